"""ProbCover: greedy coverage by balls."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths import kmeans
from queryselect_service.maths.distances import Points, copy_bytes
from queryselect_service.maths.farthest import FarthestFirst
from queryselect_service.maths.neighbourhoods import EDGE_BYTES, Neighbourhoods, parts, pure_radius
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, strategy

#: Masses are whole numbers of a unit, so many bits at most together: then no order changes a sum of them.
MASS_BITS = 52
#: Neighbours are kept where that takes at most so many times the memory of the rows; else they are found again.
GRAPH = 1


@dataclass(frozen=True)
class ProbCover(Spec):
    """Its parameters."""

    delta: float | None = parameter(
        None,
        "The radius of a ball, above 0; unset: the largest at which so many balls are pure as `purity` says",
        low=0,
    )
    purity: float = parameter(
        0.95, "The part of balls that hold rows of one cluster alone, where delta is unset", low=0, high=1
    )
    num_classes: int | None = parameter(
        None,
        "Clusters that stand for classes where delta is unset; unset: distinct labels, or else C",
        low=2,
        unit="classes",
    )
    normalize: bool = parameter(True, "Whether every row is scaled to unit Euclidean length first")

    def __post_init__(self) -> None:
        """Raises InvalidInput for a radius of 0 too: then a row does not cover itself."""
        super().__post_init__()
        if self.delta is not None and not 0 < self.delta < math.inf:
            raise InvalidInput(f"delta must be above 0 and finite; it is {self.delta}", field="delta")

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput where nothing tells how many classes there are, and that is needed."""
        super().check_inputs(shapes, returns)
        known = {"labels", "probabilities", "logits"} & set(shapes)
        if self.delta is None and self.num_classes is None and not known:
            words = "delta, or to estimate it num_classes, pool.labels of shape (L) or pool.logits of shape (N C)"
            raise InvalidInput(f"prob_cover needs {words}; the request has none of them", field="pool.labels")


