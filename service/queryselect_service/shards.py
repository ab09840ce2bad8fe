"""What may cross rows. A kernel sees its own rows as plain tensors and reaches the other rows through these verbs.

Requirements that the design meets:

- The same kernel runs on one tensor and on slices of it in several processes, with the same picks: it is written
  against `Shards`, of which `Whole` is the one-tensor case.
- The verbs are the only points of cancellation and progress. They call `check`, which raises when the caller has gone
  or the deadline has passed, and `spans` keeps the work between two checks at about 100 ms at the most. Slices may
  raise only where all of them meet (`sum`, `best`, `top`, `blocks`): one that left alone would leave the others
  waiting.
- Nothing else crosses: `sum`, `best`, `top`, `blocks`, and what a row's global number is (`offset`, `size`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

#: Bytes that a span of rows touches: about 10 ms of memory bandwidth on two cores, 100 ms of slow arithmetic.
SPAN_BYTES = 64 << 20


class Shards(Protocol):
    """The rows that a kernel sees, as part of all rows. What kernels are written against.

    size: N, the rows of all slices. offset: the global number of the first row here.
    """

    size: int
    offset: int

    def check(self) -> None:
        """Raises where the caller has gone or the deadline has passed."""

    def progress(self, done: int, total: int) -> None:
        """Tells how far the selection is, in picks or rows; a check too."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all slices, elementwise."""

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The highest of the scores (n,) of all slices, ties to the lowest global row.

        Returns the global row and its score, both (), and the winner's row of every tensor in `rows`. Nothing leaves
        the device.
        """

    def top(self, scores: Tensor, k: int, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k highest scores among the candidates (n,) of all slices, best first, ties to the lowest global row.

        Returns global rows (k,) and their scores (k,).
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
        index = scores.argmax()  # torch promises the first of equal ones
        at = index[None]  # index_select stays on the device, where x[index] would ask it for a number
        return (index, scores.index_select(0, at)[0], *(x.index_select(0, at)[0] for x in rows))

    def top(self, scores: Tensor, k: int, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """See Shards."""
        self.check()
        rows = candidates.nonzero().squeeze(1)
        values = scores[rows]
        if k < len(values):
            bar = values.topk(k, sorted=False).values.min()
            above = (values > bar).nonzero().squeeze(1)
            at_bar = (values == bar).nonzero().squeeze(1)[: k - len(above)]
            keep = torch.cat([above, at_bar]).sort().values
            rows, values = rows[keep], values[keep]
        order = values.sort(descending=True, stable=True).indices
        return rows[order], values[order]

    def blocks(self, *x: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """See Shards."""
        for span in self.spans(len(x[0]), sum(_row_bytes(t) for t in x)):
            yield tuple(t[span] for t in x)

    def spans(self, rows: int, row_bytes: int) -> Iterator[slice]:
        """See Shards."""
        step = max(1, SPAN_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            self.check()
            yield slice(start, min(start + step, rows))


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * (x[0].numel() if len(x) else 1)
