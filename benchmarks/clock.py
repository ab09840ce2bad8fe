"""Seconds: of a call, and of what is too slow to be run in whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of a call until its device has done everything, and what it returned."""
    _finish(device)
    started = time.perf_counter()
    found = call()
    _finish(device)
    return time.perf_counter() - started, found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scaled(
    select: Callable[[int], T], steps: int, few: tuple[int, int], device: torch.device
) -> tuple[float, float, T]:
    """What a greedy selection of so many steps would take, by two runs of `few` steps: what happens once counts once.

    Returns the seconds before the first step, those of all steps, and what the longer run returned.
    """
    short, _ = timed(lambda: select(few[0]), device)
    long, found = timed(lambda: select(few[1]), device)
    step = (long - short) / (few[1] - few[0])
    return max(0.0, short - few[0] * step), steps * step, found
