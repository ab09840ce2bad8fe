"""Ours and the peers side by side: one run, the same input, in alternation."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.case import OURS, Benchmark, Case, Part, Peer, Problem
from benchmarks.clock import timed
from benchmarks.machine import NOT_INSTALLED
from benchmarks.progress import Progress


@dataclass
class Way:
    """One way to select, ours or a peer's, and what is found of it.

    seconds: of every round. part: which part was run, where it was not the whole. peak: megabytes beside the inputs.
    trouble: why something is missing; a way in trouble is not run again.
    """

    name: str
    label: str
    select: Callable[[Problem], Tensor | Part]
    rounds: int
    exact: bool = False
    weighed: bool = True
    seconds: list[float] = field(default_factory=list)
    picks: list[int] | None = None
    part: str = ""
    peak: float | None = None
    trouble: str = ""

    @property
    def median(self) -> float | None:
        """Seconds, the median over the rounds."""
        return statistics.median(self.seconds) if self.seconds else None

    def run(self, problem: Problem) -> None:
        """Selects once, and notes how long it took and what was picked."""
        gc.collect()  # what the others left behind
        try:
            seconds, found = timed(lambda: self.select(problem), problem.device)
        except ModuleNotFoundError as error:
            self.trouble = f"{NOT_INSTALLED}: {error.name}"
        except Exception as error:  # noqa: BLE001  # whatever ails one way, the others are measured
            self.trouble = f"failed: {type(error).__name__}: {error}"
        else:
            part = found if isinstance(found, Part) else Part(seconds, "", found)
            self.seconds.append(part.seconds)
            self.part, self.picks = part.said, None if part.picks is None else part.picks.tolist()

    def warm_up(self, problem: Problem) -> None:
        """Selects once on a small problem, which costs what libraries do once, and notes nothing but trouble."""
        self.run(problem)
        self.seconds.clear()
        self.picks = None

    def weigh(self, benchmark: Benchmark, case: Case, device: str) -> None:
        """Measures the memory, in a process of its own."""
        try:
            self.peak, _ = memory.measure(benchmark, case, self.name, device)
        except RuntimeError as error:
            self.trouble = f"memory not measured: {error}"


def ways(benchmark: Benchmark, case: Case, rounds: int) -> list[Way]:
    """Ours, and the peers."""

    def way(peer: Peer) -> Way:
        return Way(peer.name, peer.label, peer.select, min(rounds, peer.rounds or rounds), peer.exact, peer.peak)

    return [Way(OURS, OURS, benchmark.ours, rounds), *(way(peer) for peer in (*benchmark.peers, *case.peers))]


def compare(benchmark: Benchmark, case: Case, device: str, rounds: int) -> list[Way]:
    """Runs every way as often as it is to be run, in turns, and then measures its memory."""
    rounds = min(rounds, case.rounds or rounds)
    found = ways(benchmark, case, rounds)
    weighed = [way for way in found if way.weighed]
    steps = len(found) + sum(way.rounds for way in found) + len(weighed)
    with Progress(steps, f"{benchmark.title} {case}") as progress:

        def turn(way: Way, what: str, step: Callable[[], None]) -> None:
            progress.now(f"{way.label}, {what}")
            if not way.trouble:
                step()
            progress.step()

        small = benchmark.problem(benchmark.quick, device)
        for way in found:
            turn(way, "warming up", partial(way.warm_up, small))
        problem = benchmark.problem(case, device)
        for number in range(rounds):
            for way in (each for each in found if number < each.rounds):
                turn(way, f"round {number + 1}", partial(way.run, problem))
        del problem  # the processes that measure memory have their own
        torch.cuda.empty_cache()
        for way in weighed:
            turn(way, "memory", partial(way.weigh, benchmark, case, device))
    return found
