"""PowerBALD: stochastic batch acquisition."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput
from queryselect_service.maths.noise import NOISE_BYTES, uniform
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, on_scores

#: The step of the noise: 0 is that of `random`, whose picks with the same seed these must not resemble.
NOISE = 1


class PowerForm(enum.StrEnum):
    """How scores are perturbed."""

    POWER = "POWER"
    SOFTMAX = "SOFTMAX"
    SOFTRANK = "SOFTRANK"


@dataclass(frozen=True)
class PowerBald(Spec):
    """Its parameters."""

    base: str = parameter("bald", "The canonical name of the pointwise strategy whose scores are perturbed")
    form: PowerForm = parameter(
        PowerForm.POWER, "Whether a row is drawn by a power of its score, by its exponential, or by a power of its rank"
    )
    beta: float = parameter(1.0, "The power, or the factor of the exponential; 0 draws uniformly", low=0, high=1e6)


@on_scores(
    PowerBald,
    base_parameter="base",
    seeded=True,
    cost="that of the base, and O(N) time and memory; SOFTRANK sorts",
    memory=lambda sizes, spec: (
        (62 if spec.form is PowerForm.SOFTRANK else 30) * sizes.N + min(34 * sizes.N, SPAN_BYTES) + 96 * sizes.k
    ),
    citation="Kirsch, Farquhar, Atighehchian, Jesson, Branchaud-Charron and Gal, Stochastic batch acquisition: a "
    "simple baseline for deep active learning (TMLR 2023), arXiv:2106.12059, table 1",
)
def power_bald(scores: Tensor, *, choice: Choice, seed: int, pool: Shards, spec: PowerBald = PowerBald()) -> Tensor:
    """Draws rows without replacement by their score under another strategy: Gumbel noise, and the k highest.

        POWER: u = β ln s + ε,  SOFTMAX: u = β s + ε,  SOFTRANK: u = -β ln rank(s) + ε
        ε ~ Gumbel(0, 1) by (seed, row)

    scores: (n,) of the base, at least 0 for POWER. A score of 0 counts as the least positive number, so such rows come
    last and in random order. Ranks count from 1 among all rows that may be chosen, equal scores having the same, their
    mean. Returns the perturbed scores (n,), by which rows are picked.

    >>> from queryselect_service.shards import Whole
    >>> s = torch.tensor([0.5, 0.0, 0.25]).double()
    >>> choice = Choice(2, torch.ones(3, dtype=torch.bool), Whole(3))
    >>> power_bald(s, choice=choice, seed=0, pool=Whole(3)).argmin()
    tensor(1)
    """
    negative = choice.allowed & (scores < 0)
    if spec.form is PowerForm.POWER and bool(pool.sum(negative.count_nonzero()) > 0):
        raise InvalidInput("form POWER needs scores of at least 0, which those of the base are not", field="form")
    values = _ranks(scores, choice.allowed, pool) if spec.form is PowerForm.SOFTRANK else scores
    found = torch.empty_like(scores)
    for span in pool.spans(len(scores), NOISE_BYTES):
        rows = torch.arange(pool.offset + span.start, pool.offset + span.stop, device=scores.device)
        gumbel = uniform(seed, rows, NOISE).log_().neg_().log_().neg_()
        found[span] = _exponents(values[span], spec.form).mul(spec.beta).add_(gumbel)
    return found


def _exponents(values: Tensor, form: PowerForm) -> Tensor:
    """What β times of it is added to noise: scores (s,), their logarithms, or minus those of ranks (s,)."""
    if form is PowerForm.SOFTMAX:
        return values
    if form is PowerForm.SOFTRANK:
        return values.log().neg_()
    return values.clamp_min(0).log_().clamp_(min=math.log(torch.finfo(values.dtype).tiny))


def _ranks(scores: Tensor, allowed: Tensor, pool: Shards) -> Tensor:
    """The ranks (n,) of the scores (n,) among the allowed rows of all slices, the highest 1, equal ones their mean."""
    blocks = [block for (block,) in pool.blocks(scores[allowed])]
    ascending = torch.cat([scores[:0], *blocks]).sort().values  # limits may allow no row at all
    above = len(ascending) - torch.searchsorted(ascending, scores, right=True)
    as_high = len(ascending) - torch.searchsorted(ascending, scores)
    return (above + as_high + 1).double() / 2
