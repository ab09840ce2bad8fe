"""The parameters of a strategy: a frozen dataclass whose fields carry defaults, ranges, units and documentation."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

from queryselect_service.errors import InvalidInput

S = TypeVar("S", bound="Spec")


def parameter(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, unit: str | None = None
) -> Any:
    """A field of a Spec: its default, one line of documentation, its inclusive range, and its unit."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "unit": unit})


@dataclass(frozen=True)
class Spec:
    """The parameters of a strategy. Building one checks every range that `parameter` declared."""

    def __post_init__(self) -> None:
        """Raises InvalidInput, its field the parameter's name, for a value out of range or NaN."""
        for field in dataclasses.fields(self):
            value, low, high = getattr(self, field.name), field.metadata["low"], field.metadata["high"]
            if value is None or isinstance(value, str):
                continue
            # Written so that NaN fails too.
            if not ((low is None or value >= low) and (high is None or value <= high)):
                raise InvalidInput(f"{field.name} must be {range_text(low, high)}; it is {value}", field=field.name)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises InvalidInput for a parameter that the request's sizes (by letter: N, D, C …) rule out."""

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput, its field a path in the request, where the parameters need other inputs than there are.

        shapes: those of the inputs that the strategy reads, by the names that it has for them. returns: what is asked
        for beside the picks, such as PSEUDO_LABELS.
        """


def range_text(low: float | None, high: float | None) -> str:
    """The words for an inclusive range."""
    if low is not None and high is not None:
        return f"between {low} and {high}"
    return f"at least {low}" if low is not None else f"at most {high}"


class LabelAggregation(enum.StrEnum):
    """How the scores of a row's labels become the row's score, when the task is multi-label."""

    MEAN = "MEAN"
    SUM = "SUM"
    MAX = "MAX"
    TOP_K_MEAN = "TOP_K_MEAN"


@dataclass(frozen=True)
class LabelScore(Spec):
    """The parameters of every score that is computed per label in a multi-label task."""

    label_aggregation: LabelAggregation = parameter(
        LabelAggregation.MEAN, "How label scores become the row's score, in a multi-label task"
    )
    top_k: int | None = parameter(
        None, "The number of labels that TOP_K_MEAN averages, at most C", low=1, unit="labels"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_aggregation is LabelAggregation.TOP_K_MEAN and self.top_k is None:
            raise InvalidInput("label_aggregation TOP_K_MEAN needs top_k", field="top_k")

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises InvalidInput where top_k is more than the labels there are."""
        labels = sizes.get("C")
        if self.top_k is not None and labels is not None and self.top_k > labels:
            raise InvalidInput(f"top_k must be at most C = {labels}; it is {self.top_k}", field="top_k")


@dataclass(frozen=True)
class SummedLabelScore(LabelScore):
    """The same for scores that are information, in nats: that of labels that are independent adds up."""

    label_aggregation: LabelAggregation = parameter(
        LabelAggregation.SUM, "How label scores become the row's score, in a multi-label task"
    )


class Disagreement(Spec):
    """The parameters of a strategy by which parameter samples disagree: one sample alone disagrees with nobody."""

    def check_inputs(self, shapes: Mapping[str, tuple[int, ...]], returns: Collection[str]) -> None:
        """Raises InvalidInput where the pool's samples are one alone."""
        super().check_inputs(shapes, returns)
        shape = shapes.get("samples")
        if shape is not None and shape[1] < 2:
            text = " ".join(map(str, shape))
            words = f"with K at least 2, since one sample disagrees with nobody; it has ({text})"
            raise InvalidInput(f"pool.samples needs shape (N K C) {words}", field="pool.samples")


class RidgeScale(enum.StrEnum):
    """What a ridge is measured in."""

    RELATIVE = "RELATIVE"
    ABSOLUTE = "ABSOLUTE"


class FisherScale(enum.StrEnum):
    """How the Fisher information of labelled rows adds up."""

    MEAN = "MEAN"
    SUM = "SUM"


class Objective(enum.StrEnum):
    """What a design minimises."""

    TRACE = "TRACE"


@dataclass(frozen=True)
class FisherDesign(Spec):
    """The parameters of every strategy that minimises tr(M^-1 F)."""

    ridge: float = parameter(
        1.0, "Added to the diagonal of M; relative: in units of the pool's mean squared length per dimension", low=0
    )
    ridge_scale: RidgeScale = parameter(
        RidgeScale.RELATIVE, "Whether the ridge is relative to the embeddings' scale, or absolute as in the papers"
    )
    fisher_scale: FisherScale = parameter(
        FisherScale.MEAN, "Whether labelled rows' information enters M as their mean or as their sum"
    )
    oversampling: int = parameter(
        2, "Times the budget that is chosen first; the backward phase drops what is too much", low=1, high=100
    )
    objective: Objective = parameter(Objective.TRACE, "What is minimised: tr(M^-1 F)")

    def __post_init__(self) -> None:
        """Raises InvalidInput for a ridge of 0 too: nothing is invertible without one."""
        super().__post_init__()
        if not 0 < self.ridge < math.inf:
            raise InvalidInput(f"ridge must be above 0 and finite; it is {self.ridge}", field="ridge")


@dataclass(frozen=True)
class Herding(Spec):
    """The parameters of every strategy that covers the pool by a Gaussian kernel."""

    bandwidth: float = parameter(1.0, "h in the kernel exp(-d²/h²), above 0; in units of the embeddings", low=0)
    adaptive_bandwidth: bool = parameter(
        False, "Whether h is the least distance above 0 between labelled rows, where there is one"
    )
    normalize: bool = parameter(True, "Whether every row is scaled to unit Euclidean length first")

    def __post_init__(self) -> None:
        """Raises InvalidInput for a bandwidth of 0 too: a row would see nothing, not even itself."""
        super().__post_init__()
        if not 0 < self.bandwidth < math.inf:
            raise InvalidInput(f"bandwidth must be above 0 and finite; it is {self.bandwidth}", field="bandwidth")


def build(spec: type[S], values: Mapping[str, Any]) -> S:
    """A `spec` with `values` over its defaults, converted to the types its fields declare.

    Raises InvalidInput, its field the parameter's name, for an unknown name (the nearest is offered), a value of the
    wrong type, or one out of range.
    """
    hints = _hints(spec)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    for name in values:
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            offer = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(hints) or 'none'}"
            raise InvalidInput(f"there is no parameter {name}; {offer}", field=name)
    return spec(**{name: _convert(value, hints[name], name) for name, value in values.items()})


@cache
def _hints(spec: Any) -> dict[str, Any]:
    """The types that the fields of a Spec declare, by name."""
    types = get_type_hints(spec)
    return {field.name: types[field.name] for field in dataclasses.fields(spec)}


def value_type(hint: Any) -> tuple[Any, bool]:
    """The type of a field's values, and whether None is one: `int | None` gives int and True."""
    options = get_args(hint) or (hint,)
    return next(option for option in options if option is not type(None)), type(None) in options


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type that a Spec's field declares. Struct knows only float, bool, str and None."""
    kind, optional = value_type(hint)
    if value is None and optional:
        return None
    if issubclass(kind, enum.Enum):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
        raise InvalidInput(f"{name} must be one of {', '.join(kind.__members__)}; it is {value}", field=name)
    whole = kind is int and isinstance(value, float) and value.is_integer()
    if whole or (kind is float and type(value) is int):
        return kind(value)
    if type(value) is not kind:
        raise InvalidInput(f"{name} must be of type {kind.__name__}; it is {value!r}", field=name)
    return value
