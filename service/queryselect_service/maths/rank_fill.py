"""Distinct rows from the rankings of many centres: all first ranks, best first, then all second ranks, and so on."""

from __future__ import annotations

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
        """Takes pairs (p,) of a centre and a row, none told of before, and their values."""
        count, keep = self.values.shape
        old = (self.rows >= 0).nonzero()
        centres = torch.cat([old[:, 0], centres])
        rows, values = torch.cat([self.rows[old[:, 0], old[:, 1]], rows]), torch.cat([self.values[*old.T], values])
        order = rows.argsort(stable=True)
        order = order[values[order].argsort(stable=True, descending=True)]
        order = order[centres[order].argsort(stable=True)]
        centres, rows, values = centres[order], rows[order], values[order]
        first = torch.searchsorted(centres, torch.arange(count, device=centres.device))
        rank = torch.arange(len(centres), device=centres.device) - first[centres]
        best = rank < keep
        self.values[centres[best], rank[best]] = values[best]
        self.rows[centres[best], rank[best]] = rows[best]


def rank_major(best: BestRows) -> tuple[Tensor, Tensor]:
    """The list: rows (l,) and their values (l,), all of rank 1 first, each rank in descending order of values.

    A row may stand there several times, once for every centre. Equal values stand in order of rows.
    """
    rows, values = best.rows.T, best.values.T  # (keep, c)
    order = rows.argsort(dim=1, stable=True)
    rows, values = rows.gather(1, order), values.gather(1, order)
    order = values.argsort(dim=1, stable=True, descending=True)
    rows, values = rows.gather(1, order).flatten(), values.gather(1, order).flatten()
    return rows[rows >= 0], values[rows >= 0]


def first_places(rows: Tensor) -> Tensor:
    """Where in a list of rows (l,) every distinct one stands first, ascending."""
    distinct, which = torch.unique(rows, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    return places.new_full((len(distinct),), len(rows)).scatter_reduce_(0, which, places, "amin").sort().values
