"""Between protobuf and torch, both ways. The only file that imports both.

Requirements that the design meets:

- No strategy is named here: a strategy's message is read by its descriptor, field by field, into the dataclass that the
  kernel's file declares, and written back the same way.
- Nothing that is set is ignored: a field, an enum number or a strategy that this server does not serve is Unsupported.
- Bytes are read once and not copied again: a protobuf `bytes` field copies on every access.
- Tensors that did not come inline come as `buffers`, by path (callers in this process), or later (streams, references).
- A chunk is read without a copy of its bytes, which protobuf would make two of: half the time of an upload.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from torch import Tensor

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2, tensor_pb2
from queryselect_service import spec as specs
from queryselect_service import strategy as strategies
from queryselect_service.call import Caller
from queryselect_service.checks import Array, Source, elements, shape_text
from queryselect_service.errors import InvalidInput, OverLimit, Unsupported
from queryselect_service.items import ItemAggregation, Items
from queryselect_service.quotas import Quota, QuotaLimit
from queryselect_service.references import REFERENCE_INPUTS, Reference
from queryselect_service.request import INPUTS, ROW_LISTS, Request
from queryselect_service.settings import Settings
from queryselect_service.spec import Spec
from queryselect_service.strategy import (
    PLUGINS,
    STRATEGIES,
    Input,
    ReferenceRole,
    ScoreKind,
    Selection,
    Strategy,
    Task,
)
from queryselect_service.terms import Terms
from queryselect_service.times import Times
from queryselect_service.upload import Part

if sys.byteorder != "little":
    raise ImportError("tensors travel little-endian, and this machine is not")

# Tensors here are views of bytes that nobody may write; kernels never write their inputs (tests/strategy_case.py).
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Readable = TypeVar("Readable", bound=Message)

#: Tensors of an answer that are better sent apart from it, by path.
Large = dict[str, Tensor]
#: A tensor's bytes, flat or in shape, of the type its message says.
Buffers = Mapping[str, np.ndarray[Any, Any]]

DTYPES = {
    tensor_pb2.DATA_TYPE_F64: torch.float64,
    tensor_pb2.DATA_TYPE_F32: torch.float32,
    tensor_pb2.DATA_TYPE_F16: torch.float16,
    tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
    tensor_pb2.DATA_TYPE_I64: torch.int64,
    tensor_pb2.DATA_TYPE_I32: torch.int32,
    tensor_pb2.DATA_TYPE_U8: torch.uint8,
    tensor_pb2.DATA_TYPE_BOOL: torch.bool,
}
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
#: The pool's fields that tell of items of several rows.
ITEM_FIELDS = ("item_rows", "item_aggregation", "item_top_k", "num_items")
#: Ranges of rows that one reference may name: each is read by itself.
MOST_RANGES = 1024
#: Row numbers that one warning carries.
WARNING_ROWS = 1000
RECOMMENDED_CHUNK_BYTES = 1 << 20


# Requests


def decode(message: selection_pb2.SelectRequest, buffers: Buffers | None, settings: Settings) -> Request:
    """What a request says, its tensors with their elements where those are here already.

    buffers: the elements of tensors marked as streamed, by path; None where they are still to come.

    Raises InvalidInput, OverLimit or Unsupported, naming the field.
    """
    _refuse_unserved(
        message,
        "",
        {"pool", "references", "strategy", "stop", "task", "seed", "returns", "validate_only", "request_id"},
    )
    strategy, spec, path = decode_strategy(message.strategy)
    pool = message.pool
    try:
        strategy = strategy.bound(spec, (field.name for field, _ in pool.ListFields()))
    except InvalidInput as error:
        raise error.of(strategy.name, path) from None
    if len(message.references) > settings.max_references:
        raise OverLimit(
            "reference sets",
            len(message.references),
            settings.max_references,
            name="max_references",
            field="references",
        )
    read = _served(None)
    _refuse_unserved(pool, "pool.", {*read, *ROW_LISTS, *ITEM_FIELDS, "costs", "quotas", "ids", "num_rows"})
    returns = {_enum_name(selection_pb2.Return.DESCRIPTOR, value, "returns") for value in message.returns}
    for name in returns - {"UNSPECIFIED", "POOL_SCORES", "PSEUDO_LABELS"}:
        raise Unsupported(f"this server does not return {name}", field="returns")
    task = _enum_name(strategy_pb2.Task.DESCRIPTOR, message.task, "task")

    return Request(
        strategy=strategy,
        spec=spec,
        path=path,
        inputs=_decode_inputs(pool, "pool", INPUTS, "N", buffers),
        references=[
            _decode_reference(each, f"references[{at}]", strategy, buffers)
            for at, each in enumerate(message.references)
        ],
        row_lists=_decode_tensors(pool, "pool", dict.fromkeys(ROW_LISTS, ""), buffers),
        terms=_decode_terms(message, buffers, settings),
        items=_decode_items(pool, buffers, settings),
        num_rows=pool.num_rows if pool.HasField("num_rows") else None,
        max_items=message.stop.max_items if message.stop.HasField("max_items") else None,
        task=Task.MULTICLASS if task == "UNSPECIFIED" else Task(task),
        seed=message.seed,
        returns=frozenset(returns),
        validate_only=message.validate_only,
        ids=_decode_ids(pool, buffers),
    )


def _refuse_unserved(message: Message, path: str, served: set[str]) -> None:
    for field, _ in message.ListFields():
        if field.name not in served:
            raise Unsupported(f"this server does not serve {path}{field.name} yet", field=f"{path}{field.name}")


def _every_input() -> list[Input]:
    """The inputs of all strategies here."""
    return [each for some in (*STRATEGIES.values(), *PLUGINS.values()) for each in some.inputs]


def _decode_reference(
    message: selection_pb2.ReferenceSet, path: str, strategy: Strategy, buffers: Buffers | None
) -> Reference:
    served = {each.role for each in _every_input()} - {None}
    if not served:
        raise Unsupported("no query strategy of this server reads references", field=path)
    name = _enum_name(selection_pb2.ReferenceRole.DESCRIPTOR, message.role, f"{path}.role")
    if name == "UNSPECIFIED" and len(strategy.roles) != 1:
        known = f"reads those of roles {', '.join(strategy.roles)}" if strategy.roles else "reads no references"
        raise InvalidInput(f"{path} needs a role; it has none, and {strategy.name} {known}", field=f"{path}.role")
    role = strategy.roles[0] if name == "UNSPECIFIED" else ReferenceRole(name)
    if role not in served:
        words = f"no query strategy of this server reads references of role {role}"
        raise Unsupported(words, field=f"{path}.role")
    _refuse_unserved(message, f"{path}.", {"role", *_served(role)})
    return Reference(path, role, _decode_inputs(message, path, REFERENCE_INPUTS, "M", buffers))


def _served(role: ReferenceRole | None) -> set[str]:
    """The fields of a pool, or of a reference set of a role, that some strategy here reads."""
    read = {field for each in _every_input() if each.role is role for field in each.fields}
    return read | ({"samples_kind"} if "samples" in read else set())


def _decode_inputs(
    message: selection_pb2.Pool | selection_pb2.ReferenceSet,
    path: str,
    letters: Mapping[str, str],
    rows: str,
    buffers: Buffers | None,
) -> dict[str, Array]:
    """The tensors of a pool or of a reference set, and those of their scales. rows: the letter of their rows."""
    found = _decode_tensors(message, path, letters, buffers)
    for at, scale in enumerate(message.scales):
        if not scale.HasField("embeddings"):
            where = f"{path}.scales[{at}]"
            raise InvalidInput(
                f"{where} needs embeddings of shape ({rows} L); it has none", field=f"{where}.embeddings"
            )
        shapes = {"embeddings": f"{rows} L{at}", "gradients": f"{rows} P{at}"}
        parts = _decode_tensors(scale, f"{path}.scales[{at}]", shapes, buffers)
        found |= {f"scales[{at}].{name}": array for name, array in parts.items()}
    if "samples" in found:
        name = _enum_name(selection_pb2.SamplesKind.DESCRIPTOR, message.samples_kind, f"{path}.samples_kind")
        found["samples"].kind = "PROBABILITIES" if name == "UNSPECIFIED" else name
    return found


def _decode_tensors(
    message: Message, path: str, letters: Mapping[str, str], buffers: Buffers | None
) -> dict[str, Array]:
    """Those of the tensors named in `letters` that are set."""
    return {
        name: decode_tensor(getattr(message, name), f"{path}.{name}", buffers, each)
        for name, each in letters.items()
        if message.HasField(name)
    }


def _decode_terms(message: selection_pb2.SelectRequest, buffers: Buffers | None, settings: Settings) -> Terms:
    pool, stop = message.pool, message.stop
    if len(pool.quotas) > settings.max_quotas:
        raise OverLimit("quotas", len(pool.quotas), settings.max_quotas, name="max_quotas", field="pool.quotas")
    quotas, values, letter = [], [], _chosen(pool)
    for at, each in enumerate(pool.quotas):
        path = f"pool.quotas[{at}]"
        if not each.HasField("values"):
            raise InvalidInput(f"{path} needs values of shape ({letter}); it has none", field=f"{path}.values")
        values.append(decode_tensor(each.values, f"{path}.values", buffers, letter))
        limits = tuple(_decode_limit(limit, f"{path}.limits[{place}]") for place, limit in enumerate(each.limits))
        quotas.append(Quota(each.name or path, each.default_max if each.HasField("default_max") else None, limits))
    return Terms(
        quotas=tuple(quotas),
        values=tuple(values),
        costs=decode_tensor(pool.costs, "pool.costs", buffers, letter) if pool.HasField("costs") else None,
        max_cost=stop.max_cost if stop.HasField("max_cost") else None,
        min_gain=stop.min_gain if stop.HasField("min_gain") else None,
    )


def _chosen(pool: selection_pb2.Pool) -> str:
    """The letter of what is chosen among: items, where rows tell theirs, or rows."""
    return "I" if pool.HasField("item_rows") else "N"


def _decode_items(pool: selection_pb2.Pool, buffers: Buffers | None, settings: Settings) -> Items | None:
    name = _enum_name(selection_pb2.ItemAggregation.DESCRIPTOR, pool.item_aggregation, "pool.item_aggregation")
    if not pool.HasField("item_rows"):
        for field, value in pool.ListFields():
            if field.name in ITEM_FIELDS and not (field.enum_type and value == 0):  # UNSPECIFIED is as if unset
                words = f"pool.{field.name} needs pool.item_rows of shape (N); the request has none"
                raise InvalidInput(words, field="pool.item_rows")
        return None
    return Items(
        array=decode_tensor(pool.item_rows, "pool.item_rows", buffers),
        aggregation=ItemAggregation.MEAN if name == "UNSPECIFIED" else ItemAggregation(name),
        top_k=pool.item_top_k if pool.HasField("item_top_k") else None,
        most=settings.max_rows,
        told=(pool.num_items, "pool.num_items") if pool.HasField("num_items") else None,
    )


def _decode_limit(limit: selection_pb2.QuotaLimit, path: str) -> QuotaLimit:
    if not limit.HasField("value"):
        raise InvalidInput(f"{path} needs a value, the group that it limits; it has none", field=f"{path}.value")
    return QuotaLimit(limit.value, limit.min, limit.max if limit.HasField("max") else None)


def _decode_ids(pool: selection_pb2.Pool, buffers: Buffers | None) -> Array | list[str] | None:
    kind = pool.ids.WhichOneof("kind")
    if kind == "integers":
        return decode_tensor(pool.ids.integers, "pool.ids.integers", buffers, _chosen(pool))
    if kind == "strings":
        return list(pool.ids.strings.values)
    if pool.HasField("ids"):
        raise InvalidInput("pool.ids needs integers or strings; it has neither", field="pool.ids")
    return None


def decode_tensor(message: tensor_pb2.Tensor, path: str, buffers: Buffers | None, letters: str = "") -> Array:
    """The tensor at `path`. Its elements are views of the message's bytes or of the caller's buffer: not to be written.

    buffers: as in `decode`. letters: what its dimensions should be; not checked here.

    Raises InvalidInput where type, shape and bytes don't fit together.
    """
    name = _enum_name(tensor_pb2.DataType.DESCRIPTOR, message.dtype, path)
    source = message.WhichOneof("source")
    if source == "ref":
        return Array(path, torch.uint8, (), None, letters, source=_decode_source(message, path))
    if name == "UNSPECIFIED":
        raise InvalidInput(f"{path} needs a dtype; it has none", field=path)
    dtype, shape = DTYPES[message.dtype], tuple(message.shape)
    # Strides count the bytes of every dimension but the first, a length of 0 elsewhere notwithstanding.
    if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        text = shape_text(shape)
        raise InvalidInput(f"{path} needs sizes of at least 0 that memory can hold; its shape is {text}", field=path)
    if source == "streamed":
        if buffers is None:
            return Array(path, dtype, shape, None, letters)
        if path not in buffers:
            raise InvalidInput(f"{path} is marked as streamed, which only SelectStream can send", field=path)
        return Array(path, dtype, shape, elements(path, buffers[path], dtype, shape), letters)
    needed = math.prod(shape) * dtype.itemsize
    if source is None and needed:  # no elements may be told by no bytes
        raise InvalidInput(f"{path} needs data; it has none", field=path)
    data = message.data
    if len(data) != needed:
        text = f"{path} of shape {shape_text(shape)} and type {name}"
        raise InvalidInput(f"{text} needs {needed} bytes; it has {len(data)}", field=path)
    return Array(path, dtype, shape, elements(path, np.frombuffer(data, np.uint8), dtype, shape), letters)


def _decode_source(message: tensor_pb2.Tensor, path: str) -> Source:
    ref = message.ref
    if not ref.uri:
        raise InvalidInput(f"{path} needs a uri; its reference has none", field=f"{path}.ref.uri")
    if len(ref.rows) > MOST_RANGES:
        words = f"{path} needs at most {MOST_RANGES} ranges of rows; its reference has {len(ref.rows)}"
        raise InvalidInput(words, field=f"{path}.ref.rows")
    for at, each in enumerate(ref.rows):
        if not 0 <= each.start < each.stop:
            words = f"a range of rows needs 0 <= start < stop; it is {each.start} to {each.stop}"
            raise InvalidInput(words, field=f"{path}.ref.rows[{at}]")
    format_name = _enum_name(tensor_pb2.TensorFormat.DESCRIPTOR, ref.format, f"{path}.ref.format")
    return Source(
        uri=ref.uri,
        format="" if format_name == "UNSPECIFIED" else format_name,
        column=ref.column if ref.HasField("column") else None,
        rows=tuple(range(each.start, each.stop) for each in ref.rows),
        version=ref.version if ref.HasField("version") else None,
        dtype=DTYPES[message.dtype] if message.dtype else None,
        shape=tuple(message.shape) or None,
    )


def _enum_name(descriptor: EnumDescriptor, number: int, path: str) -> str:
    """The value's name without its prefix; Unsupported where a newer client sent a number unknown here."""
    value = descriptor.values_by_number.get(number)
    if value is None:
        raise Unsupported(f"this server does not know value {number} of {descriptor.name}", field=path)
    return str(value.name.removeprefix(_prefix(descriptor)))


