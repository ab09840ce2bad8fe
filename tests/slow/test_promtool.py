"""What Prometheus' own tool says of metrics, rules and dashboard.

Every alert fires when it should, and only then; what is recorded is what arithmetic says.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml

from queryselect import Client, InvalidInput
from queryselect_service import server
from queryselect_service.settings import Settings
from tests.slow import tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = Path(__file__).parent.parent.parent / "helm" / "queryselect" / "files"
ALERTS, RECORDED = (FILES / name for name in ("alerts.yaml", "recording.yaml"))
#: Group by group, as the rules ask for each other.
RULES = {
    "rule_files": [str(RECORDED), str(ALERTS)],
    "evaluation_interval": "1m",
    "group_eval_order": ["queryselect.recorded", "queryselect"],
}

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
    "QuerySelectLongWait": (
        {"queryselect_queue_wait_seconds": "90x40"},
        {"queryselect_queue_wait_seconds": "90x35 50x5"},
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

#: What one of two servers counts in a minute, where 30 are one in a second of both.
SELECTIONS = {
    'queryselect_requests_total,rpc="Select",code="OK"': "0+60x40",
    'queryselect_requests_total,rpc="SelectStream",code="OK"': "0+30x40",
    'queryselect_requests_total,rpc="Select",code="RESOURCE_EXHAUSTED"': "0+30x40",
    'queryselect_requests_total,rpc="ListStrategies",code="OK"': "0+300x40",
}
#: Of four waits a second two take up to 1 s, one up to 10 s and one up to 100 s: 3.6 of them take 10 s and 0.6 of 90 s.
WAITS = {
    'queryselect_queue_duration_seconds_bucket,strategy="margin",le="1"': "0+60x40",
    'queryselect_queue_duration_seconds_bucket,strategy="margin",le="10"': "0+60x40",
    'queryselect_queue_duration_seconds_bucket,strategy="margin",le="100"': "0+90x40",
    'queryselect_queue_duration_seconds_bucket,strategy="margin",le="+Inf"': "0+90x40",
    'queryselect_queue_duration_seconds_bucket,strategy="bait",le="1"': "0+0x40",
    'queryselect_queue_duration_seconds_bucket,strategy="bait",le="10"': "0+30x40",
    'queryselect_queue_duration_seconds_bucket,strategy="bait",le="100"': "0+30x40",
    'queryselect_queue_duration_seconds_bucket,strategy="bait",le="+Inf"': "0+30x40",
}
KERNELS = {
    'queryselect_kernel_duration_seconds_sum,strategy="margin"': "0+15x40",
    'queryselect_kernel_duration_seconds_sum,strategy="bait"': "0+30x40",
}
DEVICES = {'queryselect_device_ready,device="cuda:0"': "1x40", 'queryselect_device_ready,device="cuda:1"': "1x40"}
#: What is recorded of which series of each of two servers.
RECORDS = {
    "job_code:queryselect_requests:rate5m": (SELECTIONS, {'code="OK"': 3, 'code="RESOURCE_EXHAUSTED"': 1}),
    "job:queryselect_requests:rate5m": (SELECTIONS, {"": 4}),
    "job_code:queryselect_requests:ratio_rate5m": (SELECTIONS, {'code="OK"': 0.75, 'code="RESOURCE_EXHAUSTED"': 0.25}),
    "job_reason:queryselect_rejected:rate5m": (
        {
            'queryselect_rejected_total,reason="BUG"': "0x40",
            'queryselect_rejected_total,reason="BUSY:queue"': "0+15x40",
        },
        {'reason="BUG"': 0, 'reason="BUSY:queue"': 0.5},
    ),
    "job_le:queryselect_queue_duration_seconds_bucket:rate5m": (
        WAITS,
        {'le="1"': 2, 'le="10"': 3, 'le="100"': 4, 'le="+Inf"': 4},
    ),
    "job:queryselect_queue_duration_seconds:quantile_rate5m": (
        WAITS,
        {'quantile="0.5"': 1, 'quantile="0.9"': 64, 'quantile="0.99"': 96.4},
    ),
    "job:queryselect_queue_wait_seconds:max": ({"queryselect_queue_wait_seconds": "7x40"}, {"": 7}),
    "job_strategy:queryselect_kernel_duration_seconds_sum:rate5m": (
        KERNELS,
        {'strategy="margin"': 0.5, 'strategy="bait"': 1},
    ),
    "job:queryselect_device_busy:ratio_rate5m": (KERNELS | DEVICES, {"": 0.375}),
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


@pytest.mark.parametrize("path", [ALERTS, RECORDED], ids=lambda path: path.name)
def test_the_rules_are_rules(promtool, path):
    (group,) = yaml.safe_load(path.read_text())["groups"]
    assert f"{len(group['rules'])} rules found" in says(promtool, "check", "rules", path)


def test_the_dashboard_asks_what_prometheus_understands(promtool, tmp_path):
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    rules = [
        {"record": f"panel:{number}", "expr": each.replace("$__rate_interval", "5m").replace("$", "")}
        for number, each in enumerate(asked)
    ]
    (tmp_path / "rules.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(asked)} rules found" in says(promtool, "check", "rules", tmp_path / "rules.yaml")


def rules(path: Path, kind: str) -> dict[str, dict]:
    return {each[kind]: each for group in yaml.safe_load(path.read_text())["groups"] for each in group["rules"]}


def series(values: dict[str, str], of: str = 'job="queryselect",instance="a:9090"') -> list[dict[str, str]]:
    """promtool's own words: a value, and how often it comes again."""
    every = []
    for name, said in values.items():
        metric, comma, labels = name.partition(",")
        every.append({"series": f"{metric}{{{of}{comma}{labels}}}", "values": said})
    return every


def test_every_rule_has_a_case():
    assert list(CASES) == list(rules(ALERTS, "alert"))
    assert list(RECORDS) == list(rules(RECORDED, "record"))


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_when_it_should_and_else_does_not(promtool, tmp_path, alert):
    severity = rules(ALERTS, "alert")[alert]["labels"]["severity"]

    def case(values: dict[str, str], *, fires: bool) -> dict:
        # Only whether it fires counts, and which; labels and words follow from the rule.
        count = f'count(ALERTS{{alertname="{alert}",alertstate="firing",severity="{severity}"}}) or vector(0)'
        told = [{"expr": count, "eval_time": "38m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}]
        return {"interval": "1m", "input_series": series(values), "promql_expr_test": told}

    firing, well = CASES[alert]
    cases = [case(firing, fires=True), case(well, fires=False)]
    (tmp_path / "tests.yaml").write_text(json.dumps({**RULES, "tests": cases}))
    says(promtool, "test", "rules", tmp_path / "tests.yaml")


@pytest.mark.parametrize("record", RECORDS)
def test_what_is_recorded_is_right(promtool, tmp_path, record):
    values, expected = RECORDS[record]
    servers = (
        'job="queryselect",instance="a:9090"',
        'job="queryselect",instance="b:9090"',
        'job="x",instance="c:9090"',
    )
    told = [
        {"labels": ",".join(('{job="queryselect"', *filter(None, [labels]))) + "}", "value": value}
        for labels, value in expected.items()
    ]
    asked = {"expr": f'round({record}{{job="queryselect"}}, 1e-6)', "eval_time": "38m", "exp_samples": told}
    given = [each for server in servers for each in series(values, server)]
    case = {"interval": "1m", "input_series": given, "promql_expr_test": [asked]}
    (tmp_path / "tests.yaml").write_text(json.dumps({**RULES, "tests": [case]}))
    says(promtool, "test", "rules", tmp_path / "tests.yaml")
