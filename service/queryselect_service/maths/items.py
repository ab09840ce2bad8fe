"""From a score per row to a score per item."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from queryselect_service.maths.lists import together
from queryselect_service.shards import SPAN_BYTES, Shards

#: Rows, or items, that are looked at between two checks.
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
        scores = together(scores, items, stops - counts, pool)
    found = scores.new_empty(size)
    for some, rows in _blocks(stops, pool):
        block, lengths = scores[rows], counts[some]
        if how == "MAX":
            of_items = torch.segment_reduce(block, "max", lengths=lengths, unsafe=True)
        else:
            of_items = _sums(block, lengths)
        if how == "TOP_K_MEAN" and top_k is not None:
            _sum_highest(block, lengths, top_k, of_items, pool)
            lengths = lengths.clamp(max=top_k)
        if how in ("MEAN", "TOP_K_MEAN"):
            of_items /= lengths.clamp(min=1)
        found[some] = torch.where(lengths > 0, of_items, 0.0)
    largest = torch.finfo(found.dtype).max
    return found.clamp_(-largest, largest)


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


def _sums(scores: Tensor, lengths: Tensor) -> Tensor:
    """The sums (m,) of stretches of the scores (n,), one after the other, each added up in its order."""
    return torch.segment_reduce(scores, "sum", lengths=lengths, unsafe=True)


def _sum_highest(scores: Tensor, lengths: Tensor, k: int, sums: Tensor, pool: Shards) -> None:
    """Puts the sum of its k highest scores in the place of every item's that has more than k.

    scores: (n,), those of each item one after the other. lengths: (m,). sums: (m,), of all of them; written.
    """
    if len(lengths) == 1 and len(scores) > k:  # it may be long
        sums.copy_(_sums(_highest(scores, k, pool), lengths.clamp(max=k)))
        return
    starts = lengths.cumsum(0) - lengths
    width, longest = k, int(lengths.max())
    while width < longest:  # items of about the same length at a time, as rows of a matrix
        some = ((lengths > width) & (lengths <= 2 * width)).nonzero().squeeze(1)
        width *= 2
        places = torch.arange(min(width, longest), device=scores.device)
        within = (starts[some, None] + places).clamp_(max=len(scores) - 1)
        theirs = torch.where(places < lengths[some, None], scores[within], -torch.inf)
        sums[some] = _sums(theirs.topk(k).values.flatten(), torch.full_like(some, k))


def _highest(scores: Tensor, k: int, pool: Shards) -> Tensor:
    """The k highest scores, best first, or all; looked for a block at a time."""
    best = scores[:0]
    for span in pool.spans(len(scores), SPAN_BYTES // BLOCK_ROWS):
        best = torch.cat([best, scores[span]])
        best = best.topk(min(k, len(best))).values
    return best
