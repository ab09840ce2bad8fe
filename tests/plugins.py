"""Plug-in strategies for tests: what a third party would register."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, ScoreKind, Selection, Task, pointwise, rank, strategy


@dataclass(frozen=True)
class Sleepy(Spec):
    """Its parameters."""

    seconds: float = parameter(0.0, "How long to work", low=0, unit="seconds")
    fail: str = parameter("", "How to fail: bug, device, host, allocator, lost, thread, or not at all")


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
    if spec.fail == "lost":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if spec.fail == "thread":
        raise RuntimeError("can't start new thread")
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


@strategy(Spec, kind=ScoreKind.GAIN, cost="O(N D + M (D + C))", citation="2026")
def guided(
    embeddings: Annotated[Tensor, "N D"],
    weights: Annotated[Tensor, "N"] | None = None,
    labeled_embeddings: Annotated[Tensor, "M D"] | None = None,
    labeled_probabilities: Annotated[Predictions, "M C"] | None = None,
    labeled_weights: Annotated[Tensor, "M"] | None = None,
    *,
    choice: Choice,
) -> Selection:
    """A kernel that reads one role, all of it optional: how far along a row is to what is labelled with certainty."""
    gains = embeddings.double().sum(1)
    if labeled_embeddings is not None:
        mass = labeled_probabilities[:].amax(1) * (1 if labeled_weights is None else labeled_weights)
        gains = embeddings.double() @ (mass[:, None] * labeled_embeddings).sum(0)
    if weights is not None:
        gains = gains * weights
    return rank(gains, choice)


@pointwise(Spec, cost="O(N D + M D)", citation="2026")
def between(
    embeddings: Annotated[Tensor, "N D"],
    target_probabilities: Annotated[Tensor, "M C"],
    avoid_embeddings: Annotated[Tensor, "M D"] | None = None,
    target_weights: Annotated[Tensor, "M"] | None = None,
) -> Tensor:
    """A pointwise kernel of two roles, one of which it can't do without; its weights it can."""
    scores = embeddings.sum(1) * target_probabilities[:, 0].sum()
    if target_weights is not None:
        scores = scores * target_weights.sum()
    return scores if avoid_embeddings is None else scores - embeddings @ avoid_embeddings.mean(0)


@strategy(Spec, kind=ScoreKind.POINT, cost="O(N + M)", citation="2026", pool_scores=False)
def weighed(*, choice: Choice, labeled_weights: Annotated[Tensor, "M"]) -> Selection:
    """A kernel that asks for nothing but weights, and gets them whether they are given or not."""
    return rank(torch.arange(len(choice.free)).double() * labeled_weights.sum(), choice)
