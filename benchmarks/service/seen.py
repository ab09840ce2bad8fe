"""What it costs a small request that the server is seen from outside: metrics, the log, traces.

One client of small requests, and servers that tell more and more of themselves: they take turns, so that what the
machine does besides falls on all of them alike. The server's processor time per request is what counts.
"""

from __future__ import annotations

import tempfile
import threading
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any

from benchmarks.machine import Usage, metrics
from benchmarks.progress import Progress
from benchmarks.service import load
from benchmarks.service.crew import Crew
from benchmarks.service.loopback import QUIETLY, process

ROUNDS, SECONDS = 9, 2.0
#: What metrics may add to the processor time of a request.
GOAL = 1.03
BLIND, SEEN = "no metrics, no log", "metrics"
FREE = ("--port", "0", "--metrics-port", "0")

Row = dict[str, Any]


class Collector(BaseHTTPRequestHandler):
    """Takes traces, and throws them away."""

    def do_POST(self) -> None:  # http.server's own name for it
        """One batch."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def servers(collector: int) -> dict[str, tuple[str, ...]]:
    """What to start, by what it tells of itself."""
    here = "queryselect_service"
    traces = ("--otlp-endpoint", f"http://127.0.0.1:{collector}/v1/traces")
    return {
        BLIND: ("-m", f"{__package__}.blind", *QUIETLY),
        SEEN: ("-m", here, *QUIETLY),
        "metrics, log as text": ("-m", here, *FREE, "--log-format", "text"),
        "metrics, log as JSON": ("-m", here, *FREE, "--log-format", "json"),
        "metrics, log as JSON, traces": ("-m", here, *FREE, "--log-format", "json", *traces),
    }


def measure(*, quick: bool = False) -> Row:
    """Every server in turn, round after round."""
    rounds, seconds = (1, 0.3) if quick else (ROUNDS, SECONDS)
    name = next(iter(load.SMALL))
    found: dict[str, list[Row]] = {}
    with ExitStack() as stack:
        collector = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Collector))
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        stack.callback(collector.shutdown)
        log = stack.enter_context(tempfile.TemporaryFile("w"))
        running = {
            told: stack.enter_context(process(*arguments, errors=log))
            for told, arguments in servers(collector.server_port).items()
        }
        progress = stack.enter_context(Progress(rounds, "seen"))
        for turn in range(rounds):
            progress.now(f"round {turn + 1}")
            for told, (pid, (port, _)) in running.items():
                with Crew(1, partial(load.steady, "stub", name, f"127.0.0.1:{port}"), nice=load.NICE) as crew:
                    crew.begin(seconds)
                    usage = Usage(pid)
                    (seen,) = crew.found()
                    cpu = usage.cpu
                found.setdefault(told, []).append({
                    "requests/s": len(seen.seconds) / seconds, "CPU ms": 1e3 * cpu / len(seen.seconds)
                })  # fmt: skip
            progress.step()
        _, (_, port) = running[SEEN]
        counted = metrics(port)['queryselect_kernel_duration_seconds_count{strategy="margin"}']
    return {
        "request": name,
        "rounds": rounds,
        "seconds": seconds,
        "goal": GOAL,
        "counted": counted,
        "rows": [{"server": told, **_ratios(rows, found[BLIND])} for told, rows in found.items()],
    }


def _ratios(rows: list[Row], bare: list[Row]) -> Row:
    """The middle of each figure, and of its ratios to those of the server that is not seen, round by round."""
    told: Row = {}
    for name in ("requests/s", "CPU ms"):
        ratios = sorted(one[name] / other[name] for one, other in zip(rows, bare, strict=True))
        told |= {name: median(each[name] for each in rows), f"{name}, ratio": median(ratios)}
        told[f"{name}, ratios"] = [ratios[0], ratios[-1]]
    return told


def show(found: Row) -> str:
    """The table, for people."""
    lines = [
        f"{found['request']}, one client by stub, {found['rounds']} rounds of {found['seconds']:g} s in turn: middles,",
        f"and ratios to the first within a round. {load.stepping_back(load.NICE)}",
        f"goal: metrics cost at most {found['goal'] - 1:.0%} of the processor time",
        f"{'':32}{'requests/s':>12}{'ratio':>8}{'CPU ms':>10}{'ratio':>8}{'lowest':>8}{'highest':>8}",
    ]
    for row in found["rows"]:
        low, high = row["CPU ms, ratios"]
        lines.append(
            f"{row['server']:32}{row['requests/s']:12.0f}{row['requests/s, ratio']:8.3f}"
            f"{row['CPU ms']:10.3f}{row['CPU ms, ratio']:8.3f}{low:8.3f}{high:8.3f}"
        )
    return "\n".join(lines)
