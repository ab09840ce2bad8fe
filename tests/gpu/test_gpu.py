"""On a CUDA device every strategy picks what it picks on the CPU.

Calls the kernels directly, so that a machine with torch and pytest alone can run it:

    PYTHONPATH=service python -m pytest --noconftest -c tests/gpu/pytest.ini --rootdir . tests/gpu

QUERYSELECT_TEST_DEVICE names another device than cuda, such as cuda:1.
"""

from __future__ import annotations

import os

import pytest
import torch

from queryselect_service import strategy as strategies
from queryselect_service.shards import Whole

strategies.load()
pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("QUERYSELECT_TEST_DEVICE", "cuda")
N, D, C = 20_000, 96, 12


def make(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "probabilities":
        return torch.rand(N, C, generator=generator, dtype=torch.float64).softmax(1).float()
    return torch.randn(N, D, generator=generator)


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("name", sorted(strategies.STRATEGIES))
def test_the_picks_are_those_of_the_cpu(name, cold):
    strategy = strategies.STRATEGIES[name]
    inputs = {each.name: make(each.name) for each in strategy.inputs if each.required}
    context = torch.arange(0 if cold else 50)
    candidates = torch.ones(N, dtype=torch.bool)
    candidates[context] = False
    found = {}
    for device in ("cpu", DEVICE):
        with torch.inference_mode():
            found[device] = strategies.select(
                strategy,
                {key: x.to(device) for key, x in inputs.items()},
                k=100,
                pool=Whole(N),
                candidates=candidates.to(device),
                context=context.to(device),
                seed=3,
            )
    assert found[DEVICE].indices.tolist() == found["cpu"].indices.tolist()
    torch.testing.assert_close(found[DEVICE].scores.cpu(), found["cpu"].scores, rtol=1e-9, atol=0)