def _prefix(descriptor: EnumDescriptor) -> str:
    zero: str = descriptor.values_by_number[0].name
    return zero.removesuffix("UNSPECIFIED")


# Strategies


def strategy_name(message: strategy_pb2.Strategy) -> str:
    """What a request is counted under, read or not: a name that this server knows, never a text of the caller's."""
    name = message.WhichOneof("kind") or ""
    return message.custom.name if name == "custom" and message.custom.name in PLUGINS else name


def decode_strategy(message: strategy_pb2.Strategy) -> tuple[Strategy, Spec, str]:
    """The strategy that is set, its parameters, and their path in the request."""
    name = message.WhichOneof("kind")
    known = ", ".join(sorted({*STRATEGIES, *PLUGINS}))
    if name is None:
        if len(UnknownFieldSet(message)):
            raise Unsupported(f"this server does not know that strategy; it has {known}", field="strategy")
        raise InvalidInput(f"strategy needs a query strategy; none is set. There are {known}", field="strategy")
    chosen, values = getattr(message, name), {}
    if name == "custom":
        strategy = PLUGINS.get(chosen.name)
        path = f"strategy.{name}.parameters"
        for key, value in chosen.parameters.fields.items():
            if value.WhichOneof("kind") is None:
                raise InvalidInput(f"parameter {key} needs a value; it has none", field=f"{path}.{key}")
        values = dict(chosen.parameters.items())
        if strategy is None:
            plugins = ", ".join(sorted(PLUGINS)) or "none"
            raise Unsupported(f"no plug-in {chosen.name!r} is installed here; there are {plugins}", field="strategy")
    else:
        strategy = STRATEGIES.get(name)
        path = f"strategy.{name}"
        if strategy is None:
            raise Unsupported(f"this server has no kernel for {name}; it has {known}", field="strategy")
        for field, value in chosen.ListFields():
            said = _enum_name(field.enum_type, value, f"{path}.{field.name}") if field.enum_type else value
            if not (field.enum_type and value == 0):  # UNSPECIFIED is the default, as if unset
                values[field.name] = said
    try:
        return strategy, specs.build(strategy.spec, values), path
    except InvalidInput as error:
        raise error.of(strategy.name, path) from None


