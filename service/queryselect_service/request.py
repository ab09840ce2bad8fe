"""A request off the wire: what it says, whether it makes sense, and the problem that is left for a kernel.

`Request` may know a tensor by its header alone: `check` then looks at names, shapes and types, and whatever values are
there already, so that a large upload can be refused before it is sent, and a large object before it is read. What comes
later is checked as it comes: `check_values` takes rows, `check_rows` the lists of rows. `problem` needs all values, or
the scores made of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from queryselect_service import strategy as strategies
from queryselect_service.checks import (
    FLOATS,
    INTEGERS,
    Array,
    check_disjoint,
    check_type,
    check_values,
    row_list,
    shape_text,
    unify,
)
from queryselect_service.choice import Limits
from queryselect_service.errors import InvalidInput, OverLimit
from queryselect_service.items import Items
from queryselect_service.maths.predictions import SamplesKind
from queryselect_service.references import WEIGHTS, Reference, check_names, check_shapes, join
from queryselect_service.settings import Settings
from queryselect_service.shards import Shards, Whole
from queryselect_service.spec import Spec
from queryselect_service.strategy import Notice, NoticeCode, Selection, Sizes, Strategy, Task
from queryselect_service.terms import Terms

#: The pool's inputs and their dimensions. Those with an N have one row per row of the pool.
INPUTS = {
    "embeddings": "N D",
    "probabilities": "N C",
    "logits": "N C",
    "samples": "N K C",
    "gradients": "N P",
    "head_weights": "C D",
    "head_bias": "C",
    "utilities": "N",
    "weights": "N",
    "clusters": "N",
    "pseudo_labels": "N",
    "labels": "L",
}
INTEGER_INPUTS = ("clusters", "pseudo_labels", "labels")
_TYPES = {**dict.fromkeys(INTEGER_INPUTS, INTEGERS), "misclassified": (torch.bool,)}
#: The pool's lists of rows, each a boolean mask or integer indices.
ROW_LISTS = ("labeled", "pending", "excluded", "candidates")
#: Those whose rows count as labelled.
CONTEXT = ("labeled", "pending")


@dataclass
class Request:
    """What one request says.

    With items of several rows (`items`), lists of rows, limits, ids and whatever is chosen are those of items.
    """

    strategy: Strategy
    spec: Spec
    path: str  # of the strategy's parameters
    inputs: dict[str, Array]
    references: list[Reference]
    row_lists: dict[str, Array]
    terms: Terms
    items: Items | None
    num_rows: int | None
    max_items: int | None
    task: Task
    seed: int
    returns: frozenset[str]  # what is asked for beside the picks: POOL_SCORES, PSEUDO_LABELS
    validate_only: bool
    ids: Array | list[str] | None
    said: list[Notice] = field(default_factory=list)  # what there is to tell of the request's names
    letters: dict[str, int] = field(default_factory=dict)  # their sizes, told by check
    rows: dict[str, Tensor] = field(default_factory=dict)  # the row lists as ascending rows, as far as they are here

    def check(self, settings: Settings, check: Callable[[], None] = lambda: None) -> None:
        """Raises InvalidInput or OverLimit for what is wrong as far as it is known. Called once.

        check: called between blocks of values; may raise.
        """
        self._check_names()
        self.letters = self._check_shapes()
        self._check_types()
        read = {name: x.shape for name, x in self._named() if self.strategy.reads(name)}
        for spec in self.strategy.specs(self.spec):
            try:
                spec.check_sizes(self.letters)
            except InvalidInput as error:
                raise error.of(self.strategy.name, self.path) from None
            spec.check_inputs(read, self.returns)
        self.check_rows()
        for array in self.read:
            if array.data is not None and self.checkable(array):
                self.check_values(array, array.data, 0, check)
        self.check_weights()
        self._check_limits(settings)

    def check_rows(self) -> None:
        """Reads the row lists that are here, and which item each row is of, where that is here.

        Raises InvalidInput for what is wrong with them or with the budget, OverLimit for too many items.
        """
        if self.items is not None:
            self.items.read()
        for name, array in self.row_lists.items():
            known = self.items is None or self.items.size is not None
            if array.data is not None and name not in self.rows and known:
                self.rows[name] = row_list(array, array.data, self.num_items, self._unit)
        check_disjoint(self.rows, self._unit)
        self._check_budget()

    def checkable(self, array: Array) -> bool:
        """Whether an array's values can be looked at: which of its rows are excluded is known."""
        if not array.per_row or "excluded" not in self.row_lists:
            return True
        told = self.items is None or array.unit == "item" or self.items.occupied is not None
        return told and "excluded" in self.rows

    def check_values(self, array: Array, data: Tensor, first: int, check: Callable[[], None] = lambda: None) -> None:
        """Raises InvalidInput for the first bad row of an array's rows (n, ...) from row `first` on."""
        multilabel = self.task is Task.MULTILABEL
        check_values(array, data, first=first, multilabel=multilabel, excluded=self._excluded(array), check=check)

    def _excluded(self, array: Array) -> Callable[[Tensor], Tensor] | None:
        """What tells of some of the array's rows (r,) which are excluded, (r,) bool; None: none are."""
        gone = self.rows.get("excluded")
        if gone is None or not array.per_row:
            return None
        if self.items is None or array.unit == "item":
            return lambda rows: torch.isin(rows, gone)
        item_rows = self.items.array.data
        assert item_rows is not None  # see checkable
        return lambda rows: torch.isin(item_rows[rows].long(), gone)

    def check_weights(self) -> None:
        """Raises InvalidInput where no row that counts has any weight, as far as weights are here."""
        for array in self.read:
            if array.name == WEIGHTS and array.data is not None and self.checkable(array):
                weighty, excluded = array.data > 0, self._excluded(array)
                if excluded is not None:
                    weighty &= ~excluded(torch.arange(len(weighty)))
                if not weighty.any():
                    raise InvalidInput(f"{array.path} must not all be 0; they are", field=array.path)

    @property
    def given(self) -> set[str]:
        """The pool's inputs that are set."""
        return {strategies.base(name) for name in self.inputs}

    @property
    def want_pool_scores(self) -> bool:
        """Whether every row's score is asked for."""
        return "POOL_SCORES" in self.returns

    @property
    def want_pseudo_labels(self) -> bool:
        """Whether the label that the strategy guesses for every row is asked for."""
        return "PSEUDO_LABELS" in self.returns

    @property
    def size(self) -> int:
        """N, once checked."""
        return self.letters["N"]

    @property
    def num_items(self) -> int:
        """The number of what is chosen among: rows, or items; N as long as only rows to come tell of these."""
        return self.size if self.items is None else self.items.size or self.size

    @property
    def _unit(self) -> str:
        """What is chosen: rows or items."""
        return "row" if self.items is None else "item"

    @property
    def notices(self) -> list[Notice]:
        """What the caller should know, once everything is here."""
        if self.items is None or self.items.occupied is None:
            return self.said
        inert = (self._free() & ~self.items.occupied).nonzero().squeeze(1)
        if not len(inert):
            return self.said
        words = f"{len(inert)} item{'s have' if len(inert) > 1 else ' has'} no rows in pool.item_rows: never chosen"
        return [*self.said, Notice(NoticeCode.INERT_ROWS, words, inert)]

    @property
    def arrays(self) -> Iterator[Array]:
        """Every tensor of the request."""
        yield from self.inputs.values()
        for reference in self.references:
            yield from reference.inputs.values()
        yield from self.row_lists.values()
        yield from self.terms.arrays
        if self.items is not None:
            yield self.items.array
        if isinstance(self.ids, Array):
            yield self.ids

    @property
    def nbytes(self) -> int:
        """The bytes of every tensor."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def read(self) -> list[Array]:
        """The tensors whose values count, beside lists of rows and ids."""
        return [*self._used, *self.terms.arrays]

    @property
    def sizes(self) -> Sizes:
        """What the selection's cost follows from, as far as it is known: row lists to come count in full."""
        used = self._used
        known = {field.name for field in dataclasses.fields(Sizes)}
        letters = {letter: size for letter, size in self.letters.items() if letter in known}
        letters["L"] = sum(
            len(self.rows[name]) if name in self.rows else array.shape[0]
            for name, array in self.row_lists.items()
            if name in CONTEXT
        )
        return Sizes(
            **letters,
            S=sum(array.shape[1] for name, array in self.inputs.items() if strategies.base(name) != name),
            M=self.reference_rows,
            k=self.max_items or 0,
            item=max((array.dtype.itemsize for array in used), default=8),
            entries=sum(math.prod(array.shape) for array in used),
            inputs=sum(array.nbytes for array in used),
            multilabel=self.task is Task.MULTILABEL,
        )

    @property
    def reference_rows(self) -> int:
        """The rows of references that the strategy reads, once checked."""
        return sum(each.size for each in self.references if each.role in self.strategy.roles)

    @property
    def used(self) -> list[str]:
        """The pool's inputs given that the strategy reads."""
        return [name for name in self.inputs if self.strategy.reads(name)]

    @property
    def unused(self) -> list[Array]:
        """The inputs given that the strategy does not read, of the pool and of reference sets."""
        return [array for name, array in self._named() if not self.strategy.reads(name)]

    def tensors(self) -> dict[str, Tensor]:
        """What the strategy reads and what is here of it, by the names that it has for them."""
        mine = {name: x for name in self.used if (x := self.inputs[name].data) is not None}
        return mine | join(self.strategy, self.references)

    @property
    def _used(self) -> list[Array]:
        return [array for name, array in self._named() if self.strategy.reads(name)]

    def _named(self) -> Iterator[tuple[str, Array]]:
        """Every input, by the name that kernels have for it."""
        yield from self.inputs.items()
        for reference in self.references:
            yield from reference.named()

    @property
    def kinds(self) -> dict[str, SamplesKind]:
        """What samples are, of the pool and of reference sets."""
        return {name: SamplesKind(array.kind) for name, array in self._named() if array.kind}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type the strategy computes in: float64 where rows are scored one by one or come in it."""
        wide = any(array.dtype is torch.float64 for array in self._used)
        return torch.float64 if wide or self.strategy.pointwise or not self._used else torch.float32

    def _check_names(self) -> None:
        strategy = self.strategy
        if self.items is not None:
            self.items.check(strategy)
        if "probabilities" in self.inputs and "logits" in self.inputs:
            raise InvalidInput(
                "pool needs exactly one of probabilities and logits; the request has both", field="pool.logits"
            )
        if self.task not in strategy.tasks:
            served = " or ".join(strategy.tasks)
            raise InvalidInput(f"{strategy.name} serves task {served}; the request has {self.task}", field="task")
        for wanted in strategy.inputs:
            if wanted.required and wanted.role is None and not self.given & {*wanted.names}:
                names = " or ".join(f"pool.{each}" for each in wanted.names)
                given = ", ".join(array.described for array in self.inputs.values()) or "no inputs"
                raise InvalidInput(
                    f"{strategy.name} needs {names} of shape ({wanted.shape}); the request has {given}",
                    field=f"pool.{wanted.name}",
                )
        check_names(strategy, self.references)
        if self.want_pool_scores and not strategy.pool_scores:
            raise InvalidInput(f"{strategy.name} has no score for rows it does not choose", field="returns")
        if self.want_pseudo_labels and not strategy.pseudo_labels:
            raise InvalidInput(f"{strategy.name} guesses no labels", field="returns")
        unread = [array.path for array in self.unused]
        unread += [each.path for each in self.references if each.role not in strategy.roles and not each.inputs]
        if unread:
            message = f"{strategy.name} does not read {', '.join(unread)}"
            self.said.append(Notice(NoticeCode.UNUSED_INPUT, message))
        self.terms.check(strategy, self.max_items)

    def _check_shapes(self) -> dict[str, int]:
        """The size of every letter."""
        sizes: dict[str, tuple[int, str]] = {}
        if self.num_rows is not None:
            if self.num_rows < 1:
                raise InvalidInput(f"pool.num_rows must be at least 1; it is {self.num_rows}", field="pool.num_rows")
            sizes["N"] = (self.num_rows, "pool.num_rows")
        of_each = "N" if self.items is None else "I"  # of what is chosen
        if self.items is not None:
            if self.items.told is not None:
                sizes["I"] = self.items.told
            unify(dataclasses.replace(self.items.array, letters="N"), sizes)
        for array in (*self.inputs.values(), *self.terms.arrays):
            unify(array, sizes)
        check_shapes(self.references, sizes)
        if isinstance(self.ids, list):
            unify(Array("pool.ids", torch.uint8, (len(self.ids),), None, of_each), sizes)
        elif self.ids is not None:
            unify(self.ids, sizes)
        if "N" not in sizes:
            raise InvalidInput(
                f"{self.strategy.name} needs pool.num_rows, the number of rows, where no input tells it; "
                "the request has no inputs",
                field="pool.num_rows",
            )
        for array in self.row_lists.values():
            if len(array.shape) != 1:
                raise InvalidInput(
                    f"{array.path} needs a list of {self._unit}s, or a mask of shape ({of_each}); "
                    f"it has {shape_text(array.shape)}",
                    field=array.path,
                )
            if array.dtype is torch.bool:
                size, _ = sizes.setdefault(of_each, (array.shape[0], array.path))
                if array.shape != (size,):
                    shape = shape_text(array.shape)
                    raise InvalidInput(f"{array.path} needs a mask of shape ({size}); it has {shape}", field=array.path)
        if self.items is not None:
            self.items.told = sizes.get("I")
        return {letter: size for letter, (size, _) in sizes.items()}

    def _check_types(self) -> None:
        for array in self._used:
            check_type(array, _TYPES.get(array.name, FLOATS))
        for array in self.row_lists.values():
            check_type(array, (torch.bool, *INTEGERS))
        self.terms.check_types()
        if isinstance(self.ids, Array):
            check_type(self.ids, (torch.int64,))

    @property
    def answer_bytes(self) -> int:
        """The bytes of the answer's tensors: an index and a score per pick, what every item has when asked for."""
        return 16 * (self.max_items or 0) + 8 * self.num_items * (self.want_pool_scores + self.want_pseudo_labels)

    @property
    def extra_bytes(self) -> int:
        """The memory that `problem` takes beside the inputs: lists of rows, masks, and inputs without excluded rows."""
        lengths = (len(self.rows.get(name, range(*array.shape))) for name, array in self.row_lists.items())
        extra = 3 * self.num_items + 24 * sum(lengths)  # as they came, as rows, and sorted
        if len(self.references) > 1:  # those of one role become one tensor
            extra += sum(array.nbytes for each in self.references for array in each.inputs.values())
        if "excluded" in self.row_lists and not self.strategy.pointwise:
            extra += self.sizes.inputs
        if "excluded" in self.row_lists:
            extra += 24 * self.num_items + self.terms.nbytes(self.num_items)
        return extra + self.terms.nbytes(self.num_items)

    @property
    def working_bytes(self) -> int:
        """The most memory that `Problem.solve` takes beside the inputs."""
        sizes, items = self.sizes, self.num_items
        working = self.strategy.memory(dataclasses.replace(sizes, N=items), self.spec)
        if self.items is not None and self.strategy.pointwise:  # rows are scored, and then their scores put together
            scoring = self.strategy.memory(sizes, self.spec)
            working = max(working, scoring) + self.items.memory(self.size, items)
        return working + self.terms.memory(items, sizes.k)

    @property
    def moved_bytes(self) -> int:
        """The bytes beside inputs that a device with memory of its own is given: limits, and the items of rows."""
        of_rows = self.items.array.nbytes if self.items is not None and self.strategy.pointwise else 0
        return self.terms.nbytes(self.num_items) + of_rows

    @property
    def num_candidates(self) -> int:
        """The number of rows that may be chosen; while row lists are still to come, the most that it may be."""
        if self.items is not None and self.items.occupied is not None:
            return int((self._free() & self.items.occupied).count_nonzero())
        most = self.num_items - sum(len(self.rows[name]) for name in self._apart if name in self.rows)
        if "candidates" in self.rows:
            most = len(self.rows["candidates"])
        return min(most, self.size)  # no more items have rows than there are rows

    @property
    def _apart(self) -> tuple[str, ...]:
        """The lists of rows that may not be chosen."""
        # Labelled rows may be chosen where they are listed as candidates, which is known when that list is here.
        return ("pending", "excluded") if "candidates" in self.row_lists else ("labeled", "pending", "excluded")

    def _free(self) -> Tensor:
        """Which rows may be chosen as far as row lists are here, (n,) bool; items whether they have rows or not."""
        free = torch.ones(self.num_items, dtype=torch.bool)
        for name in self._apart:
            if name in self.rows:
                free[self.rows[name]] = False
        if "candidates" in self.rows:
            free.zero_()[self.rows["candidates"]] = True
        return free

    def _check_budget(self) -> None:
        if self.max_items is None:
            raise InvalidInput("stop.max_items, the number of picks, is needed; it is not set", field="stop.max_items")
        if self.max_items < 1:
            raise InvalidInput(f"stop.max_items must be at least 1; it is {self.max_items}", field="stop.max_items")
        if self.max_items > self.num_candidates:
            raise InvalidInput(f"budget {self.max_items} but {self.num_candidates} candidates", field="stop.max_items")

    def _check_limits(self, settings: Settings) -> None:
        letters = self.letters
        checks = (
            ("rows", self.size, settings.max_rows, "max_rows", "pool"),
            ("rows of references", self.reference_rows, settings.max_rows, "max_rows", "references"),
            (f"{self._unit}s", self.num_items, settings.max_rows, "max_rows", "pool"),
            ("embedding dimensions", letters.get("D", 0), settings.max_dims, "max_dims", "pool.embeddings"),
            ("classes", letters.get("C", 0), settings.max_classes, "max_classes", "pool"),
            ("budget", self.max_items or 0, settings.max_budget, "max_budget", "stop.max_items"),
        )
        for what, size, limit, name, path in checks:
            if size > limit:
                raise OverLimit(what, size, limit, name=name, field=path)
        self.terms.check_sizes(settings)
        if isinstance(self.ids, list):
            for text in self.ids:
                if len(text.encode()) > settings.max_id_bytes:
                    raise OverLimit(
                        "bytes of an id",
                        len(text.encode()),
                        settings.max_id_bytes,
                        name="max_id_bytes",
                        field="pool.ids",
                    )

    def problem(self, check: Callable[[], None], scores: Tensor | None = None) -> Problem:
        """What is left for the kernel; every value is here and checked.

        check: called between stretches of work; may raise. scores: (N,), where rows were scored already.

        Excluded rows are gone. Strategies that score rows one by one score them all the same, so that the blocks of
        rows that are scored together do not depend on how the rows came, and then lose those scores.
        """
        inputs = self.tensors()
        kept: Tensor | None = None
        rows, size, candidates = dict(self.rows), self.num_items, self._free()
        if self.items is not None and self.items.occupied is not None:
            candidates &= self.items.occupied
        if len(rows.get("excluded", ())):
            keep = torch.ones(size, dtype=torch.bool)
            keep[rows.pop("excluded")] = False
            kept = keep.nonzero().squeeze(1)
            new = keep.cumsum(0) - 1  # (N,), the row's number among those kept
            rows = {name: new[each] for name, each in rows.items()}
            if not self.strategy.pointwise:
                rowwise = strategies.per_row(self.strategy, inputs)
                inputs = {name: _take(x, kept, check) if name in rowwise else x for name, x in inputs.items()}
            size, candidates = len(kept), candidates[kept]
        context = torch.cat([torch.empty(0, dtype=torch.int64), *(rows[name] for name in CONTEXT if name in rows)])
        limits = self.terms.limits(lambda x: x if kept is None else _take(x, kept, check))
        item_rows = self.items.array.data if self.items is not None and self.strategy.pointwise else None
        return Problem(self, inputs, size, candidates, context.sort().values, limits, kept, scores, item_rows)


