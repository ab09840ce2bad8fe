"""BatchBALD, against libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

NUM_SAMPLES, REDUX = 10_000, "batchbald-redux"
#: The joint probabilities up to which libraries are run on all rows and for all picks, and the rows that they are run
#: on where there are more: as many as batchbald-redux takes at once; of what keeps all of them, as many as have room.
WHOLE, ROWS = {True: 2e9, False: 1e8}, {True: 1024, False: 256}


def configurations(picks: int, classes: int, samples: int = NUM_SAMPLES) -> int:
    """How many are summed over once so many picks are made."""
    return int(min(float(classes) ** picks, samples))


def affordable(
    problem: Problem, select: Callable[[Problem, int], Tensor], *, chunks: bool = False, drawn: bool = False
) -> Tensor | Part:
    """The selection in whole where that is a matter of a minute; otherwise a part, scaled.

    The part has some of the rows, and of the picks as many as there are until configurations are drawn and two more:
    the last one counts for all that follow, as each of them draws and looks at as many. chunks: it takes rows in
    chunks, so that all of them have room. drawn: it draws from the start.
    """
    n, _, classes = problem.inputs["samples"].shape
    samples = problem.params["num_samples"]
    sizes = [samples if drawn else configurations(picks, classes, samples) for picks in range(problem.k)]
    if n * classes * sum(sizes) <= WHOLE[chunks]:
        return select(problem, problem.k)
    rows = min(n, ROWS[chunks])
    some = problem.first(rows)
    exact = 1 if drawn else sum(float(classes) ** picks <= samples for picks in range(problem.k))
    few = min(exact + 1, problem.k)
    seconds, _ = timed(lambda: select(some, few), torch.device("cpu"))
    if few < problem.k:
        longer, _ = timed(lambda: select(some, few + 1), torch.device("cpu"))
        again, _ = timed(lambda: select(some, few), torch.device("cpu"))  # the first run also fetched memory
        seconds = min(seconds, again)
        seconds += (problem.k - few) * max(0.0, longer - seconds)
        few += 1
    return Part(seconds * n / rows, f"{few} of {problem.k} picks on {rows} of {n} rows, scaled")


def redux(problem: Problem) -> Tensor | Part:
    """It takes logarithms, and draws by torch's generator."""
    from batchbald_redux.batchbald import get_batchbald_batch

    def select(some: Problem, k: int) -> Tensor:
        torch.manual_seed(problem.seed)
        logs = some.inputs["samples"].cpu().log()
        return torch.tensor(get_batchbald_batch(logs, k, problem.params["num_samples"]).indices)

    return affordable(problem, select, chunks=True)


def baal(problem: Problem) -> Tensor | Part:
    """Its heuristic, which draws for every parameter sample, makes one pick more than asked, and all at once."""

    def select(some: Problem, k: int) -> Tensor:
        from baal.active.heuristics import BatchBALD

        x = np.ascontiguousarray(some.array("samples").swapaxes(1, 2))
        draws = max(1, problem.params["num_samples"] // x.shape[2])
        return torch.from_numpy(BatchBALD(max(1, k - 1), draws)(x)[:k].copy())

    return affordable(problem, select, drawn=True)


def scikit_activeml(problem: Problem) -> Tensor | Part:
    """Its function, which keeps all joint probabilities of all rows."""

    def select(some: Problem, k: int) -> Tensor:
        from skactiveml.pool import batch_bald

        x: Any = np.array(some.array("samples").swapaxes(0, 1), order="C")
        return torch.from_numpy(np.nanargmax(batch_bald(x, k, problem.params["num_samples"], problem.seed), axis=1))

    return affordable(problem, select)


def floor(sizes: Sizes) -> dict[str, float]:
    """The joint probabilities of every row with all configurations, at every pick."""
    counts = sum(configurations(picks, sizes.C) for picks in range(1, sizes.k))
    return {"gemm f64": 2.0 * counts * sizes.N * sizes.K * sizes.C}


def peers(*, exact: bool) -> tuple[Peer, ...]:
    """exact: whether all configurations are there at every pick, so that nothing is drawn and picks must be ours."""
    return (
        Peer(REDUX, redux, "float32", distribution="batchbald-redux", rounds=1, exact=exact),
        Peer("baal", baal, "BatchBALD, float64", distribution="baal", rounds=1),
        Peer("scikit-activeml", scikit_activeml, "batch_bald, float64", distribution="scikit-activeml", rounds=1),
    )


def case(k: int, classes: int, *, ratio: float | None = None, rounds: int | None = None) -> Case:
    """So many picks of so many classes, and the goals."""
    return Case(
        Sizes(N=10_000, K=100, C=classes, k=k),
        ratios={REDUX: ratio} if ratio else {},
        ceiling=0.5,
        peak=0.3,
        peers=peers(exact=float(classes) ** (k - 1) <= NUM_SAMPLES),
        rounds=rounds,
    )


BENCHMARKS = (
    Benchmark(
        strategy="batch_bald",
        params={"num_samples": NUM_SAMPLES},
        make=pools.consistent_samples,
        peers=(),
        floor=floor,
        quick=Case(Sizes(N=60, K=8, C=4, k=4), peers=peers(exact=True)),
        cpu=(
            case(5, 10, ratio=8),
            case(10, 10, ratio=10),
            case(10, 77),
            case(50, 10, ratio=10, rounds=1),  # far beyond what the samples can tell
        ),
        cuda=(Case(Sizes(N=100_000, K=100, C=10, k=50)),),
        scaling=Scaling(Sizes(N=2000, K=50, C=8, k=8), {"N": (1000, 8000), "K": (25, 200), "C": (4, 32), "k": (5, 40)}),
    ),
)
