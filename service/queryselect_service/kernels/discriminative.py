"""Discriminative active learning: rows that can be told from labelled ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus

from queryselect_service.errors import InvalidInput
from queryselect_service.maths.distances import EXACT_BYTES, Points, copy_bytes
from queryselect_service.maths.farthest import FarthestFirst
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy

#: A fit ends where the gradient's length is this part of l2, so that weights are as exact, or of N, which rounding is.
EXACT, ROUNDING = 1e-11, 1e-15
#: Newton's steps at the most.
STEPS = 100
#: The Hessian is written out up to so many columns, a span adding to it with so many multiply-adds per byte touched.
WRITTEN, FAST_PRODUCTS = 1024, 4
#: Beyond, how well Newton's equations are solved, and in how many products at the most.
RESIDUAL, PRODUCTS = 1e-4, 1000
#: The part of the fall that a step promises which it has to keep, and the part of a value that rounding may change.
KEPT, SLACK = 1e-4, 1e-13
#: How often a step is halved; after so many rounding is all that is left.
HALVINGS = 30
#: A column whose spread is a smaller part of its largest entry is taken for constant.
CONSTANT = 1e-12


@dataclass(frozen=True)
class Discriminative(Spec):
    """Its parameters."""

    sub_batches: int = parameter(10, "How often the discriminator is fitted; at most once per pick", low=1, unit="fits")
    l2: float = parameter(
        1.0, "The discriminator's penalty on squared weights, above 0; the losses of rows are added", low=0
    )

    def __post_init__(self) -> None:
        """Raises InvalidInput for a penalty of 0 too: rows that are separable would have infinite weights."""
        super().__post_init__()
        if not 0 < self.l2 < math.inf:
            raise InvalidInput(f"l2 must be above 0 and finite; it is {self.l2}", field="l2")


def _memory(sizes: Sizes, _: Discriminative) -> int:
    """A standardised float64 copy of the rows, what Points makes of half types, numbers per row, and spans."""
    copy = copy_bytes(sizes.D, sizes.item, normalize=False)
    spans = min(3 * SPAN_BYTES // 2, 4 * 8 * sizes.N * sizes.D)
    spans += 3 * 8 * min(sizes.D + 1, WRITTEN) ** 2
    return sizes.N * (8 * (sizes.D + 1) + copy + 90) + 2 * sizes.k * sizes.D * sizes.item + 100 * sizes.D + spans


@strategy(
    Discriminative,
    kind=ScoreKind.PROBABILITY,
    pool_scores=False,
    cost="O(N D²) time per step of Newton's method, some ten of them per fit; with more than 1000 columns some hundred "
    "times O(N D) per step; O(N D) memory",
    memory=_memory,
    work=lambda sizes: min(10, sizes.k) * min(10.0 * sizes.D, 600) * sizes.N * sizes.D,
    citation="Gissin and Shalev-Shwartz, Discriminative active learning (2019), arXiv:1907.06347, algorithm 1",
)
def discriminative(
    embeddings: Annotated[Tensor, "N D"],
    *,
    choice: Choice,
    spec: Discriminative = Discriminative(),
    context: Tensor,
    pool: Shards,
) -> Selection:
    """Prefers rows that a classifier tells from what is labelled: the labelled set shall look like the pool.

        w = argmin of sum over labelled x of ln(1 + exp(w.x)) + sum over others of ln(1 + exp(-w.x)) + l2/2 |w|^2
        pick the k / sub_batches rows of highest P(unlabelled | x) = 1 / (1 + exp(-w.x));  they are labelled;  repeat

    x are standardised over the pool, with a constant 1 beside. embeddings: (n, D). context: (l,) rows that count as
    labelled; choice: k picks among (n,) rows. Rows that may not be chosen are unlabelled like others. Scores are
    P(unlabelled) when a row was taken.

    Without context there is nothing to tell rows from: the first sub-batch is farthest-first from the row nearest to
    the mean, with a warning; its scores are those distances. The paper's classifier is a deep network, fitted anew for
    up to 1000 epochs per sub-batch: a training job, which this is not. Here a logistic regression is fitted to its
    optimum, on the embeddings that such a network begins with.

    >>> line = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    >>> from queryselect_service.shards import Whole
    >>> choice = Choice(1, torch.ones(4, dtype=torch.bool), Whole(4))
    >>> discriminative(line, choice=choice, context=torch.tensor([0]), pool=Whole(4)).indices
    tensor([3])
    """
    points = Points(embeddings, pool)
    discriminator = _Discriminator(points, spec.l2)
    labeled = torch.zeros(len(embeddings), dtype=torch.bool, device=embeddings.device)
    labeled[context] = True
    cold = not pool.sum(labeled.count_nonzero()) > 0
    indices, scores = [context[:0]], [points.mean[:0]]
    rounds, made = min(spec.sub_batches, choice.k), 0
    notices: tuple[Notice, ...] = ()
    for number in range(1, rounds + 1):
        pool.progress(made, choice.k)
        count = choice.k * number // rounds - made
        if cold and number == 1:
            rows, found = FarthestFirst(points, choice).pick(count)
            message = f"nothing is labelled: the first {len(rows)} picks are farthest-first, and their scores distances"
            notices = (Notice(NoticeCode.FALLBACK, message, rows),)
        else:
            rows, logits = choice.walk(discriminator.fit(labeled), count)
            found = torch.sigmoid(logits)
        indices.append(rows)
        scores.append(found)
        made += len(rows)
        if len(rows) < count:
            break
        here = rows - pool.offset
        labeled[here[(here >= 0) & (here < len(labeled))]] = True
    return Selection(torch.cat(indices), torch.cat(scores), None, notices)


class _Discriminator:
    """Logistic regression on standardised rows, by Newton's method."""

    def __init__(self, points: Points, l2: float) -> None:
        self._pool, self._l2 = points.pool, l2
        embeddings = points.embeddings
        n, dims, device = *embeddings.shape, embeddings.device
        self._rows = torch.empty(n, dims + 1, dtype=torch.float64, device=device)  # the last column is the constant 1
        squares, peak = torch.zeros_like(points.mean), points.mean.abs()
        for span in self._pool.spans(n, EXACT_BYTES * dims):
            rows = points.exact(embeddings[span]).sub_(points.mean)
            self._rows[span, :dims], self._rows[span, dims] = rows, 1
            squares += rows.square_().sum(0)
        spread = (self._pool.sum(squares) / self._pool.size).sqrt_()
        factor = torch.where(spread > CONSTANT * peak, 1 / spread, 0.0)
        for span in self._pool.spans(n, 2 * 8 * dims):
            self._rows[span, :dims] *= factor
        self._weights = torch.zeros(dims + 1, dtype=torch.float64, device=device)

    def fit(self, labeled: Tensor) -> Tensor:
        """The logits w.x (n,) of being unlabelled, once fitted to the rows that are labelled (n,), and all others."""
        bound = max(EXACT * self._l2, ROUNDING * self._pool.size)
        for _ in range(STEPS):
            value, gradient, variances = self._expansion(labeled)
            if gradient.norm() <= bound:
                break
            step = self._newton(gradient, variances)
            if not self._fell(labeled, value, step, float(gradient @ step)):
                break
        return self._logits()

    def _fell(self, labeled: Tensor, value: float, step: Tensor, promised: float) -> bool:
        """Takes the step, or as much of it as makes the value fall by a part of what it promised; or else none."""
        start = self._weights
        for halvings in range(HALVINGS):
            size = 0.5**halvings
            self._weights = start - size * step
            if value - self._value(labeled) >= KEPT * size * promised - SLACK * value:
                return True
        self._weights = start
        return False

    def _logits(self) -> Tensor:
        """w.x (n,), each row by itself, so that equal rows have equal bits."""
        logits = torch.empty_like(self._rows[:, 0])
        for span in self._spans(3):
            logits[span] = (self._rows[span] * self._weights).sum(1)
        return logits

    def _value(self, labeled: Tensor) -> float:
        """What is minimised."""
        loss = torch.zeros_like(self._weights[0])
        for span in self._spans(1):
            logits = self._rows[span] @ self._weights
            loss += softplus(torch.where(labeled[span], logits, -logits)).sum()
        return self._penalised(loss)

    def _penalised(self, loss: Tensor) -> float:
        """The value, by the losses of the rows here."""
        return float(self._pool.sum(loss) + self._l2 / 2 * self._weights.square().sum())

    def _expansion(self, labeled: Tensor) -> tuple[float, Tensor, Tensor]:
        """The value, its gradient (D + 1,), and the variances p (1 - p) (n,) that its Hessian is made of."""
        gradient, variances = torch.zeros_like(self._weights), torch.empty_like(self._rows[:, 0])
        loss = torch.zeros_like(gradient[0])
        for span in self._spans(2):
            rows = self._rows[span]
            logits = rows @ self._weights
            wrong = torch.sigmoid(torch.where(labeled[span], logits, -logits))  # keeps its digits
            gradient += torch.where(labeled[span], wrong, -wrong) @ rows
            variances[span] = wrong * (1 - wrong)
            loss += softplus(torch.where(labeled[span], logits, -logits)).sum()
        return self._penalised(loss), self._pool.sum(gradient) + self._l2 * self._weights, variances

    def _newton(self, gradient: Tensor, variances: Tensor) -> Tensor:
        """H⁻¹ gradient, or nearly that, (D + 1,), with H = Σ p (1 - p) x xᵀ + l2 I."""
        dims = len(gradient)
        if dims > WRITTEN:
            return self._by_conjugate_gradients(gradient, variances)
        hessian = gradient.new_zeros(dims, dims)
        for span in self._spans(2 + dims // (8 * FAST_PRODUCTS)):
            rows = self._rows[span]
            hessian.addmm_((rows * variances[span, None]).T, rows)
        hessian = self._pool.sum(hessian)
        hessian.diagonal().add_(self._l2)
        root, failed = torch.linalg.cholesky_ex(hessian)
        if failed:  # with so small a penalty that rounding hides it
            return self._by_conjugate_gradients(gradient, variances)
        found: Tensor = torch.cholesky_solve(gradient[:, None], root)[:, 0]
        return found

    def _by_conjugate_gradients(self, gradient: Tensor, variances: Tensor) -> Tensor:
        """The same, with products of H and vectors alone."""
        found = torch.zeros_like(gradient)
        left, direction = gradient.clone(), gradient
        length, enough = left @ left, float(RESIDUAL * gradient.norm())
        for _ in range(PRODUCTS):
            product = torch.zeros_like(gradient)
            for span in self._spans(2):
                rows = self._rows[span]
                product += (variances[span] * (rows @ direction)) @ rows
            product = self._pool.sum(product) + self._l2 * direction
            size = length / (direction @ product)
            found = found + size * direction
            left = left - size * product
            before, length = length, left @ left
            if length.sqrt() <= enough:
                break
            direction = left + length / before * direction
        return found

    def _spans(self, passes: int) -> Iterator[slice]:
        return self._pool.spans(len(self._rows), passes * 8 * self._rows.shape[1])
