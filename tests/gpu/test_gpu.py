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
from queryselect_service.spec import build

strategies.load()
pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("QUERYSELECT_TEST_DEVICE", "cuda")
N, M, D, C, K = 20_000, 2000, 96, 12, 10
#: Inputs that a strategy can do without, though not without any of them; and parameters that it needs.
OPTIONAL, PARAMS = {("drop_query", "head_weights")}, {"prob_cover": {"delta": 0.9}}
CLUSTERED = {"drop_query", "k_means", "typiclust", "typiclust_to_margin"}
KERNELS = [
    {"kernel": kernel, "coarse_products": coarse} for kernel in ("PCC", "SUM", "LAST_LAYER") for coarse in (False, True)
]


def make(name: str, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    if name.endswith("samples"):
        return (2 * torch.randn(rows, K, C, generator=generator)).softmax(2)
    if name == "head_weights":
        return torch.randn(C, D, generator=generator)
    if name.endswith("weights"):
        return torch.rand(rows, generator=generator)
    if name.endswith("labels"):
        return torch.randint(C, (rows,), generator=generator)
    if name.endswith("probabilities"):
        return torch.rand(rows, C, generator=generator, dtype=torch.float64).softmax(1).float()
    return torch.randn(rows, D, generator=generator)


def make_inputs(strategy: strategies.Strategy) -> dict[str, torch.Tensor]:
    """Those that have to be there; beside reference rows, classes too, and scales with gradients."""
    strategy = strategy.bound(strategy.spec(), ())
    refers, found = any(each.role for each in strategy.inputs), {}
    for each in strategy.inputs:
        rows = M if each.role else N
        if each.name.endswith("scales"):
            for part in ("embeddings", "gradients"):
                found[f"{each.name}[0].{part}"] = make(part, rows + len(part))[:rows]
        elif (
            each.required
            or (strategy.name, each.name) in OPTIONAL
            or (refers and each.name.removeprefix("validation_") in {"probabilities", "labels"})
        ):
            found[each.name] = make(each.name, rows)
    if strategy.name in CLUSTERED:  # in as many blobs as picks: in one alone, rounding decides where k-means ends
        middles = torch.randn(100, D, generator=torch.Generator().manual_seed(0))
        found["embeddings"] += 20 * middles[torch.arange(N) % 100]
    return found


def check(name: str, context: int, params: dict) -> None:
    """Picks on the device and on the CPU."""
    strategy = strategies.STRATEGIES[name]
    inputs, candidates = make_inputs(strategy), torch.ones(N, dtype=torch.bool)
    candidates[:context] = False
    found = {}
    for device in ("cpu", DEVICE):
        with torch.inference_mode():
            found[device] = strategies.select(
                strategy,
                {key: x.to(device) for key, x in inputs.items()},
                k=100,
                pool=Whole(N),
                candidates=candidates.to(device),
                context=torch.arange(context).to(device),
                spec=build(strategy.spec, params),
                seed=3,
            )
    assert found[DEVICE].indices.tolist() == found["cpu"].indices.tolist()
    torch.testing.assert_close(found[DEVICE].scores.cpu(), found["cpu"].scores, rtol=1e-9, atol=0)


@pytest.mark.parametrize("context", [0, 50])
@pytest.mark.parametrize("name", sorted(strategies.STRATEGIES))
def test_the_picks_are_those_of_the_cpu(name, context):
    check(name, context, PARAMS.get(name, {}))


@pytest.mark.parametrize("params", KERNELS, ids=str)
def test_every_kernel_of_fisher_kernel_picks_the_same(params):
    check("fisher_kernel", 0, params)
