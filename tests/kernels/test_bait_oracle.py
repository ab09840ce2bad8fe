"""The BAIT family against what its authors' own codes picked, in float64 (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.kernels.fisher import softmax

FILES = sorted((Path(__file__).parents[1] / "data").glob("bait_N*.npz"))
FORMS = {
    "bait": ("bait", {}),
    "exp2": ("bait", {"top_classes": 2}),
    "binary": ("bait_binary", {}),
    "diag": ("bait_diagonal", {}),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_picks_and_gains_are_the_authors(local, path, form, dtype):
    data, (name, params) = np.load(path), FORMS[form]
    x = np.concatenate([data["features_unlabeled"], data["features_labeled"]]).astype(dtype)
    p = softmax(np.concatenate([data["logits_unlabeled"], data["logits_labeled"]]).astype(np.float64))
    labeled, budget = np.arange(len(data["features_unlabeled"]), len(x)), int(data["B"])
    steps = dict(zip(data[f"{form}_mean_steps_idx"][:-budget], data[f"{form}_mean_steps_score"][:-budget], strict=True))
    for key, scale in (("mean", "MEAN"), ("badge", "MEAN"), ("bs1", "SUM")):
        if f"{form}_{key}_f64" not in data:
            continue
        options = {"ridge": float(data["lmb"]), "ridge_scale": "ABSOLUTE", "fisher_scale": scale, **params}
        got = local.select(name, budget, embeddings=x, probabilities=p, labeled=labeled, params=options)
        assert got.indices.tolist() == data[f"{form}_{key}_f64"].tolist()
        if key == "mean":
            np.testing.assert_allclose(got.scores, [steps[row] for row in got.indices], rtol=1e-8)


def test_there_are_oracles():
    assert len(FILES) == 3
