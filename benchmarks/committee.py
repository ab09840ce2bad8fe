"""What the benchmarks of scores of samples share: sizes, inputs, and how libraries are handed predictions.

Every library has a layout of its own. Where that is not ours, it gets its own before the clock starts, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pools
from benchmarks.case import Benchmark, Case, Part, Peer, Problem, Scaling
from benchmarks.clock import timed
from queryselect_service.strategy import Sizes

#: Members of the committee, in the cases.
MEMBERS = 100
LAYOUT = "given its own layout"


def reads(sizes: Sizes) -> dict[str, float]:
    """The floor of scores without logarithms: one look at all samples."""
    return {"read": sizes.item * sizes.N * sizes.K * sizes.C}


def logarithms(sizes: Sizes) -> dict[str, float]:
    """The floor of scores with the logarithm of every probability, and of the mean ones."""
    return {"log": sizes.N * (sizes.K + 1) * sizes.C}


def benchmark(
    strategy: str,
    peers: tuple[Peer, ...],
    floor: Callable[[Sizes], Mapping[str, float]],
    cpu: tuple[Case, ...] = (),
    params: Mapping[str, Any] | None = None,
) -> Benchmark:
    """The benchmark of a score of samples. cpu: the cases there, where they are not one of ten classes alone."""
    return Benchmark(
        strategy=strategy,
        params=params or {},
        make=pools.samples,
        peers=peers,
        floor=floor,
        quick=Case(Sizes(N=500, K=8, C=5, k=10)),
        cpu=cpu or (Case(Sizes(N=50_000, K=MEMBERS, C=10, k=100)),),
        cuda=(Case(Sizes(N=500_000, K=MEMBERS, C=100, k=1000)),),
        scaling=Scaling(
            Sizes(N=10_000, K=32, C=10, k=100), {"N": (5_000, 40_000), "K": (16, 128), "C": (8, 64), "k": (1000, 8000)}
        ),
    )


def highest(scores: Any, k: int) -> Tensor:
    """The rows of the k highest of scores (N,), the first of equal ones."""
    return torch.from_numpy(np.argsort(-scores, kind="stable")[:k])


def by_numpy(scores: Callable[[Any], Any], how: str = "the formula and argsort") -> Peer:
    """A peer of a line of numpy. scores: of samples (N, K, C), (N,)."""
    return Peer("numpy", lambda problem: highest(scores(problem.array("samples")), problem.k), how)


def baal(select: Callable[[Any, Problem], Tensor], how: str, *, rounds: int | None = None) -> Peer:
    """A heuristic of baal's. select: the picks, of samples (N, C, K)."""

    def run(problem: Problem) -> Part:
        x = np.ascontiguousarray(problem.array("samples").swapaxes(1, 2))
        seconds, picks = timed(lambda: select(x, problem), torch.device("cpu"))
        return Part(seconds, LAYOUT, picks)

    return Peer("baal", run, how, distribution="baal", rounds=rounds)


def heuristic(name: str, how: str) -> Peer:
    """That of baal.active.heuristics by its name, and the first rows of its ranks."""

    def ranks(x: Any, problem: Problem) -> Tensor:
        from baal.active import heuristics

        return torch.from_numpy(getattr(heuristics, name)()(x)[: problem.k].copy())

    return baal(ranks, how)


def votes(samples: Any) -> Any:
    """The class (N, K) that each member finds likeliest."""
    return samples.argmax(2)


def counts(samples: Any) -> Any:
    """How many members vote for each class (N, C)."""
    n, _, classes = samples.shape
    return np.bincount((votes(samples) + classes * np.arange(n)[:, None]).ravel(), minlength=n * classes).reshape(
        n, classes
    )


def entropies(p: Any) -> Any:
    """The entropy (...,) of distributions (..., C), 0 ln 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.nansum(p * np.log(p), axis=-1)


def scikit_activeml(utilities: Callable[[Any], Any], how: str) -> Peer:
    """What its QueryByCommittee does with what its committee predicted. utilities: of samples (N, K, C)."""

    def run(problem: Problem) -> Tensor:
        from skactiveml.utils import simple_batch

        found = utilities(problem.array("samples"))
        return torch.from_numpy(simple_batch(found, random_state=problem.seed, batch_size=problem.k))

    return Peer("scikit-activeml", run, how, distribution="scikit-activeml")


class Committee:
    """A committee that has predicted already, as modAL asks one: samples (N, K, C) of K members."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples
        self.classes_ = np.arange(samples.shape[2])

    def __len__(self) -> int:
        return int(self._samples.shape[1])

    def __iter__(self) -> Iterator[SimpleNamespace]:
        return (SimpleNamespace() for _ in range(len(self)))

    def vote(self, _: Any) -> Any:
        """The members' votes (N, K)."""
        return votes(self._samples)

    def vote_proba(self, _: Any) -> Any:
        """The members' predictions (N, K, C)."""
        return self._samples

    def predict_proba(self, _: Any) -> Any:
        """The consensus (N, C)."""
        return self._samples.mean(1)


def modal(sampling: str, how: str = "") -> Peer:
    """A query strategy of modAL.disagreement, with a committee that has predicted already."""

    def run(problem: Problem) -> Tensor:
        from modAL import disagreement

        samples = problem.array("samples")
        picks, _ = getattr(disagreement, sampling)(Committee(samples), samples, n_instances=problem.k)
        return torch.from_numpy(picks)

    return Peer("modAL", run, how, distribution="modAL-python")
