"""How soon a health check is answered, by a probe in a process of its own: idle, under load, and under overload."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.machine import Usage, in_flight
from benchmarks.progress import Progress
from benchmarks.service import load, overload
from benchmarks.service.crew import Crew, Found, Work
from benchmarks.service.loopback import QUIETLY, process

#: What is checked, and how often each, in seconds.
SERVICES = {"liveness": "", "readiness": "queryselect.v1.SelectionService"}
EVERY = 0.02
#: What a check may take at most, in seconds; beyond it counts as no answer.
PATIENCE = 10.0
SECONDS = 10.0

Row = dict[str, Any]


@dataclass
class Checks:
    """The seconds of every answered check by what was checked, and how many were answered how."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SERVICES})
    answers: Counter[str] = field(default_factory=Counter)

    def late(self) -> float:
        """The 99th percentile of the slower of the two, in ms."""
        return max(load.in_ms(each)["p99 ms"] for each in self.seconds.values())


def probe(target: str, _: int, start: Callable[[], float]) -> Checks:
    """Checks, each when it is due: whether those before are answered or not, or slow answers would be few."""
    checks, changed, open_ = Checks(), threading.Condition(), 0
    request = health_pb2.HealthCheckRequest

    def note(name: str, began: float, call: Any) -> None:
        nonlocal open_
        seconds = time.monotonic() - began
        with changed:
            open_ -= 1
            if call.code() is grpc.StatusCode.OK:
                checks.seconds[name].append(seconds)
                checks.answers[health_pb2.HealthCheckResponse.ServingStatus.Name(call.result().status)] += 1
            else:
                checks.answers[call.code().name] += 1
            changed.notify_all()

    with grpc.insecure_channel(target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # missing in its stubs
        check(request())  # connects
        until = start()
        due = time.monotonic()
        while due < until:
            for name, service in SERVICES.items():
                with changed:
                    open_ += 1
                call = check.future(request(service=service), timeout=PATIENCE)
                call.add_done_callback(partial(note, name, time.monotonic()))
            due += EVERY
            time.sleep(max(0.0, due - time.monotonic()))
        with changed:
            changed.wait_for(lambda: not open_, PATIENCE)
    return checks


def beside(target: str, work: Work[Found] | None, count: int, seconds: float) -> tuple[Checks, list[Found]]:
    """What a probe sees while so many clients work, and what these found."""
    if work is None:
        with Crew(1, partial(probe, target)) as probing:
            probing.begin(seconds)
            return probing.found()[0], []
    with Crew(count, work, nice=load.NICE) as crew, Crew(1, partial(probe, target)) as probing:
        crew.begin(seconds)
        probing.begin(seconds)
        return probing.found()[0], crew.found()


def bound(idle: Checks) -> float:
    """What the 99th percentile under load may be, in ms."""
    return 3 * idle.late() + 100


def measure(*, quick: bool = False) -> Row:
    """Checks of a server idle and under small requests, and of a tight one idle and with more than it has room for."""
    seconds, clients = (0.5, 8) if quick else (SECONDS, overload.CLIENTS)
    small = next(iter(load.SMALL))
    with Progress(4, "health") as progress:
        with process("-m", "queryselect_service", *QUIETLY) as (_, (port, _)):
            target = f"127.0.0.1:{port}"
            progress.now("idle")
            idle, _ = beside(target, None, 0, seconds)
            progress.step()
            progress.now("small requests")
            loaded, seen = beside(target, partial(load.steady, "stub", small, target), clients, seconds)
            progress.step()
        with process("-m", "queryselect_service", *overload.TIGHT) as (pid, (port, metrics)):
            target = f"127.0.0.1:{port}"
            progress.now("what is right")
            right = overload.right_picks(target)
            progress.step()
            progress.now("overload")
            usage = Usage(pid)
            flooded, found = beside(
                target, partial(overload.visit, target, right, [*overload.GUESTS], True), clients, seconds
            )
            progress.step()
            tallied = overload.tally(found)
            after = {"in flight": in_flight(metrics), "MB more than before": usage.now, "peak MB": usage.peak}
    return {
        "every ms": 1e3 * EVERY,
        "nice": load.NICE,
        "clients": clients,
        "bound ms": bound(idle),
        "idle": _row(idle),
        f"{small}, {clients} clients": _row(loaded) | {"requests/s": len(load.merged(seen).seconds) / seconds},
        f"overload, {clients} clients": _row(flooded),
        "answers under overload": tallied,
        "not as documented": overload.flaws(tallied),
        "after overload": after,
    }


def _row(checks: Checks) -> Row:
    return {**{name: load.in_ms(each) for name, each in checks.seconds.items()}, "answers": dict(checks.answers)}


def show(found: Row) -> str:
    """The tables, for people."""
    idle = max(found["idle"][name]["p99 ms"] for name in SERVICES)
    lines = [
        f"health, checked every {found['every ms']:g} ms by another process. {load.stepping_back(found['nice'])}",
        f"{'':40}{'':12}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}{'of idle':>10}{'bound ms':>10}",
    ]
    for title, row in found.items():
        if not isinstance(row, dict) or "liveness" not in row:
            continue
        for name in SERVICES:
            seen = row[name]
            numbers = (seen["p50 ms"], seen["p99 ms"], seen["max ms"], seen["p99 ms"] / idle, found["bound ms"])
            lines.append(f"{title:40}{name:12}" + "".join(f"{number:10.1f}" for number in numbers))
        lines.append(f"{'':40}{row['answers']}")
    lines += ["", f"answers under overload, {found['clients']} clients:"]
    lines += [f"  {name:26}{answers}" for name, answers in found["answers under overload"].items()]
    lines.append(f"not as documented: {found['not as documented'] or 'none'}; afterwards: {found['after overload']}")
    return "\n".join(lines)
