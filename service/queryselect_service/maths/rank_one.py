"""Greedy minimisation of tr(M^-1 F) where a row's Fisher information is σ² x xᵀ, exactly and several picks per pass.

There may be L such problems at once, one per label, whose gains add up. With u = A x_s/√(τ_s + g_s) and
ζ = AFu - ½ u uᵀFu, taking s changes A by -u uᵀ and B = AFA by -u ζᵀ - ζ uᵀ, so that for every row

    g = xᵀAx  falls by  (x.u)²,    h = xᵀBx  falls by  2 (x.u)(x.ζ),    gain = Σ_l h/(τ + g),  τ = 1/σ².

A pass over the pool is the cost of a pick. To make several picks per pass they are guessed: the rows of highest gain
compete among themselves, through their Gram matrices under A and B; then one product with all the u and ζ gives the
gains that every other row had at each of those steps, and the guesses stand up to the first step at which another row
was as good. (Huseljic et al. 2024 for the approximation; the guessing is ours.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.choice import Choice
from queryselect_service.maths.fisher import ROUNDING, TIE, Forward, Rows, Terms, inverse_of_root, leader, root_of
from queryselect_service.maths.predictions import Predictions

#: Rows that compete at first, where passes are short and where they are long.
TEAM, LARGE_TEAM, LONG_PASS = 256, 512, 200_000
#: Picks that are guessed at once: at first, at least and at most.
DEPTH, LEAST_DEPTH, MOST_DEPTH = 16, 4, 64
#: Entries that the products of one pass may have.
PRODUCTS = 1 << 25
#: Rows whose steps are replayed at once: what they need stays in a core's cache.
REPLAYED = 4096
#: The error of a gain, as a part of the best, from which on everything is computed anew.
DRIFT = 1e-10

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

    def head(self, count: int) -> _Guess:
        """The first picks, without products."""
        return _Guess(
            self.rows[:count],
            self.scores[:count],
            self.x[:count],
            self.weights[:, :count],
            self.u[..., :count],
            self.zeta[..., :0],
            self.products[:0],
        )


class RankOne:
    """The forward phase. Tensors of rows are (L, n), those of directions (L, D, r)."""

    def __init__(self, terms: Terms, variances: Variances, labels: int) -> None:
        self._terms, self._pool, self._rows = terms, terms.pool, terms.rows
        n, dims = self._rows.embeddings.shape
        self._like = self._rows.mass  # float64, on the device
        self.inverse_variance = self._like.new_empty(labels, n)  # τ, infinite where a row has no information
        for span in self._rows.spans(0, 8 * (labels + self._rows.predictions.shape[1])):
            self.inverse_variance[:, span] = 1 / (terms.scale * variances(self._rows.predictions.at(span))).T

        def information(rows: Rows) -> Tensor:
            """Σ mass σ² x xᵀ: (L, D, D)."""
            found = self._like.new_zeros(labels, dims, dims)
            for span in rows.spans(2 * labels * dims * dims, 4 * dims):
                x = rows.x(span)
                masses = rows.mass[span, None] * variances(rows.predictions.at(span))  # (m, L)
                for label in range(labels):
                    found[label].addmm_((x * masses[:, label, None]).T, x)
            return found

        self._numbers = torch.arange(self._pool.offset, self._pool.offset + n, device=self._like.device)
        self._columns = (self._rows.embeddings, self.inverse_variance.T)
        self._fisher = terms.total(information)
        self._matrix = terms.ridge * torch.eye(dims, dtype=torch.float64, device=self._like.device).repeat(labels, 1, 1)
        if terms.labeled:
            self._matrix += terms.context_total(information)
        self._g, self._h = self._like.new_empty(labels, n), self._like.new_empty(labels, n)
        self._fresh = not terms.labeled  # whether M is λI still
        self._refresh()
        self.first = self._gains().clone()  # (n,)

    def _refresh(self) -> None:
        """Computes A, B, g and h anew from M."""
        if self._fresh:
            ridge = self._terms.ridge
            self._a = torch.eye(self._fisher.shape[-1], dtype=torch.float64, device=self._like.device) / ridge
            self._a = self._a.expand_as(self._fisher).clone()
            half, middle = None, self._fisher / ridge
            self._b, self._exact = middle / ridge, None
        else:
            half = inverse_of_root(root_of(self._matrix, self._pool), self._pool).mT  # S, A = S Sᵀ
            middle = half.mT @ self._fisher @ half
            self._a, self._b, self._exact = half @ half.mT, half @ middle @ half.mT, (half, middle)
        labels, dims = self._fisher.shape[:2]
        for span in self._rows.spans(4 * labels * dims * dims, 4 * dims):
            x = self._rows.x(span)
            for label in range(labels):
                # Lengths of products lose fewer digits than xᵀAx would, where A is large but not along x.
                y = x / self._terms.ridge**0.5 if half is None else x @ half[label]
                self._g[label, span] = y.square().sum(1)
                self._h[label, span] = (y @ middle[label]).mul_(y).sum(1)
        self._first_g, self._first_h = self._g.clone(), self._h.clone()

    def _gains(self) -> Tensor:
        """Every row's gain (n,)."""
        return (self._h.clamp_min(0) / (self.inverse_variance + self._g)).sum(0)

    def _drifted(self, gains: Tensor, free: Tensor) -> bool:
        """Whether rounding could have made a row's gain wrong that may be the best."""
        kept = ROUNDING / (self.inverse_variance + self._g)
        errors = (kept * self._first_h).sum(0) + gains * (kept * self._first_g).amax(0)
        _, best = self._pool.best(torch.where(free, gains, -torch.inf))
        wrong = free & (errors > DRIFT * best) & (2 * (gains + errors) >= best)
        return bool(self._pool.sum(wrong.any().double()))

    def _guess(self, rows: Tensor, embeddings: Tensor, inverse_variance: Tensor, *, picks: int) -> _Guess:
        """Chooses among a team of rows alone. rows: (T,), ascending; embeddings: (T, D); inverse_variance: (T, L)."""
        x = embeddings.double().mul_(self._terms.rows.scale) if self._terms.rows.scale != 1 else embeddings.double()
        if self._exact is None:
            ax, bx = self._a @ x.T, self._b @ x.T  # (L, D, T)
            a, b = x @ ax, x @ bx  # (L, T, T), the Gram matrices under A and B
        else:
            half, middle = self._exact
            y = x @ half
            ax, bx = half @ y.mT, half @ (middle @ y.mT)
            a, b = y @ y.mT, y @ middle @ y.mT
        first_a, first_b = (each.diagonal(dim1=1, dim2=2).clone() for each in (a, b))
        tau = inverse_variance.T.double()
        free = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        steps: list[tuple[Tensor, ...]] = []
        for _ in range(picks):
            weights = 1 / (tau + a.diagonal(dim1=1, dim2=2))  # (L, T), 1/(τ + g)
            gains = torch.where(free, (b.diagonal(dim1=1, dim2=2).clamp_min(0) * weights).sum(0), -torch.inf)
            best = gains.max()
            wrong = ROUNDING * (weights * (first_b + gains.clamp_min(0) * first_a)).sum(0)  # (T,)
            wrong = torch.where(free & (2 * (gains + wrong) >= best), wrong, 0.0).amax()
            at = (gains >= best - TIE * best).to(torch.int8).argmax()[None]
            weight = weights.index_select(1, at).sqrt()  # (L, 1)
            p, q = (weight * each.index_select(2, at)[..., 0] for each in (a, b))  # (L, T), x.u and x.(A F u)
            ufu = weight * q.index_select(1, at) / 2  # (L, 1), ½ uᵀFu
            zeta = q - ufu * p
            a = a - p[..., None] * p[:, None]
            b = b - p[..., None] * zeta[:, None] - zeta[..., None] * p[:, None]
            free = free.index_fill(0, at, value=False)
            steps.append((at[0], gains.index_select(0, at)[0], weight[:, 0], ufu[:, 0], p, zeta, wrong))
        if picks > 1:  # as many as rounding lets be told apart, but one
            sure = torch.stack([each[6] <= DRIFT * each[1] for each in steps[1:]]).cumprod(0)
            steps = steps[: 1 + int(sure.sum())]
        picks = len(steps)
        chosen, scores = torch.stack([each[0] for each in steps]), torch.stack([each[1] for each in steps])
        # The same steps for directions: what earlier ones took from A x and B x.
        u, z = ax.new_empty(*ax.shape[:2], picks), ax.new_empty(*ax.shape[:2], picks)
        p, zeta = (torch.stack([each[i] for each in steps], 1)[..., chosen] for i in (4, 5))  # (L, R, R)
        for step, (own, _, weight, ufu, *_rest) in enumerate(steps):
            before = slice(0, step)
            ps, zs = p[:, before, step, None], zeta[:, before, step, None]  # (L, step, 1)
            left = (ax.index_select(2, own[None]) - u[..., before] @ ps)[..., 0]
            u[..., step] = weight[:, None] * left
            left = (bx.index_select(2, own[None]) - u[..., before] @ zs - z[..., before] @ ps)[..., 0]
            z[..., step] = weight[:, None] * left - ufu[:, None] * u[..., step]
        return _Guess(rows[chosen], scores, x[chosen], tau[:, chosen].rsqrt(), u, z, u[:0])

    def _projected(self, guess: _Guess) -> Iterator[slice]:
        """Multiplies all rows with all directions; yields stretches of rows as they are done."""
        labels, dims, picks = guess.u.shape
        directions = torch.stack([guess.u, guess.zeta]).permute(0, 3, 1, 2).reshape(-1, dims)  # (2 R L, D)
        guess.products = self._like.new_empty(2, picks, labels, len(self._rows))
        for span in self._rows.spans(4 * picks * labels * dims, dims + 16 * picks * labels):
            for start in range(span.start, span.stop, REPLAYED):
                some = slice(start, min(start + REPLAYED, span.stop))
                found = directions @ self._rows.x(some).T
                guess.products[..., some] = found.view(2, picks, labels, -1)
                yield some

    def _accepted(self, guess: _Guess, free: Tensor) -> int:
        """How many of the picks stand: up to the first at whose step another row had as much, or more."""
        picks, device = len(guess.rows), guess.rows.device
        high, low = guess.scores * (1 + 2 * TIE), guess.scores * (1 - TIE)  # (R,)
        steps = torch.arange(picks, device=device)
        taken = torch.full((len(free),), picks, device=device)  # (n,) the step at which a row is chosen
        here = guess.rows - self._pool.offset
        mine = (here >= 0) & (here < len(free))
        taken[here[mine]] = steps[mine]
        beaten = torch.zeros(picks, dtype=torch.bool, device=device)
        for some in self._projected(guess):
            p, zeta = guess.products[..., some]  # (R, L, s)
            p_before, pz_before = p.square(), 2 * p * zeta
            g = self._g[:, some] - (p_before.cumsum(0) - p_before)
            h = self._h[:, some] - (pz_before.cumsum(0) - pz_before)
            gains = (h.clamp_min_(0) / (g + self.inverse_variance[:, some])).sum(1)  # (R, s)
            lower = self._numbers[some] < guess.rows[:, None]
            better = gains >= torch.where(lower, low[:, None], high[:, None])
            beaten |= (better & free[some] & (steps[:, None] < taken[some])).any(1)
        stands = self._pool.sum(beaten.double()).cumsum(0) == 0
        return int(stands.sum())

    def _advance(self, guess: _Guess, count: int) -> None:
        """Makes the first picks count."""
        u, zeta = guess.u[..., :count], guess.zeta[..., :count]
        self._a -= u @ u.mT
        self._b -= u @ zeta.mT + zeta @ u.mT
        weighted = guess.x[:count] * guess.weights[..., :count, None]  # (L, r, D)
        self._matrix += weighted.mT @ weighted
        self._fresh, self._exact = False, None
        labels = len(self._g)
        for some in self._rows.spans(0, 4 * count * labels):
            p, z = guess.products[:, :count, :, some]
            self._g[:, some] -= p.square().sum(0)
            self._h[:, some] -= 2 * (p * z).sum(0)

    def forward(self, choice: Choice) -> Forward:
        """Chooses."""
        pool, made = self._pool, 0
        most = max(1, PRODUCTS // (2 * len(self._fisher) * max(1, pool.size)))
        depth, team = min(DEPTH, most), LARGE_TEAM if pool.size >= LONG_PASS else TEAM
        taken: list[_Guess] = []
        while made < choice.steps:
            pool.progress(made, choice.steps)
            gains = self._gains()
            if self._drifted(gains, choice.free):
                self._refresh()
                gains = self._gains()
            wanted, count = 1 if choice.limited else min(depth, choice.steps - made), 0
            if wanted > 1:
                guess = self._guess_several(choice, gains, team, wanted)
                count = self._accepted(guess, choice.free)
                depth = min(most, MOST_DEPTH, max(LEAST_DEPTH, 2 * depth if count == wanted else int(1.3 * count) + 2))
            if not count:  # one pick: limits may forbid the next, or a row beyond the team is as good as its best
                row, score, *found = leader(choice, gains, *self._columns)
                if choice.ends(score):
                    break
                guess, count = self._guess(row[None], *(each[None] for each in found), picks=1), 1
                for _ in self._projected(guess):
                    pass
                team *= 4 if wanted > 1 else 1
            self._advance(guess, count)
            taken.append(guess.head(count))
            for each in taken[-1].rows:
                choice.take(each)
            made += count
        none = self._like[:0]
        rows, scores = (torch.cat([getattr(each, name) for each in taken] or [none]) for name in ("rows", "scores"))
        return Forward(rows.long(), scores, 1, lambda: self._matrices(taken))

    def _guess_several(self, choice: Choice, gains: Tensor, team: int, picks: int) -> _Guess:
        """The next picks among the rows of highest gain."""
        _, _, *found = self._pool.top(gains, team, choice.free, self._numbers, *self._columns)
        order = found[0].argsort()  # equal gains go to the lowest row
        rows, embeddings, inverse_variance = (each[order] for each in found)
        return self._guess(rows, embeddings, inverse_variance, picks=picks)

    def _matrices(self, taken: list[_Guess]) -> tuple[Tensor, Tensor]:
        """Λ and Φ (L, m, m)."""
        x, weights, u = (torch.cat([getattr(each, name) for each in taken], dim) for name, dim in PARTS)
        root = (weights[..., None] * (x @ u)).tril(-1)  # σ x.u
        # On the diagonal √(1 + γ), γ = σ² g, where σ x.u is γ/√(1 + γ).
        own = (u * (x.T * weights[:, None])).sum(1)  # (L, m)
        root.diagonal(dim1=-2, dim2=-1).copy_((own + (own.square() + 4).sqrt()) / 2)
        return root, u.mT @ self._fisher @ u