def _take(x: Tensor, rows: Tensor, check: Callable[[], None]) -> Tensor:
    """The rows (r,) of `x` (n, ...), a stretch at a time."""
    taken = x.new_empty(len(rows), *x.shape[1:])
    for span in Whole(len(rows), check).spans(len(rows), x.element_size() * x.shape[1:].numel()):
        torch.index_select(x, 0, rows[span], out=taken[span])
    return taken


@dataclass
class Problem:
    """A request without its excluded rows, ready for a kernel. With items of several rows, these are its rows.

    inputs: without excluded rows too, but for strategies that score rows one by one. candidates: (n,) bool. context:
    (l,) rows. limits: what is asked of the picks together. kept: (n,) the request's row of each row here, None where
    all are. scores: (N,) of a pointwise strategy whose rows were scored as they came, excluded ones too. item_rows:
    (N,) of a pointwise strategy that chooses among items.
    """

    request: Request
    inputs: dict[str, Tensor]
    size: int
    candidates: Tensor
    context: Tensor
    limits: Limits
    kept: Tensor | None
    scores: Tensor | None
    item_rows: Tensor | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Problem:
        """The same where `move` puts its tensors."""
        return dataclasses.replace(
            self,
            inputs={name: move(x) for name, x in self.inputs.items()},
            candidates=move(self.candidates),
            context=move(self.context),
            limits=self.limits.mapped(move),
            item_rows=None if self.item_rows is None else move(self.item_rows),
        )

    def solve(self, pool: Shards) -> Selection:
        """Runs the kernel. Rows in the answer are the request's; tensors are on the host."""
        request = self.request
        try:
            found = strategies.select(
                request.strategy,
                self.inputs,
                scores=self._scores(pool),
                k=request.max_items or 0,
                pool=pool,
                candidates=self.candidates,
                context=self.context,
                spec=request.spec,
                task=request.task,
                seed=request.seed,
                limits=self.limits,
                kinds=request.kinds,
            )
        except InvalidInput as error:  # of a parameter, whose place in the request a kernel does not know
            if error.field.startswith(("pool.", "references")):
                raise
            raise error.of(request.strategy.name, request.path) from None
        scores: Tensor | None = None
        if request.want_pool_scores:
            if found.pool_scores is None:
                raise RuntimeError(f"{request.strategy.name} says that it has pool_scores, and returned none")
            scores = found.pool_scores().cpu()
            scores = self._spread(scores, -torch.inf)
        labels: Tensor | None = None
        said = found.notices
        if request.want_pseudo_labels:
            if found.pseudo_labels is None:
                raise RuntimeError(f"{request.strategy.name} says that it guesses labels, and returned none")
            guessed, of_labels = found.pseudo_labels()
            labels, said = self._spread(guessed.cpu(), -1), (*said, *of_labels)
        notices = (
            Notice(each.code, each.message, None if each.rows is None else self._original(each.rows)) for each in said
        )
        return dataclasses.replace(
            found,
            indices=self._original(found.indices),
            scores=found.scores.cpu(),
            pool_scores=None if scores is None else lambda: scores,
            pseudo_labels=None if labels is None else lambda: (labels, ()),
            notices=(*request.notices, *notices),
        )

    def _scores(self, pool: Shards) -> Tensor | None:
        """The scores (n,) of the rows here where rows are scored one by one, in blocks of all rows of the request.

        With items, those of the items here, made of their rows' scores.
        """
        request = self.request
        if not request.strategy.pointwise:
            return None
        scores = self.scores
        if scores is None:
            scores = strategies.score(request.strategy, self.inputs, request.spec, request.task, pool, request.kinds)
        if request.items is not None and self.item_rows is not None:
            scores = request.items.aggregate(scores, self.item_rows, pool)
        return scores if self.kept is None else scores[self.kept.to(scores.device)]

    def _spread(self, values: Tensor, missing: float) -> Tensor:
        """Values (n,) of the rows here for all rows of the request, (N,)."""
        if self.kept is None:
            return values
        return torch.full((self.request.num_items,), missing, dtype=values.dtype).index_put((self.kept,), values)

    def _original(self, rows: Tensor) -> Tensor:
        """The request's rows of rows here, on the host."""
        return rows.cpu() if self.kept is None else self.kept[rows.cpu()]
