"""The problems of kernels' benchmarks as calls of a client: every strategy at its largest size for a processor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from benchmarks.case import LETTERS, Benchmark, Case, load
from queryselect_service.strategy import STRATEGIES, ReferenceRole


@dataclass(frozen=True)
class Asked:
    """A call of `Client.select`. title: what it is called by. options: the keywords beside strategy and budget."""

    title: str
    strategy: str
    budget: int
    options: Mapping[str, Any]


def largest(name: str, most_bytes: float = math.inf) -> Iterator[Asked]:
    """The largest cases of each of a strategy's benchmarks, those of the most numbers and of the most rows.

    most_bytes: of the inputs; where they are more, there are fewer rows.
    """
    for benchmark in load(name):
        widest, longest = (max(benchmark.cpu, key=size) for size in (_numbers, _rows))
        for case in [widest] if longest is widest else [widest, longest]:
            nbytes = sum(x.nbytes for x in benchmark.problem(case, "cpu").inputs.values())
            rows = case.sizes.N if nbytes <= most_bytes else int(case.sizes.N * most_bytes / nbytes)
            yield asked(benchmark, replace(case, sizes=replace(case.sizes, N=rows)))


def asked(benchmark: Benchmark, case: Case) -> Asked:
    """A case as a client asks for it."""
    problem = benchmark.problem(case, "cpu")
    inputs = keywords(problem.inputs)
    if not inputs:
        inputs["num_rows"] = case.sizes.N
    if len(problem.context):
        inputs["labeled"] = problem.context.numpy()
    options = {**inputs, "params": dict(problem.params), "seed": problem.seed}
    return Asked(f"{benchmark.title}: {case}", benchmark.strategy, problem.k, options)


def keywords(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs by the names that kernels have for them, as the client takes them.

    Those of scales[0], say, are in a list of scales, and target_samples in a reference set of the role TARGET.
    """
    found: dict[str, Any] = {}
    references: dict[str, dict[str, Any]] = {}
    for name, x in inputs.items():
        role = next((role for role in ReferenceRole if name.startswith(role.prefix)), None)
        into = found if role is None else references.setdefault(role, {"role": str(role)})
        place, _, part = name.removeprefix("" if role is None else role.prefix).rpartition(".")
        if place:  # scales come in their order
            scales = into.setdefault("scales", [])
            at = int(place.removeprefix("scales[").removesuffix("]"))
            scales.extend({} for _ in range(at + 1 - len(scales)))
            into = scales[at]
        into[part] = x.numpy()
    return {**found, "references": list(references.values())} if references else found


def names() -> list[str]:
    """The strategies of the registry."""
    return sorted(STRATEGIES)


def _numbers(case: Case) -> int:
    return math.prod(max(1, getattr(case.sizes, letter)) for letter in LETTERS)


def _rows(case: Case) -> int:
    return case.sizes.N
