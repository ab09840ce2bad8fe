"""From keyword arguments to a SelectRequest and the arrays that go with it.

The messages' own descriptors drive this: an argument is a field of Pool, by name, and a new field needs no code here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from queryselect._arrays import WireArray, to_wire
from queryselect._errors import InvalidInput
from queryselect._picks import enum_name
from queryselect._quotas import to_quotas
from queryselect.v1 import selection_pb2, strategy_pb2, tensor_pb2

ROW_LISTS = ("labeled", "pending", "excluded", "candidates")
#: Tensors of the pool that every strategy may need: never left out.
ALWAYS = (*ROW_LISTS, "costs", "item_rows")
#: Tensors of the pool that are of items where rows tell theirs.
OF_ITEMS = (*ROW_LISTS, "costs")
#: Tensors of the pool whose first dimension is not N.
NOT_PER_ROW = ("head_weights", "head_bias", "labels", *ROW_LISTS)
#: What stands in for another input only where nothing else does that is given, and then stays here.
LAST = "samples"
#: Arguments that are more than one field of the pool.
APART = ("ids", "quotas", "groups", "max_per_group", "reference", "references")
#: Words for the types of single values.
_TYPES = {
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
    FieldDescriptor.CPPTYPE_INT32: "a whole number",
    FieldDescriptor.CPPTYPE_INT64: "a whole number within 64 bits",
    FieldDescriptor.CPPTYPE_UINT32: "a whole number of at least 0",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number from 0 to 2^64 - 1",
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_STRING: "a text",
    FieldDescriptor.CPPTYPE_ENUM: "the name of a value",
}
_FIELDS = selection_pb2.Pool.DESCRIPTOR.fields_by_name


@dataclass
class Prepared:
    """A request whose tensors are marked as streamed, the arrays by path, and the caller's ids."""

    message: selection_pb2.SelectRequest
    arrays: dict[str, WireArray] = field(default_factory=dict)
    ids: Any = None
    num_items: int = 0  # what is chosen among, rows or items of several; 0 where nothing tells it

    @property
    def num_bytes(self) -> int:
        """The bytes of all arrays."""
        return sum(array.data.nbytes for array in self.arrays.values())

    @property
    def answer_bytes(self) -> float:
        """The bytes of the answer's arrays: an index and a score per pick, what every item has when asked for.

        Without end where an array by reference may have any number of items.
        """
        asked = {selection_pb2.RETURN_POOL_SCORES, selection_pb2.RETURN_PSEUDO_LABELS} & {*self.message.returns}
        if asked and not self.num_items:
            return math.inf
        per_item = 8 * self.num_items * len(asked)
        return 16 * self.message.stop.max_items + per_item

    def inline(self, most: float = math.inf, most_of_list: float = math.inf) -> dict[str, WireArray]:
        """Puts the arrays of at most so many bytes into the message, lists of rows by their own limit.

        Returns the others.
        """
        large = {}
        for path, array in self.arrays.items():
            is_list = path.removeprefix("pool.") in ROW_LISTS
            if array.data.nbytes <= (most_of_list if is_list else most):
                _tensor_at(self.message, path).data = array.data.tobytes()
            else:
                large[path] = array
        return large


def prepare(
    strategy: str | Message,
    inputs: Mapping[str, Any],
    *,
    params: Mapping[str, Any] | None,
    descriptions: Mapping[str, strategy_pb2.StrategyDescription],
    stop: Mapping[str, Any],
    task: str | None,
    seed: int,
    returns: Sequence[str],
    validate_only: bool,
    request_id: str | None,
) -> Prepared:
    """Builds the request. descriptions: what the server says of its strategies; inputs that this one does not read stay
    here. Without a description everything is sent.

    Raises InvalidInput for values that can't be, TypeError for an argument that does not exist.
    """
    message = selection_pb2.SelectRequest(strategy=to_strategy(strategy, params))
    prepared = Prepared(message)
    _add_inputs(prepared, inputs, description_of(message.strategy, descriptions))
    _fill(message.stop, stop, "stop.", {})
    options = {"task": task, "seed": seed, "validate_only": validate_only or None, "request_id": request_id}
    _fill(message, options, "", {})
    message.returns.extend(_enum(selection_pb2.Return.DESCRIPTOR, each, "returns") for each in returns)
    return prepared


