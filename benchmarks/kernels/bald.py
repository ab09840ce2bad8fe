"""BALD, against libraries and its formula."""

from __future__ import annotations

import torch

from benchmarks.case import Case, Part, Peer, Problem
from benchmarks.clock import timed
from benchmarks.committee import MEMBERS, benchmark, heuristic, logarithms
from benchmarks.published import epig
from queryselect_service.strategy import Sizes

#: Rows that batchbald-redux is run on where there are more: it takes them by the thousand.
ROWS = 4096


def redux(problem: Problem) -> Part:
    """It takes logarithms, which it gets before the clock starts."""
    from batchbald_redux.batchbald import get_bald_batch

    n = len(problem.candidates)
    logs = problem.inputs["samples"][:ROWS].cpu().log()
    seconds, found = timed(lambda: get_bald_batch(logs, problem.k), logs.device)
    if n <= ROWS:
        return Part(seconds, "given logarithms", torch.tensor(found.indices))
    return Part(seconds * n / ROWS, f"given logarithms, {ROWS} of {n} rows, scaled")


GOALS = {"baal": 5, "batchbald-redux": 30, epig.BALD: 2}

BENCHMARKS = (
    benchmark(
        "bald",
        (
            heuristic("BALD", "BALD"),
            Peer("batchbald-redux", redux, "get_bald_batch", distribution="batchbald-redux"),
            Peer(epig.BALD, epig.bald, "in the samples' type"),
        ),
        logarithms,
        cpu=tuple(Case(Sizes(N=50_000, K=MEMBERS, C=classes, k=100), ratios=GOALS) for classes in (10, 77)),
    ),
)
