"""Products in float32 as a sieve: how wrong g and h may be by them, so that few rows need float64 (see rank_one.py).

A product x.u in float32 is wrong by ‖x‖ε_u at the most, ε_u = κ‖u‖, whatever the order of its sum. Over all directions
u and ζ since g and h were exact, by Cauchy and Schwarz,

    |g̃ - g| <= 2 ‖x‖ P E_u + ‖x‖² E_u²,                      P² = Σ (x.u)²,   E_u² = Σ ε_u²,
    |h̃ - h| <= 2 ‖x‖ (P E_ζ + Q E_u + ‖x‖ E_u E_ζ),          Q² = Σ (x.ζ)²,   E_ζ² = Σ ε_ζ²,

where P² is at most what g was at first, as g is never negative, and Q at most ‖x‖E_ζ above that of the products found.
Sums of R squares or products in float32 are wrong by ρ = (R + 2) 2⁻²⁴ of P², P Q and Q² more. So are differences from
τ + g and from h, one product after the other, and by ρ (τ + g) and ρ (|h| + 2 P Q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from queryselect_service.maths.fisher import ROUNDING, Rows

#: Entries of a pool from which on half the bytes and twice the rate are worth the bounds.
LEAST_ENTRIES = 1 << 20
#: Lengths of rows and of directions whose products, and their squares, are far from what float32 can't hold.
SHORTEST, LONGEST = 1e-6, 1e6
#: Gains, τ + g and h that are as far from it.
LEAST, MOST = 1e-30, 1e30


class Sieve:
    """The error bounds of rows, and what makes their g and h exact. Tensors of rows are (L, m)."""

    def __init__(self, lengths: Tensor, dims: int, first_g: Tensor, first_h: Tensor, at_once: int) -> None:
        """lengths: (n,), ‖x‖ at least. first_g, first_h: (L, n), g and h of the rows as they are, exact.

        at_once: how many directions there may be in one product.
        """
        self._lengths, self._first_g, self._first_h = lengths, first_g, first_h
        self._squares = torch.zeros_like(first_g)  # Q² of what was found
        self._directions = first_g.new_empty(2, len(first_g), dims, 0)  # u and ζ, (2, L, D, t)
        self._product = (dims + 4) * 2.0**-24  # κ: rounding u, D products, D sums; and what is of second order
        self._at_once, self._sum = at_once, (at_once + 4) * 2.0**-24  # ρ
        #: How wrong L divisions in float32 and the sum of what they give may be.
        self.division = (len(first_g) + 4) * 2.0**-23

    @staticmethod
    def of(rows: Rows, first_g: Tensor, first_h: Tensor, at_once: int) -> Sieve | None:
        """A sieve for rows, where it is worth it and float32 holds them; see __init__."""
        x, pool = rows.embeddings, rows.pool
        if x.dtype == torch.float64 or rows.scale != 1 or pool.size * x.shape[1] < LEAST_ENTRIES:
            return None
        lengths = torch.empty_like(rows.mass)
        for span in rows.spans(0, x.shape[1]):
            lengths[span] = torch.linalg.vector_norm(x[span].float(), dim=1)
        strange = (lengths > LONGEST) | ((lengths < SHORTEST) & (lengths > 0))
        if bool(pool.sum(strange.any().double())):
            return None
        return Sieve(lengths * (1 + x.shape[1] * 2.0**-22), x.shape[1], first_g, first_h, at_once)

    def restarted(self, first_g: Tensor, first_h: Tensor) -> Sieve:
        """The same for g and h that are exact again; see __init__."""
        dims = self._directions.shape[2]
        return Sieve(self._lengths, dims, first_g, first_h, self._at_once)

    @staticmethod
    def holds(directions: Tensor, scores: Tensor) -> bool:
        """Whether float32 holds directions u and ζ (2, L, D, R) and the gains (R,) of their picks."""
        lengths = directions.norm(dim=2)
        held = ((lengths >= SHORTEST) & (lengths <= LONGEST)).all() & ((scores >= LEAST) & (scores <= MOST)).all()
        return bool(held)

    def until(self, directions: Tensor) -> Tensor:
        """E_u and E_ζ until the last of more directions (2, L, D, R): (2, L, 1)."""
        every = torch.cat([self._directions, directions], dim=3).norm(dim=2)  # (2, L, t + R)
        found: Tensor = self._product * every.norm(dim=2, keepdim=True)
        return found

    def errors(self, until: Tensor, some: slice, products: Tensor) -> tuple[Tensor, Tensor]:
        """How wrong g and h of some rows may be. until: see there. products: (R, L, m), in float32, those with ζ."""
        e_u, e_zeta = until
        x, p = self._lengths[some], self._first_g[:, some].sqrt()
        q = (self._squares[:, some] + products.square().sum(0)).mul_(1 + 2 * self._sum).sqrt_().add_(x * e_zeta)
        p_wrong, q_wrong = x * e_u, x * e_zeta
        wrong_g = 2 * p * p_wrong + p_wrong.square()
        wrong_h = 2 * (p * q_wrong + q * p_wrong + p_wrong * q_wrong)
        p, q = p + p_wrong, q + q_wrong  # at least what was found
        wrong_g += self._sum * p.square() + ROUNDING * self._first_g[:, some]
        wrong_h += 4 * self._sum * p * q + ROUNDING * self._first_h[:, some].abs()
        return wrong_g, wrong_h

    def bounds(
        self, until: Tensor, some: slice, products: Tensor, below: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What gains of some rows may be replayed from in float32, to be too high if anything: τ + g and h, (L, m).

        until, products: see errors. below, h: τ + g and h as they were found, float64. The third, (m,), says of which
        rows float32 does not hold it.
        """
        wrong_g, wrong_h = self.errors(until, some, products)
        high = wrong_h.add_(h).add_(h.abs(), alpha=self._sum)
        low = (below * (1 - self._sum)).sub_(wrong_g)
        return low.clamp_(max=MOST).float(), high.float(), (high > MOST).any(0)

    def exact(self, x: Tensor, first_g: Tensor, first_h: Tensor) -> tuple[Tensor, Tensor]:
        """Computes g and h of rows x (m, D), float64. first_g, first_h: what they were at first."""
        p, q = x @ self._directions  # (L, m, t)
        return first_g - p.square().sum(2), first_h - 2 * (p * q).sum(2)

    @property
    def served(self) -> int:
        """How many directions count."""
        return self._directions.shape[3]

    def advance(self, directions: Tensor) -> None:
        """Makes directions u and ζ (2, L, D, r) count."""
        self._directions = torch.cat([self._directions, directions], dim=3)

    def count(self, some: slice, products: Tensor) -> None:
        """Adds to Q² of some rows their products (r, L, m) with ζ."""
        self._squares[:, some] += products.square().sum(0)
