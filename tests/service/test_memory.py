"""Every kernel's estimate of its memory against what a process really takes: never less, and at most twice as much.

Measured in a process of its own for every case, on Linux. Sizes are heavy, so that what a process takes for itself does
not count, and what is freed goes back at once: glibc keeps pieces of up to 32 MB, more or fewer from run to run.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch

from queryselect_service import strategy as strategies
from queryselect_service.checks import Array
from queryselect_service.items import ItemAggregation, Items
from queryselect_service.quotas import Quota
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from queryselect_service.strategy import STRATEGIES, Limits, Sizes, Task
from queryselect_service.terms import Terms

strategies.load()


@dataclass(frozen=True)
class Case:
    strategy: str
    rows: int
    width: int = 1  # D, or C where the strategy reads no embeddings
    classes: int = 0  # C beside D
    k: int = 100
    labeled: int = 0
    dtype: str = "float32"
    task: str = "MULTICLASS"
    params: tuple = ()
    offset: float = 0.0  # of embeddings from the origin
    quotas: int = 0  # with as many groups as picks, one pick each, and costs
    references: int = 0  # rows of a set beside the pool
    samples: int = 0  # K


CASES = [
    Case("random", 5_000_000),
    Case("random", 4_000_000, k=2_000_000),
    Case("least_confidence", 3_000_000, 10),
    Case("margin", 100_000, 1000),
    Case("margin", 150_000, 300, task="MULTILABEL"),
    Case("entropy", 2_000_000, 10, k=500_000),
    Case("entropy", 100_000, 1000, dtype="float16"),
    Case("random", 5_000_000, quotas=1),
    Case("random", 4_000_000, k=200_000, quotas=3),
    Case("entropy", 2_000_000, 10, k=50_000, quotas=2),
    Case("k_center_greedy", 300_000, 384, k=10),
    Case("k_center_greedy", 300_000, 384, k=10, offset=1e4),
    Case("k_center_greedy", 150_000, 384, k=10, dtype="float64"),
    Case("k_center_greedy", 300_000, 384, k=10, dtype="bfloat16"),
    Case("k_center_greedy", 300_000, 384, k=10, labeled=300, params=(("normalize", True),)),
    Case("k_center_greedy", 2_000_000, 32, k=10, labeled=100),
    Case("k_center_greedy", 60_000, 384, k=200, labeled=5000),
    # Three in five of all pairs are so near: about as many neighbours as are kept; and all pairs, too many.
    Case("prob_cover", 2_500, 16_000, k=20, params=(("delta", 1.4156),)),
    Case("prob_cover", 2_500, 16_000, k=20, params=(("delta", 1e3), ("normalize", False))),
    Case("prob_cover", 2_500, 16_000, k=20, params=(("num_classes", 10),)),
    Case("discriminative", 30_000, 768, k=2, labeled=20),
    Case("discriminative", 30_000, 768, k=2, dtype="float16"),
    Case("max_herding", 500, 60_000, k=5),
    Case("max_herding", 500, 60_000, k=5, labeled=250, params=(("normalize", False),)),
    Case("uncertainty_herding", 500, 60_000, 10, k=5, labeled=5),
    Case("k_means", 100_000, 256, k=10),
    Case("k_means", 300_000, 16, k=50, params=(("normalize", True),)),
    Case("typiclust", 100_000, 256, k=20),
    Case("typiclust_to_margin", 100_000, 256, 10, k=20),
    Case("drop_query", 100_000, 256, 10, k=10),
    Case("expected_gradient_length", 300_000, 384, 10),
    Case("badge", 200_000, 384, 10, k=100),
    Case("badge", 100_000, 64, 100, k=300, dtype="float64"),
    Case("bait_diagonal", 100_000, 384, 10, k=5),
    Case("bait_diagonal", 100_000, 64, 20, k=5, task="MULTILABEL"),
    Case("bait_diagonal", 500, 20_000, 4, params=(("oversampling", 5),)),  # the backward phase is what takes most
    Case("bait_binary", 200_000, 128, 10, k=100),
    Case("bait_binary", 50_000, 384, 10, k=500, labeled=100),
    Case("bait", 100_000, 64, 20, k=20, task="MULTILABEL"),
    Case("bait", 20_000, 128, 10, k=50, labeled=200),
    Case("bait", 20_000, 384, 10, k=20, params=(("top_classes", 2),)),
    Case("bait", 5_000, 256, 40, k=20, labeled=20),
    Case("bait", 1_000, 8, 61, k=40),  # the backward phase is what takes most
    Case("fisher_kernel", 300_000, 160, k=125, references=10_000, params=(("kernel", "PCC"),)),
    Case("fisher_kernel", 30_000, 1536, k=200, references=3_000, params=(("kernel", "PCC"),)),
    Case("fisher_kernel", 200_000, 384, 10, k=100, references=2_000, params=(("kernel", "LAST_LAYER"),)),
    Case("fisher_kernel", 1_000_000, 32, k=1000, references=1_000, params=(("kernel", "PCC"),)),
    Case("variation_ratio", 200_000, 10, samples=50),
    Case("mean_std", 200_000, 10, samples=50),
    Case("predictive_entropy", 200_000, 10, samples=50, dtype="float64"),
    Case("bald", 200_000, 10, samples=100),
    Case("bald", 4_000, 1000, samples=100, k=10),
    Case("bald", 50_000, 20, samples=50, task="MULTILABEL"),
    Case("bald", 20_000, 12, samples=50, task="MULTILABEL", params=(("label_aggregation", "JOINT"),)),
    Case("bald", 200, 30, samples=100, k=10, task="MULTILABEL", params=(("label_aggregation", "JOINT"),)),
    Case("vote_entropy", 200_000, 10, samples=50),
    Case("consensus_kl", 100_000, 77, samples=20),
    Case("max_disagreement", 100_000, 77, samples=20),
    Case("power_bald", 3_000_000, 4, samples=5),
    Case("power_bald", 3_000_000, 4, samples=5, params=(("form", "SOFTRANK"),)),
    Case("epig", 20_000, 10, samples=50, references=500, k=10),
    Case("epig", 5_000, 10, samples=50, references=5_000, k=10),
    Case("epig", 5_000, 10, samples=50, references=200, k=10, task="MULTILABEL"),
    Case("batch_bald", 20_000, 10, samples=100, k=8),
    Case("batch_bald", 10_000, 77, samples=100, k=10),
    Case("batch_bald", 5_000, 10, samples=100, k=8, params=(("num_samples", 300_000),)),
    Case("batch_bald", 300_000, 3, samples=10, k=20, params=(("num_samples", 500),)),
    Case(
        "fisher_kernel",
        100_000,
        384,
        10,
        k=100,
        references=20_000,
        params=(("kernel", "LAST_LAYER"), ("coarse_products", True)),
    ),
]


def bound(case: Case) -> strategies.Strategy:
    """The strategy with what it reads by its parameters."""
    strategy = STRATEGIES[case.strategy]
    return strategy.bound(build(strategy.spec, dict(case.params)), ())


def letters(case: Case) -> dict[str, list[str]]:
    """The letters after the first of the inputs that a case gives, by name: those that have to be there, scales as
    embeddings.

    With classes of its own, a case that has references gives probabilities on both sides.
    """  # fmt: skip
    found = {}
    for each in bound(case).inputs:
        if each.required:
            name = each.name.replace("scales", "embeddings")
            found[name] = ["D"] if each.field == "scales" else each.shape.split()[1:]
    if case.references and case.classes:
        found |= {"probabilities": ["C"], "validation_probabilities": ["C"]}
    if case.strategy == "drop_query":
        found |= {"head_weights": ["D"]}
    return found


def widths(case: Case) -> dict[str, int]:
    """The sizes of D, C and K."""
    return {"D": case.width, "C": case.classes or case.width, "K": case.samples}


def rows_of(case: Case, name: str, rows: int) -> int:
    """How many rows an input has where the pool has so many: C those of a head, those of references their own."""
    if name == "head_weights":
        return case.classes
    return min(rows, case.references) if name.startswith(("validation", "target")) else rows


def measure(case: Case) -> tuple[int, int]:
    """The bytes of the inputs, and the most that the kernel took beside them; in this process."""
    from benchmarks.machine import Usage

    strategy, dtype = STRATEGIES[case.strategy], getattr(torch, case.dtype)

    def run(rows: int, k: int, labeled: int, watched: bool) -> tuple[int, int]:
        inputs = {}
        for name, some in letters(case).items():
            count = rows_of(case, name, rows)
            x = np.random.default_rng(0).random((count, *(widths(case)[letter] for letter in some)), np.float32)
            if name.endswith(("probabilities", "samples")) and case.task == "MULTICLASS":
                x /= x.sum(-1, keepdims=True)
            inputs[name] = torch.from_numpy(x).add_(case.offset).to(dtype)
            del x
        if case.references and case.strategy == "fisher_kernel":
            count = min(rows, case.references)
            inputs["validation_labels"] = torch.arange(count) % (case.classes or 10)
            inputs["validation_misclassified"] = torch.arange(count) % 3 > 0
        candidates = torch.ones(rows, dtype=torch.bool)
        candidates[:labeled] = False
        context = torch.arange(labeled)
        limits = limits_of(case, rows, k)
        usage = Usage(os.getpid())
        with torch.inference_mode():
            strategies.select(
                strategy, inputs, k=k, pool=Whole(rows), candidates=candidates, context=context,
                spec=build(strategy.spec, dict(case.params)), task=Task(case.task), limits=limits,
            )  # fmt: skip
        return sum(x.nbytes for x in inputs.values()), int(usage.peak * 1e6) if watched else 0

    run(500, 5, min(case.labeled, 20), False)  # what libraries take once
    return run(case.rows, case.k, case.labeled, True)


def limits_of(case: Case, rows: int, k: int) -> Limits:
    """Quotas whose groups lie together, so that most rows are passed over, and a budget that is no limit."""
    if not case.quotas:
        return Limits()
    values = tuple(torch.arange(rows) * k // rows for _ in range(case.quotas))
    quotas = tuple(Quota(f"quota {number}", 1) for number in range(case.quotas))
    return Limits(quotas, values, torch.ones(rows, dtype=torch.float64), 1e9)


def estimate(case: Case) -> int:
    strategy, item = STRATEGIES[case.strategy], getattr(torch, case.dtype).itemsize
    inputs, sizes = 0, {}
    for name, some in letters(case).items():
        sizes |= {letter: widths(case)[letter] for letter in some}
        width = math.prod(sizes[letter] for letter in some)
        inputs += rows_of(case, name, case.rows) * width * item
    known = Sizes(
        entries=inputs // item,
        N=case.rows,
        k=case.k,
        L=case.labeled,
        M=case.references,
        item=item,
        inputs=inputs,
        multilabel=case.task == "MULTILABEL",
        **sizes,
    )
    arrays = tuple(Array("pool.quotas", torch.int64, (case.rows,)) for _ in range(case.quotas))
    terms = Terms(tuple(Quota("") for _ in arrays), arrays)
    return bound(case).memory(known, build(strategy.spec, dict(case.params))) + terms.memory(case.rows, case.k)


@dataclass(frozen=True)
class ItemsCase:
    rows: int
    items: int
    how: str = "MEAN"
    ascending: bool = True
    dtype: str = "int64"


ITEMS_CASES = [
    ItemsCase(5_000_000, 200_000),
    ItemsCase(5_000_000, 200_000, ascending=False),
    ItemsCase(5_000_000, 5_000_000, "MAX", ascending=False, dtype="int32"),
    ItemsCase(5_000_000, 200_000, "TOP_K_MEAN", ascending=False),
    ItemsCase(2_000_000, 8_000_000, "SUM", ascending=False),
]


def items_of(case: ItemsCase) -> Items:
    return Items(Array("pool.item_rows", getattr(torch, case.dtype), (case.rows,)), ItemAggregation(case.how), 3, 0)


def measure_items(case: ItemsCase) -> tuple[int, int]:
    """The same of putting rows' scores together to those of items."""
    from benchmarks.machine import Usage

    def run(rows: int, items: int) -> tuple[int, int]:
        of = (torch.arange(rows) * items // rows).to(getattr(torch, case.dtype))
        of = of if case.ascending else of.flip(0)
        scores, each = torch.ones(rows, dtype=torch.float64), items_of(case)
        each.occupied = torch.ones(items, dtype=torch.bool)
        usage = Usage(os.getpid())
        with torch.inference_mode():
            each.aggregate(scores, of, Whole(items))
        return scores.nbytes + of.nbytes, int(usage.peak * 1e6)

    run(500, 50)
    return run(case.rows, case.items)


def measured(case: Case | ItemsCase, way: str = "measure") -> tuple[int, int]:
    """The same in a process of its own: memory that one case leaves behind is none of the next's."""
    code = (
        "import json, sys; from tests.service import test_memory as here;"
        "kind, way, case = *sys.argv[1:3], json.loads(sys.argv[3]);"
        "case |= {'params': tuple(map(tuple, case['params']))} if 'params' in case else {};"
        "print(json.dumps(getattr(here, way)(getattr(here, kind)(**case))))"
    )
    command = [sys.executable, "-c", code, type(case).__name__, way, json.dumps(asdict(case))]
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


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("case", ITEMS_CASES, ids=lambda case: "-".join(map(str, asdict(case).values())))
def test_the_estimate_for_items_is_never_too_low_and_at_most_twice_too_high(case):
    """The scores of rows are among the inputs here."""
    inputs, peak = measured(case, "measure_items")
    expected = items_of(case).memory(case.rows, case.items)
    said = f"inputs {inputs / 1e6:.0f} MB, beside them {peak / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB"
    assert peak <= expected, said
    assert inputs + expected <= 2 * (inputs + peak), said
