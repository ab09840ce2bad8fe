"""What the tests of committee and Bayesian strategies share: samples, and the textbook's formulas in numpy."""

from __future__ import annotations

import itertools

import numpy as np

from queryselect_service import strategy as strategies
from tests.kernels.fisher import softmax
from tests.strategy_case import ROWS, Inputs, StrategyCase

K, C = 6, 4


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def entropy(p):
    """-sum p ln p over the last axis, by a loop that skips zeros."""
    p = np.asarray(p, dtype=float)
    return np.where(p > 0, -p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)


def kl(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


def binary(q):
    """Distributions (..., 2) of labels that are there with probability q."""
    return np.stack([1 - q, q], axis=-1)


def information(p):
    """I(y; θ) of samples (K, C)."""
    return entropy(p.mean(0)) - entropy(p).mean()


def joint_information(rows):
    """I(y_1 … y_B; θ) of samples (B, K, C), by every configuration of labels."""
    total = 0.0
    for labels in itertools.product(*(range(p.shape[1]) for p in rows)):
        total += float(
            entropy(np.array([np.prod([p[:, y] for p, y in zip(rows, labels, strict=True)], axis=0).mean()]))
        )
    return total - sum(entropy(p).mean() for p in rows)


def votes(p):
    """The share (C,) of samples (K, C) that vote for each class."""
    return np.bincount(p.argmax(-1), minlength=p.shape[-1]) / len(p)


class SampleScore(StrategyCase):
    """A score of samples, sent as logits: `score` of one row's distributions (K, C) gives the expected one."""

    options = {"samples_kind": "LOGITS"}

    def make(self, rng: np.random.Generator) -> Inputs:
        return {"samples": rng.normal(size=(ROWS, 1, C)) + rng.normal(size=(ROWS, K, C)) * 1.5}

    def distributions(self, inputs: Inputs) -> np.ndarray:
        return softmax(inputs["samples"])

    def score(self, p: np.ndarray) -> float:
        raise NotImplementedError

    def scores(self, inputs: Inputs) -> np.ndarray:
        return np.array([self.score(p) for p in self.distributions(inputs)])

    def oracle(self, inputs, k, context, candidates):
        scores = self.scores(inputs)
        order = sorted(np.flatnonzero(candidates), key=lambda row: (-round(scores[row], 11), row))[:k]
        return np.array(order), scores[order], scores


class LabelSampleScore(SampleScore):
    """The same per label: `score` is of one label's distributions (K, 2), aggregated by `how`."""

    options = {"samples_kind": "LOGITS", "task": "MULTILABEL"}
    how = staticmethod(np.mean)

    def scores(self, inputs: Inputs) -> np.ndarray:
        q = binary(sigmoid(inputs["samples"]))  # (N, K, L, 2)
        return np.array([self.how([self.score(row[:, label]) for label in range(C)]) for row in q])


def pointwise() -> list[str]:
    """The strategies that score samples row by row, by name."""
    return sorted(
        each.name
        for each in strategies.STRATEGIES.values()
        if each.pointwise and any("samples" in wanted.names for wanted in each.inputs)
    )
