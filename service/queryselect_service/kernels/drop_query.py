"""DropQuery: rows whose predicted class changes under dropout, spread by k-means."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths import kmeans
from queryselect_service.maths.distances import Points
from queryselect_service.maths.farthest import farthest_rows
from queryselect_service.maths.noise import uniform
from queryselect_service.maths.predictions import Samples
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, Notice, NoticeCode, ScoreKind, Selection, Sizes, Task, strategy

#: Candidates per pick that are enough.
ENOUGH = 25
#: The step of the noise of the first pass, far from those of others with the same seed.
NOISE = 1 << 33
#: Bytes per entry that a pass touches: its number, the noise of it and what that is made of.
PASS_BYTES = 160


@dataclass(frozen=True)
class DropQuery(Spec):
    """Its parameters."""

    passes: int = parameter(3, "The passes with dropout, where head_weights are given", low=1, high=1000, unit="passes")
    dropout: float = parameter(0.75, "The part of a row's entries that a pass leaves out", low=0, high=1)
    normalize: bool = parameter(True, "Whether every row is scaled to unit Euclidean length before it is clustered")

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput where neither a head nor samples are given."""
        super().check_inputs(shapes, returns)
        if "head_weights" not in shapes and "samples" not in shapes:
            words = "drop_query needs pool.head_weights of shape (C D), or pool.samples of shape (N K C)"
            raise InvalidInput(f"{words}; the request has neither", field="pool.head_weights")


def _memory(sizes: Sizes, spec: DropQuery) -> int:
    """What k-means takes; before it, a pass over a span of rows and the head."""
    clustering = kmeans.memory(sizes.N, sizes.D, sizes.item, sizes.k, normalize=spec.normalize)
    return clustering + 24 * sizes.N + 8 * sizes.C * sizes.D + 2 * 8 * sizes.k * sizes.D


@strategy(
    DropQuery,
    kind=ScoreKind.DISTANCE,
    pool_scores=False,
    seeded=True,
    tasks=(Task.MULTICLASS,),
    cost="O(N D C) time per pass, O(N D k) per iteration of k-means, at most 100 of them; O(N D + k D) memory",
    memory=_memory,
    work=lambda sizes: float(sizes.N) * sizes.D * (60 + 4 * sizes.C + kmeans.ITERATIONS * sizes.k),
    citation="Gupte, Aklilu, Nirschl and Yeung-Levy, Revisiting active learning in the era of vision foundation models "
    "(TMLR 2024), arXiv:2401.14555, section 4; thresholds as in the authors' code",
)
def drop_query(
    embeddings: Annotated[Tensor, "N D"],
    head_weights: Annotated[Tensor, "C D"] | None = None,
    head_bias: Annotated[Tensor, "C"] | None = None,
    samples: Annotated[Samples, "N K C"] | None = None,
    *,
    choice: Choice,
    spec: DropQuery = DropQuery(),
    context: Tensor,
    seed: int = 0,
    pool: Shards,
) -> Selection:
    """Prefers rows whose class changes when their entries are left out, one near each of as many centres as picks.

        Z = { x : sum over passes of [argmax W(m ∘ x) + (1 - dropout) b  !=  argmax Wx + b] > t };  k-means on Z

    embeddings: (n, D), on which head_weights W (C, D) and head_bias b (C,), by default 0, make a linear model; m keeps
    an entry with probability 1 - dropout, by (seed, row, entry, pass). Without a head, samples (n, K, C) are the passes
    instead, against the class of their mean. context: (l,) rows that count as labelled. choice: k picks among (n,)
    rows, of which Z is made.

    t is half of the passes, and less while Z has fewer than 25 k rows, but not below 0. Picks and scores are those of
    k_means on Z: minus the distance to the centre. Where Z has fewer than k rows, those follow that are farthest from
    everything labelled or picked, with a warning; their scores are these distances.

    >>> from queryselect_service.shards import Whole
    >>> rows, head = torch.tensor([[9.0, 0.0], [3.0, 2.9], [7.0, 0.0], [8.0, 0.0]]), torch.eye(2)
    >>> four, spec = Whole(4), DropQuery(passes=20)
    >>> choice = Choice(1, torch.ones(4, dtype=torch.bool), four)
    >>> drop_query(rows, head, choice=choice, spec=spec, context=torch.tensor([0]), pool=four).indices
    tensor([1])
    """
    if head_weights is not None:
        changed, passes = _changes(embeddings, head_weights, head_bias, spec, seed, pool), spec.passes
    elif samples is not None:
        changed, passes = _dissent(samples, pool), samples.shape[1]
    else:
        raise InvalidInput("drop_query needs head_weights or samples", field="pool.head_weights")
    unsettled, found = _unsettled(changed, passes, choice, pool)
    points = Points(embeddings, pool, normalize=spec.normalize)
    indices, scores = torch.empty_like(changed[:0]), torch.empty_like(points.mean[:0])
    notices = points.inert_rows() if spec.normalize else ()
    if found:
        clusters = kmeans.k_means(points, choice.k, seed, unsettled.double())
        indices, scores, warnings = kmeans.representatives(points, clusters, choice, unsettled)
        notices = (*notices, *warnings)
    if len(indices) < choice.k:
        far, distances = farthest_rows(points, choice, context, indices)
        if len(far):
            words = (
                f"the class of {found} rows changes under dropout: {len(far)} picks are the farthest of the others, "
            )
            notices = (*notices, Notice(NoticeCode.FALLBACK, f"{words}their scores the distances", far))
        indices, scores = torch.cat([indices, far]), torch.cat([scores, distances])
    return Selection(indices, scores, None, notices)


