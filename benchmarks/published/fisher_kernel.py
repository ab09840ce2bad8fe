"""The Fisher kernel's selection as its authors' scheme has it, every step in float32.

Descriptors are standardised as a whole; every pool row is compared with all references for its label, in features and,
though that is not used, in gradients; k-centres compute the similarities of all centres so far anew at every step; and
all columns are ranked for every centre before the first pick is made. Only one entry of the ranking that the authors'
code passes over by mistake is not passed over here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.case import Peer, Problem
from queryselect_service.maths.noise import uniform

#: Columns that are compared at once, and ranks where every misclassified row is a centre.
COLUMNS, RANKS = 256, 32
SCHEME = "the authors' scheme"


def standardized(x: Tensor) -> Tensor:
    """Rows (n, L) less their mean, over their standard deviation."""
    return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-10)


def scheme(problem: Problem) -> Tensor:
    """Its picks (k,)."""
    given = problem.inputs
    z, theirs = (_scales(given, prefix, "embeddings") for prefix in ("", "validation_"))
    if "head_weights" in given:
        y = given["validation_labels"]
        labels = y[_nearest(z, theirs)]
        g, their_g = (
            standardized(_gradients(given[f"{prefix}probabilities"], each, given["head_weights"]))
            for prefix, each in (("", labels), ("validation_", y))
        )
        wrong = (given["validation_probabilities"].argmax(1) != y).nonzero().squeeze(1)
    else:
        g, their_g = (_scales(given, prefix, "gradients") for prefix in ("", "validation_"))
        wrong = given["validation_misclassified"].nonzero().squeeze(1)
    rows, centres = torch.cat([z, g], 1), torch.cat([theirs[wrong], their_g[wrong]], 1)
    ranks = RANKS
    if len(centres) > problem.k:
        # It begins where ours does.
        first = problem.params.get("first_center", int(uniform(problem.seed, wrong).argmax()))
        centres, ranks = _k_centers(centres, first, problem.k), problem.k - 1
    similar = torch.cat([centres @ rows[at : at + COLUMNS].T for at in range(0, len(rows), COLUMNS)], 1)  # (c, N)
    values, indices = similar.T.contiguous().topk(min(ranks, len(rows)), dim=0)  # (ranks, c), along columns
    picks: dict[int, None] = {}
    for value, index in zip(values, indices, strict=True):
        picks.update(dict.fromkeys(index[value.argsort(descending=True)].tolist()))
        if len(picks) >= problem.k:
            break
    return torch.tensor(list(picks)[: problem.k])


def _scales(given: Mapping[str, Tensor], prefix: str, part: str) -> Tensor:
    names = sorted(name for name in given if name.startswith(f"{prefix}scales") and name.endswith(part))
    return torch.cat([standardized(given[name]) for name in names], 1)


def _gradients(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (probabilities - torch.eye(len(weights))[labels].to(probabilities)) @ weights


def _nearest(rows: Tensor, references: Tensor) -> Tensor:
    """The likest reference row (N,); the second product, which is not used, is that of gradients."""
    found = []
    for start in range(0, len(rows), COLUMNS):
        part = rows[start : start + COLUMNS].T
        similar = references @ part
        references @ part
        found.append(similar.argmax(0))
    return torch.cat(found)


def _k_centers(rows: Tensor, first: int, k: int) -> Tensor:
    chosen = [first]
    while len(chosen) < k:
        chosen.append(int((rows[chosen] @ rows.T).amax(0).argmin()))
    return rows[chosen]


PEERS = (Peer(SCHEME, scheme, "by its text", exact=True),)
