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
from benchmarks.case import OURS, Benchmark, Case, Part, Peer, Problem, run
from benchmarks.machine import NOT_INSTALLED
from benchmarks.progress import Progress


@dataclass
class Way:
    """One way to select, ours or a peer's, and what is found of it.

    rounds: beside the one in which its memory is measured, which counts where there is no other.
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
            self.note(run(self.select, problem))
        except ModuleNotFoundError as error:
            self.trouble = f"{NOT_INSTALLED}: {error.name}"
        except Exception as error:  # noqa: BLE001  # whatever ails one way, the others are measured
            self.trouble = f"failed: {type(error).__name__}: {error}"

    def note(self, ran: Part) -> None:
        """Keeps what a round took and picked."""
        self.seconds.append(ran.seconds)
        self.part, self.picks = ran.said, None if ran.picks is None else ran.picks.tolist()

    def warm_up(self, problem: Problem) -> None:
        """Selects once on a small problem, which costs what libraries do once, and notes nothing but trouble."""
        self.run(problem)
        self.seconds.clear()
        self.picks = None

    def weigh(self, benchmark: Benchmark, case: Case, device: str) -> None:
        """Measures the memory, in a process of its own; the run counts where there is no other."""
        try:
            found = memory.measure(benchmark, case, self.name, device, once=not self.seconds)
        except RuntimeError as error:
            self.trouble = f"memory not measured: {error}"
        else:
            self.peak = found.peak
            if not self.seconds:
                self.note(found.ran)


def ways(benchmark: Benchmark, case: Case, rounds: int) -> list[Way]:
    """Ours, and the peers. What has one round has it where its memory is measured."""

    def way(peer: Peer) -> Way:
        mine = min(rounds, peer.rounds or rounds)
        mine = 0 if mine == 1 and peer.peak else mine
        return Way(peer.name, peer.label, peer.select, mine, peer.exact, peer.peak)

    return [way(peer) for peer in (Peer(OURS, benchmark.ours), *benchmark.peers, *case.peers)]


def compare(benchmark: Benchmark, case: Case, device: str, rounds: int) -> list[Way]:
    """Runs every way as often as it is to be run, in turns, and then measures its memory."""
    found = ways(benchmark, case, min(rounds, case.rounds or rounds))
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
        for number in range(max(way.rounds for way in found)):
            for way in (each for each in found if number < each.rounds):
                turn(way, f"round {number + 1}", partial(way.run, problem))
        del problem  # the processes that measure memory have their own
        torch.cuda.empty_cache()
        for way in weighed:
            turn(way, "memory", partial(way.weigh, benchmark, case, device))
    return found
