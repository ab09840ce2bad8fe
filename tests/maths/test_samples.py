"""Distributions made of logits: the rarest classes count as impossible, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch

from queryselect_service.maths.information import divergences, mutual_information
from queryselect_service.maths.predictions import Samples, SamplesKind

TINY = torch.finfo(torch.float64).tiny
#: How far below the likeliest class; e^-745 is the smallest number that is not 0.
FAR = [0.0, 30.0, 699.0, 701.0, 707.0, 709.0, 730.0, 744.0, 745.2, 746.0, 800.0, 1e6, math.inf]


@pytest.fixture
def logits():
    """Three members; in every row one class is so far below the others, to one member or to all."""
    z = torch.randn(2 * len(FAR), 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, far in enumerate(FAR * 2):
        members = slice(None) if row < len(FAR) else slice(1)
        z[row, members, 0] = z[row, members, 1:].amax(-1) - far
    return z


def test_no_number_is_denormal_and_none_moves_by_much(logits):
    found = Samples(logits, SamplesKind.LOGITS)[:]
    wanted = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
    assert not ((found > 0) & (found < TINY)).any()
    assert not found[wanted == 0].any(), "what was impossible stays so"
    assert (found[wanted > 1e-303] > 0).all()
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-303)


@pytest.mark.parametrize("score", [mutual_information, divergences])
def test_scores_are_those_of_all_digits(logits, score):
    found = Samples(logits, SamplesKind.LOGITS)[:]
    wanted = torch.exp(logits - logits.amax(-1, keepdim=True))
    wanted *= 1 / wanted.sum(-1, keepdim=True)
    change = (score(found) - score(wanted)).abs().max()
    assert change <= 1e-300 * logits.shape[-1]


def test_labels_that_are_all_but_certain_are_certain():
    z = torch.tensor([[[-800.0, -720.0, -690.0, 0.0, 690.0, 720.0, 800.0]]], dtype=torch.float64)
    (q,) = Samples(z, SamplesKind.LOGITS, multilabel=True)[:].unbind(0)
    assert (q.sum(-1) == 1).all()
    absent, present = q[0].unbind(-1)
    assert present[:2].tolist() == absent[-2:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(present[2], torch.tensor(-690.0).double().exp(), rtol=1e-14, atol=0.0)
