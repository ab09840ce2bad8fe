"""The most memory that one way to select takes beside the inputs, in a process of its own: `measure`.

On a CPU it is the growth of the resident memory, with an allocator that gives everything larger than 1 MB back at once
(what one way leaves behind must not hide what it takes the next time); on a GPU, what torch has allocated at most.
What ran is told as well, for what takes so long that once must do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Part, Problem, load, run
from benchmarks.machine import MB, Usage
from queryselect_service import allocator
from queryselect_service import strategy as strategies
from queryselect_service.strategy import Sizes

#: What is larger goes back to the system at once.
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True)
class Weighed:
    """Megabytes beside the inputs: those that a way took, and those that ours is said to take at most; what ran."""

    peak: float
    estimate: float
    ran: Part


def measure(benchmark: Benchmark, case: Case, way: str, device: str, *, once: bool = False) -> Weighed:
    """Runs `way`, ours or the name of a peer. Raises RuntimeError where the process failed.

    once: what the run took counts too, so that its allocator is that of other rounds, which takes less time.
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
    env = os.environ if once else os.environ | {THRESHOLD: str(1 << 20)}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1])
    peak, estimate, seconds, said, picks = json.loads(ran.stdout.splitlines()[-1])
    return Weighed(peak, estimate, Part(seconds, said, None if picks is None else torch.tensor(picks)))


def main() -> None:
    """What the process does: makes the inputs, runs once on small ones, and measures."""
    strategy, title, sizes, dtype, way, device = json.loads(sys.argv[1])
    strategies.load()
    if THRESHOLD not in os.environ:
        allocator.prepare()
    benchmark = next(each for each in load(strategy) if each.title == title)
    plain = Case(Sizes(**sizes), getattr(torch, dtype))
    declared = (benchmark.quick, *benchmark.cpu, *benchmark.cuda)
    case = next((each for each in declared if each.known == plain.known), plain)  # with its own peers
    select = benchmark.ways(case)[way]
    select(benchmark.problem(benchmark.quick, device))  # what libraries take once
    problem = benchmark.problem(case, device)
    peak, ran = (_on_gpu if device == "cuda" else _on_cpu)(select, problem)
    picks = None if ran.picks is None else ran.picks.tolist()
    print(json.dumps([peak, benchmark.estimate(case, problem) / MB, ran.seconds, ran.said, picks]))


def _on_cpu(select: Callable[[Problem], Tensor | Part], problem: Problem) -> tuple[float, Part]:
    usage = Usage(os.getpid())
    ran = run(select, problem)
    return usage.peak, ran


def _on_gpu(select: Callable[[Problem], Tensor | Part], problem: Problem) -> tuple[float, Part]:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ran = run(select, problem)
    return (torch.cuda.max_memory_allocated() - before) / MB, ran


if __name__ == "__main__":
    main()
