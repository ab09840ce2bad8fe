"""Every kernel's estimate of its memory against what a process really takes: never less, and at most twice as much.

Measured in a process of its own for every case, on Linux. Sizes are heavy, so that what a process takes for itself does
not count, and what is freed goes back at once: glibc keeps pieces of up to 32 MB, more or fewer from run to run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from queryselect_service import strategy as strategies
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from queryselect_service.strategy import STRATEGIES, Sizes, Task

strategies.load()


@dataclass(frozen=True)
class Case:
    strategy: str
    rows: int
    width: int = 1  # D or C
    k: int = 100
    labeled: int = 0
    dtype: str = "float32"
    task: str = "MULTICLASS"
    params: tuple = ()
    offset: float = 0.0  # of embeddings from the origin


CASES = [
    Case("random", 5_000_000),
    Case("random", 4_000_000, k=2_000_000),
    Case("least_confidence", 3_000_000, 10),
    Case("margin", 100_000, 1000),
    Case("margin", 150_000, 300, task="MULTILABEL"),
    Case("entropy", 2_000_000, 10, k=500_000),
    Case("entropy", 100_000, 1000, dtype="float16"),
    Case("k_center_greedy", 300_000, 384, k=10),
    Case("k_center_greedy", 300_000, 384, k=10, offset=1e4),
    Case("k_center_greedy", 150_000, 384, k=10, dtype="float64"),
    Case("k_center_greedy", 300_000, 384, k=10, dtype="bfloat16"),
    Case("k_center_greedy", 300_000, 384, k=10, labeled=300, params=(("normalize", True),)),
    Case("k_center_greedy", 2_000_000, 32, k=10, labeled=100),
    Case("k_center_greedy", 60_000, 384, k=200, labeled=5000),
]


def measure(case: Case) -> tuple[int, int]:
    """The bytes of the inputs, and the most that the kernel took beside them; in this process."""
    from benchmarks.machine import Usage

    strategy, dtype = STRATEGIES[case.strategy], getattr(torch, case.dtype)

    def run(rows: int, k: int, labeled: int, watched: bool) -> tuple[int, int]:
        inputs = {}
        for each in strategy.inputs:
            x = np.random.default_rng(0).random((rows, case.width), np.float32)
            if each.name == "probabilities" and case.task == "MULTICLASS":
                x /= x.sum(1, keepdims=True)
            inputs[each.name] = torch.from_numpy(x).add_(case.offset).to(dtype)
            del x
        candidates = torch.ones(rows, dtype=torch.bool)
        candidates[:labeled] = False
        context = torch.arange(labeled)
        usage = Usage(os.getpid())
        with torch.inference_mode():
            strategies.select(
                strategy, inputs, k=k, pool=Whole(rows), candidates=candidates, context=context,
                spec=build(strategy.spec, dict(case.params)), task=Task(case.task),
            )  # fmt: skip
        return sum(x.nbytes for x in inputs.values()), int(usage.peak * 1e6) if watched else 0

    run(500, 5, min(case.labeled, 20), False)  # what libraries take once
    return run(case.rows, case.k, case.labeled, True)


def estimate(case: Case) -> int:
    strategy, item = STRATEGIES[case.strategy], getattr(torch, case.dtype).itemsize
    letters = {letter: case.width for each in strategy.inputs for letter in each.shape.split() if letter != "N"}
    inputs = case.rows * case.width * item if strategy.inputs else 0
    sizes = Sizes(
        entries=inputs // item,
        N=case.rows,
        k=case.k,
        L=case.labeled,
        item=item,
        inputs=inputs,
        multilabel=case.task == "MULTILABEL",
        **letters,
    )
    return strategy.memory(sizes, build(strategy.spec, dict(case.params)))


def measured(case: Case) -> tuple[int, int]:
    """The same in a process of its own: memory that one case leaves behind is none of the next's."""
    code = (
        "import json, sys; from tests.service.test_memory import Case, measure;"
        "case = json.loads(sys.argv[1]); case['params'] = tuple(map(tuple, case['params']));"
        "print(json.dumps(measure(Case(**case))))"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    inputs, peak = json.loads(ran.stdout.splitlines()[-1])
    return inputs, peak


def test_every_strategy_is_measured():
    assert {case.strategy for case in CASES} >= set(STRATEGIES)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
def test_an_estimate_is_never_too_low_and_at_most_twice_too_high(case):
    (inputs, peak), expected = measured(case), estimate(case)
    said = f"inputs {inputs / 1e6:.0f} MB, beside them {peak / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB"
    assert peak <= expected, said
    assert inputs + expected <= 2 * (inputs + peak), said
