"""What a query strategy is, and the registry of all there are.

A strategy is one file in `kernels/`: a frozen `Spec` of its parameters and one function on tensors, announced with
`@strategy` or, where a row's score depends on that row alone, `@pointwise`. Everything else (ListStrategies, the checks
at the door, the blocks of a stream) follows from what stands there: the function's annotations name its inputs and
their shapes, the fields of its Spec carry defaults, ranges and documentation.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from queryselect_service import workers
from queryselect_service.choice import Choice, Limits
from queryselect_service.errors import InvalidInput
from queryselect_service.maths.descriptors import scales_of
from queryselect_service.maths.labels import aggregate_labels
from queryselect_service.maths.predictions import Predictions, Samples, SamplesKind, distributions
from queryselect_service.selection import Notice, NoticeCode, ScoreKind, Selection, StopReason
from queryselect_service.shards import Shards, Whole
from queryselect_service.spec import LabelScore, Spec

#: What kernels need of a selection, to be found here too.
__all__ = ["Choice", "Limits", "Notice", "NoticeCode", "ScoreKind", "Selection", "StopReason"]

Block = TypeVar("Block")

#: What samples are, by the name that kernels have for the input.
Kinds = Mapping[str, SamplesKind]
NO_KINDS: Kinds = types.MappingProxyType({})
#: Rows that a pointwise strategy scores at once: block borders never depend on how the rows arrived.
POINTWISE_ROWS = 4096
#: Fewer where a row has so many entries that a block would have more than this: a block must not take long, nor much.
#: 2 MB of float64, of which the processor's caches hold a few.
POINTWISE_ENTRIES = 1 << 18
#: Bytes that scores and their ranking take (Whole.top), per row and per pick: the scores, masks, the rows of equal
#: scores; and what finding the k highest of a block takes.
RANKING_BYTES, PICK_BYTES = 18, 64

#: Inputs that may stand in for another; the service derives the one from the other.
ALTERNATIVES = {"probabilities": ("logits",), "scales": ("embeddings",)}
#: What an annotation adds where samples may stand in for probabilities, by their mean.
OR_SAMPLES = "samples"


class Task(enum.StrEnum):
    """What the rows' predictions are: one of C classes, or any of C labels."""

    MULTICLASS = "MULTICLASS"
    MULTILABEL = "MULTILABEL"


class ReferenceRole(enum.StrEnum):
    """The part that rows beside the pool play."""

    VALIDATION = "VALIDATION"
    TARGET = "TARGET"
    AVOID = "AVOID"
    LABELED = "LABELED"

    @property
    def prefix(self) -> str:
        """What the names of a kernel's inputs begin with that are those of such rows: labeled_embeddings."""
        return f"{self.lower()}_"


