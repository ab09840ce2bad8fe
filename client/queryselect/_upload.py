"""A request as a stream: the start with its small arrays inside, then the large ones in chunks that are views of them.

A chunk is put together by hand: protobuf would copy its bytes twice more, which is half the time of an upload.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from queryselect._arrays import WireArray
from queryselect._picks import NUMPY
from queryselect._request import NOT_PER_ROW, OF_ITEMS, Prepared
from queryselect.v1 import selection_pb2

#: Arrays of at most so many bytes travel inside the start; lists of rows do though they are longer, because the server
#: can tell from them at once what the selection will take.
SMALL_BYTES, LIST_BYTES = 64 << 10, 4 << 20
#: The shortest and the longest chunk, whatever a server recommends.
CHUNK_BYTES = (64 << 10, 4 << 20)

Message = selection_pb2.SelectStreamRequest | bytes


class Upload:
    """The messages of one stream, for gRPC to draw from: the start, and once `admit` was called the chunks."""

    def __init__(self, prepared: Prepared) -> None:
        self._large = prepared.inline(SMALL_BYTES, LIST_BYTES)
        self._start = selection_pb2.SelectStreamRequest(start=prepared.message)
        self._go, self._chunk_bytes = threading.Event(), 0

    @property
    def num_bytes(self) -> int:
        """The bytes of all chunks."""
        return sum(array.data.nbytes for array in self._large.values())

    def admit(self, chunk_bytes: int) -> None:
        """The server lets the chunks come, of the length it likes."""
        low, high = CHUNK_BYTES
        self._chunk_bytes = min(max(chunk_bytes, low), high)
        self._go.set()

    def stop(self) -> None:
        """The stream has ended: nothing more is sent."""
        self._large = {}
        self._go.set()

    def __iter__(self) -> Iterator[Message]:
        yield self._start
        self._go.wait()
        # Lists of rows first, and the items of rows: the server needs them before it can look at rows. Then all arrays
        # side by side, so that a row is complete soon after its first byte, and a server that scores rows as they come
        # holds few of them.
        items = self._start.start.pool.HasField("item_rows")
        lists = {path: array for path, array in self._large.items() if not _per_row(path, items=items)}
        rows = {path: array for path, array in self._large.items() if path not in lists}
        for path, array in lists.items():
            for offset in range(0, array.data.nbytes, self._chunk_bytes):
                yield _chunk_of(path, array, offset, self._chunk_bytes)
        widest = max((_row_bytes(array) for array in rows.values()), default=1)
        step = max(1, self._chunk_bytes // widest)
        for row in range(0, max((array.shape[0] for array in rows.values()), default=0), step):
            for path, array in rows.items():
                yield _chunk_of(path, array, row * _row_bytes(array), step * _row_bytes(array))


def _per_row(path: str, *, items: bool) -> bool:
    """Whether the array at `path` has a row for every row of the pool, and can wait. items: whether rows have items."""
    owner, _, name = path.partition(".")
    of_items = items and (name in (*OF_ITEMS, "item_rows") or name.startswith("quotas["))
    return owner == "pool" and name not in NOT_PER_ROW and not of_items


def _row_bytes(array: WireArray) -> int:
    return array.data.nbytes // array.shape[0]


def _chunk_of(path: str, array: WireArray, offset: int, size: int) -> bytes:
    """The chunk of `size` bytes from `offset` on, fewer at the array's end."""
    return chunk(path, offset, array.data.reshape(-1).view(np.uint8).data[offset : offset + size])


def chunk(path: str, offset: int, data: memoryview) -> bytes:
    """SelectStreamRequest(chunk=Chunk(path, offset, data)) as it travels, with one copy of the data.

    >>> made = chunk("pool.embeddings", 300, memoryview(bytes(200)))
    >>> selection_pb2.SelectStreamRequest.FromString(made).chunk.offset
    300
    """
    head = selection_pb2.Chunk(path=path, offset=offset).SerializeToString() + _DATA + _varint(len(data))
    return b"".join((_CHUNK, _varint(len(head) + len(data)), head, data))


#: The keys of the chunk in the stream's message and of the data in the chunk: field number and "length follows".
_CHUNK, _DATA = b"\x12", b"\x1a"


def _varint(value: int) -> bytes:
    """A number as protobuf writes it: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def serialize(message: Message) -> bytes:
    """What travels of a message of the stream."""
    return message if isinstance(message, bytes) else message.SerializeToString()


class Download:
    """A result whose large tensors come in chunks."""

    def __init__(self) -> None:
        self.message: selection_pb2.SelectResponse | None = None
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._parts: dict[str, list[tuple[int, int]]] = {}  # first byte and the one after the last, by path

    def start(self, message: selection_pb2.SelectResponse) -> None:
        """The result itself."""
        self.message = message
        for path in ("indices", "scores", "pool_scores", "pseudo_labels"):
            tensor = getattr(message, path)
            if tensor.WhichOneof("source") == "streamed":
                self.arrays[path] = np.empty(tuple(tensor.shape), NUMPY[tensor.dtype])
                self._parts[path] = []

    def write(self, part: selection_pb2.Chunk) -> None:
        """A part of one of its tensors; of a tensor that this client does not ask for, nothing."""
        if part.path in self.arrays:
            data, whole = np.frombuffer(part.data, np.uint8), self.arrays[part.path].reshape(-1).view(np.uint8)
            stop = part.offset + len(data)
            if part.offset >= 0 and stop <= len(whole):
                whole[part.offset : stop] = data
                self._parts[part.path].append((part.offset, stop))

    @property
    def complete(self) -> bool:
        """Whether the result and all its parts are here."""
        return self.message is not None and all(
            _joined(parts) == self.arrays[path].nbytes for path, parts in self._parts.items()
        )


def _joined(parts: list[tuple[int, int]]) -> int:
    """The length of parts that follow each other without gap or overlap; -1 where they don't."""
    at = 0
    for start, stop in sorted(parts):
        if start != at:
            return -1
        at = stop
    return at
