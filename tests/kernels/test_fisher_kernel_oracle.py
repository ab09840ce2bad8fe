"""The Fisher kernel against what its authors' own code chose and guessed, in float32 (tests/data/README.md)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from queryselect_service.maths.descriptors import standardized, total
from queryselect_service.maths.least_like import k_centers
from queryselect_service.shards import Whole
from tests.kernels.fisher import softmax

DATA = np.load(Path(__file__).parents[1] / "data" / "fisher_kernel.npz")
P_VAL = softmax(DATA["B_logits_val"].astype(np.float64))
RUNS = [("A1", "SUM"), ("A1", "PCC"), ("A3", "SUM"), ("A3", "PCC"), ("A5", "SUM")]
#: What the authors call each way to guess a label: what it is called here, None where gradients stand for it alone.
GUESSES = {
    "none": None, "gradAbl": "PROVIDED", "grad": "PREDICTED", "gradFmap": "NEAREST", "cor": "MC_TRACE", "amiFull": None,
}  # fmt: skip


def scales(name, rows, form, dtype):
    """The scales of a run, as they are sent."""
    parts = {"embeddings": "z"} if form == "PCC" else {"embeddings": "z", "gradients": "g"}
    return [
        {part: DATA[f"{name}_{letter}_{rows}"][:, start:stop].astype(dtype) for part, letter in parts.items()}
        for start, stop in pairwise(DATA[f"{name}_edges"])
    ]


@pytest.mark.parametrize(("name", "form"), RUNS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_picks_are_the_authors(local, remote, name, form, dtype, coarse):
    wrong, picks = scales(name, "wrong", form, dtype), DATA[f"{name}_picks_{form}"]
    centres = DATA[f"{name}_centres_{form}"]
    for client in (local, remote):
        got = client.select(
            "fisher_kernel",
            len(picks),
            scales=scales(name, "pool", form, dtype),
            reference={"scales": wrong, "misclassified": np.ones(len(wrong[0]["embeddings"]), bool)},
            params={
                "kernel": form,
                "author_compat": True,
                "first_center": int(centres[0]),
                "coarse_products": coarse,
            },
        )
        assert sorted(got.indices) == picks.tolist()


@pytest.mark.parametrize(("name", "form"), [each for each in RUNS if each[0] == "A1"])
def test_the_centres_are_the_authors(name, form):
    wrong = scales(name, "wrong", form, np.float32)
    factors = [torch.from_numpy(each[part]) for part in wrong[0] for each in wrong]
    terms = total([standardized(x, torch.float32) for x in factors], [x.shape[1] for x in factors])
    centres = DATA[f"{name}_centres_{form}"]
    found = k_centers(terms, torch.tensor(centres[0]), len(centres), Whole(len(factors[0])), repeat=True)
    assert found.tolist() == centres.tolist()


@pytest.mark.parametrize("how", GUESSES)
def test_the_picks_by_every_guess_of_labels_are_the_authors(local, how):
    """With the gradients that they had; 118 references are wrong, fewer than picks, so that all of them are centres."""
    form, picks = "PCC" if how == "none" else "SUM", DATA[f"B_picks_{how}"]
    pool, reference = {"embeddings": DATA["B_z_pool"]}, {"embeddings": DATA["B_z_val"]}
    if form == "SUM":
        pool["gradients"], reference["gradients"] = DATA[f"B_g_pool_{how}"], DATA[f"B_g_val_{how}"]
    got = local.select(
        "fisher_kernel",
        len(picks),
        **pool,
        excluded=np.setdiff1d(np.arange(300), DATA["B_available"]),
        reference={
            **reference,
            "labels": DATA["B_y_val"],
            "probabilities": P_VAL,
        },
        params={"kernel": form, "author_compat": True},
    )
    assert sorted(got.indices) == sorted(picks)


@pytest.mark.parametrize("how", [each for each, name in GUESSES.items() if name not in {None, "PROVIDED"}])
def test_guessed_labels_are_the_authors(local, how):
    """Those of cor are the least likely class, whatever the samples: at the last layer the trace tells nothing else."""
    p = softmax(DATA["B_logits_pool"].astype(np.float64))
    got = local.select(
        "fisher_kernel",
        5,
        embeddings=DATA["B_z_pool"],
        probabilities=p,
        samples=p[:, None],
        reference={
            "embeddings": DATA["B_z_val"],
            "probabilities": P_VAL,
            "labels": DATA["B_y_val"],
        },
        params={"kernel": "PCC", "pseudo_label": GUESSES[how]},
        returns="PSEUDO_LABELS",
    )
    assert got.pseudo_labels.tolist() == DATA[f"B_labels_{how}"].tolist()
    if how == "cor":
        assert got.pseudo_labels.tolist() == p.argmin(1).tolist()
