"""Greedy k-centres by similarity: each the row that is least like those before it."""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.maths.descriptors import Terms, similarity, taken
from queryselect_service.shards import Shards

#: On a processor, tables of more bytes than this are not read as a whole at every step; they do not stay in its cache.
CACHED_BYTES = 4 << 20
#: How many rows are brought up to date at a time.
FRONTIER = 32


class Nearness:
    """To how similar a centre every row has one, max over s of R(c_s, m), known in full where it is the least."""

    def __init__(self, rows: Terms, most: int, pool: Shards) -> None:
        """rows: (n, ...) to choose from. most: how many centres there can be."""
        first = rows[0].factors[0]
        count = len(first)
        self._rows, self._pool, self._made = rows, pool, 0
        self._row_bytes = sum(f.shape[1] * f.element_size() for term in rows for f in term.factors)
        self._lazy = first.device.type == "cpu" and count * self._row_bytes > CACHED_BYTES
        self._centres = taken(rows, torch.zeros(most if self._lazy else 1, dtype=torch.int64, device=first.device))
        # Infinite for rows that may not become centres. A row that was compared with some of the centres alone may be
        # nearer than it is said to be, but no less near: maxima only grow.
        self.values = torch.full((count,), -torch.inf, dtype=first.dtype, device=first.device)
        self._compared = torch.zeros(count, dtype=torch.int64, device=first.device)

    def add(self, row: Tensor) -> None:
        """A centre: the row of a number ()."""
        at = self._made if self._lazy else 0
        for ours, theirs in zip(self._centres, self._rows, strict=True):
            for f, g in zip(ours.factors, theirs.factors, strict=True):
                f[at : at + 1] = g.index_select(0, row[None])
        if self._made == 0 or not self._lazy:
            for span in self._pool.spans(len(self.values), self._row_bytes):
                self._update(span, at, at + 1)
        self._made += 1

    def least(self) -> Tensor:
        """The row () whose nearest centre is the farthest, ties to the lowest."""
        row = self.values.argmin()
        while self._lazy and self._compared[row] < self._made:
            low = self.values.topk(min(FRONTIER, len(self.values)), largest=False).indices
            low = torch.cat([row[None], low])
            compared = self._compared[low]
            # Most lack the last centre alone; the rest are compared with all that any of them lacks.
            for lacking in (low[compared == self._made - 1], low[compared < self._made - 1]):
                if len(lacking):
                    self._update(lacking, int(self._compared[lacking].min()), self._made)
            row = self.values.argmin()
        return row

    def _update(self, rows: slice | Tensor, start: int, stop: int) -> None:
        centres = taken(self._centres, slice(start, stop))
        found = similarity(taken(self._rows, rows), centres).amax(1)
        self.values[rows] = torch.maximum(self.values[rows], found)
        self._compared[rows] = stop


def k_centers(rows: Terms, first: Tensor, k: int, pool: Shards, *, repeat: bool = False) -> Tensor:
    """The numbers (k,) of k of more rows, each the one least like those before it; the first is given.

    repeat: whether a row may come again. pool: told of the progress.
    """
    near = Nearness(rows, k, pool)
    chosen, row = first.new_empty(k), first
    for step in range(k):
        pool.progress(step, 2 * k)
        chosen[step] = row
        if step + 1 == k:
            break
        near.add(row)
        if not repeat:
            near.values.index_fill_(0, row[None], torch.inf)
        row = near.least()
    return chosen