@dataclass(frozen=True)
class Input:
    """An input of a kernel: the name of its parameter and its dimensions, such as "N D".

    role: that of the reference sets that it is read from; None: it is the pool's own. last: a field that stands in for
    it where neither its own nor those of ALTERNATIVES are given.
    """

    name: str
    shape: str
    required: bool
    kind: Any = Tensor  # what it is annotated as: Predictions and Samples are made where the kernel reads them
    role: ReferenceRole | None = None
    last: str = ""

    @property
    def field(self) -> str:
        """Its name in the pool, or in a reference set."""
        return self.name if self.role is None else self.name.removeprefix(self.role.prefix)

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The fields that may stand in for this one."""
        return ALTERNATIVES.get(self.field, ()) + ((self.last,) if self.last else ())

    @property
    def fields(self) -> tuple[str, ...]:
        """Its own field and those that may stand in for it."""
        return (self.field, *self.alternatives)

    @property
    def names(self) -> tuple[str, ...]:
        """The same as names of parameters: those of reference sets have their role before them."""
        return self.fields if self.role is None else tuple(self.role.prefix + field for field in self.fields)


@dataclass(frozen=True)
class Sizes:
    """What the cost of a selection follows from: the letters (0 where the request has none), and bytes.

    S: entries of a row of all scales. L: rows that count as labelled. M: rows of reference sets that are read.
    k: picks. item: bytes of an entry of the widest type. entries, inputs: how many entries the inputs have together,
    and how many bytes. multilabel: whether every probability becomes two.
    """

    N: int = 0
    D: int = 0
    C: int = 0
    K: int = 0
    P: int = 0
    S: int = 0
    L: int = 0
    M: int = 0
    k: int = 0
    item: int = 8
    entries: int = 0
    inputs: int = 0
    multilabel: bool = False


def _unknown_memory(sizes: Sizes, _: Spec) -> int:
    """What a plug-in is taken to need that does not say: a float64 copy of its inputs, and a few numbers per row."""
    return 8 * sizes.entries + 64 * sizes.N


def _unknown_work(sizes: Sizes) -> float:
    """The work of a plug-in that does not say: a look at everything per pick."""
    return float(sizes.entries * max(1, sizes.k))


@dataclass(frozen=True)
class Strategy:
    """A query strategy as the registry knows it."""

    name: str
    function: Callable[..., Any]
    spec: type[Spec]
    inputs: tuple[Input, ...]
    keywords: frozenset[str]  # the names of all parameters of the function
    tasks: tuple[Task, ...]
    score_kind: ScoreKind
    pointwise: bool
    seeded: bool
    pool_scores: bool
    pseudo_labels: bool
    cost: str
    memory: Callable[[Sizes, Any], int]
    work: Callable[[Sizes], float]
    citation: str
    custom: bool = False
    side_by_side: bool = False  # whether several blocks of rows may be scored at a time
    base_parameter: str = ""  # of a strategy on the scores of another: the parameter that names that one
    base: Strategy | None = None  # and that one, once it is known

    @property
    def limitable(self) -> bool:
        """Whether it keeps to quotas, a cost budget and a least gain."""
        return self.pointwise or "choice" in self.keywords

    @property
    def can_be_base(self) -> bool:
        """Whether another strategy can build on its scores."""
        return self.pointwise and not self.base_parameter

    @property
    def serves_items(self) -> bool:
        """Whether items of several rows can be chosen: where rows have scores of their own, or none is read."""
        return self.pointwise or not any(each.role is None and each.shape.startswith("N") for each in self.inputs)

    @property
    def summary(self) -> str:
        """The first line of the kernel's documentation."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def optional_in(self, role: ReferenceRole | None) -> bool:
        """Whether reference sets of a role may lack what the kernel has a default for: where they must be there."""
        return any(each.required for each in self.inputs if each.role is role)

    @property
    def roles(self) -> list[ReferenceRole]:
        """The roles of the reference sets that it reads."""
        return list(dict.fromkeys(each.role for each in self.inputs if each.role is not None))

    def bound(self, spec: Spec, given: Iterable[str]) -> Strategy:
        """The same for one request: with what it reads by its parameters, and of the inputs that are given.

        given: names of the pool's inputs. Raises InvalidInput where the strategy it builds on is none of those it can.
        """
        base_strategy, inputs = self.base, self.inputs
        changed: dict[str, Any] = {}
        if self.base_parameter and base_strategy is None:
            base_strategy = _base(self, getattr(spec, self.base_parameter))
            inputs = base_strategy.inputs
            changed = {
                "base": base_strategy,
                "tasks": base_strategy.tasks,
                "work": base_strategy.work,
                "memory": partial(_memory_on_scores, self.memory, base_strategy),
            }
        has = {base(name) for name in given}
        inputs = tuple(
            dataclasses.replace(each, last="") if each.last and has.intersection({*each.fields} - {each.last}) else each
            for each in inputs
        )
        return dataclasses.replace(self, inputs=inputs, **changed)

    def specs(self, spec: Spec) -> tuple[Spec, ...]:
        """The parameters given, and those that a strategy it builds on has: its defaults."""
        return (spec,) if self.base is None else (spec, self.base.spec())

    def reads(self, name: str) -> bool:
        """Whether the input `name`, of the pool or with its role before it, is of use to this strategy."""
        return any(base(name) in each.names for each in self.inputs)


def base(name: str) -> str:
    """What an input is one of: scales for scales[0].gradients; others are themselves."""
    return name.partition("[")[0]


STRATEGIES: dict[str, Strategy] = {}
PLUGINS: dict[str, Strategy] = {}


def bases() -> dict[str, Strategy]:
    """The strategies whose scores another one can build on, by name."""
    return {name: STRATEGIES[name] for name in sorted(STRATEGIES) if STRATEGIES[name].can_be_base}


def _base(strategy: Strategy, name: str) -> Strategy:
    """The strategy whose scores another one builds on."""
    known = bases()
    if name not in known:
        words = f"{strategy.base_parameter} must be one of {', '.join(known)}; it is {name!r}"
        raise InvalidInput(words, field=strategy.base_parameter)
    return known[name]


def _memory_on_scores(own: Callable[[Sizes, Any], int], other: Strategy, sizes: Sizes, spec: Spec) -> int:
    """What making the scores takes, and what comes after."""
    return max(other.memory(sizes, other.spec()), own(sizes, spec))