def _add_inputs(
    prepared: Prepared, inputs: Mapping[str, Any], description: strategy_pb2.StrategyDescription | None
) -> None:
    """Adds what the strategy reads; keeps the ids here; says N, and how many items, where nothing else does."""
    message, wanted = prepared.message, None
    if description is not None:
        wanted = {name for each in description.inputs for name in _choices(each, inputs)}
    given: list[str] = []
    sizes: list[int] = []
    items = sizes if inputs.get("item_rows") is None else []  # of what has an entry per item
    told, ids = False, inputs.get("ids")
    for name, value in inputs.items():
        if name not in (*_FIELDS, *APART):
            raise TypeError(f"select has no argument {name!r}{_nearest(name, [*_FIELDS, *APART])}")
        if value is None or name in APART:
            continue
        if name == "scales":
            upload = wanted is None or name in wanted
            sizes += _add_scales(prepared, value, upload=upload)
            told = told or upload
            given.append(name)
            continue
        if not _is_tensor(_FIELDS[name]):
            _fill(message.pool, {name: value}, "pool.", prepared.arrays)
            continue
        upload = wanted is None or name in wanted or name in ALWAYS
        if isinstance(value, tensor_pb2.TensorRef):
            given.append(f"{name} by reference")
            if upload:
                getattr(message.pool, name).ref.CopyFrom(value)
            told = told or (upload and name not in NOT_PER_ROW)
        else:
            array = to_wire(value, f"pool.{name}", rows=name in (*ROW_LISTS, "labels", "item_rows"))
            given.append(f"{name} {array.shape_text}")
            if upload:
                getattr(message.pool, name).CopyFrom(array.header())
                prepared.arrays[f"pool.{name}"] = array
            if array.shape and (name not in NOT_PER_ROW or (name in ROW_LISTS and array.data.dtype == bool)):
                known = items if name in OF_ITEMS else sizes
                known.append(array.shape[0])
                if not upload:  # the server says so of what it sees
                    _check_rows(name, array, known[0])
                told = told or (upload and name not in ROW_LISTS)
                ids = array.index if ids is None and known is items else ids
    _add_references(prepared, inputs, description)
    rows = _add_quotas(prepared, inputs)
    items += rows
    told = told or bool(rows)
    if description is not None:
        _check_required(description, message.pool, given)
    _say_sizes(prepared, ids, sizes, items, told=told)


def _say_sizes(prepared: Prepared, ids: Any, sizes: list[int], items: list[int], *, told: bool) -> None:
    """Keeps the ids here; says N, and how many items there are, where nothing that is sent does.

    sizes: what tells N. items: what tells the number of items; the same list where these are the rows. told: whether
    something that is sent tells N.
    """
    pool = prepared.message.pool
    if pool.HasField("num_rows"):
        sizes.append(pool.num_rows)
    if ids is not None:
        prepared.ids = ids.to_numpy() if hasattr(ids, "to_numpy") else np.asarray(ids)
    if items is not sizes:
        _count_items(prepared, items)
    if prepared.ids is not None:
        items.append(prepared.ids.size)
        if prepared.ids.shape != (items[0],):
            shape, what = " ".join(map(str, prepared.ids.shape)), "row" if items is sizes else "item"
            raise InvalidInput(f"pool.ids needs one id per {what}, ({items[0]}); it has ({shape})", field="pool.ids")
    prepared.num_items = items[0] if items else 0
    if sizes and not told and not pool.HasField("num_rows"):
        pool.num_rows = sizes[0]


def _count_items(prepared: Prepared, items: list[int]) -> None:
    """Says how many items of several rows there are where nothing else that is sent does: ids, and what rows say.

    items: what else tells it, and after this that number too. Wrong numbers are left for the server to name.
    """
    pool, array = prepared.message.pool, prepared.arrays.get("pool.item_rows")
    rows = np.empty(0) if array is None else array.data  # by reference: the server sees
    if pool.HasField("num_items"):
        items.append(pool.num_items)
    elif not items and rows.size and rows.dtype.kind == "i" and rows.min() >= 0:
        items.append(max(int(rows.max()) + 1, 0 if prepared.ids is None else prepared.ids.size))
        pool.num_items = items[0]


def _add_scales(prepared: Prepared, value: Any, *, upload: bool) -> list[int]:
    """Adds the pool's scales, unless they stay here; returns the number of rows that they tell."""
    pool = selection_pb2.Pool()
    arrays: dict[str, WireArray] = {}
    _fill(pool, {"scales": value}, "pool.", arrays)
    rows = [array.shape[0] for array in arrays.values() if array.shape][:1]
    if upload:
        prepared.message.pool.scales.extend(pool.scales)
        prepared.arrays |= arrays
    return rows


