"""What may cross rows. A kernel sees its own rows as plain tensors and reaches the other rows through these verbs.

Requirements that the design meets:

- The same kernel runs on one tensor and on slices of it in several processes, with the same picks. `Whole` is the
  one-tensor case, where every verb is trivial.
- The verbs are the only points of cancellation: each calls `check`, which raises when the caller has gone or the
  deadline has passed. `spans` keeps the work between two checks at about 100 ms at the most.
- Nothing else crosses: `sum`, `best`, `top`, `blocks`, and what a row's global number is (`offset`, `size`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Bytes that a span of rows touches: about 10 ms of memory bandwidth on two cores, 100 ms of slow arithmetic.
SPAN_BYTES = 64 << 20


def _nothing() -> None:
    """The check of a selection that nobody can cancel."""


class Whole:
    """All N rows in one place.

    size: N. offset: the global number of the first row here, always 0.
    """

    offset = 0

    def __init__(self, size: int, check: Callable[[], None] = _nothing) -> None:
        self.size, self.check = size, check

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all slices, elementwise."""
        self.check()
        return x

    def best(self, scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """The highest of the scores (n,) of all slices, ties to the lowest global row.

        Returns the global row and its score, both (), and the winner's row of every tensor in `rows`. Nothing leaves
        the device.
        """
        self.check()
        index = scores.argmax()  # torch promises the first of equal ones
        return (index, scores[index], *(x[index] for x in rows))

    def top(self, scores: Tensor, k: int, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The k highest scores among the candidates (n,) of all slices, best first, ties to the lowest global row.

        Returns global rows (k,) and their scores (k,).
        """
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
        """The rows of all slices, in global order, a block at a time: what a kernel needs that compares all pairs."""
        for span in self.spans(len(x[0]), sum(_row_bytes(t) for t in x)):
            yield tuple(t[span] for t in x)

    def spans(self, rows: int, row_bytes: int) -> Iterator[slice]:
        """Slices that cover `rows` of this place's rows, so short that work on one takes about 100 ms at the most.

        They depend on the arguments alone. `row_bytes` is what the caller's work touches per row.
        """
        step = max(1, SPAN_BYTES // max(1, row_bytes))
        for start in range(0, rows, step):
            self.check()
            yield slice(start, min(start + step, rows))


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * (x[0].numel() if len(x) else 1)
