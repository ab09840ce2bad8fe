"""Plug-in strategies for tests: what a third party would register."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from queryselect_service.shards import Whole
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import ScoreKind, Selection, strategy


@dataclass(frozen=True)
class Sleepy(Spec):
    """Its parameters."""

    seconds: float = parameter(0.0, "How long to work", low=0, unit="seconds")
    fail: str = parameter("", "How to fail: bug, memory, or not at all")


#: The last moment at which a sleepy kernel was seen at work (time.monotonic).
last_seen = {"at": 0.0}


@strategy(Sleepy, kind=ScoreKind.POINT, cost="O(1)", citation="2026", pool_scores=False)
def sleepy(*, k: int, spec: Sleepy, candidates: torch.Tensor, pool: Whole) -> Selection:
    """Works for a while, in blocks of a few milliseconds, then takes the first rows."""
    if spec.fail == "bug":
        raise RuntimeError("shapes (3) and (4) don't match: secret traceback")
    if spec.fail == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    until = time.monotonic() + spec.seconds
    while time.monotonic() < until:
        pool.check()
        last_seen["at"] = time.monotonic()
        time.sleep(0.005)
    rows, scores = pool.top(torch.zeros(len(candidates), dtype=torch.float64), k, candidates)
    return Selection(rows, scores)
