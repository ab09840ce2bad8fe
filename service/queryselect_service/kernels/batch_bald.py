"""BatchBALD: the information that a batch's labels have about the parameters, greedily."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.maths.configurations import STRETCH, Configurations
from queryselect_service.maths.information import entropy, surprise, without_noise
from queryselect_service.maths.predictions import Samples
from queryselect_service.shards import SPAN_BYTES, Shards
from queryselect_service.spec import Disagreement, parameter
from queryselect_service.strategy import (
    Choice,
    Notice,
    NoticeCode,
    ScoreKind,
    Selection,
    Sizes,
    strategy,
)

#: Joint probabilities that are in memory at once: 4 MB of float64.
TILE = 1 << 19
#: A probability below this counts as none: what is made of it may be a denormal number, which takes a hundred times as
#: long as another.
LEAST_PROBABILITY = 1e-200
#: Gains closer than this, in nats, are ties: sums of the same numbers in another order differ by less.
TIE = 1e-12
#: Rows whose gain is looked at first in a step, to know early what others have to reach.
HEAD = 32
#: Of drawn configurations the parts that tell which rows can't be the best, where there are enough of them.
PARTS, ENOUGH = (64, 16, 4), 128
#: The part of the best gain that configurations may tell which the sieve leaves out.
REST = 0.1
#: Standard errors by which a row must be behind to be left out.
ERRORS = 5.0
#: The part of ln K beyond which a batch is said to know all that the parameter samples can tell.
SATURATION = 0.95


@dataclass(frozen=True)
class BatchBald(Disagreement):
    """Its parameters."""

    num_samples: int = parameter(
        10_000,
        "The configurations of the batch's labels that are summed over; drawn where there are more",
        low=1,
        high=1_000_000,
        unit="configurations",
    )


def _memory(sizes: Sizes, spec: BatchBald) -> int:
    outcomes = sizes.C * (2 if sizes.multilabel else 1)
    configurations = max(spec.num_samples, sizes.K) * sizes.K
    stretch = min(configurations, STRETCH)
    row = max(1, sizes.K * outcomes)
    chunk = max(row, min(sizes.N * row, TILE))
    per_row = 8 * sizes.K + 48
    return sizes.N * per_row + 8 * (3 * configurations + 4 * stretch + 5 * chunk + 4 * TILE) + sizes.k * 8 * row


@strategy(
    BatchBald,
    kind=ScoreKind.GAIN,
    seeded=True,
    cost="O(N K C num_samples) time a pick at the most, of which few rows take part; O(N K + K num_samples) memory",
    memory=_memory,
    work=lambda sizes: float(sizes.N) * sizes.K * sizes.C * 1000 * max(1, sizes.k),
    citation="Kirsch, van Amersfoort and Gal, BatchBALD: efficient and diverse batch acquisition for deep Bayesian "
    "active learning (NeurIPS 2019), arXiv:1906.08158, equations 8 to 13 and algorithm 1",
)
def batch_bald(
    samples: Annotated[Samples, "N K C"],
    *,
    choice: Choice,
    seed: int,
    pool: Shards,
    spec: BatchBald = BatchBald(),
) -> Selection:
    """Greedily chooses the rows whose labels, together, tell most about the parameters, in nats.

        gain(n | S) = I(y_n; θ | y_S) = E_{y_S} [ H(sum_k w_k p_nk) - sum_k w_k H(p_nk) ],  w_k = p(θ_k | y_S)

    The expectation is over all configurations of the batch's labels as long as these are at most num_samples, and then
    over about as many that are drawn, equally many from each parameter sample. Every term is at least 0, and no two
    large sums are subtracted: the paper's estimate (equation 13) of the same number has several times the spread.

    samples: (n, K, C) under the same K parameter samples for every row: number k must be one model throughout (one
    dropout mask, one ensemble member), or the score means nothing. In a multi-label task a row's labels are a vector of
    L, whose information is added up over the labels, as if they told different things; what the batch knows is that of
    whole vectors. Scores are the gains; pool_scores those of the first step, BALD. No more than ln K nats can be known:
    SATURATED tells where a batch comes near that.

    >>> from queryselect_service.shards import Whole
    >>> one = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    >>> other = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    >>> pool = Whole(3)
    >>> choice = Choice(2, torch.ones(3, dtype=torch.bool), pool)
    >>> batch_bald(Samples(torch.tensor([one, one, other])), choice=choice, seed=0, pool=pool).indices
    tensor([0, 2])
    """
    members = samples.shape[1]
    entropies, first = _bald(samples, pool)
    bounds, gains = first.clone(), first  # at least every row's gain; and the gain, or an upper bound that is too low
    batch, tail = (Configurations(members, spec.num_samples, seed, samples.device, pool.check) for _ in range(2))
    picks: list[tuple[Tensor, Tensor]] = []
    known: list[Tensor] = []
    for number in range(choice.steps):
        pool.progress(number, choice.steps)
        if number:
            gains = _Step(samples, entropies, batch, tail, choice, pool).gains(bounds)
        _, top = choice.best(gains)
        row, score, p = choice.best(torch.where(gains >= top - TIE, top, gains), samples.values)
        if choice.ends(score):
            break
        choice.take(row)
        picks.append((row, score))
        known.append(batch.information + score)
        if number + 1 < choice.steps:
            batch.add(_variables(samples.of(p[None]))[0])
            if number and batch.exact:
                tail.add(_variables(samples.of(p[None]))[0])
    rows, scores = (torch.stack(each) for each in zip(*picks, strict=True)) if picks else (first[:0].long(), first[:0])
    notices = _saturation(rows, torch.stack(known), members) if known else ()
    return Selection(rows, scores, lambda: first, notices)


def _variables(p: Tensor) -> Tensor:
    """Distributions (n, K, C) or (n, K, L, 2) as (n, K, V, c): V variables of c values."""
    return p[:, :, None] if p.dim() == 3 else p


def _bald(samples: Samples, pool: Shards) -> tuple[Tensor, Tensor]:
    """The entropy of every row's label under each parameter sample, (n, K), and its information about them, (n,)."""
    n, members = samples.shape[:2]
    entropies = torch.empty(n, members, dtype=torch.float64, device=samples.device)
    gains = torch.empty(n, dtype=torch.float64, device=samples.device)
    for span, p in _chunks(samples, torch.arange(n, device=samples.device), pool, 1):
        own = surprise(p).sum(-1)  # (b, K, V)
        entropies[span] = own.sum(-1)
        total = entropy(p.mean(1))  # (b, V)
        gains[span] = without_noise(total - own.mean(1), total).sum(-1)
    return entropies, gains


