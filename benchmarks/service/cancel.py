"""How soon a selection stops that nobody wants any more: every strategy at its largest size, and what is beside them.

Two measures of each. In this process, the longest stretch of work between two looks whether the caller is still there
(shards.py), and where those looks are. And through a server of its own, the time from cancel() until the server holds
nothing, at several moments of the run.

A stretch counts by the processor time of its thread: what others keep from running is not long. Where threads of torch
work together that is the time of one of them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import queryselect_service
from benchmarks.machine import in_flight
from benchmarks.progress import Progress
from benchmarks.service.asked import Asked, largest, names
from benchmarks.service.loopback import QUIETLY, process
from queryselect import Cancelled, Client
from queryselect._request import prepare
from queryselect_service import allocator, wire
from queryselect_service import errors as service_errors
from queryselect_service import strategy as strategies
from queryselect_service.settings import Settings
from queryselect_service.shards import Whole

#: The law: no more milliseconds between two looks, and until a cancelled selection is gone.
STRETCH_MS, CANCEL_MS = 100, 250
#: The moments of a run at which it is cancelled, as parts of its time.
MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
#: How many of the longest stretches are told of.
TOLD = 3
#: Looks pass through these; where they were is in who called.
VERBS = ("shards.py", "cancel.py")

#: The name of what is beside strategies.
BESIDE = "beside"

Row = dict[str, Any]


@dataclass
class Stretch:
    """What lies between two looks of one thread: seconds of the clock, and of the processor."""

    seconds: float = 0.0
    cpu: float = 0.0

    def row(self, where: tuple[str, str]) -> Row:
        """For the result."""
        return {"ms": 1e3 * self.cpu, "clock ms": 1e3 * self.seconds, "from": where[0], "to": where[1]}


@dataclass
class Watch:
    """Notes when and where each thread looks whether the caller is still there.

    seconds: of the processor, after which enough was seen.
    """

    seconds: float
    longest: dict[tuple[str, str], Stretch] = field(default_factory=lambda: defaultdict(Stretch))
    done: tuple[int, int] | None = None
    _last: dict[int, tuple[float, float, str]] = field(default_factory=dict)
    _until: float = math.inf

    def check(self) -> None:
        """A look."""
        self.note(_place(inspect.currentframe()))
        if time.process_time() > self._until:
            raise service_errors.Cancelled("enough was seen")

    def report(self, done: int, total: int) -> None:
        """How far the kernel is."""
        self.done = (done, total)

    def note(self, place: str) -> None:
        """A look at a place with a name; nothing is raised."""
        thread = threading.get_ident()
        cpu, now = time.thread_time(), time.monotonic()
        self._until = min(self._until, time.process_time() + self.seconds)
        if thread in self._last:
            before, cpu_before, begin = self._last[thread]
            seen = self.longest[begin, place]
            if cpu - cpu_before > seen.cpu:
                seen.seconds, seen.cpu = now - before, cpu - cpu_before
        self._last[thread] = (time.monotonic(), time.thread_time(), place)

    @property
    def rows(self) -> list[Row]:
        """The longest stretches, the longest first, by where they are."""
        found = sorted(self.longest.items(), key=lambda each: -each[1].cpu)
        return [stretch.row(where) for where, stretch in found[:TOLD]]


def _place(frame: FrameType | None) -> str:
    """Where a look was: the nearest caller that is no verb."""
    while frame is not None and frame.f_code.co_filename.endswith(VERBS):
        frame = frame.f_back
    if frame is None:
        return "nowhere"
    path = Path(frame.f_code.co_filename)
    root = Path(queryselect_service.__file__).parent
    return f"{path.relative_to(root) if path.is_relative_to(root) else path.name}:{frame.f_lineno}"


def stretches(call: Asked, seconds: float) -> Row:
    """Runs a call in this process, as the service does, for at most so long; the longest stretches."""
    options = dict(call.options)
    stop = {"max_items": call.budget, "max_cost": options.pop("cost_budget", None)}
    prepared = prepare(
        call.strategy, params=options.pop("params", None), stop=stop, task=None,
        seed=options.pop("seed", 0), returns=options.pop("returns", ()), validate_only=False, request_id=None,
        descriptions={}, inputs=options,
    )  # fmt: skip
    watch = Watch(seconds)
    began = time.monotonic()
    covered = 1.0
    try:
        with torch.inference_mode():
            buffers = {path: array.data for path, array in prepared.arrays.items()}
            request = wire.decode(prepared.message, buffers, Settings())
            watch.note("begin")
            request.check(Settings(), watch.check)
            problem = request.problem(watch.check)
            watch.note("kernel")
            found = problem.solve(Whole(problem.size, watch.check, watch.report))
            watch.note("end")
            wire.encode(found, request, {})
            watch.note("encoded")
    except service_errors.Cancelled:
        done, total = watch.done or (0, 1)
        covered = done / total
    return {"seconds": time.monotonic() - began, "covered": covered, "stretches": watch.rows}


@dataclass
class Server:
    """A server in a process of its own, and a client of it."""

    client: Client
    metrics: int

    def cancelled(self, call: Asked, seconds: float) -> tuple[float, float | None]:
        """Lets a call run for so long and cancels it; the seconds it ran, and those until the server holds nothing.

        None where it was over before.
        """
        began = time.monotonic()
        job = self.client.submit(call.strategy, call.budget, **call.options)
        try:
            job.result(seconds)
        except TimeoutError:
            pass
        else:
            return time.monotonic() - began, None
        cancelled = time.monotonic()
        job.cancel()
        while in_flight(self.metrics):
            time.sleep(0.002)
        stopped = time.monotonic()
        try:
            job.result(5)
        except Cancelled:
            return cancelled - began, stopped - cancelled
        return cancelled - began, None

    def cancels(self, call: Asked, seconds: float) -> Row:
        """Cancels a call at several moments of its first so many seconds."""
        ran, last = self.cancelled(call, seconds)
        found = [(part * ran, self.cancelled(call, part * ran)[1]) for part in MOMENTS] + [(ran, last)]
        at = {f"{moment:.2f}": 1e3 * stopped for moment, stopped in found if stopped is not None}
        return {"ran s": ran, "cancelled ms": at, "worst cancel ms": max(at.values(), default=None)}


def beside(million: int = 1_000_000) -> Iterator[Asked]:
    """What is beside kernels, at sizes where it takes long: rows left out, limits, items, large answers."""
    rng = np.random.default_rng(0)

    def normal(rows: int, width: int) -> Any:
        return rng.standard_normal((rows, width), np.float32)

    excluded = {"embeddings": normal(million, 256), "excluded": rng.permutation(million)[: million // 10]}
    yield Asked("a tenth of a million rows excluded", "k_center_greedy", 100, excluded)
    del excluded
    limits = {
        "groups": rng.integers(million // 20, size=million), "max_per_group": 3,
        "costs": rng.random(million), "cost_budget": million / 10,
    }  # fmt: skip
    yield Asked("groups, costs and 100 000 picks", "margin", million // 10, {"logits": normal(million, 10), **limits})
    items = {"item_rows": rng.integers(million // 2, size=10 * million)}
    yield Asked("items of 20 rows, in any order", "margin", 100, {"logits": normal(10 * million, 4), **items})
    del items
    scores = {"logits": normal(10 * million, 4), "returns": ["POOL_SCORES"]}
    yield Asked("ten million scores in the answer", "margin", 100, scores)
    del scores
    yield Asked("a million picks", "margin", million, {"logits": normal(2 * million, 4)})
    reference = {"embeddings": normal(1000, 32), "logits": normal(1000, 10), "labels": rng.integers(10, size=1000)}
    pool = {
        "embeddings": normal(million // 2, 32), "logits": normal(million // 2, 10), "reference": reference,
        "params": {"kernel": "LAST_LAYER", "reference_subset": "ALL"}, "returns": ["PSEUDO_LABELS"],
    }  # fmt: skip
    yield Asked("guessed labels in the answer", "fisher_kernel", 100, pool)


def rows(wanted: list[str], seconds: float, server: Server | None) -> Iterator[Row]:
    """The measures of everything; no cancels without a server. seconds: how much of a run is looked at."""
    with Progress(len(wanted), "cancel") as progress:
        for name in wanted:
            progress.now(name)
            for call in beside() if name == BESIDE else largest(name):
                row = {"strategy": call.strategy, "of": call.title, **stretches(call, seconds)}
                yield row if server is None else {**row, **server.cancels(call, seconds)}
            progress.step()


@contextmanager
def serving() -> Iterator[Server]:
    """A server for as long as the context lasts."""
    with (
        process("-m", "queryselect_service", *QUIETLY) as (_, (port, metrics)),
        Client(f"127.0.0.1:{port}") as client,
    ):
        client.select("k_center_greedy", 10, embeddings=np.eye(100))  # what libraries take once
        yield Server(client, metrics)


HEAD = f"{'longest ms':>10}{'clock':>7}{'covered':>9}{'cancel ms':>11}  what, and between which looks"


def measure(*, quick: bool = False) -> Row:
    """The part of `make bench-service`."""
    allocator.prepare()  # as the server does
    strategies.load()
    wanted = ["random", "margin"] if quick else [*names(), BESIDE]
    with serving() as server:
        found = list(rows(wanted, 1.0 if quick else 2.0, server))
    return {"rows": found, "worst cancel ms": max(row["worst cancel ms"] or 0 for row in found)}


def show(found: Row) -> str:
    """For people."""
    worst = f"worst of all: {found['worst cancel ms']:.0f} ms from cancel() until nothing is held"
    return "\n".join((HEAD, *map(_told, found["rows"]), worst))


def _told(row: Row) -> str:
    first, worst = row["stretches"][0], row.get("worst cancel ms")
    late = "  LATE" if first["ms"] > STRETCH_MS or (worst or 0) > CANCEL_MS else ""
    said = "-" if worst is None else f"{worst:.0f}"
    lines = [f"{'':17}{row['covered']:9.0%}{said:>11}  {row['of']}, {row['seconds']:.1f} s{late}"]
    lines += [
        f"{each['ms']:10.0f}{each['clock ms']:7.0f}{'':22}  {each['from']} to {each['to']}" for each in row["stretches"]
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.cancel", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"strategies, or {BESIDE!r} (default: all of them)")
    parser.add_argument("--seconds", type=float, default=15, help="how much of a run (default %(default)s)")
    parser.add_argument("--stretches", action="store_true", help="only those, and no cancels")
    parser.add_argument("--json", type=Path, help="a file for the result")
    chosen = parser.parse_args(arguments)
    allocator.prepare()  # as the server does
    strategies.load()
    print(HEAD)
    found = []
    with nullcontext() if chosen.stretches else serving() as server:
        for row in rows(chosen.names or [*names(), BESIDE], chosen.seconds, server):
            print(_told(row), flush=True)
            found.append(row)
            if chosen.json:
                chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