def _changes(x: Tensor, weights: Tensor, bias: Tensor | None, spec: DropQuery, seed: int, pool: Shards) -> Tensor:
    """In how many passes the class of each row (n,) is another than without dropout."""
    n, dims = x.shape
    changed = torch.zeros(n, dtype=torch.int64, device=x.device)
    head = weights.double().T  # (D, C)
    offset = torch.zeros_like(head[0]) if bias is None else bias.double()
    entries = torch.arange(dims, device=x.device)
    for span in pool.spans(n, dims * (PASS_BYTES + head.shape[1])):
        rows = x[span].double()
        plain = torch.addmm(offset, rows, head).argmax(1)
        numbers = torch.arange(pool.offset + span.start, pool.offset + span.stop, device=x.device)
        numbers = (numbers[:, None] * dims + entries).view(-1)
        for at in range(spec.passes):
            pool.check()
            kept = uniform(seed, numbers, NOISE + at).view(-1, dims) >= spec.dropout
            # Dropout divides by 1 - dropout what it keeps; here it multiplies the bias, which changes no argmax.
            logits = torch.addmm(offset * (1 - spec.dropout), rows * kept, head)
            changed[span] += logits.argmax(1) != plain
    return changed


def _dissent(samples: Samples, pool: Shards) -> Tensor:
    """How many samples give each row (n,) another class than their mean does."""
    _, count, classes = samples.shape
    dissent = torch.empty(len(samples), dtype=torch.int64, device=samples.device)
    for span in pool.spans(len(samples), 32 * count * classes):
        likeliest = samples[span].mean(1).argmax(-1)
        dissent[span] = (samples.values[span].argmax(-1) != likeliest[:, None]).sum(1)
    return dissent


def _unsettled(changed: Tensor, passes: int, choice: Choice, pool: Shards) -> tuple[Tensor, int]:
    """The rows (n,) bool whose class changes often enough, and how many there are in all slices."""
    threshold = passes // 2
    while True:
        unsettled = choice.allowed & (changed > threshold)
        found = int(pool.sum(unsettled.count_nonzero()))
        if found >= ENOUGH * choice.k or not threshold:
            return unsettled, found
        threshold -= 1
