"""Greedy minimisation of tr(M^-1 F) where a row's Fisher information is σ² x xᵀ, exactly and several picks per pass.

There may be L such problems at once, one per label, whose gains add up. With u = A x_s/√(τ_s + g_s) and
ζ = AFu - ½ u uᵀFu, taking s changes A by -u uᵀ and B = AFA by -u ζᵀ - ζ uᵀ, so that for every row

    g = xᵀAx  falls by  (x.u)²,    h = xᵀBx  falls by  2 (x.u)(x.ζ),    gain = Σ_l h/(τ + g),  τ = 1/σ².

A pass over the pool is the cost of a pick. To make several picks per pass they are guessed: the rows of highest gain
compete among themselves; then one product with all their u and ζ gives the gains that every other row had at each of
those steps, and the guesses stand up to the first step at which another row was as good. That product may be one in
float32, with bounds of its errors: the few rows that reach the best by them are computed in float64. (Huseljic et al.
2024 for the approximation; the guessing is ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.fisher import (
    AT_ONCE,
    DRIFT,
    FLOPS_PER_BYTE,
    ROUNDING,
    TIE,
    Design,
    Forward,
    Rows,
    backward_entries,
    inverse_of_root,
    leader,
    product,
    refuse_overflow,
    root_of,
)
from queryselect_service.maths.predictions import Predictions
from queryselect_service.maths.sieve import Sieve
from queryselect_service.shards import Shards

#: Rows that compete at first: a part of all, but at least and at most so many.
TEAM_PART, LEAST_TEAM, MOST_TEAM = 32, 256, 1024
#: Picks that are guessed at once: at first, at least and at most.
DEPTH, LEAST_DEPTH, MOST_DEPTH = 16, 4, 64
#: Entries that the products of one pass may have.
PRODUCTS = 1 << 25
#: Rows that may be as good as a guess by the bounds of float32, of which there are too many from here on.
MOST_CONTENDERS = 4096
#: Rows whose steps are replayed at once: enough for every core, few enough to stay in their caches.
REPLAYED = 65_536

#: The most dimensions whose eigenvectors are a matter of 100 ms.
TURNED = 768
#: The part of the largest eigenvalue below which rounding leaves too few digits of a sum of others.
SMALL = 2.0**-8

#: What the picks' matrices are made of, and along which dimension picks lie there.
PARTS = (("x", 0), ("weights", 1), ("u", 2))

#: The variances σ² (m, L) of rows' predictions.
Variances = Callable[[Predictions], Tensor]


@dataclass
class _Guess:
    """Picks (R,) with their gains when chosen (R,), embeddings (R, D), σ (L, R), and directions u and ζ (L, D, R).

    products: (2, R, L, n), every row's x.u and x.ζ, once they are known.
    """

    rows: Tensor
    scores: Tensor
    x: Tensor
    weights: Tensor
    u: Tensor
    zeta: Tensor
    products: Tensor

    def directions(self) -> Tensor:
        """All u and ζ: (2, L, D, R)."""
        return torch.stack([self.u, self.zeta])

    @property
    def low(self) -> Tensor:
        """The gains (R,) from which on a row ties."""
        return self.scores * (1 - TIE)

    def beaten_by(self, gains: Tensor, rows: Tensor) -> Tensor:
        """Whether the picks are, at their steps, by rows (m,) of gains (R, m): (R, m). A tie goes to the lower row."""
        high = self.scores * (1 + 2 * TIE)
        return torch.where(rows < self.rows[:, None], gains >= self.low[:, None], gains > high[:, None])

    def head(self, count: int) -> _Guess:
        """The first picks, without products."""
        return _Guess(
            self.rows[:count],
            self.scores[:count],
            self.x[:count],
            self.weights[:, :count],
            self.u[..., :count].clone(),  # of their own, so that the rest can go
            self.u.new_empty(0),
            self.u.new_empty(0),
        )


class _Steps:
    """The directions u and ζ (L, D, R) of picks among a few rows, one after the other; A and B stay as they are."""

    def __init__(
        self, x: Tensor, a: Tensor, b: Tensor, exact: tuple[Tensor, Tensor] | None, picks: int, pool: Shards
    ) -> None:
        """x: (T, D). a, b: A and B (L, D, D). exact: S and SᵀFS where A = S Sᵀ, which lose fewer digits."""
        self._x, self._a, self._b, self._exact, self._pool = x, a, b, exact, pool
        self._y = None if exact is None else torch.cat([product(x[None], s[None], pool) for s in exact[0]])  # (L, T, D)
        self.u, self.zeta = a.new_empty(*a.shape[:2], picks), a.new_empty(*a.shape[:2], picks)
        self._p, self._q = (a.new_empty(len(a), len(x), picks) for _ in range(2))  # all rows' x.u and x.ζ
        self._count = 0

    def take(self, at: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x.u and x.ζ (L, T) of all rows for the pick at (1,). weight: (L, 1), 1/√(τ + g)."""
        self._pool.check()
        row = self._x.index_select(0, at).T  # (D, 1)
        if self._y is None or self._exact is None:
            ax, bx = self._a @ row, self._b @ row  # (L, D, 1)
            products = self._x @ torch.cat([ax, bx], dim=2)  # (L, T, 2)
        else:
            half, middle = self._exact
            y = self._y.index_select(1, at).mT  # (L, D, 1)
            both = torch.cat([y, middle @ y], dim=2)
            products, (ax, bx) = self._y @ both, (half @ both).chunk(2, dim=2)
        done = slice(0, self._count)
        u, zeta, p, q = self.u[..., done], self.zeta[..., done], self._p[..., done], self._q[..., done]
        ps, qs = p.index_select(1, at).mT, q.index_select(1, at).mT  # (L, count, 1)
        weight = weight[..., None]
        # What earlier picks took from A x and B x = A F A x, for directions and for the products with all rows.
        new_u, new_p = weight * (ax - u @ ps), weight * (products[..., :1] - p @ ps)
        new_w, new_q = weight * (bx - u @ qs - zeta @ ps), weight * (products[..., 1:] - p @ qs - q @ ps)
        half_ufu = weight * new_q.index_select(1, at) / 2  # (L, 1, 1)
        now = self._count
        self.u[..., now], self.zeta[..., now] = new_u[..., 0], (new_w - half_ufu * new_u)[..., 0]
        self._p[..., now], self._q[..., now] = new_p[..., 0], (new_q - half_ufu * new_p)[..., 0]
        self._count += 1
        return self._p[..., now], self._q[..., now]