def encode_strategy(strategy: Strategy, spec: Spec) -> strategy_pb2.Strategy:
    """The strategy with every parameter as it is used."""
    message = strategy_pb2.Strategy()
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    if strategy.custom:
        message.custom.name = strategy.name
        message.custom.parameters.update(values)
        return message
    chosen = getattr(message, strategy.name)
    chosen.SetInParent()
    for name, value in values.items():
        enum_type = chosen.DESCRIPTOR.fields_by_name[name].enum_type
        if value is not None:
            setattr(chosen, name, enum_type.values_by_name[_prefix(enum_type) + value].number if enum_type else value)
    return message


def describe(strategy: Strategy) -> strategy_pb2.StrategyDescription:
    """What ListStrategies says of a strategy."""
    hints = get_type_hints(strategy.spec)
    return strategy_pb2.StrategyDescription(
        name=strategy.name,
        summary=strategy.summary,
        inputs=_describe_inputs(strategy, None),
        references=[
            strategy_pb2.ReferenceDescription(role=role, inputs=_describe_inputs(strategy, role))
            for role in strategy.roles
        ],
        tasks=[strategy_pb2.Task.Value(f"TASK_{task}") for task in strategy.tasks],
        parameters=[
            _describe_parameter(
                each, hints[each.name], strategies.bases() if each.name == strategy.base_parameter else ()
            )
            for each in dataclasses.fields(strategy.spec)
        ],
        cost=strategy.cost,
        seeded=strategy.seeded,
        pool_scores=strategy.pool_scores,
        pseudo_labels=strategy.pseudo_labels,
        score_kind=_score_kind(strategy.score_kind),
        citation=strategy.citation,
        custom=strategy.custom,
        base_parameter=strategy.base_parameter or None,
        items=strategy.serves_items,
    )


