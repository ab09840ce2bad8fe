"""What Prometheus' own tool says of metrics, alerts and dashboard; every alert fires when it should, and only then."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest

from queryselect import Client, InvalidInput
from queryselect_service import server
from queryselect_service.settings import Settings
from tests.slow import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = Path(__file__).parent.parent.parent / "helm" / "queryselect" / "files"
ALERTS = FILES / "alerts.yaml"
OF = '{job="queryselect",instance="a:9090"%s}'

#: What each alert is about: series over 40 minutes that fire it, and the same of a server that is well.
CASES = {
    "QuerySelectGone": ({}, {"queryselect_build_info": "1x40"}),
    "QuerySelectNotScraped": ({"up": "1x30 0x10"}, {"up": "1x35 0x2 1x3"}),
    "QuerySelectNotReady": ({"queryselect_ready": "0x40"}, {"queryselect_ready": "1x36 0x2 1x1"}),
    "QuerySelectDeviceDown": (
        {'queryselect_device_ready,device="cuda:0"': "1x40", 'queryselect_device_ready,device="cuda:1"': "1x30 0x10"},
        {'queryselect_device_ready,device="cuda:0"': "1x38 0x2", 'queryselect_device_ready,device="cuda:1"': "1x40"},
    ),
    "QuerySelectDeviceLost": (
        {'queryselect_rejected_total,reason="DEVICE_LOST"': "0x35 2x5"},
        {'queryselect_rejected_total,reason="DEVICE_LOST"': "2x40"},
    ),
    "QuerySelectBug": (
        {'queryselect_rejected_total,reason="BUG"': "0x35 1x5"},
        {'queryselect_rejected_total,reason="INVALID_INPUT"': "0+9x40"},
    ),
    "QuerySelectOutOfMemory": ({"queryselect_oom_total": "0x35 1x5"}, {"queryselect_oom_total": "0x40"}),
    "QuerySelectFull": (
        {
            'queryselect_requests_total,rpc="Select",code="OK"': "0+60x40",
            'queryselect_rejected_total,reason="BUSY:queue"': "0+6x40",
        },
        {
            'queryselect_requests_total,rpc="Select",code="OK"': "0+60x40",
            'queryselect_rejected_total,reason="BUSY:queue"': "0+2x40",
            'queryselect_rejected_total,reason="BUSY:selections"': "0+30x40",
            'queryselect_rejected_total,reason="INVALID_INPUT"': "0+30x40",
        },
    ),
    "QuerySelectSlowQueue": (
        {
            'queryselect_queue_duration_seconds_bucket,le="25"': "0+1x40",
            'queryselect_queue_duration_seconds_bucket,le="50"': "0+10x40",
            'queryselect_queue_duration_seconds_bucket,le="+Inf"': "0+10x40",
        },
        {
            'queryselect_queue_duration_seconds_bucket,le="25"': "0+10x40",
            'queryselect_queue_duration_seconds_bucket,le="50"': "0+10x40",
            'queryselect_queue_duration_seconds_bucket,le="+Inf"': "0+10x40",
        },
    ),
    "QuerySelectCallersLeave": (
        {
            'queryselect_requests_total,rpc="SelectStream",code="CANCELLED"': "0+60x40",
            'queryselect_cancelled_total,phase="queue"': "0+20x40",
        },
        {
            'queryselect_requests_total,rpc="SelectStream",code="CANCELLED"': "0+60x40",
            'queryselect_cancelled_total,phase="queue"': "0+1x40",
        },
    ),
    "QuerySelectSlowUploads": (
        {'queryselect_rejected_total,reason="SLOW"': "0+1x40"},
        {'queryselect_rejected_total,reason="SLOW"': "0x38 2x2"},
    ),
    "QuerySelectDeviceMemoryLow": (
        {
            'queryselect_device_memory_bytes,kind="free"': "2x40",
            'queryselect_device_memory_bytes,kind="total"': "100x40",
        },
        {
            'queryselect_device_memory_bytes,kind="free"': "20x40",
            'queryselect_device_memory_bytes,kind="total"': "100x40",
        },
    ),
    "QuerySelectStore": (
        {'queryselect_rejected_total,reason="SOURCE_REFUSED"': "0+1x40"},
        {
            'queryselect_rejected_total,reason="SOURCE"': "0x38 2x2",
            'queryselect_rejected_total,reason="NOT_ALLOWED"': "0+9x40",
        },
    ),
    "QuerySelectFileNotUsed": (
        {'queryselect_file_current,file="token_file"': "1x30 0x10"},
        {'queryselect_file_current,file="token_file"': "1x30 0x3 1x7"},
    ),
    "QuerySelectCertificateEnds": (  # time begins at 0 here
        {'queryselect_file_expiry_timestamp_seconds,file="certificate"': "200000x40"},
        {
            'queryselect_file_expiry_timestamp_seconds,file="certificate"': "900000x40",
            'queryselect_file_expiry_timestamp_seconds,file="token_file"': "200000x40",
        },
    ),
    "QuerySelectFiles": (
        {"process_open_fds": "900x40", "process_max_fds": "1000x40"},
        {"process_open_fds": "500x40", "process_max_fds": "1000x40"},
    ),
    "QuerySelectRestarts": (
        {"process_start_time_seconds": "1x10 2x10 3x10 4x7"},
        {"process_start_time_seconds": "1x20 2x17"},
    ),
}


@pytest.fixture(scope="module")
def promtool() -> str:
    return str(tools.unpacked("prometheus") / "usr" / "bin" / "promtool")


def says(promtool: str, *arguments, data: bytes | None = None) -> str:
    done = subprocess.run([promtool, *map(str, arguments)], input=data, capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()
    return (done.stdout + done.stderr).decode()


def test_the_metrics_are_as_they_should_be(promtool):
    started = server.start(Settings(port=0, metrics_port=0))
    with Client(f"127.0.0.1:{started.port}") as client, grpc.insecure_channel(f"127.0.0.1:{started.port}"):
        pool = np.random.default_rng(0).normal(size=(50, 4))
        client.select("k_center_greedy", 3, embeddings=pool)
        with pytest.raises(InvalidInput):
            client.select("k_center_greedy", 51, embeddings=pool)
    with urllib.request.urlopen(f"http://127.0.0.1:{started.metrics_port}/metrics") as page:
        text = page.read()
    started.drain(0.1)
    assert b"queryselect_kernel_duration_seconds_count" in text
    assert says(promtool, "check", "metrics", data=text) == ""


def test_the_alerts_are_rules(promtool):
    assert f"{len(CASES)} rules found" in says(promtool, "check", "rules", ALERTS)


def test_the_dashboard_asks_what_prometheus_understands(promtool, tmp_path):
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    rules = [
        {"record": f"panel:{number}", "expr": each.replace("$__rate_interval", "5m").replace("$", "")}
        for number, each in enumerate(asked)
    ]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(asked)} rules found" in says(promtool, "check", "rules", tmp_path / "rules.yaml")


def test_every_alert_has_a_case():
    assert set(CASES) == set(re.findall(r"alert: (\w+)", ALERTS.read_text()))


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_else_does_not(promtool, tmp_path, alert):
    (text,) = re.findall(rf"alert: {alert}\n.*?(?=\n      - alert|\Z)", ALERTS.read_text(), re.DOTALL)
    (severity,) = re.findall(r"severity: (\w+)", text)

    def series(values: dict[str, str]) -> list[dict[str, str]]:
        """promtool's own words: a value, and how often it comes again."""
        every = []
        for name, said in values.items():
            metric, _, labels = name.partition(",")
            every.append({"series": metric + OF % (f",{labels}" if labels else ""), "values": said})
        return every

    def case(values: dict[str, str], *, fires: bool) -> dict:
        # Only whether it fires counts, and which; labels and words follow from the rule.
        count = f'count(ALERTS{{alertname="{alert}",alertstate="firing",severity="{severity}"}}) or vector(0)'
        told = [{"expr": count, "eval_time": "38m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}]
        return {"interval": "1m", "input_series": series(values), "promql_expr_test": told}

    firing, well = CASES[alert]
    tests = {"rule_files": [str(ALERTS)], "evaluation_interval": "1m"}
    tests["tests"] = [case(firing, fires=True), case(well, fires=False)]
    (tmp_path / "tests.yaml").write_text(json.dumps(tests))
    says(promtool, "test", "rules", tmp_path / "tests.yaml")