def _chunks(samples: Samples, rows: Tensor, pool: Shards, configurations: int) -> Iterator[tuple[slice, Tensor]]:
    """The distributions (b, K, V, c) of some rows (r,) of this place, a stretch of them at a time."""
    outcomes = samples.shape[2] * (2 if samples.multilabel else 1)
    # A stretch is at most TILE numbers, and at most SPAN_BYTES of joint probabilities.
    row_bytes = outcomes * max(8 * configurations, SPAN_BYTES // TILE * samples.shape[1])
    for span in pool.spans(len(rows), row_bytes):
        p = _variables(samples[rows[span]])
        yield span, p.masked_fill_(p < LEAST_PROBABILITY, 0)


class _Step:
    """One greedy step: which rows have their gain computed, and the gains.

    A gain never grows with the batch: what a row had in an earlier step, or has given a part of the batch, bounds it.
    Drawn configurations estimate both, so there a row counts as behind when it is so by several standard errors.
    """

    def __init__(
        self,
        samples: Samples,
        entropies: Tensor,
        batch: Configurations,
        tail: Configurations,
        choice: Choice,
        pool: Shards,
    ) -> None:
        """batch: all picks so far. tail: those but the first, while both are exact."""
        self._samples, self._entropies, self._batch, self._tail = samples, entropies, batch, tail
        self._choice, self._pool = choice, pool

    def gains(self, bounds: Tensor) -> Tensor:
        """The gains (n,) of the rows that may be the best, -inf of others. bounds: (n,), lowered where that is known.

        The best free row is among them, and every row that is as good.
        """
        found, free, pool = torch.full_like(bounds, -torch.inf), self._choice.free, self._pool
        done, errors = torch.zeros_like(free), torch.zeros_like(bounds)
        count, sifted = HEAD, False
        while True:
            _, top, slack, p = self._choice.best(found, errors, self._samples.values)
            doubtful = free & ~done & (bounds + ERRORS * slack >= top - TIE)
            if not int(pool.sum(doubtful.count_nonzero())):
                return found
            rows = doubtful.nonzero().squeeze(1)
            if count > HEAD and not sifted:
                self._sift(rows, bounds, top, p)
                done[rows] = bounds[rows] < top - TIE
                sifted = True
                continue
            rows = rows[bounds[rows].topk(min(count, len(rows))).indices]
            found[rows], errors[rows] = self._evaluate(rows)
            bounds[rows] = torch.minimum(bounds[rows], found[rows] + ERRORS * errors[rows])
            done[rows] = True
            count *= 2

    def _sift(self, rows: Tensor, bounds: Tensor, top: Tensor, p: Tensor) -> None:
        """Lowers the bounds of rows (r,) by less work than their gains would take.

        top, p: the gain of the best row so far, and its samples as sent (K, C).
        """
        batch = self._batch
        if batch.exact:
            if len(self._tail) * 4 <= len(batch):
                given_tail, _ = self._evaluate(rows, self._tail)
                bounds[rows] = torch.minimum(bounds[rows], given_tail)
            return
        lead = _variables(self._samples.of(p[None]))
        open_ones, rest = self._open(REST * float(top) / lead.shape[2])
        rest, share = rest * lead.shape[2], len(open_ones) / len(batch)
        for part in PARTS if share > 0.5 else (*PARTS, 1):
            count = len(open_ones) // part
            if count < ENOUGH:
                continue
            posteriors = batch.posteriors[open_ones[:count]]
            lead_gain = _conditional_gains(posteriors, lead, surprise(lead).sum((2, 3)))  # (m, 1)
            errors = share * ERRORS / math.sqrt(count) if part > 1 else 0.0
            # Eight times as many, for a stretch of an eighth: these joint probabilities are not made in tiles.
            for span, some in _chunks(self._samples, rows, self._pool, 8 * count):
                behind = _conditional_gains(posteriors, some, self._entropies[rows[span]]) - lead_gain  # (m, b)
                spread, mean = torch.std_mean(behind, dim=0)
                best = top + share * mean + errors * spread + rest
                bounds[rows[span]] = torch.minimum(bounds[rows[span]], best)
            rows = rows[bounds[rows] >= top - TIE]

    def _open(self, little: float) -> tuple[Tensor, float]:
        """The drawn configurations (m,) that leave something open, in their order, and what the others can tell.

        A label tells no more than what its configuration leaves open of the parameters: where a batch knows nearly all,
        most configurations tell nothing. little: the most that those left out may tell together, per variable.
        """
        left, order = self._batch.left.sort(descending=True)
        rest = left.flip(0).cumsum(0).flip(0) / len(left)  # (M,), what this one and all after it can tell
        count = int((rest > little).count_nonzero())
        return order[:count].sort().values, float(rest[count]) if count < len(rest) else 0.0

    def _evaluate(self, rows: Tensor, given: Configurations | None = None) -> tuple[Tensor, Tensor]:
        """The gains (r,) of some rows, and their standard errors, 0 where all configurations are there."""
        given = given or self._batch
        gains, squares = (torch.zeros(len(rows), dtype=torch.float64, device=rows.device) for _ in range(2))
        for span, p in _chunks(self._samples, rows, self._pool, len(given)):
            own, height = self._entropies[rows[span]], max(1, TILE // p[:, 0].numel())
            for start in range(0, len(given), height):
                self._pool.check()
                some = slice(start, start + height)
                found = _conditional_gains(given.posteriors[some], p, own)
                gains[span] += given.weights[some] @ found
                if not given.exact:
                    squares[span] += given.weights[some] @ found.square()
        errors = (squares - gains.square()).clamp_(min=0).div_(len(given)).sqrt_() if not given.exact else squares
        return without_noise(gains, self._entropies[rows].mean(1)), errors


def _conditional_gains(posteriors: Tensor, p: Tensor, entropies: Tensor) -> Tensor:
    """H(sum_k w_mk p_nk) - sum_k w_mk H(p_nk), (m, b), summed over variables.

    posteriors: (m, K). p: (b, K, V, c). entropies: (b, K), summed over variables.
    """
    columns = p.transpose(0, 1).flatten(1)  # (K, b V c)
    joint = surprise(posteriors @ columns).view(len(posteriors), len(p), -1)
    return joint.sum(-1) - posteriors @ entropies.T


def _saturation(rows: Tensor, known: Tensor, members: int) -> tuple[Notice, ...]:
    """What there is to say where the picks (k,) know, one after the other, nearly all that there is to know."""
    most = math.log(members)
    full = (known >= SATURATION * most).nonzero().squeeze(1).tolist()
    if not full:
        return ()
    first, told = full[0], float(known[full[0]])
    message = (
        f"the first {first + 1} of {len(rows)} picks tell {told:.3g} of the at most ln K = {most:.3g} nats that "
        f"{members} parameter samples can tell apart; what later picks add is hardly more than noise"
    )
    return (Notice(NoticeCode.SATURATED, message, rows[first:]),)