def _add_references(
    prepared: Prepared, inputs: Mapping[str, Any], description: strategy_pb2.StrategyDescription | None
) -> None:
    """Adds the reference sets; what the strategy does not read of them stays here, and the server is left to say so."""
    single, several = inputs.get("reference"), inputs.get("references")
    if single is not None and several is not None:
        raise TypeError("select takes a reference or several references, not both")
    _fill(prepared.message, {"references": several if single is None else [single]}, "", prepared.arrays)
    if description is None:
        return
    read = {each.role: {name for wanted in each.inputs for name in _choices(wanted)} for each in description.references}
    for at, each in enumerate(prepared.message.references):
        role = enum_name(selection_pb2.ReferenceRole.DESCRIPTOR, each.role)
        if role == "UNSPECIFIED" and len(read) == 1:
            (role,) = read
        for tensor, _ in each.ListFields():
            if tensor.message_type is not None and tensor.name not in read.get(role, ()):
                each.ClearField(tensor.name)  # type: ignore[arg-type]
                path = f"references[{at}].{tensor.name}"
                for known in [known for known in prepared.arrays if known == path or known.startswith(f"{path}[")]:
                    del prepared.arrays[known]


def _add_quotas(prepared: Prepared, inputs: Mapping[str, Any]) -> list[int]:
    """Adds the quotas; returns the number of rows that each of them tells."""
    quotas = to_quotas(inputs.get("quotas"), inputs.get("groups"), inputs.get("max_per_group"))
    _fill(prepared.message.pool, {"quotas": quotas}, "pool.", prepared.arrays)
    arrays = (prepared.arrays.get(f"pool.quotas[{at}].values") for at in range(len(quotas)))
    return [array.shape[0] for array in arrays if array is not None and array.shape]


def _check_rows(name: str, array: WireArray, rows: int) -> None:
    """Raises InvalidInput for an array of another number of rows."""
    if array.shape[0] != rows:
        raise InvalidInput(f"pool.{name} needs {rows} rows; it has {array.shape_text}", field=f"pool.{name}")


def to_strategy(strategy: str | Message, params: Mapping[str, Any] | None = None) -> strategy_pb2.Strategy:
    """A strategy by its canonical name and parameters, or a typed message, as the oneof.

    Raises InvalidInput for a name that this client does not know, and for an unknown or ill-typed parameter.
    """
    message = strategy_pb2.Strategy()
    fields = {each.name: each for each in message.DESCRIPTOR.oneofs_by_name["kind"].fields}
    if isinstance(strategy, Message):
        for name, each in fields.items():
            if each.message_type is strategy.DESCRIPTOR:
                getattr(message, name).CopyFrom(strategy)
                break
        else:
            raise InvalidInput(f"{strategy.DESCRIPTOR.full_name} is no query strategy", field="strategy")
    elif isinstance(strategy, type):
        raise InvalidInput(f"a query strategy is an object: {strategy.__name__}(), not the class", field="strategy")
    elif strategy in fields:
        name = strategy
        getattr(message, name).SetInParent()
    else:
        known = ", ".join(sorted(fields))
        raise InvalidInput(
            f"there is no query strategy {strategy!r}{_nearest(str(strategy), fields)} This client knows {known}",
            field="strategy",
        )
    _fill(getattr(message, name), params or {}, f"strategy.{name}.", {})
    return message


def description_of(
    strategy: strategy_pb2.Strategy, descriptions: Mapping[str, strategy_pb2.StrategyDescription]
) -> strategy_pb2.StrategyDescription | None:
    """What the server says of a strategy; where it builds on another one, with the inputs of that one."""
    found = descriptions.get(_name(strategy))
    if found is None or not found.base_parameter:
        return found
    chosen = getattr(strategy, _name(strategy))
    (parameter,) = (each for each in found.parameters if each.name == found.base_parameter)
    name = getattr(chosen, parameter.name) if chosen.HasField(parameter.name) else parameter.default
    if name not in parameter.values:  # the server says so
        return None
    base = descriptions[name]
    merged = strategy_pb2.StrategyDescription()
    merged.CopyFrom(found)
    merged.inputs.extend(base.inputs)
    merged.references.extend(base.references)
    return merged


