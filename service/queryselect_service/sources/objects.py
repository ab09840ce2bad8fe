"""What every scheme and every format know of each other."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Protocol

import torch

from queryselect_service.errors import ObjectChanged
from queryselect_service.upload import Bytes

Piece = bytes | Bytes

#: The bytes that are read of an object when it is opened: most headers are within.
HEAD_BYTES = 64 << 10
#: The bytes that are read at a time, and how many such reads of one tensor are under way.
PIECE_BYTES, AHEAD = 4 << 20, 4
#: The most bytes that a header may have: a format's own, of any number of tensors.
HEADER_BYTES = 4 << 20


class Object(Protocol):
    """One version of an object, of which ranges can be read, by several threads at a time."""

    size: int
    version: str  # its etag; of a file, what changes with it; empty where there is none

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), all of them. Raises ServiceError, ObjectChanged where it is another version now."""
        ...


class Remote(ABC):
    """An object whose first bytes are kept: that they come tells its size and its version, and headers are there."""

    size: int
    version: str

    def __init__(self) -> None:
        self._head = self._get(0, HEAD_BYTES)

    def read(self, start: int, stop: int) -> bytes:
        """See Object."""
        return self._head[start:stop] if stop <= len(self._head) else self._get(start, stop)

    @abstractmethod
    def _get(self, start: int, stop: int) -> bytes:
        """Those of the bytes [start, stop) that there are, from where the object is."""


class Reader(Protocol):
    """A tensor in an object. ahead: how many pieces may be read at a time. extra: bytes that reading takes besides."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    ahead: int
    extra: int

    def pieces(self) -> Iterator[Callable[[], Piece]]:
        """What reads the tensor's bytes, piece by piece, in their order."""
        ...


class Content(Exception):
    """The object is not what its format says. The caller's fault, as far as the server can tell: told with its path."""


class Stretches:
    """A tensor whose rows stand one after the other in the object, from a byte on."""

    ahead, extra = AHEAD, 0

    def __init__(
        self, source: Object, dtype: torch.dtype, shape: tuple[int, ...], start: int, rows: tuple[range, ...]
    ) -> None:
        """shape: of all rows in the object. rows: those that are taken; none: all."""
        self._source, self._start, self.dtype = source, start, dtype
        if not all(0 <= size < 1 << 63 for size in shape):
            raise Content("its shape can't be")
        row = math.prod(shape[1:]) * dtype.itemsize
        if start + row * math.prod(shape[:1]) > source.size:
            raise Content("it ends before its last row")
        rows = chosen(rows, shape)
        self.shape = (sum(map(len, rows)), *shape[1:]) if shape else shape
        self._spans = [(start + row * each.start, start + row * each.stop) for each in rows] or [(start, start + row)]

    def pieces(self) -> Iterator[Callable[[], bytes]]:
        """See Reader."""
        for first, last in self._spans:
            for start in range(first, last, PIECE_BYTES):
                yield _Read(self._source, start, min(start + PIECE_BYTES, last))


class _Read:
    def __init__(self, source: Object, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop

    def __call__(self) -> bytes:
        return self._source.read(self._start, self._stop)


def chosen(rows: tuple[range, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    """The rows that are taken of a tensor of that shape. Raises Content where it does not have them."""
    if not shape:
        if rows:
            raise Content("a scalar has no rows to choose from")
        return ()
    for each in rows:
        if each.stop > shape[0]:
            raise Content(f"it has {shape[0]} rows; rows {each.start} to {each.stop} are asked for")
    return rows or (range(shape[0]),)


def names_text(names: Collection[str]) -> str:
    """The names of an object's tensors, as messages write them: a few."""
    return f"there are {', '.join(sorted(names)[:8])}{'…' if len(names) > 8 else ''}"


def check_version(found: str, wanted: str | None) -> None:
    """Raises ObjectChanged where an object's version is another than the one wanted. Quotes of etags don't count."""
    if wanted is not None and bare(wanted) != found:
        raise ObjectChanged(f"it has version {found!r} and not {wanted!r}" if found else "it has no version to go by")


def bare(etag: str) -> str:
    """A version without the quotes that HTTP puts around it. What is only weakly the same (W/) stays as it is."""
    return etag[1:-1] if len(etag) > 1 and etag[0] == etag[-1] == '"' else etag
