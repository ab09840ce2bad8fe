"""A real Prometheus scrapes a real server at work: what is exported arrives, and what is asked of it has answers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from queryselect import Cancelled, Client, Custom, InvalidInput, _tokens
from tests.slow import tools
from tests.slow.servers import Served, served, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = Path(__file__).parent.parent.parent / "helm" / "queryselect" / "files"
#: Of an expression of the dashboard, what Grafana puts in.
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}

#: What fires where a server is no more.
GONE = ("QuerySelectGone", "QuerySelectNotScraped")


class Prometheus:
    """One that scrapes a server every second, by our rules."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers. Raises OSError for what it does not understand, and as long as it is not there."""
        address = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        return told["data"]

    def ask(self, expression: str) -> list[dict]:
        return self.get("query", query=expression)["result"]

    @property
    def is_there(self) -> bool:
        try:
            return self.get("status/runtimeinfo") is not None
        except OSError:
            return False

    def rules(self) -> list[dict]:
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def state(self, alert: str) -> str:
        return next(rule["state"] for rule in self.rules() if rule["name"] == alert)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def loaded(name: str) -> list[dict]:
    (group,) = yaml.safe_load((FILES / name).read_text())["groups"]
    return group["rules"]


@contextmanager
def scraping(metrics_port: int, folder: Path) -> Iterator[Prometheus]:
    """Alerts wait for a second and not for minutes."""
    (folder / "alerts.yaml").write_text(re.sub(r"for: \d+m", "for: 1s", (FILES / "alerts.yaml").read_text()))
    job = {"job_name": "queryselect", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}
    told = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FILES / "recording.yaml"), str(folder / "alerts.yaml")],
        "scrape_configs": [job],
    }
    (folder / "prometheus.yml").write_text(json.dumps(told))
    port = free_port()
    command = [
        tools.unpacked("prometheus") / "usr" / "bin" / "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    running = subprocess.Popen(command, stdout=sys.stderr, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(port)
    finally:
        running.terminate()
        running.wait(30)


@contextmanager
def at_work(target: str, token: str) -> Iterator[None]:
    """Callers who ask for this and that, and one who leaves, until the end."""
    rng, ended = np.random.default_rng(0), threading.Event()
    logits, embeddings = rng.normal(size=(1000, 10)), rng.normal(size=(20_000, 64))

    def call() -> None:
        with Client(target, token=token) as client:
            while not ended.is_set():
                client.select("margin", 5, logits=logits)
                client.select("k_center_greedy", 5, embeddings=embeddings)
                with pytest.raises(InvalidInput):
                    client.select("margin", 1001, logits=logits)
                job = client.submit(Custom(name="sleepy", parameters={"seconds": 30}), 1, num_rows=5)
                ended.wait(0.5)
                job.cancel()
                with pytest.raises(Cancelled):
                    job.result(10)

    calls = threading.Thread(target=call)
    calls.start()
    try:
        yield
    finally:
        ended.set()
        calls.join(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[Served, str]]:
    """It, and a token for it."""
    token, salt, hashed = _tokens.make("studio")
    file = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    file.write_text(f'[[tokens]]\nname = "studio"\nsalt = "{salt.hex()}"\nhash = "{hashed.hex()}"\n')
    with served("--token-file", str(file)) as own:
        yield own, token


def test_what_is_exported_arrives_and_what_is_asked_of_it_has_answers(server, tmp_path):
    own, token = server
    with scraping(own.metrics_port, tmp_path) as prometheus:
        with at_work(own.target, token):
            wait_for(lambda: prometheus.is_there, 60)
            wait_for(lambda: [each["value"][1] for each in prometheus.ask("up")] == ["1"], 30)

            with urllib.request.urlopen(f"http://127.0.0.1:{own.metrics_port}/metrics", timeout=30) as page:
                exported = set(re.findall(r"^(\w+)(?:\{| )", page.read().decode(), re.MULTILINE))
            assert {"queryselect_cancelled_total", "queryselect_file_current", "process_open_fds"} <= exported
            wait_for(lambda: exported <= set(prometheus.get("label/__name__/values")), 60)

            panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
            for asked in [target["expr"] for panel in panels for target in panel.get("targets", ())]:
                expression = re.sub(r"\$\w+", lambda found: VARIABLES[found[0]], asked)
                wait_for(lambda expression=expression: prometheus.ask(expression), 60)

            for rule in loaded("recording.yaml"):
                wait_for(lambda name=rule["record"]: prometheus.ask(name), 60)
            (parts,) = prometheus.ask("sum(job_code:queryselect_requests:ratio_rate5m)")
            assert float(parts["value"][1]) == pytest.approx(1)
            rules = [*loaded("alerts.yaml"), *loaded("recording.yaml")]
            assert sorted((each["name"], each["health"], each.get("lastError", "")) for each in prometheus.rules()) == [
                (name, "ok", "") for name in sorted(each.get("record") or each["alert"] for each in rules)
            ]
            assert {prometheus.state(alert) for alert in GONE} == {"inactive"}

        own.process.kill()
        wait_for(lambda: {prometheus.state(alert) for alert in GONE} == {"firing"}, 60)
