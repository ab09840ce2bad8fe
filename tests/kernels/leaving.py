"""Callers who leave while a kernel runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from queryselect_service import strategy as strategies
from queryselect_service.shards import Whole
from queryselect_service.spec import build


class Left(Exception):
    """The caller has gone."""


def checks(name: str, inputs: Mapping[str, Tensor], params: Mapping[str, Any], k: int, labeled: int = 5) -> int:
    """How often a selection checks for the caller; whichever check of some it is that raises, it ends there."""
    strategies.load()
    strategy, rows = strategies.STRATEGIES[name], len(inputs["embeddings"])
    made = 0

    def run(last: int) -> int:
        nonlocal made
        made = 0

        def check() -> None:
            nonlocal made
            made += 1
            if made == last:
                raise Left

        strategies.select(
            strategy, inputs, k=k, candidates=torch.arange(rows) >= labeled, context=torch.arange(labeled),
            pool=Whole(rows, check), spec=build(strategy.spec, params),
        )  # fmt: skip
        return made

    total = run(0)
    for last in range(1, total, max(1, total // 20)):
        with pytest.raises(Left):
            run(last)
        assert made == last
    return total
