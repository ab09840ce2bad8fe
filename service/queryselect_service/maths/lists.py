"""Lists of different lengths, stored one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Lists:
    """Where the entries of m lists lie."""

    def __init__(self, counts: Tensor) -> None:
        """counts: (m,) int64, how many entries each has."""
        self._counts, self._ends = counts, counts.cumsum(0)

    @property
    def starts(self) -> Tensor:
        """Where the first entry of each (m,) lies."""
        return self._ends - self._counts

    def places(self, some: Tensor) -> tuple[Tensor, Tensor]:
        """Where the entries (p,) of some lists (s,) lie, and whose they are (p,), counted among those asked for."""
        counts = self._counts[some]
        at = torch.repeat_interleave(counts)
        before = counts.cumsum(0)  # entries up to the end of each
        return torch.arange(len(at), device=at.device) + (self._ends[some] - before)[at], at