class _Lengths:
    """One label's g = |y|² and h = yᵀ(SᵀFS)y of rows, y = Sᵀx.

    Lengths lose fewer digits than xᵀAx would, where A is large but not along x.
    """

    def __init__(self, half: Tensor, middle: Tensor, rooms: Tensor) -> None:
        """half: S (D, D), upper triangular, A = S Sᵀ. middle: SᵀFS (D, D). rooms: (2, m, D), for m rows at once."""
        self._half, self._rooms = half, rooms
        self._upper = middle.triu() + middle.triu(1)  # yᵀ middle y = yᵀ upper y
        self._turned, self._top = len(half) <= TURNED, half.new_zeros(())
        if self._turned:
            refuse_overflow(middle)
            values, vectors = torch.linalg.eigh(middle)
            self._top = values[-1]
            # With SᵀFS = T diag(λ) Tᵀ and z = Tᵀy, g = Σ z² and h = Σ λ z².
            self._turn, self._sums = half @ vectors, torch.stack([torch.ones_like(values), values.clamp_min(0)], dim=1)

    def quickly(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gives g and h (m,) of rows x (m, D), where D is not large by one product."""
        if not self._turned:
            return self.surely(x)
        z = torch.mm(x, self._turn, out=self._rooms[0, : len(x)])
        return (z.square_() @ self._sums).unbind(1)

    def unsure(self, g: Tensor, h: Tensor) -> Tensor:
        """Of which rows (n,) that loses digits: small eigenvalues are as wrong as large ones."""
        return h < SMALL * self._top * g

    def surely(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gives the same by two products."""
        y, z = self._rooms[:, : len(x)]
        _times_upper(x, self._half, y)
        _times_upper(y, self._upper, z)
        return torch.linalg.vecdot(y, y), torch.linalg.vecdot(z, y)


class RankOne:
    """The forward phase. Tensors of rows are (L, n), those of directions (L, D, r)."""

    def __init__(self, design: Design, variances: Variances, labels: int) -> None:
        self._design, self._pool, self._rows = design, design.pool, design.rows
        n, dims = self._rows.embeddings.shape
        self._like = self._rows.mass  # float64, on the device
        self.inverse_variance = self._like.new_empty(labels, n)  # τ, infinite where a row has no information
        for span in self._rows.spans(0, 8 * (labels + self._rows.predictions.shape[1])):
            self.inverse_variance[:, span] = 1 / (design.scale * variances(self._rows.predictions.at(span))).T

        def information(rows: Rows) -> Tensor:
            """Σ mass σ² x xᵀ: (L, D, D)."""
            found, room = self._like.new_zeros(labels, dims, dims), self._like.new_empty(AT_ONCE, dims)
            for span, x in rows.read(2 * labels * dims * dims, 4 * dims):
                roots = (rows.mass[span, None] * variances(rows.predictions.at(span))).sqrt_()  # (m, L)
                for label in range(labels):
                    y = torch.mul(x, roots[:, label, None], out=room[: len(x)])
                    for some in _parts(dims):  # it is symmetric
                        found[label, some, some.start :].addmm_(y[:, some].T, y[:, some.start :])
            return found.triu() + found.triu(1).mT

        self._numbers = torch.arange(self._pool.offset, self._pool.offset + n, device=self._like.device)
        self._fisher = design.total(information)
        self._matrix = design.ridge * torch.eye(dims, dtype=torch.float64, device=self._like.device).repeat(
            labels, 1, 1
        )
        if design.labeled:
            self._matrix += design.context_total(information)
        self._g, self._h = self._like.new_empty(labels, n), self._like.new_empty(labels, n)
        self._room = self._like.new_empty(0)
        self._a, self._b = torch.empty_like(self._fisher), torch.empty_like(self._fisher)
        self._exact: tuple[Tensor, Tensor] | None = None  # S and SᵀFS of A = S Sᵀ, before picks change it
        self._sieve: Sieve | None = None
        self._refresh()
        self.first = self._gains()  # (n,)

    def _refresh(self) -> None:
        """Computes A, B, g and h anew from M."""
        half = inverse_of_root(root_of(self._matrix, self._pool), self._pool).mT  # S, A = S Sᵀ
        self._exact = half, torch.empty_like(half)
        labels, dims = half.shape[:2]
        lengths, rooms = [], self._like.new_empty(2, AT_ONCE, dims)
        for label, (s, middle) in enumerate(zip(*self._exact, strict=True)):
            middle.copy_(self._product(s.T, self._fisher[label], s))
            self._a[label], self._b[label] = self._product(s, s.T), self._product(s, middle, s.T)
            lengths.append(_Lengths(s, middle, rooms))
        for span, x in self._rows.read(4 * labels * dims * dims, 4 * dims):
            for label, of in enumerate(lengths):
                self._g[label, span], self._h[label, span] = of.quickly(x)
        for of, g, h in zip(lengths, self._g, self._h, strict=True):
            unsure = of.unsure(g, h).nonzero().squeeze(1)
            for start in range(0, len(unsure), AT_ONCE):
                self._pool.check()
                few = unsure[start : start + AT_ONCE]
                g[few], h[few] = of.surely(self._rows.x(few))
        self._first_g, self._first_h = self._g.clone(), self._h.clone()
        if self._sieve is not None:
            self._sieve = self._sieve.restarted(self._first_g, self._first_h)

    def _product(self, first: Tensor, *others: Tensor) -> Tensor:
        """The product of some matrices, from the left."""
        for other in others:
            first = product(first[None], other[None], self._pool)[0]
        return first

    def _gains(self) -> Tensor:
        """Every row's gain (n,)."""
        return (self._h.clamp_min(0) / (self.inverse_variance + self._g)).sum(0)

    def _drifted(self, gains: Tensor, free: Tensor) -> bool:
        """Whether rounding could have made a row's gain wrong that may be the best."""
        errors = _rounding(1 / (self.inverse_variance + self._g), gains, self._first_g, self._first_h)
        _, best = self._pool.best(torch.where(free, gains, -torch.inf))
        wrong = free & (errors > DRIFT * best) & (2 * (gains + errors) >= best)
        return bool(self._pool.sum(wrong.any().double()))

    def _guess(self, rows: Tensor, x: Tensor, *state: Tensor, picks: int) -> _Guess:
        """Chooses among a team of rows alone, as many as rounding lets be told apart.

        rows: (T,), ascending; x: (T, D); state: see _state, (T, L) each. With a sieve there may be none; without, that
        the first can be told has been seen to.
        """
        x = x.double() * self._rows.scale
        tau, first_g, first_h, g, h = (each.T.clone() for each in state)  # (L, T)
        if self._sieve is not None:
            g, h = self._sieve.exact(x, first_g, first_h)
        free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        steps = _Steps(x, self._a, self._b, self._exact, picks, self._pool)
        chosen, scores, weights, errors = [], [], [], []
        for _ in range(picks):
            kept = 1 / (tau + g)
            gains = torch.where(free, (h.clamp_min(0) * kept).sum(0), -torch.inf)
            best = gains.max()
            wrong = _rounding(kept, gains, first_g, first_h)
            errors.append(torch.where(free & (2 * (gains + wrong) >= best), wrong, 0.0).amax() - DRIFT * best)
            at = (gains >= best - TIE * best).to(torch.int8).argmax()[None]
            chosen.append(at)
            scores.append(gains.index_select(0, at))
            weights.append(kept.index_select(1, at).sqrt())  # (L, 1), 1/√(τ + g)
            p, zeta = steps.take(at, weights[-1])
            g.addcmul_(p, p, value=-1)
            h.addcmul_(p, zeta, value=-2)
            free = free.index_fill(0, at, value=False)
        told = torch.stack(errors) <= 0
        if self._sieve is None:
            told[0] = True
        count = int(told.cumprod(0).sum())
        at = torch.cat(chosen)[:count]
        u, zeta = steps.u[..., :count], steps.zeta[..., :count]
        return _Guess(rows[at], torch.cat(scores)[:count], x[at], tau[:, at].rsqrt(), u, zeta, u[:0])

    def _projected(self, guess: _Guess) -> Iterator[slice]:
        """Multiplies all rows with all directions; yields stretches of rows as they are done."""
        labels, dims, picks = guess.u.shape
        directions = guess.directions().permute(0, 3, 1, 2).reshape(-1, dims).to(self._room.dtype)  # (2 R L, D)
        guess.products = self._room[: len(directions) * len(self._rows)].view(2, picks, labels, -1)
        flat, done = guess.products.view(len(directions), -1), 0
        read = self._rows.read if self._sieve is None else self._rows.read_single
        for some, x in read(4 * picks * labels * dims, dims + 16 * picks * labels):
            torch.mm(directions, x.T, out=flat[:, some])
            if some.stop - done >= REPLAYED or some.stop == len(self._rows):
                yield slice(done, some.stop)
                done = some.stop

    def _replayed(self, guess: _Guess, others: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The gains (R, s) of stretches of rows at every step, and where they are none, (s,).

        They have the products' type; in float32 they are too high, if anything, but for the roundings of a division and
        a sum. others: (n,), the rows that are compared; gains of others are 0.
        """
        sieve = self._sieve
        bounds = None if sieve is None else partial(sieve.bounds, sieve.until(guess.directions()))
        for some in self._projected(guess):
            below, h = self._g[:, some] + self.inverse_variance[:, some], self._h[:, some]  # τ + g
            if bounds is None:
                h, strange = h.clone(), torch.zeros_like(others[some])
            else:
                below, h, strange = bounds(some, guess.products[1, ..., some], below, h)
                h.masked_fill_(strange, 0)
            below.masked_fill_(~others[some], torch.inf)
            gains = h.new_empty(len(guess.rows), some.stop - some.start)
            for step, (p, zeta) in enumerate(zip(*guess.products[..., some], strict=True)):
                if len(h) == 1:
                    torch.div(h[0], below[0], out=gains[step])
                else:
                    gains[step] = (h.clamp_min(0) / below).sum(0)
                below.addcmul_(p, p, value=-1)
                h.addcmul_(p, zeta, value=-2)
            yield some, gains, strange | (below <= 0).any(0)

    def _accepted(self, guess: _Guess, free: Tensor) -> int:
        """How many of the picks stand: up to the first at whose step another row had as much, or more."""
        others = free.clone()
        here = guess.rows - self._pool.offset
        others[here[(here >= 0) & (here < len(free))]] = False
        if self._sieve is not None:
            return self._sifted(guess, others, self._sieve)
        beaten = torch.zeros(len(guess.rows), dtype=torch.bool, device=guess.rows.device)
        for some, gains, _ in self._replayed(guess, others):
            if bool((gains.amax(1) >= guess.low).any()):  # a tie, which goes to the lower row, or more
                beaten |= (guess.beaten_by(gains, self._numbers[some]) & others[some]).any(1)
        return self._standing(beaten)

    def _standing(self, beaten: Tensor) -> int:
        """How many picks there are before the first that is beaten (R,), in any slice."""
        return int((self._pool.sum(beaten.double()).cumsum(0) == 0).sum())

    def _sifted(self, guess: _Guess, others: Tensor, sieve: Sieve) -> int:
        """See _accepted; with gains in float64 of those rows alone that may be as good by their bounds."""
        if not len(guess.rows) or not sieve.holds(guess.directions(), guess.scores):
            return 0
        picks, low = len(guess.rows), (guess.low * (1 - sieve.division)).float()
        first = torch.full_like(self._numbers, picks)  # the step at which a row may first be as good
        for some, gains, unknown in self._replayed(guess, others):
            at = (~(gains.amax(1) < low)).nonzero().squeeze(1)  # the steps at which there are any; 0/0 may be
            for step, near in zip(at.flip(0), (~(gains[at] < low[at, None])).flip(0), strict=True):
                first[some] = torch.where(near, step, first[some])
            first[some].masked_fill_(unknown & others[some], 0)
        contenders = self._pool.sum(first.bincount(minlength=picks + 1)[:picks].double()).cumsum(0)
        count = int((contenders <= MOST_CONTENDERS).sum())
        rows = (first < count).nonzero().squeeze(1)
        x, first_g, first_h = self._rows.x(rows), self._first_g[:, rows], self._first_h[:, rows]  # (m, D), (L, m)
        g, h = sieve.exact(x, first_g, first_h)
        p, q = x @ guess.directions()[..., :count]  # (L, m, count)
        # What earlier steps took, without the step's own.
        g = g[..., None] - (p.square().cumsum(2) - p.square())
        h = h[..., None] - 2 * ((p * q).cumsum(2) - p * q)
        kept = 1 / (self.inverse_variance[:, rows, None] + g)
        gains = (h.clamp_min(0) * kept).sum(0)  # (m, count)
        wrong, best = _rounding(kept, gains, first_g[..., None], first_h[..., None]), guess.scores[:count]
        unsure = (2 * (gains + wrong) >= best) & (wrong > DRIFT * best)
        return self._standing((guess.head(count).beaten_by(gains.T, self._numbers[rows]) | unsure.T).any(1))

    def _advance(self, guess: _Guess, count: int) -> None:
        """Makes the first picks count."""
        u, zeta = directions = guess.directions()[..., :count]
        weighted = guess.x[:count] * guess.weights[..., :count, None]  # (L, r, D)
        for some in self._pool.spans(u.shape[1], u.shape[1] * len(u) * max(8 * 8, 4 * count // FLOPS_PER_BYTE)):
            self._a[:, some] -= u[:, some] @ u.mT
            self._b[:, some] -= u[:, some] @ zeta.mT + zeta[:, some] @ u.mT
            self._matrix[:, some] += weighted.mT[:, some] @ weighted
        self._exact = None
        for some in self._rows.spans(0, 8 * count * len(self._g)):
            p, z = guess.products[:, :count, :, some]
            self._g[:, some] -= p.square().sum(0)
            self._h[:, some] -= 2 * (p * z).sum(0)
            if self._sieve is not None:
                self._sieve.count(some, z)
        if self._sieve is not None:
            self._sieve.advance(directions)

    def forward(self, choice: Choice) -> Forward:
        """Chooses."""
        pool, made = self._pool, 0
        most = 1 if choice.limited else min(MOST_DEPTH, max(1, PRODUCTS // (2 * len(self._fisher) * max(1, pool.size))))
        depth, team = min(DEPTH, most), max(LEAST_TEAM, min(MOST_TEAM, pool.size // TEAM_PART))
        if not choice.limited:
            self._sieve = Sieve.of(self._rows, self._first_g, self._first_h, most)
        self._make_room(most)
        taken: list[_Guess] = []
        while made < choice.steps:
            pool.progress(made, choice.steps)
            gains = self._gains()
            if self._sieve is None and self._drifted(gains, choice.free):
                self._refresh()
                gains = self._gains()
            wanted, count = min(depth, choice.steps - made), 0
            if wanted > 1 or self._sieve is not None:
                guess = self._guess_several(choice, gains, team, wanted)
                count = self._accepted(guess, choice.free)
                depth = min(most, max(LEAST_DEPTH, 2 * depth if count == wanted else int(1.3 * count) + 2))
                if not count and self._sieve is not None:  # errors have grown too large; float32's, if they were new
                    if self._sieve.served < MOST_DEPTH:
                        self._sieve = None
                        self._make_room(most)
                    self._refresh()
                    continue
            if not count:  # one pick: limits may forbid the next, or a row beyond the team is as good as its best
                row, score, *found = leader(choice, gains, *self._state())
                if choice.ends(score):
                    break
                refuse_overflow(score)
                guess, count = self._guess(row[None], *(each[None] for each in found), picks=1), 1
                for _ in self._projected(guess):
                    pass
                team *= 4 if wanted > 1 else 1
            self._advance(guess, count)
            taken.append(guess.head(count))
            del guess
            for each in taken[-1].rows:
                choice.take(each)
            made += count
        none = self._like[:0]
        rows, scores = (torch.cat([getattr(each, name) for each in taken] or [none]) for name in ("rows", "scores"))
        entries = torch.cat([torch.cat([each.x, each.weights.T], dim=1) for each in taken] or [none[:, None]])
        return Forward(rows.long(), scores, entries, 1, lambda: self._matrices(taken))

    def _make_room(self, most: int) -> None:
        """Memory for the products of so many picks, had once: what is new takes longer to have than to fill."""
        self._room = self._like.new_empty(0)
        dtype = torch.float64 if self._sieve is None else torch.float32
        self._room = self._like.new_empty(2 * most * self._g.numel(), dtype=dtype)

    def _guess_several(self, choice: Choice, gains: Tensor, team: int, picks: int) -> _Guess:
        """The next picks among the rows of highest gain."""
        _, _, *found = self._pool.top(gains, team, choice.free, self._numbers, *self._state())
        order = found[0].argsort()  # equal gains go to the lowest row
        return self._guess(*(each[order] for each in found), picks=picks)

    def _state(self) -> tuple[Tensor, ...]:
        """What a guess needs of a row: its embedding (n, D), τ, g and h at first, g and h (n, L) each."""
        state = self.inverse_variance, self._first_g, self._first_h, self._g, self._h
        return self._rows.embeddings, *(each.T for each in state)

    def _matrices(self, taken: list[_Guess]) -> tuple[Tensor, Tensor]:
        """Λ and Φ (L, m, m)."""
        x, weights, u = (torch.cat([getattr(each, name) for each in taken], dim) for name, dim in PARTS)
        root = (weights[..., None] * (x @ u)).tril(-1)  # σ x.u
        # On the diagonal √(1 + γ), γ = σ² g, where σ x.u is γ/√(1 + γ).
        own = (u * (x.T * weights[:, None])).sum(1)  # (L, m)
        root.diagonal(dim1=-2, dim2=-1).copy_((own + (own.square() + 4).sqrt()) / 2)
        middle = torch.cat([self._product(mine.T, f, mine)[None] for mine, f in zip(u, self._fisher, strict=True)])
        return root, middle


def _rounding(kept: Tensor, gains: Tensor, first_g: Tensor, first_h: Tensor) -> Tensor:
    """How wrong rounding may have made gains of rows, since g and h were first_g and first_h. kept: 1/(τ + g)."""
    return ROUNDING * (kept * (first_h + gains.clamp_min(0) * first_g)).sum(0)


def _parts(size: int) -> list[slice]:
    """Parts of a side of a triangle, so that products leave most of its empty half out."""
    step = max(32, -(-size // 4))
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _times_upper(x: Tensor, upper: Tensor, out: Tensor) -> None:
    """Writes X (m, D) times an upper triangular matrix (D, D) into out (m, D)."""
    for some in _parts(len(upper)):
        torch.mm(x[:, : some.stop], upper[: some.stop, some], out=out[:, some])


def memory(n: int, dims: int, labels: int, steps: int, drops: int) -> int:
    """Bytes that the forward and the backward phase take at the most, for n rows and L labels. drops: of the latter."""
    depth = min(MOST_DEPTH, max(1, PRODUCTS // (2 * labels * max(1, n))))
    team = min(n, max(LEAST_TEAM, min(MOST_TEAM, n // TEAM_PART)))
    rows = n * (8 * labels + 9 + 2 * labels * depth) + 2 * team * (dims + labels * (dims + depth))
    matrices = 13 * labels * dims * dims + steps * dims * (1 + 2 * labels)
    matrices += labels * backward_entries(steps, drops, 1)
    return 8 * (rows + matrices + 5 * min(n, AT_ONCE) * dims)


def work(n: int, dims: int, labels: int, steps: int) -> float:
    """Multiply-adds."""
    return float(labels * n * dims * (3 * dims + 3 * steps))
