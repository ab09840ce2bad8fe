"""Plug-in strategies for tests: what a third party would register."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import ScoreKind, Selection, Task, pointwise, strategy


@dataclass(frozen=True)
class Sleepy(Spec):
    """Its parameters."""

    seconds: float = parameter(0.0, "How long to work", low=0, unit="seconds")
    fail: str = parameter("", "How to fail: bug, device, host, allocator, or not at all")


#: The last moment at which a sleepy kernel was seen at work (time.monotonic).
last_seen = {"at": 0.0}


@strategy(Sleepy, kind=ScoreKind.POINT, cost="O(1)", citation="2026", pool_scores=False)
def sleepy(*, k: int, spec: Sleepy, candidates: Tensor, pool: Shards) -> Selection:
    """Works for a while, in blocks of a few milliseconds, then takes the first rows."""
    if spec.fail == "bug":
        raise RuntimeError("shapes (3) and (4) don't match: secret traceback")
    if spec.fail == "device":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if spec.fail == "host":
        raise MemoryError
    if spec.fail == "allocator":
        torch.empty(1 << 50, dtype=torch.uint8)  # torch's allocator on the host has no error of its own
    until = time.monotonic() + spec.seconds
    while time.monotonic() < until:
        pool.check()
        last_seen["at"] = time.monotonic()
        time.sleep(0.005)
    rows, scores = pool.top(torch.zeros(len(candidates), dtype=torch.float64), k, candidates)
    return Selection(rows, scores)


@dataclass(frozen=True)
class Sharpness(Spec):
    """Its parameters."""

    power: float = parameter(1.0, "The exponent", low=0)


@pointwise(Sharpness, cost="O(N C)", citation="2026")
def sharpness(
    probabilities: Annotated[Tensor, "N C"],
    head_weights: Annotated[Tensor, "C D"] | None = None,
    *,
    spec: Sharpness,
    task: Task,
) -> Tensor:
    """A pointwise kernel that takes everything one may take."""
    scores = probabilities.amax(-1) ** spec.power
    if task is Task.MULTILABEL:
        scores = scores.sum(1)
    return scores if head_weights is None else scores * head_weights.sum()


@strategy(Spec, kind=ScoreKind.POINT, cost="O(N C)", citation="2026")
def second_class(probabilities: Annotated[Tensor, "N C"], *, k: int, candidates: Tensor, pool: Shards) -> Selection:
    """A kernel of its own that reads probabilities, whatever the caller sent."""
    rows, scores = pool.top(probabilities[:, 1], k, candidates)
    return Selection(rows, scores)


@pointwise(Spec, cost="O(N C)", citation="2026")
def steepest(logits: Annotated[Tensor, "N C"]) -> Tensor:
    """A kernel that wants the logits themselves."""
    return logits.amax(-1)


@dataclass(frozen=True)
class Scaled(Spec):
    """Its parameters."""

    seconds: float = parameter(0.0, "How long to work on a block", low=0, unit="seconds")
    fail: bool = parameter(False, "Whether to fail")


#: The number of rows of every block that was scaled, the last ones.
scaled_rows: deque[int] = deque(maxlen=100)


@pointwise(Scaled, cost="O(N (C + D))", citation="2026")
def scaled(probabilities: Annotated[Tensor, "N C"], embeddings: Annotated[Tensor, "N D"], *, spec: Scaled) -> Tensor:
    """A pointwise kernel of two inputs with a row per row of the pool, as slow as one likes."""
    if spec.fail:
        raise RuntimeError("secret traceback")
    last_seen["at"] = time.monotonic()
    scaled_rows.append(len(probabilities))
    time.sleep(spec.seconds)
    last_seen["at"] = time.monotonic()
    return probabilities.amax(-1) * embeddings.sum(-1)
