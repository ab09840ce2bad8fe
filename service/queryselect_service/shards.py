"""What may cross rows. A kernel sees its own rows as plain tensors and reaches the other rows through these verbs.

Requirements that the design meets:

- The same kernel runs on one tensor and on slices of it in several processes, with the same picks: it is written
  against `Shards`, of which `Whole` is the case of one tensor and `Slices` that of several processes.
- The verbs are the only points of cancellation and progress. They call `check`, which raises when the caller has gone
  or the deadline has passed, and `spans` keeps the work between two checks at about 100 ms at the most. Slices may
  raise only where all of them meet (`sum`, `best`, `top`, `blocks`): one that left alone would leave the others
  waiting. Elsewhere a slice keeps its wish to stop to itself; at the next meeting all learn of it and all leave.
- Nothing else crosses: `sum`, `best`, `top`, `blocks`, and what a row's global number is (`offset`, `size`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from queryselect_service.errors import Cancelled

#: Bytes that a span of rows touches: about 10 ms of memory bandwidth on two cores, 100 ms of slow arithmetic.
SPAN_BYTES = 64 << 20
#: Rows among which the k highest scores are looked for at once; more where k is more.
TOP_ROWS = 1 << 18
#: Rows of which it is told at once whether they are among them.
TOLD_ROWS = 1 << 22


class Shards(Protocol):
    """The rows that a kernel sees, as part of all rows. What kernels are written against.

    size: N, the rows of all slices. offset: the global number of the first row here.
    """

    size: int
    offset: int

    def check(self) -> None:
        """Raises where the caller has gone or the deadline has passed, or sees to it that the next meeting does."""

    def progress(self, done: int, total: int) -> None:
        """Tells how far the selection is, in picks or rows; a check too."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all slices, elementwise."""

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The highest of the scores (n,) of all slices, ties to the lowest global row.

        Returns the global row and its score, both (), and the winner's row of every tensor in `rows`. Nothing leaves
        the device.
        """

    def top(self, scores: Tensor, k: int, candidates: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The k highest scores among the candidates (n,) of all slices, best first, ties to the lowest global row.

        Returns global rows (k,), their scores (k,), and what they have in every tensor of `rows` (k, ...); fewer where
        there are not so many candidates.
        """

    def blocks(self, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows of all slices, in global order, a block at a time: what a kernel needs that compares all pairs."""

    def spans(self, rows: int, row_bytes: int) -> Iterator[slice]:
        """Slices that cover `rows` of this place's rows, so short that work on one takes about 100 ms at the most.

        They depend on the arguments alone. `row_bytes` is what the caller's work touches per row.
        """


def _nobody(*_: int) -> None:
    """Checks nothing and tells nobody."""


class Whole:
    """All N rows in one place, where every verb is trivial. check, report: what the verbs of that meaning call."""

    offset = 0

    def __init__(
        self, size: int, check: Callable[[], None] = _nobody, report: Callable[[int, int], None] = _nobody
    ) -> None:
        self.size, self.check, self._report = size, check, report

    def progress(self, done: int, total: int) -> None:
        """See Shards."""
        self.check()
        self._report(done, total)

    def sum(self, x: Tensor) -> Tensor:
        """See Shards."""
        self.check()
        return x

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """See Shards."""
        self.check()
        return _best(scores, *rows)

    def top(self, scores: Tensor, k: int, candidates: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """See Shards."""
        self.check()
        at, best = _top(scores, k, candidates, self.check)
        return (at, best, *(x[at] for x in rows))

    def blocks(self, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """See Shards."""
        for span in self.spans(len(x[0]), _row_bytes(*x)):
            yield tuple(t[span] for t in x)

    def spans(self, rows: int, row_bytes: int) -> Iterator[slice]:
        """See Shards."""
        return _spans(rows, row_bytes, self.check)


class Slices:
    """In every process of a group a contiguous slice of the rows, in the order of the ranks, over torch.distributed.

    All processes make their `Slices`, which is the first meeting, and call the verbs that meet (`sum`, `best`, `top`,
    `blocks`) in the same order, with tensors of the same types and, but for the number of rows, shapes. They get the
    same bits back. A slice may be empty.

    What `check` or `report` raises is kept until the slices meet: there this slice raises it, and the others raise
    Cancelled. Work between two meetings runs to its end. A process that fails by itself in any other way leaves the
    others to the group's own timeout.
    """

    def __init__(
        self,
        rows: int,
        group: dist.ProcessGroup | None = None,
        check: Callable[[], None] = _nobody,
        report: Callable[[int, int], None] = _nobody,
    ) -> None:
        """rows: how many stand here. group: any initialised process group, by default that of all processes.

        With nccl the process has set its device before (torch.cuda.set_device).
        """
        self._group, self._check, self._report = group or dist.group.WORLD, check, report
        self._rank, self._ranks = dist.get_rank(self._group), dist.get_process_group_ranks(self._group)
        self._stop: Exception | None = None
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        self._rows = self._meet(torch.tensor(rows, device=device))[0].tolist()
        self.size, self.offset = sum(self._rows), sum(self._rows[: self._rank])

    def check(self) -> None:
        """See Shards; raises nothing."""
        self._heed(self._check)

    def progress(self, done: int, total: int) -> None:
        """See Shards; raises nothing."""
        self.check()
        self._heed(partial(self._report, done, total))

    def sum(self, x: Tensor) -> Tensor:
        """See Shards."""
        self.check()
        total = torch.cat([x.reshape(-1), x.new_full((1,), self._stop is not None)])  # a copy, so that x stays
        dist.all_reduce(total, group=self._group)
        self._part(total[-1])
        return total[:-1].view(x.shape)

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """See Shards."""
        if len(scores):
            index, *found = _best(scores, *rows)
        else:  # it meets the others, and is left out of the choice below
            index, *found = (x.new_zeros(x.shape[1:]) for x in (scores.long(), scores, *rows))
        some = index.new_tensor(len(scores) > 0, dtype=torch.bool)
        some, *found = self._meet(some, *found, index + self.offset)
        _, *found, row = _best(*(x[some] for x in found))  # equal scores go to the lowest rank: the lowest row
        return (row, *found)

    def top(self, scores: Tensor, k: int, candidates: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """See Shards."""
        index, best = _top(scores, k, candidates, self.check)
        places = torch.arange(min(k, max(self._rows)), device=scores.device)  # (w,), as many as any slice can fill
        padding = len(places) - len(index)
        mine = (index + self.offset, best, *(x[index] for x in rows))
        padded = (torch.cat([x, x.new_zeros(padding, *x.shape[1:])]) for x in mine)
        count, *found = self._meet(index.new_tensor(len(index)), *padded)  # (ranks,), (ranks, w, ...) each
        numbers, values, *theirs = (x.flatten(0, 1) for x in found)
        at, best = _top(values, k, (places < count[:, None]).flatten(), self.check)  # equal ones stand in order of rows
        return (numbers[at], best, *(x[at] for x in theirs))

    def blocks(self, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """See Shards. The rows here are yielded as they are, those of other slices as copies."""
        mine = torch.tensor(len(x[0]), device=x[0].device)
        for rank, count in enumerate(self._meet(mine)[0].tolist()):
            for span in _spans(count, _row_bytes(*x), partial(self._meet, mine)):
                here, size = rank == self._rank, span.stop - span.start
                block = tuple(t[span] if here else t.new_empty(size, *t.shape[1:]) for t in x)
                for t in block:
                    dist.broadcast(_bytes(t), self._ranks[rank], group=self._group)
                yield block

    def spans(self, rows: int, row_bytes: int) -> Iterator[slice]:
        """See Shards; raises nothing."""
        return _spans(rows, row_bytes, self.check)

    def _heed(self, call: Callable[[], None]) -> None:
        """Calls, and keeps what is raised until the slices meet."""
        if self._stop is None:
            try:
                call()
            except Exception as error:  # noqa: BLE001  # whatever it is: raised here, it would leave the others waiting
                self._stop = error

    def _meet(self, *parts: Tensor) -> list[Tensor]:
        """The `parts` of every slice, in the order of the ranks, (ranks, ...) each: one gather of bytes, any types."""
        self.check()
        parts = (torch.tensor(self._stop is not None, device=parts[0].device), *parts)
        mine = [_bytes(x) for x in parts]
        sent, ranks = torch.cat(mine), len(self._ranks)
        gathered = sent.new_empty(ranks, len(sent))
        dist.all_gather(list(gathered.unbind()), sent, group=self._group)
        columns = torch.split(gathered, [len(x) for x in mine], dim=1)
        # Cloned, since a view as a wider type must start at a multiple of its width.
        stop, *found = (
            column.clone(memory_format=torch.contiguous_format).view(x.dtype).view(ranks, *x.shape)
            for column, x in zip(columns, parts, strict=True)
        )
        self._part(stop.any())
        return found

    def _part(self, stop: Tensor) -> None:
        """Where all slices know whether one wants to stop, all raise."""
        if stop:
            wish, self._stop = self._stop, None
            raise wish or Cancelled("another slice of the rows has stopped")


def _best(scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """The first of the highest scores (n,): its index and its score, both (), and its row of every tensor in `rows`."""
    index = scores.argmax()  # torch promises the first of equal ones
    at = index[None]  # index_select stays on the device, where x[index] would ask it for a number
    return (index, scores.index_select(0, at)[0], *(x.index_select(0, at)[0] for x in rows))


def _top(scores: Tensor, k: int, candidates: Tensor, check: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """The k highest of the scores (n,) among the candidates (n,), best first, equal ones in order; fewer if need be.

    Returns their indices and their scores.
    """
    bar = _bar(scores, k, candidates, check) if k < int(candidates.count_nonzero()) else None
    above, at_bar = [scores[:0].long()], [scores[:0].long()]
    for start in range(0, len(scores), TOLD_ROWS):
        check()
        some, may = scores[start : start + TOLD_ROWS], candidates[start : start + TOLD_ROWS]
        above.append((may if bar is None else (some > bar) & may).nonzero().squeeze(1).add_(start))
        if bar is not None:
            at_bar.append(((some == bar) & may).nonzero().squeeze(1)[:k].add_(start))
    rows = torch.cat(above)
    if bar is not None:
        rows = torch.cat([rows, torch.cat(at_bar)[: k - len(rows)]]).sort().values
    check()
    values = scores[rows]
    order = values.sort(descending=True, stable=True).indices
    return rows[order], values[order]


def _bar(scores: Tensor, k: int, candidates: Tensor, check: Callable[[], None]) -> Tensor:
    """The k-th highest score (), found a block at a time: looking for it takes several times the memory of a block."""
    best, step = scores[:0], max(k, TOP_ROWS)
    for start in range(0, len(scores), step):
        check()
        block = slice(start, start + step)
        best = torch.cat([best, scores[block][candidates[block]]])
        if len(best) > k:
            best = best.topk(k, sorted=False).values
    return best.min()


def _spans(rows: int, row_bytes: int, check: Callable[[], object]) -> Iterator[slice]:
    """See Shards.spans."""
    step = max(1, SPAN_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        check()
        yield slice(start, min(start + step, rows))


def _row_bytes(*x: Tensor) -> int:
    return sum(t.element_size() * t.shape[1:].numel() for t in x)  # of the shape alone: there may be no row


def _bytes(x: Tensor) -> Tensor:
    """The memory of `x`, of any type, as bytes in one dimension; that of a copy where it is not contiguous."""
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)  # view(-1) may leave one element a stride
