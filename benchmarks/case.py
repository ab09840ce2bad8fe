"""What the file of a strategy in benchmarks/kernels/ declares, and what it is run on.

A file there gives BENCHMARKS; the harness finds it by itself:

    BENCHMARKS = (
        Benchmark(
            strategy="margin",
            make=pools.predictions,
            peers=(Peer("numpy", numpy_margin),),
            floor=lambda sizes: {"read": sizes.item * sizes.N * sizes.C},
            quick=Case(Sizes(N=500, C=10, k=5)),
            cpu=(Case(Sizes(N=1_000_000, C=10, k=100)),),
            scaling=Scaling(Sizes(N=100_000, C=16, k=100), {"N": (50_000, 400_000)}),
        ),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks.clock import timed
from benchmarks.machine import NOT_INSTALLED, installed
from queryselect_service import strategy as strategies
from queryselect_service.shards import Whole
from queryselect_service.spec import build
from queryselect_service.strategy import Sizes

OURS = "ours"
LETTERS = ("N", "D", "S", "K", "C", "L", "M", "k")


@dataclass(frozen=True)
class Problem:
    """What ours and the peers are given, all on one device.

    inputs: by name, N rows each. context: (L,) rows that count as labelled. candidates: (N,) bool. params: those of the
    strategy's Spec.
    """

    inputs: Mapping[str, Tensor]
    k: int
    context: Tensor
    candidates: Tensor
    params: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.candidates.device

    def first(self, rows: int) -> Problem:
        """Its first rows, with nothing labelled."""
        inputs = {name: x[:rows] for name, x in self.inputs.items()}
        return replace(
            self, inputs=inputs, context=self.context[:0], candidates=torch.ones_like(self.candidates[:rows])
        )

    def array(self, name: str) -> Any:
        """An input as a numpy array, without a copy where it is on the CPU."""
        return self.inputs[name].cpu().numpy()


@dataclass(frozen=True)
class Part:
    """What a peer gives that is too slow to run in whole: the seconds that the whole would take, by the part it ran.

    said: what part, such as "3 of 200 steps, scaled". picks: the whole's first picks, where the part gives them.
    """

    seconds: float
    said: str
    picks: Tensor | None = None


def run(select: Callable[[Problem], Tensor | Part], problem: Problem) -> Part:
    """Selects once, and says how long it took and what was picked."""
    seconds, found = timed(lambda: select(problem), problem.device)
    return found if isinstance(found, Part) else Part(seconds, "", found)


@dataclass(frozen=True)
class Peer:
    """Another way to the same picks.

    name: what goals call it; its version is shown where it is a `distribution`. how: what it does, where that does not
    follow. select: gives the picks (k,) or a Part. exact: whether its picks must be ours. rounds: fewer than the
    others', for what is very slow. peak: whether its memory is measured, for which it runs once more.
    """

    name: str
    select: Callable[[Problem], Tensor | Part]
    how: str = ""
    distribution: str = ""
    exact: bool = False
    rounds: int | None = None
    peak: bool = True

    @property
    def label(self) -> str:
        """Its name, with its version and what it does."""
        version = installed(self.distribution) if self.distribution else NOT_INSTALLED
        known = self.name if version == NOT_INSTALLED else f"{self.name} {version}"
        return f"{known}, {self.how}" if self.how else known


@dataclass(frozen=True)
class Case:
    """A size at which ours is measured beside the peers, and the goals there.

    ratios: by the name of a peer, its time over ours, at least. ceiling: the fraction of the machine's ceiling, at
    least. peak: gigabytes that ours may take beside the inputs, at most. peers: more of them than the benchmark's.
    rounds: fewer than asked for, for what takes many minutes.
    """

    sizes: Sizes
    dtype: torch.dtype = torch.float32
    ratios: Mapping[str, float] = field(default_factory=dict)
    ceiling: float | None = None
    peak: float | None = None
    peers: tuple[Peer, ...] = ()
    rounds: int | None = None

    @property
    def known(self) -> Sizes:
        """The sizes, with the bytes of an entry."""
        return replace(self.sizes, item=self.dtype.itemsize)

    def __str__(self) -> str:
        letters = " ".join(
            f"{letter}={getattr(self.sizes, letter)}" for letter in LETTERS if getattr(self.sizes, letter)
        )
        return f"{letters} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Scaling:
    """Series of sizes, each twice the one before, everything else as in `base`.

    series: by letter, the first size and the last.
    """

    base: Sizes
    series: Mapping[str, tuple[int, int]]

    def sizes(self, letter: str) -> list[Sizes]:
        """The series in a letter."""
        size, last = self.series[letter]
        found = []
        while size <= last:
            changed: dict[str, Any] = {letter: size}
            found.append(replace(self.base, **changed))
            size *= 2
        return found


@dataclass(frozen=True)
class Benchmark:
    """What one strategy, with one set of parameters, is measured on.

    make: the inputs by name, of a case's sizes, by a generator on the device where they shall be. floor: the least that
    the selection costs, in what the machine's ceilings are of (ceilings.py). quick: a case so small that every peer
    runs in whole and at once. cpu, cuda: the cases by device.
    """

    strategy: str
    make: Callable[[Case, torch.Generator], Mapping[str, Tensor]]
    peers: tuple[Peer, ...]
    floor: Callable[[Sizes], Mapping[str, float]]
    quick: Case
    cpu: tuple[Case, ...]
    scaling: Scaling
    cuda: tuple[Case, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The strategy's name, and its parameters."""
        return " ".join([self.strategy, *(f"{name}={value}" for name, value in self.params.items())])

    def cases(self, device: str, *, quick: bool) -> tuple[Case, ...]:
        """What is run on a device."""
        return (self.quick,) if quick else self.cuda if device == "cuda" else self.cpu

    def growth(self, *, quick: bool) -> Scaling:
        """The series of sizes; quick: two each, so small that they only show that everything runs."""
        if not quick:
            return self.scaling
        base = self.quick.sizes
        return Scaling(base, {letter: (size := getattr(base, letter), 2 * size) for letter in self.scaling.series})

    def problem(self, case: Case, device: str) -> Problem:
        """What is to be selected from: the same on every call for one device."""
        sizes, generator = case.sizes, torch.Generator(device).manual_seed(0)
        inputs = self.make(case, generator)
        context = torch.randperm(sizes.N, generator=generator, device=device)[: sizes.L].sort().values
        candidates = torch.ones(sizes.N, dtype=torch.bool, device=device)
        candidates[context] = False
        return Problem(inputs, sizes.k, context, candidates, self.params)

    @property
    def seeded(self) -> bool:
        """Whether picks are drawn, so that nobody else's are the same but those of a peer that draws alike."""
        return self.strategy in strategies.STRATEGIES and strategies.STRATEGIES[self.strategy].seeded

    def ways(self, case: Case) -> dict[str, Callable[[Problem], Tensor | Part]]:
        """Every way to select that a case compares, by name: ours, and the peers."""
        return {OURS: self.ours, **{peer.name: peer.select for peer in (*self.peers, *case.peers)}}

    def ours(self, problem: Problem) -> Tensor:
        """Our picks (k,)."""
        strategy = strategies.STRATEGIES[self.strategy]
        with torch.inference_mode():
            return strategies.select(
                strategy,
                problem.inputs,
                k=problem.k,
                pool=Whole(len(problem.candidates)),
                candidates=problem.candidates,
                context=problem.context,
                spec=build(strategy.spec, problem.params),
                seed=problem.seed,
            ).indices

    def least(self, case: Case, ceilings: Mapping[str, float]) -> float:
        """The seconds that a selection at the machine's ceilings would take."""
        return sum(amount / ceilings[name] for name, amount in self.floor(case.known).items())

    def estimate(self, case: Case, problem: Problem) -> int:
        """The bytes beside the inputs that the kernel says it takes at most."""
        strategy, inputs = strategies.STRATEGIES[self.strategy], problem.inputs.values()
        sizes = replace(case.known, entries=sum(x.numel() for x in inputs), inputs=sum(x.nbytes for x in inputs))
        spec = build(strategy.spec, self.params)
        return strategy.bound(spec, problem.inputs).memory(sizes, spec)


def load(name: str) -> tuple[Benchmark, ...]:
    """What the file of a strategy declares."""
    found: tuple[Benchmark, ...] = import_module(f"{kernels.__name__}.{name}").BENCHMARKS
    return found


def names() -> list[str]:
    """The strategies that have a file."""
    return sorted(module.name for module in iter_modules(kernels.__path__))
