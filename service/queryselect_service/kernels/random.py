"""Uniform sampling without replacement, the baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec
from queryselect_service.strategy import ScoreKind, Selection, strategy


class Random(Spec):
    """Has no parameters."""


@strategy(
    Random,
    kind=ScoreKind.KEY,
    seeded=True,
    cost="O(N) time, O(N) memory",
    memory=lambda sizes, _: 38 * sizes.N + 96 * sizes.k,  # row numbers, their bits mixed, keys, ranking
    work=lambda sizes: 20.0 * sizes.N,
    citation="Efraimidis and Spirakis, Weighted random sampling with a reservoir (2006), all weights equal",
)
def random(*, k: int, candidates: Tensor, seed: int, pool: Shards) -> Selection:
    """Draws rows uniformly without replacement: the k highest of one uniform key per row.

        u_i ~ U(0, 1) by (seed, row i);  picks = top-k of u

    candidates: (n,) bool. Scores are the keys. The order of the picks is random too, so a shorter budget is a prefix.

    >>> from queryselect_service.shards import Whole
    >>> random(k=2, candidates=torch.ones(5, dtype=torch.bool), seed=0, pool=Whole(5)).indices.shape
    torch.Size([2])
    """
    rows = torch.arange(pool.offset, pool.offset + len(candidates), device=candidates.device)
    keys = uniform(seed, rows)  # (n,)
    indices, scores = pool.top(keys, k, candidates)
    return Selection(indices, scores, lambda: keys)
