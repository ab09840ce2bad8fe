"""Many small requests, each client in a process of its own: how many a second, how soon, and what one costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import numpy as np

from benchmarks.machine import Usage
from benchmarks.progress import Progress
from benchmarks.service.crew import Crew, Work
from benchmarks.service.loopback import QUIETLY, process
from queryselect import Client, QuerySelectError
from queryselect._request import prepare
from queryselect.v1 import selection_pb2_grpc

#: By how much clients step back: with 64 of them on a few cores, their own turns would be all that is measured.
NICE = 10
CLIENTS = (1, 8, 64)
SECONDS = 5.0

Row = dict[str, Any]
#: A call of the server, which raises where it is refused.
Call = Callable[[], object]


@dataclass(frozen=True)
class Ask:
    """One request. inputs: made anew, and the same, in every process."""

    strategy: str
    budget: int
    inputs: Callable[[], Mapping[str, Any]]


def embeddings(rows: int, dims: int) -> dict[str, Any]:
    """Normal ones, (rows, dims)."""
    return {"embeddings": np.random.default_rng(0).standard_normal((rows, dims), np.float32)}


def probabilities(rows: int, classes: int) -> dict[str, Any]:
    """Of a model that is sure of some rows, (rows, classes)."""
    return {"probabilities": np.random.default_rng(0).dirichlet(np.full(classes, 0.5), rows).astype(np.float32)}


#: Requests as a person's tool makes them, between one batch and the next.
SMALL = {
    "margin, 1,000 rows": Ask("margin", 10, partial(probabilities, 1_000, 10)),
    "margin, 10,000 rows": Ask("margin", 10, partial(probabilities, 10_000, 10)),
    "k_center_greedy, 1,000 rows": Ask("k_center_greedy", 10, partial(embeddings, 1_000, 64)),
    "random, 10,000 rows": Ask("random", 10, partial(dict, num_rows=10_000)),
}


@dataclass
class Seen:
    """What one client saw: seconds of every call, and how many were answered how."""

    seconds: list[float] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)


def by_client(ask: Ask, target: str) -> tuple[Client, Call]:
    """As people call: everything from the arrays on is done at every call."""
    client, inputs = Client(target, retries=0), ask.inputs()
    return client, lambda: client.select(ask.strategy, ask.budget, **inputs)


def by_stub(ask: Ask, target: str) -> tuple[grpc.Channel, Call]:
    """The bare RPC, its message made once: what is left is gRPC and the server."""
    channel, nothing = grpc.insecure_channel(target), {"max_cost": None, "min_gain": None}
    made = prepare(
        ask.strategy, ask.inputs(), params=None, descriptions={}, stop={"max_items": ask.budget, **nothing}, task=None,
        seed=0, returns=(), validate_only=False, request_id=None,
    )  # fmt: skip
    made.inline()
    select = selection_pb2_grpc.SelectionServiceStub(channel).Select
    return channel, lambda: select(made.message)


WAYS: dict[str, Callable[[Ask, str], tuple[AbstractContextManager[object], Call]]] = {
    "client": by_client,
    "stub": by_stub,
}


def code_of(error: QuerySelectError | grpc.RpcError) -> str:
    """The name that gRPC has for how a call failed."""
    if isinstance(error, QuerySelectError):
        return error.code
    assert isinstance(error, grpc.Call)  # every error that a stub raises is one
    return str(error.code().name)


def steady(way: str, name: str, target: str, _: int, start: Callable[[], float]) -> Seen:
    """One client: a request, and the next when it is answered."""
    opened, call = WAYS[way](SMALL[name], target)
    with opened:
        call()  # connects
        seen, until = Seen(), start()
        while (began := time.monotonic()) < until:
            try:
                call()
                seen.answers["result"] += 1
            except (QuerySelectError, grpc.RpcError) as error:
                seen.answers[code_of(error)] += 1
            seen.seconds.append(time.monotonic() - began)
    return seen


def measure(*, quick: bool = False) -> Row:
    """Every small request at every number of clients, either way, in closed loop."""
    seconds, counts = (0.5, (2,)) if quick else (SECONDS, CLIENTS)
    names = list(SMALL)[:1] if quick else list(SMALL)
    runs = [(name, way, count) for name in names for way in WAYS for count in counts]
    rows = []
    with (
        process("-m", "queryselect_service", *QUIETLY) as (pid, (port, _)),
        Progress(len(runs), "load") as progress,
    ):
        for name, way, count in runs:
            progress.now(f"{name}, {count} by {way}")
            found = _together(partial(steady, way, name, f"127.0.0.1:{port}"), count, seconds, pid)
            rows.append({"request": name, "way": way, "clients": count, **found})
            progress.step()
    return {"nice": NICE, "seconds": seconds, "rows": rows}


def _together(work: Work[Seen], count: int, seconds: float, pid: int) -> Row:
    with Crew(count, work, nice=NICE) as crew:
        crew.begin(seconds)
        usage = Usage(pid)
        seen = merged(crew.found())
        cpu = usage.cpu
    return {
        "requests/s": len(seen.seconds) / seconds,
        **in_ms(seen.seconds),
        "server CPU ms/request": 1e3 * cpu / len(seen.seconds),
        "answers": dict(seen.answers),
    }


def merged(all_seen: Iterable[Seen]) -> Seen:
    """What several clients saw, as one."""
    whole = Seen()
    for each in all_seen:
        whole.seconds += each.seconds
        whole.answers += each.answers
    return whole


def in_ms(seconds: Sequence[float]) -> dict[str, float]:
    """The middle, the 99th percentile and the worst, in ms."""
    middle, late = np.quantile(seconds, (0.5, 0.99))
    return {"p50 ms": 1e3 * float(middle), "p99 ms": 1e3 * float(late), "max ms": 1e3 * max(seconds)}


def stepping_back(nice: int) -> str:
    """What to know of the figures."""
    return f"Clients have nice {nice}: the server, and not they, has the core that it needs."


def show(found: Row) -> str:
    """The table, for people."""
    columns = ("requests/s", "p50 ms", "p99 ms", "server CPU ms/request")
    lines = [
        f"small requests in closed loop, {found['seconds']:g} s each. {stepping_back(found['nice'])}",
        f"{'request':30}{'way':8}{'clients':>8}" + "".join(f"{name:>23}" for name in columns),
    ]
    for row in found["rows"]:
        numbers = "".join(f"{row[name]:23.2f}" for name in columns)
        refused = {code: count for code, count in row["answers"].items() if code != "result"}
        lines.append(
            f"{row['request']:30}{row['way']:8}{row['clients']:8}{numbers}" + (f"  {refused}" if refused else "")
        )
    return "\n".join(lines)
