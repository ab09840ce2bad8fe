"""Good requests of every strategy that a server offers, small and at the edges of what numbers can be.

They follow from what the server says of its strategies (ListStrategies) and from the proto's descriptors: a new
strategy, parameter or input is drawn without a line here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from queryselect.v1 import selection_pb2, strategy_pb2, tensor_pb2

Array = np.ndarray[Any, Any]
Parameter = strategy_pb2.ParameterDescription

FLOATS = (tensor_pb2.DATA_TYPE_F32, tensor_pb2.DATA_TYPE_F64, tensor_pb2.DATA_TYPE_F16, tensor_pb2.DATA_TYPE_BF16)
NUMPY = {
    tensor_pb2.DATA_TYPE_F64: np.float64,
    tensor_pb2.DATA_TYPE_F32: np.float32,
    tensor_pb2.DATA_TYPE_F16: np.float16,
    tensor_pb2.DATA_TYPE_I64: np.int64,
    tensor_pb2.DATA_TYPE_I32: np.int32,
    tensor_pb2.DATA_TYPE_U8: np.uint8,
    tensor_pb2.DATA_TYPE_BOOL: np.bool_,
}
#: The largest number of each type, but for rounding.
MOST = {tensor_pb2.DATA_TYPE_F64: 1.79e308, tensor_pb2.DATA_TYPE_F16: 65504.0}
MOST |= dict.fromkeys((tensor_pb2.DATA_TYPE_F32, tensor_pb2.DATA_TYPE_BF16), 3.3e38)
#: What integer inputs hold: labels and groups, few of them.
INTEGERS = ("labels", "pseudo_labels", "clusters", "item_rows", "values")
#: Factors that keep numbers finite in some types and not in others; denormal numbers and zeros.
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 1e-30, 1e30, 1e-160, 1e160, 1e300, 0.0)


def tensor(values: Array, dtype: int | None = None) -> tensor_pb2.Tensor:
    """A tensor message, of the array's own type or of another that holds it."""
    if dtype is None:
        dtype = next(number for number, kind in NUMPY.items() if values.dtype == kind)
    with np.errstate(over="ignore"):
        if dtype == tensor_pb2.DATA_TYPE_BF16:
            data = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            data = values.astype(NUMPY[tensor_pb2.DataType.ValueType(dtype)]).tobytes()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DataType.ValueType(dtype), shape=values.shape, data=data)


class Descriptions(dict[str, strategy_pb2.StrategyDescription]):
    """What a server says of its strategies, by name; hypothesis would write it out in full where a draw fails."""

    def __repr__(self) -> str:
        return f"those of {len(self)} strategies"


