"""Lists of different lengths, stored one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.shards import SPAN_BYTES, Shards

#: Entries that are sorted at once: few tens of milliseconds.
SORTED = 1 << 18


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


def together(x: Tensor, lists: Tensor, starts: Tensor, pool: Shards) -> Tensor:
    """The entries (n,) of some lists, those of each list one after the other, in their order.

    lists: (n,) integers, whose each entry is. starts: (m,), where those of a list begin; written. pool: what is asked
    between stretches of work.
    """
    found = torch.empty_like(x)
    narrow = torch.int32 if len(starts) < 1 << 31 else torch.int64  # sorted faster
    for span in pool.spans(len(lists), SPAN_BYTES // SORTED):
        mine, order = lists[span].to(narrow).sort(stable=True)
        values, lengths = torch.unique_consecutive(mine, return_counts=True)
        values = values.long()
        shift = starts[values] - (lengths.cumsum(0) - lengths)  # from a place in this span to that in `found`
        places = torch.arange(len(mine), device=mine.device) + shift.repeat_interleave(lengths)
        found.index_copy_(0, places, x[span][order])
        starts[values] += lengths
    return found
