"""Requests made wrong: fields by the descriptors, bytes, a stream's messages, and files that tensors are read from."""

from __future__ import annotations

import hashlib
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from benchmarks.service import files
from queryselect.v1 import selection_pb2, tensor_pb2

StreamRequest = selection_pb2.SelectStreamRequest

#: What whole numbers may be at the edges of their types and of what is meant.
WHOLE: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    -1,
    -2,
    7,
    100,
    1001,
    4096,
    20_001,
    2**31 - 1,
    -(2**31),
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
)
WHOLE += (-(2**63), 2**64 - 1)
REAL: tuple[float, ...] = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-12, 5e-324, 1e-45, 1e38, 1e300, 1.7976931348623157e308, -1e308)
REAL += (float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "a",
    "no spaces",
    "é" * 70,
    "x" * 200,
    "\0",
    "\n",
    "\x7f",
    "💣",
    "bald",
    "margin",
    "random",
    "knobs",
    "a.b[0]",
)
#: Tensors' elements at the edges: NaN, infinities, the largest and the smallest numbers, by their bytes.
BYTES = (b"\0", b"\xff", b"\x7f\xf0", b"\x7f", b"\x80", b"\x01", b"\xff\xff\x7f\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff")
#: Addresses that nobody may read, and what is put behind one that may be read.
ADDRESSES = ("file:///etc/hostname", "https://localhost/a.npy", "s3://pools/a.npy", "gs://pools/a.npy", "a.npy", "")
PATHS = (
    "",
    "/",
    "/..",
    "/../a.npy",
    "/%2e%2e/a.npy",
    "/none.npy",
    "//a.npy",
    "/a\0.npy",
    "/" + "a" * 300 + ".npy",
    "2/a.npy",
)
#: The bytes of varints at the edges: a field's length, a number that takes ten bytes, one that never ends.
VARINTS = (b"\x80\x80\x80\x80\x10", b"\xff" * 9 + b"\x01", b"\xff" * 11, b"\xff\xff\xff\xff\x07", b"\x80\x00")


