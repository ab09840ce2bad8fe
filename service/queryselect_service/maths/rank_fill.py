"""Distinct rows from the rankings of many centres: all first ranks, best first, then all second ranks, and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class BestRows:
    """For each of c centres the `keep` best rows that it was told of: values and global rows, best first.

    Equal values stand in order of rows. values: (c, keep), -inf where there are fewer. rows: (c, keep), -1 there.
    """

    def __init__(self, centres: int, keep: int, device: torch.device) -> None:
        self.values = torch.full((centres, keep), -torch.inf, dtype=torch.float64, device=device)
        self.rows = torch.full((centres, keep), -1, dtype=torch.int64, device=device)

    @property
    def bar(self) -> Tensor:
        """The value (c,) below which a row need not be told of."""
        return self.values[:, -1]

    def add(self, centres: Tensor, rows: Tensor, values: Tensor) -> None:
        """Takes pairs (p,) of a centre and a row, and their values: by centre, then by row, all of later rows."""
        count, keep = self.values.shape
        told = torch.bincount(centres, minlength=count)
        place = torch.arange(len(centres), device=centres.device) - (told.cumsum(0) - told)[centres]
        new = BestRows(count, int(told.max()), centres.device)
        new.values[centres, place], new.rows[centres, place] = values, rows
        # Stable: of equal values those that stood here, of earlier rows, stay before the new ones.
        best = torch.cat([self.values, new.values], 1).sort(dim=1, descending=True, stable=True)
        self.values = best.values[:, :keep].contiguous()
        self.rows = torch.cat([self.rows, new.rows], 1).gather(1, best.indices[:, :keep])


@dataclass(frozen=True)
class Ranked:
    """The list: rows (l,) with their ranks and values, rank by rank, each in descending order of values, then of rows.

    A row may stand there several times, once for every centre.
    """

    ranks: Tensor
    rows: Tensor
    values: Tensor

    @classmethod
    def sorted(cls, ranks: Tensor, rows: Tensor, values: Tensor) -> Ranked:
        """That of such entries (l,) in any order."""
        order = rows.argsort(stable=True)
        order = order[values[order].argsort(stable=True, descending=True)]
        order = order[ranks[order].argsort(stable=True)]
        return cls(ranks[order], rows[order], values[order])

    @classmethod
    def of(cls, best: BestRows) -> Ranked:
        """That of all centres."""
        rank, centre = (best.rows >= 0).T.nonzero().unbind(1)
        return cls.sorted(rank, best.rows[centre, rank], best.values[centre, rank])

    def joined(self, other: Ranked) -> Ranked:
        """That of the centres of both."""
        pairs = zip((self.ranks, self.rows, self.values), (other.ranks, other.rows, other.values), strict=True)
        return Ranked.sorted(*(torch.cat(pair) for pair in pairs))

    def without(self, place: int) -> Ranked:
        """Itself less one place."""
        kept = torch.arange(len(self.rows), device=self.rows.device) != place
        return Ranked(self.ranks[kept], self.rows[kept], self.values[kept])

    def distinct(self) -> Ranked:
        """Every row where it stands first alone."""
        found, which = torch.unique(self.rows, return_inverse=True)
        places = torch.arange(len(self.rows), device=self.rows.device)
        first = places.new_full((len(found),), len(places)).scatter_reduce_(0, which, places, "amin").sort().values
        return Ranked(self.ranks[first], self.rows[first], self.values[first])
