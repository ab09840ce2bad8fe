"""The most memory that one way to select takes beside the inputs, in a process of its own: `measure`.

On a CPU it is the growth of the resident memory, with an allocator that gives everything larger than 1 MB back at once
(what one way leaves behind must not hide what it takes the next time); on a GPU, what torch has allocated at most.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.case import Benchmark, Case, Problem, load
from benchmarks.machine import MB, Usage
from queryselect_service import strategy as strategies
from queryselect_service.strategy import Sizes


def measure(benchmark: Benchmark, case: Case, way: str, device: str) -> tuple[float, float]:
    """Megabytes beside the inputs that `way`, ours or the name of a peer, took, and that ours is said to take at most.

    Raises RuntimeError where the process failed.
    """
    told = [
        benchmark.strategy,
        benchmark.title,
        asdict(case.sizes),
        str(case.dtype).removeprefix("torch."),
        way,
        device,
    ]
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(told)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1])
    took, estimate = json.loads(ran.stdout.splitlines()[-1])
    return took, estimate


def main() -> None:
    """What the process does: makes the inputs, runs once on small ones, and measures."""
    strategy, title, sizes, dtype, way, device = json.loads(sys.argv[1])
    strategies.load()
    benchmark = next(each for each in load(strategy) if each.title == title)
    plain = Case(Sizes(**sizes), getattr(torch, dtype))
    declared = (benchmark.quick, *benchmark.cpu, *benchmark.cuda)
    case = next((each for each in declared if each.known == plain.known), plain)  # with its own peers
    select = benchmark.ways(case)[way]
    select(benchmark.problem(benchmark.quick, device))  # what libraries take once
    problem = benchmark.problem(case, device)
    took = (_on_gpu if device == "cuda" else _on_cpu)(select, problem)
    print(json.dumps([took, benchmark.estimate(case, problem) / MB]))


def _on_cpu(select: Callable[[Problem], object], problem: Problem) -> float:
    usage = Usage(os.getpid())
    select(problem)
    return usage.peak


def _on_gpu(select: Callable[[Problem], object], problem: Problem) -> float:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    select(problem)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MB


if __name__ == "__main__":
    main()
