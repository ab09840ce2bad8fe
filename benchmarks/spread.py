"""How far BatchBALD's estimates spread: ours by 1000 configurations beside batchbald-redux by 10 000.

    python -m benchmarks.spread

A batch of rows is given and many candidates are scored with it, by one seed after another. What is kept is the standard
deviation over the seeds of a candidate's score, and of its score less the mean of all candidates', as what they have in
common changes no pick: root mean squares over the candidates. Scores are the candidate's gain (ours), and the
information of the batch with it (batchbald-redux): they differ by a number that all candidates share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, pools
from benchmarks.case import Case
from benchmarks.progress import Progress
from benchmarks.report import Row
from queryselect_service.kernels.batch_bald import _conditional_gains
from queryselect_service.maths.configurations import Configurations
from queryselect_service.maths.information import surprise
from queryselect_service.strategy import Sizes

OURS, REDUX = "ours", "batchbald-redux"
FEW, MANY = 1000, 10_000


def ours(p: Tensor, batch: int, most: int, seed: int) -> Tensor:
    """The gains (n,) of rows, the first of which are the batch, p (n, K, C)."""
    given = Configurations(p.shape[1], most, seed, p.device)
    for row in p[:batch]:
        given.add(row[:, None])
    return given.weights @ _conditional_gains(given.posteriors, p[batch:, :, None], surprise(p[batch:]).sum(2))


def redux(p: Tensor, batch: int, most: int, seed: int) -> Tensor:
    """The information (n,) of the batch with each of the others."""
    from batchbald_redux.batchbald import compute_conditional_entropy
    from batchbald_redux.joint_entropy import DynamicJointEntropy

    torch.manual_seed(seed)
    logs = p.log()
    joint = DynamicJointEntropy(most, batch, p.shape[1], p.shape[2], dtype=p.dtype)
    joint.add_variables(logs[:batch])
    given = compute_conditional_entropy(logs)
    found: Tensor = joint.compute_batch(logs[batch:]) - given[batch:] - given[:batch].sum()
    return found


WAYS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {OURS: ours, REDUX: redux}


def measure(sizes: Sizes, batch: int, seeds: int) -> list[Row]:
    """The spread of every way at every number of configurations."""
    case = Case(Sizes(N=batch + sizes.N, K=sizes.K, C=sizes.C), torch.float64)
    p = pools.consistent_samples(case, torch.Generator().manual_seed(0))["samples"]
    rows = []
    with Progress(2 * len(WAYS) * seeds, "spread") as progress:
        for name, way in WAYS.items():
            for most in (FEW, MANY):
                found = []
                for seed in range(seeds):
                    progress.now(f"{name}, {most}")
                    found.append(way(p, batch, most, seed))
                    progress.step()
                scores = torch.stack(found)  # (seeds, n)
                rows.append(
                    {
                        "way": name,
                        "num_samples": most,
                        "spread": _rms(scores.std(0)),
                        "spread less what is common": _rms((scores - scores.mean(1, keepdim=True)).std(0)),
                        "mean": float(scores.mean()),
                    }
                )
    return rows


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, and keeps what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--candidates", type=int, default=200, help="default %(default)s")
    parser.add_argument("--members", type=int, default=100, help="parameter samples (default %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="default %(default)s")
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 10], help="rows (default 6 10)")
    parser.add_argument("--seeds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    chosen = parser.parse_args(arguments)
    sizes = Sizes(N=chosen.candidates, K=chosen.members, C=chosen.classes)
    result: Row = {"machine": machine.describe(), **vars(chosen), "rows": {}}
    del result["results"]
    for batch in chosen.batches:
        result["rows"][batch] = rows = measure(sizes, batch, chosen.seeds)
        print(f"\n{sizes.N} candidates, K={sizes.K} C={sizes.C}, {batch} rows in the batch, {chosen.seeds} seeds")
        for row in rows:
            print(
                f"  {row['way']:16}{row['num_samples']:8} configurations: spread {row['spread']:.2e},"
                f" less what is common {row['spread less what is common']:.2e}"
            )
    print(f"kept in {machine.keep('batch_bald-spread', machine.name(), result, chosen.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