class Damage:
    """Draws of what to make wrong, and where."""

    def __init__(self, draw: st.DrawFn, number: int) -> None:
        """number: the seed of bytes that nothing hangs on."""
        self._draw = draw
        self._random = random.Random(number)  # noqa: S311  # no secrets

    # Structure

    def message(self, message: Message, times: int) -> None:
        """Changes fields of a message or of those inside it."""
        for _ in range(times):
            inside = list(_inside(message))
            tensors = [each for each in inside if isinstance(each, tensor_pb2.Tensor)]
            if tensors and self.integer(0, 2) == 0:
                self._tensor(self.one_of(tensors))
            else:
                self._field(self.one_of(inside))

    def _field(self, message: Message) -> None:
        """Sets a field, or drops it, or exchanges it with one of its type, or adds one that nobody knows."""
        fields = message.DESCRIPTOR.fields
        way = self.integer(0, 9)
        if way == 0 or not fields:
            number = self.one_of((*range(1, 40), 99, 100, 101, 250, 2**29 - 1))
            kind, value = self.one_of(((0, b"\x08"), (1, bytes(8)), (2, b"\0"), (5, bytes(4))))
            message.MergeFromString(_tag(number, kind) + value)
            return
        field = self.one_of(fields)
        given = [each for each, _ in message.ListFields()]
        if way <= 3 and given:
            message.ClearField(self.one_of(given).name)
        elif way <= 5 and given:
            field = self.one_of(given)
            _exchange(message, field, self.one_of([each for each in fields if _alike(each, field)]))
        else:
            if way <= 7 and given:
                field = self.one_of(given)
            self._set(message, field, 0)

    def _set(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        """Gives a field a value of its type."""
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type
            key, value = self._scalar(entry.fields_by_name["key"]), entry.fields_by_name["value"]
            if value.message_type is None:
                getattr(message, field.name)[key] = self._scalar(value)
            else:
                self._fill(getattr(message, field.name)[key], depth + 1)
        elif field.is_repeated and field.message_type is not None:
            for _ in range(self.one_of((1, 2, 3, 17))):
                self._fill(getattr(message, field.name).add(), depth + 1)
        elif field.is_repeated:
            getattr(message, field.name).extend(self._scalar(field) for _ in range(self.integer(1, 3)))
        elif field.message_type is not None:
            at = getattr(message, field.name)
            at.SetInParent()
            self._fill(at, depth + 1)
        else:
            setattr(message, field.name, self._scalar(field))

    def _fill(self, message: Message, depth: int) -> None:
        """Gives a message some fields, and those some of their own."""
        if isinstance(message, tensor_pb2.Tensor):
            message.dtype = self.one_of(tensor_pb2.DataType.values())
            message.shape.extend(self.integer(0, 5) for _ in range(self.integer(0, 3)))
            message.data = self._random.randbytes(self.one_of((0, 8, 16, 40)))
        if isinstance(message, struct_pb2.Value):
            for _ in range(self.one_of((0, 0, 2, 20))):
                message = message.list_value.values.add()
        fields = message.DESCRIPTOR.fields
        for _ in range(self.integer(0, 2) if fields and depth < 5 else 0):
            self._set(message, self.one_of(fields), depth)

    def _scalar(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if field.enum_type is not None:
            known = [each.number for each in field.enum_type.values]
            return self.one_of((*known, *known, 6, 77, -1, 2**31 - 1))
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self._draw(st.booleans())
        if kind in {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}:
            return self.one_of(REAL)
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return self._random.randbytes(self.one_of((0, 1, 8, 16, 100)))
            return self.one_of(TEXTS)
        low, high = _RANGES[kind]
        return self.one_of([each for each in WHOLE if low <= each <= high])

    def _tensor(self, tensor: tensor_pb2.Tensor) -> None:
        """Makes a tensor's shape, type or bytes wrong, or only its values."""
        way, data = self.integer(0, 5), bytearray(tensor.data)
        if way == 0:
            tensor.dtype = self.one_of(tensor_pb2.DataType.values())
        elif way == 1 and tensor.shape:
            at = self.integer(0, len(tensor.shape) - 1)
            tensor.shape[at] = self.one_of(
                (min(tensor.shape[at], 2**62) + 1, max(tensor.shape[at], 0) - 1, *WHOLE[:-1])
            )
        elif way == 2:
            shape = list(tensor.shape)
            tensor.shape[:] = self.one_of(
                (shape[::-1], shape[1:], [*shape, 1], [1, *shape], [0, 2**61, 2], [2**32] * 2)
            )
        elif way == 3:
            tensor.data = bytes(self.one_of((data[:-1], data + b"\0", data[: len(data) // 2], data * 2, b"")))
        elif way == 4 and tensor.shape:  # fewer or more rows, all else being right
            rows = tensor.shape[0]
            fewer = self.one_of((0, 1, rows - 1, rows + 1))
            row = len(data) // rows if rows else 0
            tensor.shape[0], tensor.data = max(0, fewer), bytes((data * 2)[: max(0, fewer) * row])
        elif data:
            for _ in range(self.integer(1, 3)):
                value = self.one_of(BYTES)
                at = self.integer(0, len(data) - 1) & ~7
                data[at : at + 8] = (value * 8)[-len(data[at : at + 8]) :] if len(value) == 1 else value
            tensor.data = bytes(data)

    # Bytes

    def of_bytes(self, data: bytes, other: bytes, times: int) -> bytes:
        """Changes bytes of a message. other: one to take a part from."""
        changed = bytearray(data)
        for _ in range(times):
            at, way = self.integer(0, len(changed)), self.one_of((0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7))
            if self.integer(0, 1):  # where fields and lengths are more often than elements
                at = min(at, self.integer(0, 60))
            size = self.one_of((1, 1, 2, 8, 50))
            if way == 0 and at < len(changed):
                changed[at] ^= 1 << self.integer(0, 7)
            elif way == 1:
                changed[at:at] = self._random.randbytes(size)
            elif way == 2:
                del changed[at : at + size]
            elif way == 3:
                changed[at:at] = changed[at : at + size]
            elif way == 4:
                del changed[at:]
            elif way == 5:
                start = self.integer(0, len(other))
                changed[at:] = other[start:]
            elif way == 6:
                changed[at : at + 1] = self.one_of(VARINTS)
            else:
                changed[at : at + 1] = bytes([self.integer(0, 255)])
        return bytes(changed)

    # Streams

    def stream(self, message: selection_pb2.SelectRequest) -> list[bytes]:
        """A stream's messages: a start whose tensors are streamed, some or all, and their chunks; then made wrong."""
        start, chunks = selection_pb2.SelectRequest(), []
        start.CopyFrom(message)
        for path, tensor in _tensors(start):
            if self.integer(0, 5) and tensor.WhichOneof("source") == "data":
                chunks += self._cut(path, tensor.data)
                tensor.streamed.SetInParent()
        if self.integer(0, 2) == 0:
            self._random.shuffle(chunks)
        messages = [
            _within(StreamRequest.START_FIELD_NUMBER, start.SerializeToString()),
            *(each.SerializeToString() for each in chunks),
        ]
        for _ in range(self.one_of((0, 0, 1, 1, 2, 3))):
            self._disturb(messages)
        return messages

    def _cut(self, path: str, data: bytes) -> list[StreamRequest]:
        """A tensor's bytes in chunks."""
        size = max(len(data) // self.integer(1, 5), 1)
        chunks = []
        for offset in range(0, len(data), size):
            part = data[offset : offset + size]
            chunk = selection_pb2.Chunk(path=path, offset=offset, data=part)
            if self.integer(0, 1):
                chunk.crc32 = zlib.crc32(part)
            chunks.append(StreamRequest(chunk=chunk))
        return chunks

    def _disturb(self, messages: list[bytes]) -> None:
        """One fault of a stream's messages."""
        way, at = self.integer(0, 6), self.integer(0, max(0, len(messages) - 1))
        other = self.integer(0, max(0, len(messages) - 1))
        if not messages or way == 0:
            messages.insert(at, self._random.randbytes(self.one_of((0, 1, 20))))
        elif way == 1:
            del messages[at]
        elif way == 2:
            messages.insert(other, messages[at])
        elif way == 3:
            messages[at], messages[other] = messages[other], messages[at]
        elif way == 4:
            messages[at] = self.of_bytes(messages[at], messages[other], 1)
        else:
            self._disturb_chunk(messages, at)

    def _disturb_chunk(self, messages: list[bytes], at: int) -> None:
        """A chunk that does not belong where it says, or has other bytes than it says."""
        try:
            message = StreamRequest.FromString(messages[at])
        except Exception:  # noqa: BLE001  # damaged before; protobuf's error has no public name
            return
        if message.WhichOneof("message") != "chunk":
            return
        chunk, way = message.chunk, self.integer(0, 4)
        if way == 0:
            chunk.path = self.one_of((*TEXTS, "pool.embeddings", "pool.labeled", "references[0].labels"))
        elif way == 1:
            chunk.offset = self.one_of((max(0, chunk.offset - 1), min(chunk.offset + 1, 2**63 - 1), *WHOLE[:-1]))
        elif way == 2:
            chunk.data = self.one_of((b"", chunk.data[:-1], chunk.data + b"\0", chunk.data[::-1]))
        elif way == 3:
            chunk.crc32 = self.one_of((0, 1, 2**32 - 1))
        else:
            message.MergeFromString(b"\x12\x0b\x10" + b"\xff" * 9 + b"\x7f")  # an offset beyond 64 bits
        messages[at] = message.SerializeToString()

    # References

    def refer(self, message: selection_pb2.SelectRequest, folder: Path) -> tuple[tuple[Path, bytes], ...]:
        """Puts some of the tensors into files of that folder, and names them instead; some files and names are wrong.

        Gives the files.
        """
        found = []
        for _, tensor in _tensors(message):
            suffix = self.one_of(files.SUFFIXES)
            if self.integer(0, 2) == 0 or not _is_good(tensor) or not files.holds(suffix, tensor):
                continue
            data = files.content(suffix, tensor, self.one_of(files.COMPRESSIONS.get(suffix, ("",))))
            data = self.of_bytes(data, data, self.one_of((*[0] * 9, 1, 2, 4)))
            path = folder / (hashlib.sha256(data).hexdigest()[:20] + suffix)
            found.append((path, data))
            reference = tensor_pb2.TensorRef(uri=path.as_uri())
            if suffix != ".npy":
                reference.column = files.COLUMN
            if self.integer(0, 7) == 0:
                self._reference(reference, folder, [*tensor.shape, 0][0])
            tensor.ref.CopyFrom(reference)
            if self.integer(0, 1):
                tensor.ClearField("dtype")
            if self.integer(0, 1):
                tensor.ClearField("shape")
        return tuple(found)

    def _reference(self, reference: tensor_pb2.TensorRef, folder: Path, rows: int) -> None:
        """Asks for other rows than all, or for what is not there."""
        way = self.integer(0, 5)
        if way == 0:
            reference.uri = self.one_of((*ADDRESSES, *(folder.as_uri() + each for each in PATHS)))
        elif way == 1:
            reference.column = self.one_of((*TEXTS, "other"))
        elif way == 2:
            reference.format = self.one_of(tensor_pb2.TensorFormat.values())
        elif way == 3:
            reference.version = self.one_of((*TEXTS, '"a"'))
        else:
            for _ in range(self.integer(1, 3)):
                start = self.integer(0, rows)
                some = (start, self.integer(start, rows)) if way == 4 else [self.one_of(WHOLE[:-1]) for _ in range(2)]
                reference.rows.add(start=some[0], stop=some[1])

    # Draws

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high."""
        return self._draw(st.integers(low, high))

    def one_of(self, options: Sequence[Any]) -> Any:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]


_RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def _inside(message: Message) -> Iterator[Message]:
    """A message and all that stand in it; not those of maps' entries."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for each in value if field.is_repeated else [value]:
            yield from _inside(each)


def _tensors(message: Message, path: str = "") -> Iterator[tuple[str, tensor_pb2.Tensor]]:
    """The tensors in a message, by the paths that chunks name them by."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        parts = {f"[{at}]": each for at, each in enumerate(value)} if field.is_repeated else {"": value}
        for place, each in parts.items():
            at = f"{path}{field.name}{place}"
            if isinstance(each, tensor_pb2.Tensor):
                yield at, each
            else:
                yield from _tensors(each, f"{at}.")


def _is_good(tensor: tensor_pb2.Tensor) -> bool:
    """Whether the tensor's bytes are here and as many as they should be."""
    width = files.WIDTHS.get(tensor.dtype, 0)
    return tensor.WhichOneof("source") == "data" and len(tensor.data) == math.prod(tensor.shape) * width > 0


def _alike(one: Any, other: Any) -> bool:
    """Whether two fields can hold the same values."""
    return (one.type, one.is_repeated, one.message_type) == (other.type, other.is_repeated, other.message_type) and (
        one.enum_type == other.enum_type
    )


def _exchange(message: Message, one: FieldDescriptor, other: FieldDescriptor) -> None:
    """Lets two fields have each other's values; what shares a oneof with them goes."""
    values = type(message)()
    values.CopyFrom(message)
    for field, source in ((one, other), (other, one)):
        message.ClearField(field.name)
        value = getattr(values, source.name)
        if field.is_repeated:
            getattr(message, field.name).MergeFrom(value)
        elif field.message_type is None:
            setattr(message, field.name, value)
        else:
            getattr(message, field.name).CopyFrom(value)


def _tag(number: int, kind: int) -> bytes:
    """The first bytes of a field: its number and its kind."""
    return _varint(number << 3 | kind)


def _within(number: int, data: bytes) -> bytes:
    """A message within another one, which protobuf does not make where it would be nested too deep."""
    return _tag(number, 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
