"""How time grows with N, D, C, L and k, and memory with N: doubling series, and the slopes beside the theory's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import memory
from benchmarks.case import OURS, Benchmark, Case
from benchmarks.clock import timed
from benchmarks.progress import Progress
from benchmarks.report import Row

ROUNDS = 3


def slope(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The exponent b of the least-squares fit of a size^b, in logarithms; None where there is nothing to fit.

    >>> slope([1, 2, 4], [5, 20, 80])
    2.0
    """
    if min(values) <= 0:
        return None
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(x) for x in values]).slope


def series(benchmark: Benchmark, device: str, ceilings: Mapping[str, float], *, quick: bool) -> Iterator[Row]:
    """Every series of time, and that of memory.

    The theory of time is the benchmark's own `floor`, that of memory what the kernel says it takes at most.
    """
    growth = benchmark.growth(quick=quick)
    for letter in growth.series:
        cases = [Case(sizes) for sizes in growth.sizes(letter)]
        with Progress(len(cases), f"{benchmark.title}, time by {letter}") as progress:
            seconds = [_seconds(benchmark, case, device, progress) for case in cases]
        least = [benchmark.least(case, ceilings) for case in cases]
        yield _row(benchmark, "seconds", letter, cases, seconds, least)
    cases = [Case(sizes) for sizes in growth.sizes("N")]
    with Progress(len(cases), f"{benchmark.title}, memory by N") as progress:
        found = [_megabytes(benchmark, case, device, progress) for case in cases]
    yield _row(benchmark, "peak MB", "N", cases, *zip(*found, strict=True))


def _seconds(benchmark: Benchmark, case: Case, device: str, progress: Progress) -> float:
    """The median of a few rounds, after one that warms up."""
    progress.now(str(case))
    problem = benchmark.problem(case, device)
    rounds = [timed(lambda: benchmark.ours(problem), problem.device)[0] for _ in range(1 + ROUNDS)]
    progress.step()
    return statistics.median(rounds[1:])


def _megabytes(benchmark: Benchmark, case: Case, device: str, progress: Progress) -> tuple[float, float]:
    progress.now(str(case))
    found = memory.measure(benchmark, case, OURS, device)
    progress.step()
    return found.peak, found.estimate


def _row(
    benchmark: Benchmark, what: str, letter: str, cases: list[Case], values: Sequence[float], theory: Sequence[float]
) -> Row:
    sizes = [getattr(case.sizes, letter) for case in cases]
    base = " ".join(part for part in str(cases[0]).split() if not part.startswith(f"{letter}="))
    return {
        "title": benchmark.title,
        "what": what,
        "letter": letter,
        "base": base,
        "sizes": sizes,
        "values": list(values),
        "slope": slope(sizes, values),
        "theory": slope(sizes, theory),
    }
