"""The published algorithm in numpy, every objective from scratch: what strategies by Fisher information must equal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

#: Every row's Fisher information (N, P, P).
Information = np.ndarray


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def all_classes(embeddings: np.ndarray, probabilities: np.ndarray) -> Information:
    """(diag(p) - p pᵀ) ⊗ x xᵀ."""
    return np.stack(
        [
            np.kron(np.diag(q) - np.outer(q, q), np.outer(row, row))
            for row, q in zip(embeddings, probabilities, strict=True)
        ]
    )


def top_classes(count: int, *, renormalize: bool = True) -> Callable[[np.ndarray, np.ndarray], Information]:
    """The expectation over the likeliest classes."""

    def information(embeddings: np.ndarray, probabilities: np.ndarray) -> Information:
        found = []
        for row, q in zip(embeddings, probabilities, strict=True):
            top = np.argsort(-q, kind="stable")[:count]
            mass = q[top] / (q[top].sum() if renormalize else 1.0)
            residuals = np.eye(len(q))[top] - q
            found.append(np.kron((residuals.T * mass) @ residuals, np.outer(row, row)))
        return np.stack(found)

    return information


def binary(embeddings: np.ndarray, probabilities: np.ndarray) -> Information:
    """p̂ (1 - p̂) x xᵀ."""
    x, mode = embeddings, probabilities.max(1)
    return (mode * (1 - mode))[:, None, None] * x[:, :, None] * x[:, None]


def labels(embeddings: np.ndarray, probabilities: np.ndarray) -> Information:
    """A block q (1 - q) x xᵀ per label."""
    return np.stack(
        [
            np.kron(np.diag(each * (1 - each)), np.outer(row, row))
            for row, each in zip(embeddings, probabilities, strict=True)
        ]
    )


def labels_together(embeddings: np.ndarray, probabilities: np.ndarray) -> Information:
    """Σ_l q (1 - q) x xᵀ."""
    x, q = embeddings, probabilities
    return (q * (1 - q)).sum(1)[:, None, None] * x[:, :, None] * x[:, None]


class Design:
    """M and F of a pool, and the greedy that minimises tr(M^-1 F)."""

    def __init__(
        self,
        x: np.ndarray,
        information: Information,
        k: int,
        context: np.ndarray,
        *,
        ridge: float = 1.0,
        relative: bool = True,
        total: bool = False,
        weights: np.ndarray | None = None,
        beside: tuple[np.ndarray, Information] | None = None,
    ) -> None:
        """total: fisher_scale SUM. beside: embeddings and information of labelled rows that are not in the pool."""
        mass = np.ones(len(x)) if weights is None else weights
        everything, rows, labeled = information, x, information[context]
        if beside is not None:
            mass = np.concatenate([mass, np.ones(len(beside[0]))])
            everything, rows = np.concatenate([information, beside[1]]), np.concatenate([x, beside[0]])
            labeled = np.concatenate([labeled, beside[1]])
        self.fisher = np.tensordot(mass / mass.sum(), everything, 1)
        scale = (mass / mass.sum()) @ (rows**2).sum(1) / x.shape[1] if relative else 1.0
        count = len(labeled)
        part = labeled.sum(0) if total else labeled.sum(0) / max(count, 1)
        self.start = ridge * scale * np.eye(len(self.fisher)) + count / (count + k) * part
        self.information = k / (count + k) * information

    def objective(self, rows: list[int]) -> float:
        """tr(M^-1 F) with these rows taken."""
        return float(np.trace(np.linalg.solve(self.start + self.information[rows].sum(0), self.fisher)))

    def greedy(
        self, k: int, candidates: np.ndarray, oversampling: int = 2
    ) -> tuple[list[int], list[float], np.ndarray]:
        """Picks (k,), their gains when chosen (k,), every row's gain at the first step (N,)."""
        taken: list[int] = []
        gains: dict[int, float] = {}
        first = None
        for _ in range(min(oversampling * k, int(candidates.sum()))):
            before = self.objective(taken)
            fall = np.array([before - self.objective([*taken, row]) for row in range(len(self.information))])
            first = fall if first is None else first
            free = np.where(candidates & ~np.isin(np.arange(len(fall)), taken), fall, -np.inf)
            best = int((free >= free.max() - 1e-11 * before).argmax())
            gains[best] = fall[best]
            taken.append(best)
        while len(taken) > k:
            rises = np.array([self.objective([each for each in taken if each != row]) for row in taken])
            tied = rises <= rises.min() * (1 + 1e-12)
            taken.remove(max(row for row, equal in zip(taken, tied, strict=True) if equal))
        assert first is not None
        return taken, [gains[row] for row in taken], first