def _describe_inputs(strategy: Strategy, role: ReferenceRole | None) -> list[strategy_pb2.InputDescription]:
    """The inputs of the pool, or those of the reference sets of a role."""
    return [
        strategy_pb2.InputDescription(
            name=each.field, shape=each.shape, required=each.required, alternatives=each.alternatives
        )
        for each in strategy.inputs
        if each.role is role
    ]


_PARAMETER_TYPES = {bool: "BOOL", int: "INT", float: "FLOAT", str: "STRING"}


def _describe_parameter(
    field: dataclasses.Field[Any], hint: Any, known: Iterable[str]
) -> strategy_pb2.ParameterDescription:
    """known: the values that it can have beside those of an enum."""
    kind, _ = specs.value_type(hint)
    names = [*getattr(kind, "__members__", ()), *known]
    low, high = field.metadata["low"], field.metadata["high"]
    text = strategy_pb2.ParameterDescription(
        name=field.name,
        type=strategy_pb2.ParameterType.Value(f"PARAMETER_TYPE_{_PARAMETER_TYPES.get(kind, 'ENUM')}"),
        values=names,
        minimum=low,
        maximum=high,
        doc=field.metadata["doc"],
    )
    if field.default is not None:
        text.default = str(field.default).lower() if kind is bool else str(field.default)
    if names:
        text.range = ", ".join(names)
    elif low is not None or high is not None:
        text.range = specs.range_text(low, high)
    if field.metadata["unit"]:
        text.unit = field.metadata["unit"]
    return text


