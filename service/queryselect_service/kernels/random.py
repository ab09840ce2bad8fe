"""Uniform sampling without replacement, the baseline."""

from __future__ import annotations

import torch

from queryselect_service.maths.noise import NOISE_BYTES, uniform
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec
from queryselect_service.strategy import Choice, ScoreKind, Selection, rank, strategy


class Random(Spec):
    """Has no parameters."""


@strategy(
    Random,
    kind=ScoreKind.KEY,
    seeded=True,
    cost="O(N) time, O(N) memory",
    # Keys and their ranking; row numbers of a span, and their bits mixed.
    memory=lambda sizes, _: 12 * sizes.N + min(24 * sizes.N, SPAN_BYTES // 2) + 96 * sizes.k,
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
    keys = torch.empty_like(choice.free, dtype=torch.float64)
    for span in pool.spans(len(keys), NOISE_BYTES):
        rows = torch.arange(pool.offset + span.start, pool.offset + span.stop, device=keys.device)
        keys[span] = uniform(seed, rows)
    return rank(keys, choice)
