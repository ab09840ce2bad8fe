"""A request's references become the parts of an upload.

Requirements that the design meets:

- All addresses are held against the allow-list before anything is opened, and objects are opened before the request is
  checked: their headers tell types and shapes. Elements are read once the request has its place and its memory.
- Threads of their own read, several pieces ahead. Who waits for them looks now and then whether the caller is there.
- One object is one version, for all tensors that are read from it, from its header to its last byte.
- Rows of the pool's tensors come side by side, in steps, as a client would send them: a strategy that scores rows one
  by one never holds the pool.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch

from queryselect_service.call import Call
from queryselect_service.checks import Array, Source, shape_text, type_name
from queryselect_service.engine import POLL
from queryselect_service.errors import (
    InvalidInput,
    OverLimit,
    PermissionDenied,
    ServiceError,
    SourceRefused,
    SourceUnavailable,
    Unsupported,
)
from queryselect_service.request import Request
from queryselect_service.settings import Settings
from queryselect_service.sources.address import Address, Allowed, parse
from queryselect_service.sources.objects import PIECE_BYTES, Content, Object, Piece, Reader, check_version
from queryselect_service.threads import started
from queryselect_service.upload import Part

Result = TypeVar("Result")
#: What reads a header: of an object, the column's name, and the rows that are taken.
Read = Callable[[Object, str | None, tuple[range, ...]], Reader]

#: Threads that read from one store, for all requests together.
THREADS = 16
#: The bytes that are handed on at a time.
PART_BYTES = 1 << 20
#: Formats: the suffixes that tell them, the module and the function that read a header.
FORMATS = {
    "NPY": ((".npy",), "npy", "read"),
    "SAFETENSORS": ((".safetensors",), "safetensors", "read"),
    "PARQUET": ((".parquet",), "columns", "read_parquet"),
    "ARROW": ((".arrow", ".feather"), "columns", "read_arrow"),
}
_PACKAGE = "queryselect_service.sources"

log = logging.getLogger(__name__)


class Sources:
    """Where a server's requests may read from."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError where the allow-list can't be read or served."""
        self._allowed, self._most = Allowed(settings.allow_uris), settings.max_sources
        for scheme in self._allowed.schemes:
            try:
                import_module(f"{_PACKAGE}.{scheme}")
            except ImportError as error:
                words = f'{scheme}:// needs {error.name}: pip install "queryselect[references]"'
                raise ValueError(f"allow_uris: {words}") from None
        # A store that does not answer keeps nobody from the others.
        self._threads = {store: ThreadPoolExecutor(THREADS, f"fetch-{store}") for store in self._allowed.stores}

    @property
    def schemes(self) -> list[str]:
        """The schemes of addresses that may be read."""
        return self._allowed.schemes

    def begin(self) -> None:
        """Starts the threads; else they start when they are needed, and one day there may be none left."""
        for store in self._threads:
            self._threads[store] = started(THREADS, f"fetch-{store}")

    def close(self) -> None:
        """Lets the threads go home."""
        for each in self._threads.values():
            each.shutdown(wait=False)

    def fetch(self, request: Request, call: Call) -> Fetch:
        """What there is to read for a request, allowed. Nothing is opened yet.

        Raises PermissionDenied for an address that is not allowed, OverLimit for too many; InvalidInput or Unsupported
        for a format.
        """
        arrays = [array for array in request.arrays if array.source is not None]
        if len(arrays) > self._most:
            raise OverLimit("tensors by reference", len(arrays), self._most, name="max_sources")
        return Fetch(request, call, [self._place(array) for array in arrays])

    def _place(self, array: Array) -> Place:
        address, prefix = self._allow(array)
        return Place(array, address, prefix, _format(array), self._threads[address.store])

    def _allow(self, array: Array) -> tuple[Address, Address]:
        """The address that an array is read from, and the prefix that allows it."""
        try:
            address = parse(_source(array).uri)
        except ValueError as error:
            words = f"{array.path} may not be read from that address: {error}"
            raise PermissionDenied(words, field=array.path) from None
        prefix = self._allowed.prefix_of(address)
        if prefix is None:
            known = "the operator has allowed none" if not self.schemes else "it is not below one that is allowed"
            raise PermissionDenied(f"{array.path} may not be read from that address: {known}", field=array.path)
        return address, prefix


@dataclass(frozen=True)
class Place:
    """Where an array is read from: an address, the prefix that allows it, what reads its format, and which threads."""

    array: Array
    address: Address
    prefix: Address
    read: Read
    threads: Executor


class Fetch:
    """The tensors of one request that are read by reference. True where there are any."""

    def __init__(self, request: Request, call: Call, places: Sequence[Place]) -> None:
        self._request, self._call = request, call
        self._places = {each.array.path: each for each in places}
        self._readers: dict[str, Reader] = {}
        self._feeds: list[_Feed] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def __contains__(self, path: str) -> bool:
        return path in self._readers

    def open(self) -> None:
        """Opens every object, once, and tells the request's arrays their types and shapes. Raises ServiceError."""
        opened: dict[Address, Future[Object]] = {}
        for each in self._places.values():
            if each.address not in opened:
                begun = each.threads.submit(_open, each.address, each.prefix, self._call.check)
                opened[each.address] = begun
        for each in self._places.values():
            array, source = each.array, _source(each.array)
            found = self._wait(opened[each.address], array)
            begun_header = each.threads.submit(_header, found, source, each.read)
            reader = self._readers[array.path] = self._wait(begun_header, array)
            asked, there = (source.dtype, source.shape), (reader.dtype, reader.shape)
            array.dtype, array.shape = asked[0] or there[0], asked[1] or there[1]
            source.version = found.version
            if array.dtype is not there[0] or _rows_of(array.shape) != _rows_of(there[1]):
                words = f"{_described(array.dtype, array.shape)}, as the request says; there is {_described(*there)}"
                raise InvalidInput(f"{array.path} needs {words}", field=array.path)

    @property
    def total(self) -> int:
        """The bytes that will be read."""
        return sum(array.nbytes for array in self._arrays)

    @property
    def held_bytes(self) -> int:
        """The bytes that reading takes, beside the tensors themselves."""
        return sum(
            min((reader.ahead + 1) * PIECE_BYTES, array.nbytes) + reader.extra
            for array in self._arrays
            for reader in [self._readers[array.path]]
        )

    @property
    def _arrays(self) -> list[Array]:
        """What is read: not what no strategy looks at."""
        unused = {array.path for array in self._request.unused}
        return [each for each in self._request.arrays if each.path in self._readers and each.path not in unused]

    def parts(self) -> Iterator[Part]:
        """The parts, of tensors that are not the pool's rows first. Raises ServiceError."""
        rows = [array for array in self._arrays if array.per_row]
        for array in self._arrays:
            if not array.per_row:
                yield from self._feed(array).take(array.nbytes)
        if not rows:
            return
        widths = [array.nbytes // array.shape[0] for array in rows]
        step, feeds = max(1, PART_BYTES // max(1, *widths)), [self._feed(array) for array in rows]
        size = max(array.shape[0] for array in rows)
        for start in range(0, size, step):
            for array, width, feed in zip(rows, widths, feeds, strict=True):
                yield from feed.take(max(0, min(step, array.shape[0] - start)) * width)

    def close(self) -> None:
        """Reads no more, and lets go of what is read: feeds and this hold each other."""
        for each in self._feeds:
            each.close()
        self._feeds.clear()

    def _wait(self, future: Future[Result], array: Array) -> Result:
        """What a reading thread found. Raises ServiceError, of the array; Cancelled where the caller has gone."""
        while not future.done():
            self._call.check()
            wait([future], POLL)
        try:
            return future.result()
        except Content as error:
            raise InvalidInput(f"{array.path}, read by reference: {error}", field=array.path) from None
        except ServiceError as error:
            self._call.check()
            if isinstance(error, SourceRefused | SourceUnavailable):  # the operator's to mend
                log.warning("reading from %s fails: %s", self._places[array.path].prefix, error.message)
            error.message, error.field = f"{array.path}, read by reference: {error.message}", array.path
            raise

    def _piece(self, future: Future[Piece], array: Array) -> Piece:
        piece = self._wait(future, array)
        self._call.fetched += len(piece)
        return piece

    def _feed(self, array: Array) -> _Feed:
        threads = self._places[array.path].threads
        feed = _Feed(array, self._readers[array.path], threads, lambda future: self._piece(future, array))
        self._feeds.append(feed)
        return feed


class _Feed:
    """One tensor's bytes on their way: some pieces are read ahead."""

    def __init__(self, array: Array, reader: Reader, threads: Executor, wait: Callable[[Future[Piece]], Piece]) -> None:
        self._path, self._threads, self._wait, self._offset = array.path, threads, wait, 0
        self._todo, self._ahead = reader.pieces(), reader.ahead
        self._coming: deque[Future[Piece]] = deque()
        self._piece = memoryview(b"")

    def take(self, size: int) -> Iterator[Part]:
        """The next so many bytes."""
        while size:
            if not self._piece:
                self._read_ahead()
                piece: Any = self._wait(self._coming.popleft()) if self._coming else b""
                self._piece = memoryview(piece)
                self._read_ahead()
            if not self._piece:
                raise InvalidInput(f"{self._path}, read by reference: it ends before its last row", field=self._path)
            data, self._piece = self._piece[: min(size, PART_BYTES)], self._piece[min(size, PART_BYTES) :]
            yield Part(self._path, self._offset, data)
            self._offset += len(data)
            size -= len(data)

    def close(self) -> None:
        """Reads no more."""
        for each in self._coming:
            each.cancel()

    def _read_ahead(self) -> None:
        for work in itertools.islice(self._todo, self._ahead - len(self._coming)):
            self._coming.append(self._threads.submit(work))


def _source(array: Array) -> Source:
    assert array.source is not None  # it is read by reference
    return array.source


def _format(array: Array) -> Read:
    """What reads the header of the array's object. Raises InvalidInput, Unsupported."""
    source = _source(array)
    told = (name for name, (suffixes, *_) in FORMATS.items() if source.uri.endswith(suffixes))
    name = source.format or next(told, "")
    if not name:
        known = ", ".join(suffix for suffixes, *_ in FORMATS.values() for suffix in suffixes)
        words = f"{array.path} needs a format: its address ends with none of {known}"
        raise InvalidInput(words, field=f"{array.path}.ref.format")
    _, module, function = FORMATS[name]
    try:
        found: Read = getattr(import_module(f"{_PACKAGE}.{module}"), function)
    except ImportError as error:
        raise Unsupported(f"{name} needs {error.name}, which this server does not have", field=array.path) from None
    return found


def _open(address: Address, prefix: Address, check: Callable[[], None]) -> Object:
    found: Object = import_module(f"{_PACKAGE}.{address.scheme}").open_object(address, prefix, check)
    return found


def _header(found: Object, source: Source, read: Read) -> Reader:
    check_version(found.version, source.version)
    return read(found, source.column, source.rows)


def _rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What must agree of two shapes: the rows, and the entries of a row."""
    return (*shape[:1], math.prod(shape[1:]))


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{type_name(dtype)} {shape_text(shape)}"
