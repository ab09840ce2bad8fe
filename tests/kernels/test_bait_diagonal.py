"""BAIT with diagonals only: the published formulas with the matrices written out."""

from __future__ import annotations

import numpy as np

from tests.kernels import fisher
from tests.kernels.fisher import Design
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