class Drawing:
    """One request while it is drawn."""

    def __init__(self, draw: st.DrawFn, descriptions: Descriptions, number: int) -> None:
        self._draw, self._descriptions = draw, descriptions
        self._rng = np.random.default_rng(number)
        self._sizes: dict[str, int] = {}
        self._names: dict[str, str] = {}  # which of several inputs was chosen
        self._left_out: dict[tuple[str, str], bool] = {}
        self._dtype = self._one_of(FLOATS)
        self._kind = self._one_of((0, 0, 1, 2, 3))  # what samples are
        self._task = strategy_pb2.TASK_MULTICLASS

    def request(self) -> selection_pb2.SelectRequest:
        """A request that the server should take, most of the time."""
        description = self._descriptions[self._one_of(sorted(self._descriptions))]
        message, pool = selection_pb2.SelectRequest(), selection_pb2.Pool()
        base = self._strategy(message.strategy, description)
        self._task = self._one_of(description.tasks)
        rows = self._size("N")
        left = self._lists(pool, rows)
        inputs = (*description.inputs, *base)
        for each in inputs:
            self._input(pool, each, may_lack=not each.required)
        for role in description.references:
            must = any(each.required for each in role.inputs)
            for _ in range(self._one_of((1, 1, 2) if must else (0, 1, 2))):
                one = message.references.add(role=selection_pb2.ReferenceRole.Value(f"REFERENCE_ROLE_{role.role}"))
                self._sizes["M"] = self._integer(1, 12)
                for each in role.inputs:
                    self._input(one, each, may_lack=(must or each.name == "weights") and not each.required)
        if not inputs or self._rarely():
            pool.num_rows = rows
        if self._rarely():
            self._limits(pool, message.stop, rows)
        gains = description.score_kind == strategy_pb2.SCORE_KIND_GAIN
        if gains and self._rarely():
            message.stop.min_gain = self._one_of((0.0, 0.0, -np.inf, np.inf, 1e-3, 1e9))
        message.pool.CopyFrom(pool)
        message.stop.max_items = min(self._integer(1, 12), max(1, left))
        message.task = self._task
        message.seed = self._integer(0, 2**64 - 1)
        if description.pool_scores and self._rarely():
            message.returns.append(selection_pb2.RETURN_POOL_SCORES)
        if description.pseudo_labels and self._rarely():
            message.returns.append(selection_pb2.RETURN_PSEUDO_LABELS)
        if description.items and not base and self._rarely():
            self._items(message)
        return message

    # The strategy

    def _strategy(
        self, message: strategy_pb2.Strategy, description: strategy_pb2.StrategyDescription
    ) -> Sequence[strategy_pb2.InputDescription]:
        """Sets the strategy and some parameters; gives the inputs of one that it builds on."""
        chosen = message.custom if description.custom else getattr(message, description.name)
        chosen.SetInParent()
        if description.custom:
            chosen.name = description.name
        given = {each.name: self._parameter(each) for each in description.parameters if self._rarely()}
        if description.custom:
            chosen.parameters.update(given)
            return ()
        for name, value in given.items():
            kind = chosen.DESCRIPTOR.fields_by_name[name].enum_type
            if kind:
                prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
                value = kind.values_by_name[prefix + value].number  # noqa: PLW2901  # the same value as a number
            setattr(chosen, name, value)
        if not description.base_parameter:
            return ()
        own = next(each for each in description.parameters if each.name == description.base_parameter)
        return self._descriptions[given.get(own.name, own.default)].inputs

    def _parameter(self, parameter: Parameter) -> Any:
        """A value within its range."""
        low = parameter.minimum if parameter.HasField("minimum") else 0
        high = min(low + 30, parameter.maximum) if parameter.HasField("maximum") else low + 30
        kinds = strategy_pb2.ParameterType
        if parameter.values:
            return self._one_of(parameter.values)
        if parameter.type == kinds.PARAMETER_TYPE_BOOL:
            return self._draw(st.booleans())
        if parameter.type == kinds.PARAMETER_TYPE_INT:
            return self._integer(int(low), min(int(high), int(low) + self._one_of((2, 2, 5, 30))))
        if parameter.type == kinds.PARAMETER_TYPE_FLOAT:
            return self._one_of((low, high, *np.linspace(low, high, 7)[1:-1], 1e-3, 0.5, 1e-12))
        return self._draw(st.text(max_size=5))

    # Inputs

    def _input(self, message: Any, wanted: strategy_pb2.InputDescription, *, may_lack: bool) -> None:
        """Sets an input, or what may stand in for it; or leaves it out, of all sets of a role alike."""
        name = self._names.setdefault(wanted.name, self._one_of((wanted.name, *wanted.alternatives)))
        rows = wanted.shape.partition(" ")[0]
        if name in {field.name for field, _ in message.ListFields()}:
            return
        if may_lack and self._left_out.setdefault((rows, name), self._rarely()):
            return
        if name == "scales":
            for at in range(self._sizes.setdefault("scales", self._integer(1, 2))):
                scale, width = message.scales.add(), self._size(f"L{at}")
                for each in ("embeddings", "gradients"):
                    getattr(scale, each).CopyFrom(self._tensor(each, (self._size(rows), width)))
            return
        shape_of = {"samples": f"{rows} K C", "embeddings": f"{rows} D", "logits": f"{rows} C"}
        shape = tuple(self._size(letter) for letter in shape_of.get(name, wanted.shape).split())
        getattr(message, name).CopyFrom(self._tensor(name, shape))
        if name == "samples":
            message.samples_kind = self._kind

    def _tensor(self, name: str, shape: tuple[int, ...]) -> tensor_pb2.Tensor:
        if name == "misclassified":
            return tensor(self._rng.random(shape) < self._one_of((0.5, 0.5, 0.0, 1.0)))
        if name in INTEGERS:
            numbers = self._rng.integers(0, self._sizes.get("C", 3), shape)
            return tensor(numbers, self._one_of((tensor_pb2.DATA_TYPE_I64, tensor_pb2.DATA_TYPE_I32)))
        values = self._values(name, shape)
        values = np.where(np.isfinite(values), np.clip(values, -MOST[self._dtype], MOST[self._dtype]), values)
        if len(values) > 1 and self._rarely():  # the same rows again and again
            values = values[self._rng.integers(0, self._integer(1, 3), len(values)) % len(values)]
        return tensor(values, self._dtype)

    def _values(self, name: str, shape: tuple[int, ...]) -> Array:
        """Numbers that the input of that name may hold."""
        rng, kind = self._rng, selection_pb2.SamplesKind
        plain = name == "probabilities" or (name == "samples" and self._kind < kind.SAMPLES_KIND_LOG_PROBABILITIES)
        logarithms = name == "samples" and self._kind == kind.SAMPLES_KIND_LOG_PROBABILITIES
        if plain or logarithms:
            sharp = self._one_of((1.0, 1.0, 0.05, 100.0))
            chances = rng.dirichlet(np.full(shape[-1], sharp), shape[:-1])
            if self._task == strategy_pb2.TASK_MULTILABEL:
                chances = rng.random(shape) ** (1 / sharp)
            if self._rarely():
                chances = np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]
            with np.errstate(divide="ignore"):
                return np.asarray(np.log(chances) if logarithms else chances)
        values: Array = rng.standard_normal(shape) * self._one_of(SCALES)
        if self._rarely():
            values[rng.random(shape) < self._one_of((0.5, 0.9))] = self._one_of((0.0, 1.0, 1e30, -1e-30))
        if name in {"weights", "costs"}:
            values = np.abs(values) + (np.arange(values.size).reshape(shape) == 0)
        if name == "logits" and self._rarely():
            values[..., 1:][rng.random(values[..., 1:].shape) < 0.3] = -np.inf
        return values

    # Which rows, and what is asked of picks

    def _lists(self, pool: selection_pb2.Pool, rows: int) -> int:
        """Sets lists of rows; gives how many rows may be chosen at the least."""
        if self._rarely():
            return rows
        order = self._rng.permutation(rows)
        ends = sorted(self._integer(0, rows - 1) for _ in range(3))
        lists = dict(zip(("labeled", "pending", "excluded"), np.split(order, ends), strict=False))
        free = order[ends[-1] :]
        if self._rarely():
            lists["candidates"] = free = free[: self._integer(1, len(free))]
        for name, some in lists.items():
            if not len(some):
                continue
            mask = np.isin(np.arange(rows), some)
            kind = self._one_of((np.int64, np.int32, None))
            getattr(pool, name).CopyFrom(tensor(mask if kind is None else some.astype(kind)))
        if len(lists["labeled"]) and self._rarely():
            self._sizes["L"] = len(lists["labeled"])
            pool.labels.CopyFrom(self._tensor("labels", (self._sizes["L"],)))
        elif not len(lists["labeled"]):
            self._sizes["L"] = 1
        return len(free)

    def _limits(self, pool: selection_pb2.Pool, stop: selection_pb2.Stop, entries: int) -> None:
        for _ in range(self._integer(0, 2)):
            quota = pool.quotas.add(values=tensor(self._rng.integers(-1, 4, entries)))
            if self._rarely():
                quota.default_max = self._integer(0, 3)
            for value in range(self._integer(0, 3)):
                quota.limits.add(value=value, max=self._integer(1, 5), min=self._one_of((0, 0, 0, 1)))
        if self._rarely():
            pool.costs.CopyFrom(self._tensor("costs", (entries,)))
            stop.max_cost = self._one_of((0.0, 1.0, 10.0, 1e300))
        if self._rarely():
            pool.ids.integers.CopyFrom(tensor(self._rng.integers(0, 10, entries)))
        elif self._rarely():
            pool.ids.strings.values.extend(map(str, range(entries)))

    def _items(self, message: selection_pb2.SelectRequest) -> None:
        """Makes items of the rows; what was said of rows that does not fit items is taken back."""
        pool, items = message.pool, self._integer(1, 10)
        for name in ("labeled", "pending", "excluded", "candidates", "labels", "quotas", "costs", "ids"):
            pool.ClearField(name)
        message.stop.ClearField("max_cost")
        numbers = self._rng.integers(0, items, self._size("N"))
        pool.item_rows.CopyFrom(tensor(numbers))
        message.stop.max_items = self._integer(1, len(set(numbers.tolist())))
        if self._rarely():
            pool.num_items = items + self._integer(0, 2)
            self._limits(pool, message.stop, pool.num_items)
        if self._rarely():
            pool.item_aggregation = self._one_of(selection_pb2.ItemAggregation.values())
            pool.item_top_k = self._integer(1, 4)

    # Draws

    def _size(self, letter: str) -> int:
        if letter not in self._sizes:
            least = 2 if letter in {"K", "C"} and self._integer(0, 9) else 1
            most = {"N": 40, "K": 5, "C": 6}.get(letter, 8)
            rare = {"N": 300, "D": 70, "K": 40, "C": 40}.get(letter, 8)
            self._sizes[letter] = self._integer(least, most if self._integer(0, 9) else rare)
        return self._sizes[letter]

    def _integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def _one_of(self, options: Sequence[Any]) -> Any:
        return options[self._draw(st.integers(0, len(options) - 1))]

    def _rarely(self) -> bool:
        return self._draw(st.integers(0, 2)) == 0


@st.composite
def requests(draw: st.DrawFn, descriptions: Descriptions, number: int) -> selection_pb2.SelectRequest:
    """Requests that are good, most of them. number: the seed of tensors' elements."""
    return Drawing(draw, descriptions, number).request()
