"""Uniform sampling without replacement, the baseline."""

from __future__ import annotations

import torch

from queryselect_service.maths.noise import uniform
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec
from queryselect_service.strategy import Choice, ScoreKind, Selection, rank, strategy


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
def random(*, choice: Choice, seed: int, pool: Shards) -> Selection:
    """Draws rows uniformly without replacement: the k highest of one uniform key per row.

        u_i ~ U(0, 1) by (seed, row i);  picks = top-k of u

    choice: k picks among (n,) rows. Scores are the keys. The order of the picks is random too, so a shorter budget is a
    prefix.

    >>> from queryselect_service.shards import Whole
    >>> five = Whole(5)
    >>> random(choice=Choice(2, torch.ones(5, dtype=torch.bool), five), seed=0, pool=five).indices.shape
    torch.Size([2])
    """
    free = choice.free
    rows = torch.arange(pool.offset, pool.offset + len(free), device=free.device)
    return rank(uniform(seed, rows), choice)