def _memory(sizes: Sizes, spec: ProbCover) -> int:
    """A moved copy of the rows where Points makes one, neighbours or rows newly covered, numbers per row, picks."""
    wide = max(4, sizes.item)
    copy = copy_bytes(sizes.D, sizes.item, normalize=spec.normalize)
    edges = max(sizes.D * sizes.item, EDGE_BYTES * _edges(sizes.N, sizes.D, sizes.item) // max(1, sizes.N))
    cover = sizes.N * (copy + edges + 104 + 3 * wide) + 2 * (sizes.L + 2 * sizes.k) * sizes.D * sizes.item
    spans = min(2 * SPAN_BYTES, 8 * sizes.N * (4 * sizes.D + 512))
    if spec.delta is not None:
        return cover + spans
    classes = spec.num_classes or max(sizes.C, 2)
    clusters = kmeans.memory(sizes.N, sizes.D, sizes.item, classes, normalize=spec.normalize)
    return max(cover + spans, clusters)


@strategy(
    ProbCover,
    kind=ScoreKind.COVERAGE,
    seeded=True,
    cost="O(N² D) time: every pair at most twice, once more to estimate delta; O(N D) memory",
    memory=_memory,
    work=lambda sizes: 1.5 * float(sizes.N) * sizes.N * sizes.D,
    citation="Yehuda, Dekel, Hacohen and Weinshall, Active learning through a covering lens (NeurIPS 2022), "
    "arXiv:2205.11320, algorithm 1 and section 3.3",
)
def prob_cover(
    embeddings: Annotated[Tensor, "N D"],
    probabilities: Annotated[Predictions, "N C"] | None = None,
    labels: Annotated[Tensor, "L"] | None = None,
    weights: Annotated[Tensor, "N"] | None = None,
    *,
    spec: ProbCover = ProbCover(),
    context: Tensor,
    choice: Choice,
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers the row whose ball holds most rows that no ball of a labelled or chosen row holds.

        B(x) = {y: |x - y| < delta};  covered = union of B over context and picks
        pick argmax over x of sum of w_y over y in B(x) not covered;  repeat

    embeddings: (n, D). weights: (n,), mass w of a row, by default 1. context: (l,). choice: k picks among (n,) rows.
    Scores are the rows newly covered, or their mass; all rows have to be covered, also those that may not be chosen.
    Once nothing is left that a candidate could cover, rows farthest from all that is labelled or chosen follow, with a
    warning; their scores are those distances.

    Without delta it is the largest at which the part `purity` of all balls holds rows of one label alone, by labels
    that k-means gives the pool, with as many clusters as classes. labels: (L,) classes of labelled rows, and
    probabilities: (n, C), are read for the number of classes alone.

    Whether a row is in a ball is decided in float64 where it is close, and masses are added exactly.

    >>> line = torch.tensor([[0.0], [1.0], [2.0], [7.0], [8.0], [20.0]])
    >>> from queryselect_service.shards import Whole
    >>> choice, none = Choice(3, torch.ones(6, dtype=torch.bool), Whole(6)), torch.tensor([], dtype=torch.int64)
    >>> prob_cover(line, spec=ProbCover(1.5, normalize=False), context=none, choice=choice, pool=Whole(6)).indices
    tensor([1, 3, 5])
    """
    points = Points(embeddings, pool, normalize=spec.normalize)
    radius = spec.delta
    if radius is None:
        clusters = kmeans.k_means(points, _classes(spec, labels, probabilities), seed)
        radius = pure_radius(points, clusters.labels, spec.purity)
    mass, unit = _whole(weights, points)
    cover = _Cover(points, Neighbourhoods(points, radius), mass, context)
    first = cover.degree.clone()

    indices, scores = [context[:0]], [first[:0]]
    late: list[Tensor] = []  # picks when nothing was left to cover
    farthest: FarthestFirst | None = None
    made, told = 0, 0  # told: picks that it knows of
    while made < choice.k:
        pool.progress(made, choice.k)
        row, score, pick = choice.best(cover.degree, embeddings)
        if choice.ends(score):
            break
        if score > 0:
            choice.take(row)
            cover.take(row, pick)
            rows, found = row[None], score[None] * unit
        else:
            if farthest is None:
                farthest = FarthestFirst(points, choice)
                farthest.add_rows(context)
            farthest.add_picks(torch.cat(indices)[told:])
            told = made
            # One by one where rows that cover something may be free again.
            rows, found = farthest.pick(1 if choice.reopens else choice.k - made)
            if not len(rows):
                break
            late.append(rows)
        indices.append(rows)
        scores.append(found)
        made += len(rows)
        if late and not choice.reopens:
            break

    notices = points.inert_rows() if spec.normalize else ()
    if late:
        extra = torch.cat(late)
        message = f"{len(extra)} picks cover nothing new at delta {radius:g}: they are farthest from all others"
        notices = (*notices, Notice(NoticeCode.COVERED, message, extra))
    return Selection(torch.cat(indices), torch.cat(scores), lambda: first * unit, notices)


class _Cover:
    """Which rows are covered, (n,), and what mass a row would newly cover: degree (n,)."""

    def __init__(self, points: Points, balls: Neighbourhoods, mass: Tensor, context: Tensor) -> None:
        self._points, self._balls, self._mass = points, balls, mass
        self._covered = torch.zeros_like(mass, dtype=torch.bool)
        for (block,) in parts(points.pool, points.embeddings[context]):
            self._covered |= balls.around(block)
        most = _edges(points.pool.size, points.embeddings.shape[1], points.embeddings.element_size())
        self.degree, self._graph = balls.graph(torch.where(self._covered, 0.0, mass), most)

    def take(self, row: Tensor, pick: Tensor) -> None:
        """Covers the ball of a global row (), that is (D,)."""
        ball = self._balls.around(pick[None]) if self._graph is None else torch.zeros_like(self._covered)
        if self._graph is not None:
            ball[self._graph.around(row[None])[0]] = True
        new = (ball & ~self._covered).nonzero().squeeze(1)
        self._covered[new] = True
        self._forget(new)

    def _forget(self, rows: Tensor) -> None:
        """Takes rows (r,) of this slice, and those of all others, from degrees. A row is taken once."""
        pool, mass = self._points.pool, -self._mass[rows]
        if self._graph is None:
            for centres, theirs in parts(pool, self._points.embeddings[rows], mass):
                self._balls.add(self.degree, centres, theirs)
            return
        for numbers, theirs in pool.blocks(pool.offset + rows, mass):
            for span in pool.spans(len(numbers), EDGE_BYTES * 64):
                near, at = self._graph.around(numbers[span])
                self.degree.index_add_(0, near, theirs[span][at])


def _edges(rows: int, dims: int, item: int) -> int:
    """The edges that are kept, at the most."""
    return GRAPH * rows * dims * item // EDGE_BYTES


def _classes(spec: ProbCover, labels: Tensor | None, probabilities: Predictions | None) -> int:
    """How many classes there are."""
    if spec.num_classes is not None:
        return spec.num_classes
    if labels is None:
        assert probabilities is not None  # see check_inputs
        return max(2, probabilities.shape[1])
    classes = len(torch.unique(labels[labels >= 0]))
    if classes < 2:
        words = f"to estimate delta prob_cover needs two classes or more; pool.labels has {classes}"
        raise InvalidInput(f"{words}: give num_classes, or delta", field="pool.labels")
    return classes


def _whole(weights: Tensor | None, points: Points) -> tuple[Tensor, float]:
    """Masses (n,) as whole numbers, float64, and their unit, a power of two."""
    if weights is None:
        return torch.ones(len(points.embeddings), dtype=torch.float64, device=points.embeddings.device), 1.0
    _, largest = points.pool.best(weights.double())
    bits = math.frexp(float(largest))[1] + math.ceil(math.log2(points.pool.size)) - MASS_BITS
    unit = 2.0 ** min(max(bits, -1022), 1023 - MASS_BITS)
    return (weights.double() / unit).round_(), unit