def _score_kind(kind: ScoreKind) -> strategy_pb2.ScoreKind.ValueType:
    return strategy_pb2.ScoreKind.Value(f"SCORE_KIND_{kind}")


# Answers


def encode(selection: Selection | None, request: Request, large: Large | None = None) -> selection_pb2.SelectResponse:
    """The answer; without a selection (validate_only) what is known without one.

    large: is given the tensors that are better sent apart, by path; None: all stand in the message.
    """
    kind = (None if selection is None else selection.score_kind) or request.strategy.score_kind
    message = selection_pb2.SelectResponse(
        score_kind=_score_kind(kind), strategy=encode_strategy(request.strategy, request.spec)
    )
    for notice in request.notices if selection is None else selection.notices:
        warning = message.warnings.add()
        warning.code = selection_pb2.WarningCode.Value(f"WARNING_CODE_{notice.code}")
        warning.message = notice.message
        if notice.rows is not None:
            warning.rows.extend(notice.rows[:WARNING_ROWS].tolist())
    if selection is None:
        return message
    tensors = {"indices": selection.indices, "scores": selection.scores}
    if isinstance(request.ids, list):
        message.ids.strings.values.extend(request.ids[row] for row in selection.indices.tolist())
    elif request.ids is not None and request.ids.data is not None:
        tensors["ids.integers"] = request.ids.data[selection.indices]
    if selection.pool_scores is not None:
        tensors["pool_scores"] = selection.pool_scores()
    if selection.pseudo_labels is not None:
        tensors["pseudo_labels"], _ = selection.pseudo_labels()
    message.stop_reason = selection_pb2.StopReason.Value(f"STOP_REASON_{selection.stop_reason}")
    if selection.cost_spent is not None:
        message.cost_spent = selection.cost_spent
    for path, tensor in tensors.items():
        at = message.ids.integers if path == "ids.integers" else getattr(message, path)
        at.dtype = NUMBERS[tensor.dtype]
        at.shape.extend(tensor.shape)
        if large is not None and tensor.nbytes > RECOMMENDED_CHUNK_BYTES:
            at.streamed.SetInParent()
            large[path] = tensor
        else:
            at.data = tensor.contiguous().numpy().tobytes()
    return message


