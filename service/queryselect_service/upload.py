"""The chunks of a stream become tensors.

Requirements that the design meets:

- Chunks may come in any size and any order; none may overlap, and none may be missing in the end.
- One buffer per tensor, made before the first byte comes: a chunk's bytes are copied once, to where they belong.
- Rows of a strategy that scores them one by one go into blocks instead, which are handed out when they are full and
  used again: the pool is never held. Blocks that chunks out of order leave half full count as memory like any other.
- Values are checked as they come: in the order of the rows, or of blocks in the order in which they are full. Lists of
  rows must be here before the first row is looked at, because excluded rows may hold anything.
"""

from __future__ import annotations

import math
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from queryselect_service.checks import Array, elements
from queryselect_service.errors import DataLoss, InvalidInput
from queryselect_service.request import Request
from queryselect_service.strategy import block_rows

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

#: Blocks of rows that an upload in order needs at the most: arriving, ready, and being scored.
WINDOW = 8
#: Rows whose values are looked at together at the least: those of a chunk, while they are in the cache.
CHECK_ROWS = 256


@dataclass(frozen=True)
class Part:
    """A chunk as it came: the tensor's path, the position of the first byte, the bytes, and their CRC-32 if sent."""

    path: str
    offset: int
    data: memoryview
    crc32: int | None = None


class Coverage:
    """Which bytes of a tensor are here: stretches without overlap, in order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0

    def add(self, start: int, stop: int) -> bool:
        """Notes [start, stop). False, and nothing noted, where some of it is here already."""
        at = bisect_right(self._starts, start)
        before = self._stops[at - 1] if at else -1  # where the stretch before it ends
        after = self._starts[at] if at < len(self._starts) else math.inf  # and the one after it begins
        if before > start or after < stop:
            return False
        self.total += stop - start
        joins_before, joins_after = before == start, after == stop
        if joins_before and joins_after:
            self._stops[at - 1] = self._stops.pop(at)
            del self._starts[at]
        elif joins_before:
            self._stops[at - 1] = stop
        elif joins_after:
            self._starts[at] = start
        else:
            self._starts.insert(at, start)
            self._stops.insert(at, stop)
        return True

    @property
    def prefix(self) -> int:
        """The number of bytes at the beginning that are here without a gap."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0


class Upload:
    """The tensors of one stream that are still to come."""

    def __init__(
        self, request: Request, reserve: Callable[[int], None], check: Callable[[], None] = lambda: None
    ) -> None:
        """reserve: sets more memory aside; may raise. check: called between blocks of values; may raise."""
        self._request, self._look = request, check
        unread = {array.path for array in request.unused if array.source is not None}
        coming = (array for array in request.arrays if array.data is None and array.path not in unread)
        self._expected = {array.path: array for array in coming}
        self._coverage = {path: Coverage() for path in self._expected}
        by_block = {array.key: array for array in self._expected.values() if in_blocks(request, array)}
        self.blocks = Blocks(by_block, request.size, reserve, widest=_widest(request))
        apart = {array.path for array in (*request.unused, *by_block.values())}
        self._buffers = {path: _bytes(array.nbytes) for path, array in self._expected.items() if path not in apart}
        # What must be here before rows can be looked at: lists of rows, and inputs that are not per row.
        self._first = {path for path in self._buffers if not self._expected[path].per_row}
        # What is here and could not be looked at before.
        self._late = [array for array in request.read if array.data is not None and not request.checkable(array)]
        # Rows whose values were looked at.
        self._checked = {array.path: 0 for array in request.read if array.path in self._buffers and array.per_row}

        for path, array in self._expected.items():
            if not array.nbytes:
                self._complete(path)

    @property
    def total(self) -> int:
        """The bytes that will come."""
        return sum(array.nbytes for array in self._expected.values())

    @property
    def received(self) -> int:
        """The bytes that have come."""
        return sum(each.total for each in self._coverage.values())

    def write(self, part: Part) -> None:
        """Takes a chunk. Raises InvalidInput where it can't belong here, DataLoss where its bytes were changed."""
        array, size = self._expected.get(part.path), len(part.data)
        if array is None:
            known = ", ".join(self._expected) or "none"
            raise InvalidInput(f"there is a chunk of {part.path!r}; streamed are: {known}", field=part.path)
        stop = part.offset + size
        if part.offset < 0 or stop > array.nbytes:
            raise InvalidInput(
                f"{part.path} has {array.nbytes} bytes; there is a chunk of bytes {part.offset} to {stop}",
                field=part.path,
            )
        if part.crc32 is not None and zlib.crc32(part.data) != part.crc32:
            raise DataLoss(f"bytes {part.offset} to {stop} of {part.path} changed on their way: the CRC-32 is another")
        if not size:
            return
        if not self._coverage[part.path].add(part.offset, stop):
            raise InvalidInput(f"bytes {part.offset} to {stop} of {part.path} came before", field=part.path)
        data = np.frombuffer(part.data, np.uint8)
        if part.path in self._buffers:
            self._buffers[part.path][part.offset : stop] = data
            if self._coverage[part.path].total == array.nbytes:
                self._complete(part.path)
        elif in_blocks(self._request, array):
            self.blocks.write(array.key, part.offset, data)
        self._check()

    def finish(self) -> None:
        """The client has sent everything.

        Raises DataLoss where something is missing, InvalidInput for what is wrong with a tensor as a whole.
        """
        for path, array in self._expected.items():
            missing = array.nbytes - self._coverage[path].total
            if missing:
                raise DataLoss(f"{missing} of {array.nbytes} bytes of {path} did not come")
        self._check()
        self._request.check_weights()

    def _complete(self, path: str) -> None:
        """A tensor that is held as a whole is here."""
        array, buffer = self._expected[path], self._buffers.get(path)
        if buffer is None:
            return
        array.data = elements(path, buffer, array.dtype, array.shape)
        if path in self._first:
            self._first.remove(path)
            if array.letters:
                self._request.check_values(array, array.data, 0, self._look)
            else:
                self._request.check_rows()

    def _check(self) -> None:
        """Looks at the values of rows that are complete, in order, and hands out full blocks."""
        if self._first:
            return
        while self._late:
            array = self._late.pop(0)
            assert array.data is not None  # or it would not stand there
            self._request.check_values(array, array.data, 0, self._look)
        for path, checked in self._checked.items():
            array = self._expected[path]
            rows = self._coverage[path].prefix // _row_bytes(array)
            if rows < array.shape[0]:
                rows -= rows % CHECK_ROWS
            if rows > checked:
                span = slice(checked * _row_bytes(array), rows * _row_bytes(array))
                data = elements(path, self._buffers[path][span], array.dtype, (rows - checked, *array.shape[1:]))
                self._request.check_values(array, data, checked, self._look)
                self._checked[path] = rows
        while self.blocks.full:
            block = self.blocks.full.popleft()
            for name, data in block.tensors.items():
                self._request.check_values(self._request.inputs[name], data, block.rows.start, self._look)
            self.blocks.ready.append(block)


