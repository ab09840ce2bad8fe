"""BAIT with diagonals only: the published formulas with the matrices written out."""

from __future__ import annotations

import numpy as np
import torch

from queryselect_service.kernels import bait_diagonal
from tests.kernels import fisher
from tests.kernels.fisher import Design
from tests.kernels.leaving import checks
from tests.kernels.test_bait import FisherCase
from tests.strategy_case import ROWS


class Diagonal(Design):
    """a and f as vectors, G and H as matrices; roots: every row's V (N, P, c), without its scale."""

    def __init__(self, x, information, k, context, *, roots, **options):
        super().__init__(x, information, k, context, **options)
        count = len(context) + (len(options["beside"][0]) if options.get("beside") else 0)
        self.roots = np.sqrt(k / (count + k)) * roots
        self.a, self.f = 1 / np.diag(self.start), np.diag(self.fisher)

    def part(self, a, row, sign):
        """What the objective falls by when a row is taken, and what a falls by; where sign is -1, dropped."""
        v = self.roots[row]
        kept = np.linalg.inv(np.eye(v.shape[1]) + sign * (v.T * a) @ v)
        return np.trace(kept @ (v.T * (a**2 * self.f)) @ v), a**2 * np.einsum("pc,cd,pd->p", v, kept, v)

    def greedy(self, k, candidates, oversampling=2):
        a, taken, gains, first = self.a, [], {}, None
        for _ in range(min(oversampling * k, int(candidates.sum()))):
            fall = np.array([self.part(a, row, 1)[0] for row in range(len(self.roots))])
            first = fall if first is None else first
            best = int(np.where(candidates & ~np.isin(np.arange(len(fall)), taken), fall, -np.inf).argmax())
            gains[best] = fall[best]
            taken.append(best)
            a = a - self.part(a, best, 1)[1]
        while len(taken) > k:
            worst = min(taken, key=lambda row: self.part(a, row, -1)[0])
            taken.remove(worst)
            a = a + self.part(a, worst, -1)[1]
        return taken, [gains[row] for row in taken], first


def class_roots(embeddings, probabilities):
    """√p_j (e_j - p) ⊗ x for every class j: (N, C D, C)."""
    p = probabilities
    factor = np.sqrt(p)[:, None, :] * (np.eye(p.shape[1])[None] - p[:, :, None])  # (N, C, C)
    return (factor[:, :, None, :] * embeddings[:, None, :, None]).reshape(len(p), -1, p.shape[1])


def label_roots(embeddings, probabilities):
    """√(q (1 - q)) e_l ⊗ x for every label: (N, L D, L)."""
    q = probabilities
    factor = np.sqrt(q * (1 - q))[:, :, None] * np.eye(q.shape[1])
    return (factor[:, :, None, :] * embeddings[:, None, :, None]).reshape(len(q), -1, q.shape[1])


class TestBaitDiagonal(FisherCase):
    name = "bait_diagonal"
    roots = staticmethod(class_roots)

    def information(self, inputs):
        return fisher.all_classes(**inputs)

    def design(self, inputs, *arguments, **options):
        return Diagonal(
            inputs["embeddings"], self.information(inputs), *arguments, roots=self.roots(**inputs), **options
        )


class TestBaitDiagonalPerLabel(TestBaitDiagonal):
    options = {"task": "MULTILABEL"}
    roots = staticmethod(label_roots)

    def make(self, rng):
        x = rng.standard_normal((ROWS, 5)) + 0.3
        return {"embeddings": x, "probabilities": 1 / (1 + np.exp(-x @ rng.standard_normal((5, 3))))}

    def information(self, inputs):
        return fisher.labels(**inputs)


def test_all_losses_of_a_step_are_one_look_at_the_picks():
    """115 picks, all but 5 of them dropped again: a look for each pick that is left would be 6700."""
    rng = np.random.default_rng(0)
    inputs = {"embeddings": rng.standard_normal((120, 8)), "probabilities": rng.dirichlet(np.ones(5), 120)}
    made = checks("bait_diagonal", {name: torch.from_numpy(x) for name, x in inputs.items()}, {"oversampling": 100}, 5)
    assert 2 * 115 < made < 10 * 115


def test_of_picks_that_are_the_same_the_highest_row_is_dropped_first(local, monkeypatch):
    """Whatever rounding makes of their losses, even more than a tie."""
    rng, gains = np.random.default_rng(0), bait_diagonal._gains

    def rounded(rows, *arguments):
        found = gains(rows, *arguments)
        return found * (1 + 1e-8 * torch.from_numpy(rng.random(len(found))))

    monkeypatch.setattr(bait_diagonal, "_gains", rounded)
    x, p = np.tile(rng.standard_normal((80, 8)), (2, 1)), np.tile(rng.dirichlet(np.ones(4), 80), (2, 1))
    x[80:] *= -1  # the same for diagonals
    got = local.select("bait_diagonal", 40, embeddings=x, probabilities=p, params={"oversampling": 100})
    picks = set(got.indices.tolist())
    assert {row - 80 for row in picks if row >= 80} <= picks
