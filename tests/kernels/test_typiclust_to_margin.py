"""typiclust_to_margin: the picks of the one or of the other, by the number of labelled rows."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from queryselect import Client, InvalidInput
from tests.kernels.test_typiclust import plain, unit
from tests.strategy_case import ROWS, StrategyCase

C = 3


class TestTypiclustPhase(StrategyCase):
    """With the caller's own clusters. Up to all rows are labelled: the last phase never comes."""

    name = "typiclust_to_margin"
    seeded = False
    slice_tolerance = 1e-5
    params: ClassVar = {"min_cluster_size": 3, "neighbors": 4, "switch_at": ROWS + 1}

    def make(self, rng):
        clusters = rng.permutation(np.repeat([7, -3, 1000, 5, 6], [9, 8, 8, 3, 2]))
        probabilities = rng.dirichlet(np.ones(C), ROWS)
        return {"embeddings": rng.normal(size=(ROWS, 6)), "clusters": clusters, "probabilities": probabilities}

    def oracle(self, inputs, k, context, candidates):
        x, clusters = unit(inputs["embeddings"]), inputs["clusters"]
        picks, scores, _ = plain(x, clusters, k, context, candidates, least=3, neighbors=4)
        return picks, scores, np.zeros(ROWS)


class TestMarginPhase(StrategyCase):
    name = "typiclust_to_margin"
    seeded = False
    score_kind = "POINT"
    params: ClassVar = {"switch_at": 0}

    def make(self, rng):
        return {"embeddings": rng.normal(size=(ROWS, 6)), "probabilities": rng.dirichlet(np.ones(C), ROWS)}

    def oracle(self, inputs, k, context, candidates):
        p = np.sort(inputs["probabilities"], axis=1)
        scores = np.where(candidates, 1 - (p[:, -1] - p[:, -2]), -np.inf)
        picks = scores.argsort(kind="stable")[::-1][:k]
        return picks, scores[picks], scores


@pytest.mark.parametrize(("params", "switch"), [({}, 60), ({"switch_at": 7}, 7), ({"switch_at": 0}, 0)])
def test_margin_takes_over_once_so_many_rows_are_labelled(local: Client, remote: Client, params, switch):
    """20 per class where nothing is said; pending rows are labelled ones to come."""
    rng = np.random.default_rng(0)
    x, p = rng.normal(size=(120, 5)), rng.dirichlet(np.ones(C), 120)
    for client in (local, remote):
        for labeled in {max(0, switch - 1), switch}:
            lists = {"labeled": np.arange(labeled)[:-2], "pending": np.arange(labeled)[-2:]}
            got = client.select("typiclust_to_margin", 4, embeddings=x, logits=np.log(p), params=params, **lists)
            if labeled < switch:
                want = client.select("typiclust", 4, embeddings=x, **lists)
            else:
                want = client.select("margin", 4, logits=np.log(p), **lists)
            assert got.indices.tolist() == want.indices.tolist()
            assert got.scores.tolist() == want.scores.tolist()
            assert got.score_kind == want.score_kind


def test_labels_of_several_per_row_are_refused(local: Client):
    with pytest.raises(InvalidInput, match="serves task MULTICLASS"):
        local.select("typiclust_to_margin", 2, embeddings=np.eye(4), probabilities=np.eye(4), task="MULTILABEL")
