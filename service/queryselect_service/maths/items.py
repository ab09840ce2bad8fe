"""From a score per row to a score per item."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.shards import SPAN_BYTES, Shards

#: Rows, or items, that are looked at between two checks: where rows are sorted, few tens of milliseconds.
BLOCK_ROWS = 1 << 18


def aggregate_items(scores: Tensor, items: Tensor, size: int, how: str, top_k: int | None, pool: Shards) -> Tensor:
    """The scores (I,) of items whose rows have the scores (N,) float64: their MEAN, SUM, MAX or TOP_K_MEAN.

    items: (N,) integers, the item of each row, 0 to I - 1 in any order. size: I. top_k: of TOP_K_MEAN, the number of
    highest rows that are averaged, all of them where an item has fewer. pool: what is asked between stretches of work.

    An item without rows gets 0. What is too large for float64 becomes the largest there is. Nothing is added by several
    threads at a time, whose order would change the last digits: an item's rows are brought together, in their order.
    """
    counts = torch.zeros(size, dtype=torch.int64, device=scores.device)  # (I,)
    for span in pool.spans(len(items), SPAN_BYTES // BLOCK_ROWS):
        theirs = items[span].long()
        counts.index_add_(0, theirs, torch.ones_like(theirs))
    stops = counts.cumsum(0)  # (I,), where an item's rows end once they are together
    if bool((items[1:] < items[:-1]).any()):
        scores = _together(scores, items, stops - counts, pool)
    found = scores.new_empty(size)
    for some, rows in _blocks(stops, pool):
        block, lengths = scores[rows], counts[some]
        if how == "TOP_K_MEAN" and top_k is not None:
            block, lengths = _highest(block, lengths, top_k), lengths.clamp(max=top_k)
        of_items = torch.segment_reduce(block, "max" if how == "MAX" else "sum", lengths=lengths, unsafe=True)
        if how in ("MEAN", "TOP_K_MEAN"):
            of_items /= lengths.clamp(min=1)
        found[some] = torch.where(lengths > 0, of_items, 0.0)
    largest = torch.finfo(found.dtype).max
    return found.clamp_(-largest, largest)


def _together(scores: Tensor, items: Tensor, starts: Tensor, pool: Shards) -> Tensor:
    """The scores (N,) with those of each item one after the other, in order of rows.

    starts: (I,), where those of an item begin; written.
    """
    found = torch.empty_like(scores)
    for span in pool.spans(len(items), SPAN_BYTES // BLOCK_ROWS):
        mine, order = items[span].long().sort(stable=True)
        values, lengths = torch.unique_consecutive(mine, return_counts=True)
        shift = starts[values] - (lengths.cumsum(0) - lengths)  # from a place in this span to that in `found`
        places = torch.arange(len(mine), device=mine.device) + shift.repeat_interleave(lengths)
        found[places] = scores[span][order]
        starts[values] += lengths
    return found


def _blocks(stops: Tensor, pool: Shards) -> Iterator[tuple[slice, slice]]:
    """Stretches of items and of their rows, both short; that of an item of very many rows is the item alone.

    stops: (I,), where the rows of each item end.
    """
    item, row = 0, 0
    while item < len(stops):
        pool.check()
        within = int(torch.searchsorted(stops, stops.new_tensor(row + BLOCK_ROWS), right=True))
        last = min(max(within, item + 1), item + BLOCK_ROWS, len(stops))
        end = int(stops[last - 1])
        yield slice(item, last), slice(row, end)
        item, row = last, end


def _highest(scores: Tensor, lengths: Tensor, k: int) -> Tensor:
    """The k highest of each item's scores, all where it has fewer, best first. lengths: of the items, in order."""
    items = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # (n,)
    best = scores.sort(descending=True).indices
    order = best[items[best].sort(stable=True).indices]  # by item, and then by score
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(len(scores), device=scores.device) - starts[items]  # within the item
    return scores[order[places < k]]