def _choices(wanted: strategy_pb2.InputDescription, inputs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The inputs of which a strategy reads one; of `inputs`, those that it would read."""
    first = (wanted.name, *(name for name in wanted.alternatives if name != LAST))
    if LAST not in wanted.alternatives or any((inputs or {}).get(name) is not None for name in first):
        return first
    return (*first, LAST)


def _check_required(
    description: strategy_pb2.StrategyDescription, pool: selection_pb2.Pool, given: Sequence[str]
) -> None:
    """Says what the server would say of a missing input, with what was given here and not sent."""
    fields = {field.name for field, _ in pool.ListFields()}
    for wanted in description.inputs:
        if wanted.required and not fields.intersection(_choices(wanted)):
            names = " or ".join(f"pool.{name}" for name in _choices(wanted))
            raise InvalidInput(
                f"{description.name} needs {names} of shape ({wanted.shape}); "
                f"the request has {', '.join(given) or 'no inputs'}",
                field=f"pool.{wanted.name}",
            )


def _name(strategy: strategy_pb2.Strategy) -> str:
    name = strategy.WhichOneof("kind")
    return strategy.custom.name if name == "custom" else str(name)


def _is_tensor(field: Any) -> bool:
    return field.message_type is not None and field.message_type.name == "Tensor"


def _fill(message: Message, values: Mapping[str, Any], path: str, arrays: dict[str, WireArray]) -> None:
    """Sets fields of `message` by name: numbers, enums as strings, arrays, nested mappings and lists of them."""
    if not isinstance(values, Mapping):
        name = path.removesuffix(".")
        raise InvalidInput(f"{name} needs a mapping of names to values; it is a {type(values).__name__}", field=name)
    fields = message.DESCRIPTOR.fields_by_name
    for name, value in values.items():
        field, at = fields.get(name), f"{path}{name}"
        if field is None:
            owner, what = message.DESCRIPTOR.name, "parameter" if path.startswith("strategy.") else "field"
            raise InvalidInput(f"{owner} has no {what} {name!r}{_nearest(name, fields)}", field=at)
        if value is None:
            continue
        if field.message_type is None:
            _set(message, name, value, path)
        elif _is_tensor(field):
            _add(getattr(message, name), value, at, arrays)
        elif field.message_type.GetOptions().map_entry:
            for key, each in _listed(value, Mapping, "a mapping", at).items():
                _add(getattr(message, name)[key], each, f"{at}[{key}]", arrays)
        elif field.message_type.full_name == "google.protobuf.Struct":
            _update(getattr(message, name), value, at)
        elif hasattr(getattr(message, name), "add"):  # repeated; descriptors of older protobufs say it otherwise
            for position, each in enumerate(_listed(value, Sequence, "a list", at)):
                _fill(getattr(message, name).add(), each, f"{at}[{position}].", arrays)
        else:
            _fill(getattr(message, name), value, f"{at}.", arrays)


def _listed(value: Any, kind: Any, words: str, path: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidInput(f"{path} needs {words}; it is a {type(value).__name__}", field=path)
    return value


def _add(tensor: tensor_pb2.Tensor, value: Any, path: str, arrays: dict[str, WireArray]) -> None:
    if isinstance(value, tensor_pb2.TensorRef):
        tensor.ref.CopyFrom(value)
        return
    arrays[path] = to_wire(value, path)
    tensor.CopyFrom(arrays[path].header())


def _update(struct: Any, values: Mapping[str, Any], path: str) -> None:
    try:
        struct.update(values)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} needs a mapping of names to plain values: {error}", field=path) from None


def _set(message: Message, name: str, value: Any, path: str) -> None:
    """Sets a number, a text, a truth value or an enum (a string without prefix, or its number)."""
    field = message.DESCRIPTOR.fields_by_name[name]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of numpy's
        value = value.item()
    if field.enum_type is not None:
        value = _enum(field.enum_type, value, path + name)
    elif isinstance(value, bool) != (field.cpp_type == FieldDescriptor.CPPTYPE_BOOL):  # protobuf takes True for 1
        raise InvalidInput(f"{path}{name} needs {_TYPES[field.cpp_type]}; it is {value!r}", field=path + name)
    try:
        setattr(message, name, value)
    except (TypeError, ValueError):
        needed = _TYPES[field.cpp_type]
        raise InvalidInput(f"{path}{name} needs {needed}; it is {value!r}", field=path + name) from None


def _enum(descriptor: Any, value: Any, path: str) -> Any:
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = descriptor.values_by_name.get(f"{prefix}{value}")
    if found is None:
        names = [each.name.removeprefix(prefix) for each in descriptor.values if each.number]
        raise InvalidInput(f"{path} must be one of {', '.join(names)}; it is {value!r}", field=path)
    return int(found.number)


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else "."


def _tensor_at(message: Message, path: str) -> Any:
    """The tensor of a path such as references[0].labels or pool.inputs[pixels]."""
    name = re.split(r"[.\[]", path, maxsplit=1)[0]
    at, rest = getattr(message, name), path[len(name) :]
    if rest.startswith("[") and not isinstance(at, Message):
        if not hasattr(at, "add"):  # a map, whose keys may hold any character
            return at[rest[1:-1]]
        position, _, rest = rest[1:].partition("]")
        at = at[int(position)]
    return _tensor_at(at, rest[1:]) if rest else at
