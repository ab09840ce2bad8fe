"""Factors of a softmax's Fisher information: the same products however they are computed."""

from __future__ import annotations

import pytest
import torch

from queryselect_service.maths.class_factors import AllClasses, TopClasses, Written, between, written

ROWS, CLASSES, DIRECTIONS = 40, 6, 5


def probabilities(sharpness: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(sharpness))
    logits = sharpness * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    p = logits.softmax(1)
    p[0] = torch.eye(CLASSES, dtype=torch.float64)[2]  # certain
    p[1] = 1 / CLASSES
    return p


def factors_of(p: torch.Tensor, top: int | None) -> AllClasses | TopClasses:
    return AllClasses.of(p) if top is None else TopClasses.of(p, top, renormalize=False)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("top", [None, 1, 3])
def test_written_out_they_give_the_same_products(top, sharpness):
    p = probabilities(sharpness)
    plain = factors_of(p, top)
    kept = Written(plain, written(plain, ROWS, p))
    assert kept.columns == plain.columns == kept.heads.shape[1]
    y = torch.randn(ROWS, DIRECTIONS, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner, some = plain.transposed(y), slice(3, 17)
    # An entry is a sum over classes, of which rounding takes a part of what its terms are.
    scale = y.abs() @ kept.heads.abs().mT
    assert ((kept.transposed(y) - inner).abs() <= 1e-14 * scale).all()
    torch.testing.assert_close(kept.times(inner), plain.times(inner), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(kept[some].transposed(y[some]), plain[some].transposed(y[some]), rtol=1e-12, atol=1e-14)
    middle = y[:, :1].mT @ y[:, :1]
    torch.testing.assert_close(between(kept, middle), between(plain, middle), rtol=1e-12, atol=1e-14)
    assert torch.equal(kept.outer(), plain.outer())


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
def test_all_classes_have_the_information_of_the_softmax(sharpness):
    p = probabilities(sharpness)
    heads = written(AllClasses.of(p), ROWS, p)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(heads.mT @ heads, fisher, rtol=1e-12, atol=1e-15)