def strategy(
    spec: type[Spec],
    *,
    kind: ScoreKind,
    cost: str,
    citation: str,
    memory: Callable[[Sizes, Any], int] = _unknown_memory,
    work: Callable[[Sizes], float] = _unknown_work,
    tasks: tuple[Task, ...] = (Task.MULTICLASS, Task.MULTILABEL),
    pool_scores: bool = True,
    pseudo_labels: bool = False,
    seeded: bool = False,
    pointwise: bool = False,
    side_by_side: bool = False,
    base_parameter: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the decorated kernel under its own name.

    The kernel takes its inputs first, annotated with their shapes, then what it wants of the keywords choice (the rows
    that may be chosen, and how many), spec, task, context (rows of this place that count as labelled, (l,) int64), seed
    and pool; it returns a Selection. In place of choice it may take k and candidates ((n,) bool): then it can't keep to
    quotas, costs and the like, and is not asked to. `probabilities` come as float64, whether the caller sent them or
    logits: all of them, or as Predictions where they are annotated so. The function itself stays a plain function.

    `samples` come as Samples, `scales` as a tuple of Scale, of which embeddings and gradients alone are one.

    An input with M rows is one of reference sets, its role before its name: labeled_embeddings, target_probabilities.
    Sets of one role come one after the other as one tensor, the same in every slice. Where the kernel can do without
    them, sets that are there have all inputs that it reads of that role, but for weights, and it gets its defaults
    where there are none. Where an input of theirs is required, those with a default are not.

    memory(sizes, spec): the most bytes that the kernel holds at once beside its inputs; never less than it does, and at
    most twice that, inputs and all. work(sizes): multiply-adds, to tell short selections from long ones.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name, own = function.__name__, function.__module__.startswith(f"{__package__}.kernels.")
        taken = STRATEGIES.get(name) or PLUGINS.get(name)
        if taken is not None and taken.function.__module__ != function.__module__:
            raise ValueError(f"there is a query strategy {name} already, in {taken.function.__module__}")
        keywords = frozenset(inspect.signature(function).parameters)
        if "choice" in keywords and {"k", "candidates"} & keywords:
            raise ValueError(
                f"{name} takes choice, which knows how many rows to choose, and which: no k, no candidates"
            )
        (STRATEGIES if own else PLUGINS)[name] = Strategy(
            name=name,
            function=function,
            spec=spec,
            inputs=_inputs(function),
            keywords=keywords,
            tasks=tasks,
            score_kind=kind,
            pointwise=pointwise,
            seeded=seeded,
            pool_scores=pool_scores,
            pseudo_labels=pseudo_labels,
            cost=cost,
            memory=memory,
            work=work,
            citation=citation,
            custom=not own,
            side_by_side=side_by_side and own,  # others may not stand threads
            base_parameter=base_parameter,
        )
        return function

    return register


def pointwise(
    spec: type[Spec],
    *,
    cost: str,
    citation: str,
    copies: int = 7,
    memory: Callable[[Sizes, Any], int] | None = None,
    work: Callable[[Sizes], float] | None = None,
    tasks: tuple[Task, ...] = (Task.MULTICLASS, Task.MULTILABEL),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel that scores each row by itself: inputs of a block of rows in, scores out, float64.

    `probabilities` come as float64 distributions over the last axis: (n, C) classes or, in a multi-label task,
    (n, L, 2) for label absent and present. `samples` are the same with an axis of K after the rows. The kernel reduces
    the last axis; scores (n, L) are then aggregated over labels where the Spec is a LabelScore. Inputs without an N in
    their shape come whole. `spec` and `task` come if asked for, and `pool`, which knows the rows of the block alone,
    for what takes longer than 100 ms a block.

    copies: how many float64 copies of a block may take memory at once: those alive, and what the allocator keeps.
    memory: of what does not depend on the block alone, in place of copies; then blocks come one after the other, and on
    a processor not several at a time, each to one thread. work: as in `strategy`.
    """

    def of_blocks(sizes: Sizes, _: Spec) -> int:
        entries = max(1, sizes.entries // max(1, sizes.N))  # of a row
        blocks = min(workers.count() * block_rows(entries), sizes.N) * entries
        return 8 * copies * blocks * (2 if sizes.multilabel else 1)

    blocks = memory or of_blocks
    return strategy(
        spec,
        kind=ScoreKind.POINT,
        cost=cost,
        citation=citation,
        memory=lambda sizes, spec: blocks(sizes, spec) + RANKING_BYTES * sizes.N + PICK_BYTES * sizes.k,
        work=work or (lambda sizes: 10.0 * sizes.entries),
        tasks=tasks,
        pointwise=True,
        side_by_side=memory is None,
    )


def on_scores(
    spec: type[Spec],
    *,
    base_parameter: str,
    cost: str,
    citation: str,
    memory: Callable[[Sizes, Any], int],
    seeded: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel that changes the scores of a pointwise strategy before the highest are chosen.

    It takes the scores (n,) float64 of all rows here and, if asked for, spec, choice, seed and pool; it returns scores
    (n,). Which strategy makes the scores is what the parameter `base_parameter` says, a name; that one's parameters
    have their defaults, and its inputs are read.

    memory: what it holds beside the scores.
    """
    return strategy(
        spec,
        kind=ScoreKind.POINT,
        cost=cost,
        citation=citation,
        memory=memory,
        seeded=seeded,
        pointwise=True,
        base_parameter=base_parameter,
    )


def block_rows(entries: int) -> int:
    """The rows of a block, where a row of the widest input has so many entries. It depends on the shape alone."""
    return max(1, min(POINTWISE_ROWS, POINTWISE_ENTRIES // max(1, entries)))


def _inputs(function: Callable[..., Any]) -> tuple[Input, ...]:
    hints = get_type_hints(function, include_extras=True)
    found: list[Input] = []
    for name, value in inspect.signature(function).parameters.items():
        hint = hints.get(name)
        options = get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        for option in options:
            if typing.get_origin(option) is Annotated:
                kind, shape, *last = get_args(option)
                required = value.default is inspect.Parameter.empty
                found.append(Input(name, shape, required, kind, _role(name, shape), *last))
    return tuple(found)


def _role(name: str, shape: str) -> ReferenceRole | None:
    if not shape.startswith("M"):
        return None
    for role in ReferenceRole:
        if name.startswith(role.prefix):
            return role
    raise ValueError(f"{name} has M rows, those of reference sets; its name must begin with their role: labeled_{name}")


def load() -> None:
    """Imports every kernel of ours and every plug-in of the entry-point group `queryselect.strategies`.

    Raises RuntimeError for a plug-in that does not load: a server without a strategy it should have must not start.
    """
    kernels = import_module(f"{__package__}.kernels")
    for module in iter_modules(kernels.__path__):
        import_module(f"{kernels.__name__}.{module.name}")
    for entry in entry_points(group="queryselect.strategies"):
        try:
            entry.load()
        except Exception as error:
            raise RuntimeError(f"plug-in {entry.name} ({entry.value}) does not load: {error}") from error


def select(
    strategy: Strategy,
    inputs: Mapping[str, Tensor],
    *,
    k: int,
    pool: Shards,
    candidates: Tensor,
    context: Tensor,
    spec: Spec | None = None,
    task: Task = Task.MULTICLASS,
    seed: int = 0,
    limits: Limits | None = None,
    scores: Tensor | None = None,
    kinds: Kinds = NO_KINDS,
) -> Selection:
    """Runs a strategy on checked inputs.

    inputs: tensors by name, N rows each where their shape says N. candidates: (n,) bool. context: (l,) int64. scores:
    (n,) float64, where the strategy scores rows one by one and they have been scored already; then n may be the number
    of items that they are scores of. kinds: what samples are,
    by input; probabilities where it does not say.
    Returns k picks, or fewer where the limits end the selection; the caller has checked that there are k candidates,
    and that the strategy can keep to the limits.
    """
    spec, choice = spec or strategy.spec(), Choice(k, candidates, pool, limits)
    strategy = strategy.bound(spec, inputs)
    if strategy.pointwise:
        if scores is None:
            scores = score(strategy, inputs, spec, task, pool, kinds)
        if strategy.base is not None:
            offered = {"spec": spec, "choice": choice, "seed": seed, "pool": pool}
            scores = strategy.function(scores, **_wanted(strategy, offered))
        return _limited(rank(scores, choice), choice)
    ready = _resolved(strategy, inputs, task, kinds)
    for each in strategy.inputs:
        x = ready.get(each.name)
        if each.field == "probabilities" and task is Task.MULTILABEL and isinstance(x, Tensor):
            ready[each.name] = x[..., 1]  # (n, L), label present
    offered = {
        "choice": choice, "k": k, "candidates": candidates,
        "spec": spec, "task": task, "context": context, "seed": seed, "pool": pool,
    }  # fmt: skip
    return _limited(strategy.function(**ready, **_wanted(strategy, offered)), choice)


def _limited(found: Selection, choice: Choice) -> Selection:
    """The selection with what the limits did to it."""
    if choice.limited:
        notices = (*found.notices, *choice.notices)
        found = dataclasses.replace(found, notices=notices, stop_reason=choice.stop_reason)
    scores = found.pool_scores
    if scores is not None:
        found = dataclasses.replace(found, pool_scores=lambda: torch.where(choice.allowed, scores(), -torch.inf))
    return dataclasses.replace(found, cost_spent=choice.cost_of(found.indices))


def _wanted(strategy: Strategy, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that the kernel takes."""
    return {name: value for name, value in offered.items() if name in strategy.keywords}


def _resolved(
    strategy: Strategy,
    inputs: Mapping[str, Tensor],
    task: Task,
    kinds: Kinds = NO_KINDS,
) -> dict[str, Any]:
    """The inputs by the names that the kernel declares, with `probabilities` as distributions over the last axis."""
    ready: dict[str, Any] = {}
    for wanted in strategy.inputs:
        if wanted.field == "scales":
            scales = scales_of(inputs, wanted.name.removesuffix("scales"))
            if scales:
                ready[wanted.name] = scales
            continue
        for name in wanted.names:
            if name in inputs:
                ready[wanted.name] = _made(wanted, name, inputs[name], kinds, multilabel=task is Task.MULTILABEL)
    return ready


def _made(wanted: Input, name: str, x: Tensor, kinds: Kinds, *, multilabel: bool) -> Any:
    """What an input is for the kernel, made of `x`, its own or what stands in for it."""
    if base(name).endswith("samples"):
        samples = Samples(x, kinds.get(name, SamplesKind.PROBABILITIES), multilabel=multilabel)
        if wanted.kind is Samples:
            return samples
        return samples[:].mean(1) if wanted.field == "probabilities" else samples[:]
    if wanted.field == "probabilities":
        made = Predictions if wanted.kind is Predictions else distributions
        return made(x, logits=name != wanted.name, multilabel=multilabel)
    return x


def rank(scores: Tensor, choice: Choice) -> Selection:
    """The rows of the highest scores (n,): what is left to do once every row is scored."""
    indices, best = choice.walk(scores, choice.k)
    return Selection(indices, best, lambda: scores)


def per_row(strategy: Strategy, names: Iterable[str]) -> list[str]:
    """Those of the inputs that have a row per row of the pool."""
    shapes = {name: each.shape for each in strategy.inputs for name in each.names}
    return [name for name in names if shapes[base(name)].startswith("N")]


def score(
    strategy: Strategy, inputs: Mapping[str, Tensor], spec: Spec, task: Task, pool: Shards, kinds: Kinds = NO_KINDS
) -> Tensor:
    """Every row's score (n,) under a pointwise strategy, in fixed blocks."""
    rowwise = per_row(strategy, inputs)
    n, device = len(inputs[rowwise[0]]), inputs[rowwise[0]].device
    step = block_rows(max(inputs[name][:1].numel() for name in rowwise))
    scores = torch.empty(n, dtype=torch.float64, device=device)
    blocks = [slice(start, start + step) for start in range(0, n, step)]

    def work(rows: slice) -> None:
        pool.check()
        block = {name: x[rows] if name in rowwise else x for name, x in inputs.items()}
        scores[rows] = score_block(strategy, block, spec, task, kinds, pool.check)

    pool.progress(0, n)
    for rows in each_block(strategy, work, blocks, device):
        pool.progress(min(rows.stop, n), n)
    return scores


def each_block(
    strategy: Strategy, work: Callable[[Block], None], blocks: Sequence[Block], device: torch.device
) -> Iterable[Block]:
    """Does the work on blocks of rows, and yields each in turn once it is done: on a processor several at a time."""
    if device.type == "cpu" and (strategy.base or strategy).side_by_side and workers.count() > 1:
        yield from workers.each(work, blocks)
        return
    for block in blocks:
        work(block)
        yield block


def score_block(
    strategy: Strategy,
    inputs: Mapping[str, Tensor],
    spec: Spec,
    task: Task,
    kinds: Kinds = NO_KINDS,
    check: Callable[[], None] = lambda: None,
) -> Tensor:
    """The scores (n,) of a block of rows under a pointwise strategy. check: what its `pool` calls; may raise."""
    strategy, spec = strategy.base or strategy, strategy.specs(spec)[-1]
    ready = _resolved(strategy, inputs, task, kinds)
    block = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in ready.items()}
    rows = len(next(block[each.name] for each in strategy.inputs if each.shape.startswith("N") and each.name in block))
    offered = {"spec": spec, "task": task, "pool": Whole(rows, check)}
    scores: Tensor = strategy.function(**block, **_wanted(strategy, offered))
    if scores.dim() == 2 and isinstance(spec, LabelScore):  # (n, L)
        scores = aggregate_labels(scores, spec.label_aggregation, spec.top_k)
    return scores