def encode_info(times: Times, device: str, request: Request, version: str) -> selection_pb2.RunInfo:
    """How a request ran."""
    return selection_pb2.RunInfo(
        queue=_duration(times.seconds("queue")),
        receive=_duration(times.seconds("receive")),
        decode=_duration(times.seconds("decode")),
        transfer=_duration(times.seconds("transfer")),
        kernel=_duration(times.seconds("kernel")),
        total=_duration(times.total),
        device=device,
        compute_dtype=NUMBERS[request.compute_dtype],
        peak_bytes=times.peak_bytes,
        version=version,
        seed=request.seed,
        sources=[
            selection_pb2.Source(path=each.path, uri=each.source.uri, version=each.source.version)
            for each in request.arrays
            if each.source is not None
        ],
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


# Streams

StreamRequest = selection_pb2.SelectStreamRequest
StreamResponse = selection_pb2.SelectStreamResponse
#: A start, a chunk, or what this server does not know.
StreamMessage = selection_pb2.SelectRequest | Part | StreamRequest


def read(kind: type[Readable], data: bytes) -> Readable:
    """The message of that kind that the bytes are. Raises InvalidInput where they are none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidInput(f"these {len(data)} bytes are no {kind.DESCRIPTOR.full_name}: {error}") from None


def read_stream_request(data: bytes) -> StreamMessage:
    """A message of SelectStream; a chunk's bytes are a view of `data`. Raises InvalidInput where it is none."""
    part = _read_chunk(data)
    if part is not None:
        return part
    message = read(StreamRequest, data)  # a start; or a chunk in an order of fields that our own client never has
    if message.WhichOneof("message") == "chunk":
        chunk = message.chunk
        crc32 = chunk.crc32 if chunk.HasField("crc32") else None
        return Part(chunk.path, chunk.offset, memoryview(chunk.data), crc32)
    return message.start if message.HasField("start") else message


#: The first bytes of fields: the chunk in a stream's message; path, offset, data and crc32 in the chunk.
_CHUNK, _PATH, _OFFSET, _DATA, _CRC32 = 0x12, 0x0A, 0x10, 0x1A, 0x25
#: The most bytes that protobuf takes for a length and for a number.
_LENGTH, _NUMBER = 5, 10


def _read_chunk(data: bytes) -> Part | None:
    """A chunk read by hand, each field once and nothing else; None: leave it to protobuf."""
    try:
        length, at = _varint(data, 1, _LENGTH)
        if data[0] != _CHUNK or at + length != len(data):
            return None
        fields: dict[int, Any] = {}
        while at < len(data):
            tag, at = data[at], at + 1
            if tag in fields or tag not in (_PATH, _OFFSET, _DATA, _CRC32):
                return None
            if tag == _CRC32:
                fields[tag], at = int.from_bytes(data[at : at + 4], "little"), at + 4
                continue
            value, at = _varint(data, at, _NUMBER if tag == _OFFSET else _LENGTH)
            if tag == _OFFSET:
                fields[tag] = value
            else:
                fields[tag], at = memoryview(data)[at : at + value], at + value
        if at != len(data) or fields.get(_OFFSET, 0) >= 1 << 63:
            return None
        path = str(fields.get(_PATH, b""), "utf-8")
    except (IndexError, UnicodeDecodeError):
        return None
    return Part(path, fields.get(_OFFSET, 0), fields.get(_DATA, memoryview(b"")), fields.get(_CRC32))


def _varint(data: bytes, at: int, most: int) -> tuple[int, int]:
    """The number at a position, and the position after it. Raises IndexError where it has more than `most` bytes."""
    value = 0
    for shift in range(0, 7 * most, 7):
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def encode_admitted(request_id: str, reserved: int) -> StreamResponse:
    """The acknowledgement that chunks may come."""
    return StreamResponse(
        admitted=selection_pb2.Admitted(
            request_id=request_id, reserved_bytes=reserved, recommended_chunk_bytes=RECOMMENDED_CHUNK_BYTES
        )
    )


def encode_progress(phase: str, done: int, total: int | None) -> StreamResponse:
    """How far a request is. phase: the name of a Phase."""
    number = selection_pb2.Phase.Value(f"PHASE_{phase}")
    return StreamResponse(progress=selection_pb2.Progress(phase=number, done=done, total=total))


def encode_result(answer: selection_pb2.SelectResponse, large: Large | None) -> Iterator[StreamResponse]:
    """The result, then the bytes of the tensors that are too large for it."""
    yield StreamResponse(result=answer)
    for path, tensor in (large or {}).items():
        data = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        for offset in range(0, len(data), RECOMMENDED_CHUNK_BYTES):
            piece = data[offset : offset + RECOMMENDED_CHUNK_BYTES].tobytes()
            yield StreamResponse(chunk=selection_pb2.Chunk(path=path, offset=offset, data=piece))


def encode_limits(settings: Settings, caller: Caller) -> server_pb2.Limits:
    """The limits in force for a caller, named as Limits names them."""
    limits = server_pb2.Limits()
    own = {"rows": caller.max_rows, "host_bytes": caller.max_bytes, "in_flight": caller.max_in_flight}
    for field in limits.DESCRIPTOR.fields:
        name = field.name if hasattr(settings, field.name) else f"max_{field.name}"
        known = [each for each in (getattr(settings, name, None), own.get(field.name)) if each is not None]
        if not known:
            continue
        if field.message_type is None:
            setattr(limits, field.name, min(known))
        else:
            getattr(limits, field.name).CopyFrom(_duration(*known))
    return limits