def in_blocks(request: Request, array: Array) -> bool:
    """Whether a streamed tensor is looked at block by block and never held."""
    read = array.key in request.used and array.per_row
    return read and array.data is None and (request.strategy.pointwise or request.validate_only)


def held_bytes(request: Request) -> int:
    """The host memory of a request's tensors while they come and after, in bytes, if their chunks come in order."""
    held, row = 0, 0
    dropped = {array.path for array in request.unused if array.data is None}  # as it comes: nobody reads it
    for array in request.arrays:
        if in_blocks(request, array):
            row += _row_bytes(array)
        elif array.path not in dropped:
            held += array.nbytes
    return held + WINDOW * block_rows(_widest(request)) * row


def _widest(request: Request) -> int:
    """The entries of a row of the widest input: blocks are the same however the rows came."""
    arrays = (request.inputs[name] for name in request.used if request.inputs[name].per_row)
    return max((_row_bytes(array) // array.dtype.itemsize for array in arrays), default=1)


@dataclass
class Block:
    """A stretch of a pool's rows: (b, ...) tensors by input. left: bytes still to come."""

    rows: slice
    buffers: dict[str, Bytes]
    left: int
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Blocks:
    """Rows on their way, in blocks of the size that is scored at once. full: not looked at yet; ready: to be scored."""

    def __init__(
        self,
        arrays: dict[str, Array],
        size: int,
        reserve: Callable[[int], None],
        *,
        widest: int = 1,
    ) -> None:
        """widest: entries of a row of another input that is scored together with these."""
        self._arrays, self._size, self._reserve = arrays, size, reserve
        self._row_bytes = {name: _row_bytes(array) for name, array in arrays.items()}
        entries = (_row_bytes(array) // array.dtype.itemsize for array in arrays.values())
        self.rows = block_rows(max(widest, *entries, 1))
        self.full: deque[Block] = deque()
        self.ready: deque[Block] = deque()
        self._open: dict[int, Block] = {}
        self._free: list[dict[str, Bytes]] = []
        self._alive, self._allowed = 0, WINDOW

    def write(self, name: str, offset: int, data: Bytes) -> None:
        """Takes bytes of an input. Raises what `reserve` raises where they are too far out of order."""
        width = self._row_bytes[name] * self.rows
        while len(data):
            number, at = divmod(offset, width)
            block = self._open.get(number) or self._begin(number)
            some = data[: width - at]
            block.buffers[name][at : at + len(some)] = some
            block.left -= len(some)
            if not block.left:
                self._end(self._open.pop(number))
            data, offset = data[len(some) :], offset + len(some)

    def give_back(self, block: Block) -> None:
        """The block's rows are scored; its buffers may be used again."""
        self._alive -= 1
        self._free.append(block.buffers)

    def _begin(self, number: int) -> Block:
        if self._alive == self._allowed:
            self._reserve(self.rows * sum(self._row_bytes.values()))
            self._allowed += 1
        buffers = (
            self._free.pop()
            if self._free
            else {name: _bytes(self.rows * each) for name, each in self._row_bytes.items()}
        )
        start = number * self.rows
        stop = min(start + self.rows, self._size)
        self._alive += 1
        self._open[number] = block = Block(slice(start, stop), buffers, (stop - start) * sum(self._row_bytes.values()))
        return block

    def _end(self, block: Block) -> None:
        rows = block.rows.stop - block.rows.start
        for name, array in self._arrays.items():
            used = block.buffers[name][: rows * self._row_bytes[name]]
            block.tensors[name] = elements(array.path, used, array.dtype, (rows, *array.shape[1:]))
        self.full.append(block)


def _row_bytes(array: Array) -> int:
    return array.nbytes // array.shape[0]


def _bytes(size: int) -> Bytes:
    return np.empty(size, np.uint8)
