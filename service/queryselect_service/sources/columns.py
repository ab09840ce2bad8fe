"""A column of Apache Parquet, or of Arrow's IPC file: numbers, or lists of numbers of one length per row.

pyarrow reads both through an object of which ranges can be read: of Parquet the row groups that have chosen rows, of
Arrow the record batches, in both cases the chosen column alone.
"""

from __future__ import annotations

import io
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import ipc
from pyarrow.parquet import ParquetFile

from queryselect_service.sources.objects import HEADER_BYTES, PIECE_BYTES, Content, Object, Reader, chosen, names_text
from queryselect_service.upload import Bytes

# What is freed goes where all else that is freed goes, and is not kept for more of Arrow's own.
pa.set_memory_pool(pa.system_memory_pool())

DTYPES = {
    "double": torch.float64,
    "float": torch.float32,
    "halffloat": torch.float16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
#: The most entries of a list in a Parquet footer, such as columns: memory is taken for as many as it says there are.
MOST_PARTS = 100_000
#: The bytes at the end of a file that hold the length of its footer, and where it stands there.
_TAIL = 12


def read_parquet(source: Object, column: str | None, rows: tuple[range, ...]) -> Reader:
    """The column, or the only one. Raises Content."""
    return _open(_Parquet, source, column, rows, footer=slice(4, 8))


def read_arrow(source: Object, column: str | None, rows: tuple[range, ...]) -> Reader:
    """The column, or the only one. Raises Content."""
    return _open(_Arrow, source, column, rows, footer=slice(2, 6))


def _open(kind: type[_Column], source: Object, column: str | None, rows: tuple[range, ...], footer: slice) -> Reader:
    tail = source.read(max(0, source.size - _TAIL), source.size)
    if len(tail) < _TAIL or int.from_bytes(tail[footer], "little") > min(HEADER_BYTES, source.size):
        raise Content(f"it is no {kind.name} file that can be read")
    return kind(source, column, rows)


class _Column(ABC):
    """A column as pyarrow reads it: its type, and the stretches of rows that it can be read in."""

    name: str
    ahead = 1  # pyarrow's readers have one position

    def __init__(self, source: Object, column: str | None, rows: tuple[range, ...]) -> None:
        self._source = file = _File(source)
        with _Told(self.name, file):
            schema = self._begin(pa.PythonFile(file, mode="r"))
            names = schema.names
            if column is None and len(names) == 1:
                (column,) = names
            if column is None or names.count(column) != 1:
                raise Content(f"it needs column, the name of one of its {len(names)} columns; {names_text(names)}")
            self._index = names.index(column)
            entry, inner = _entry(schema.field(self._index).type)
            if str(entry) not in DTYPES:
                words = f"{', '.join(DTYPES)}, and lists of them are read"
                raise Content(f"the type of {column!r} is {str(entry)[:80]}; {words}")
            self.dtype = DTYPES[str(entry)]
            lengths = self._lengths()
            if any(length < 0 for length in lengths):
                raise Content("its footer contradicts itself")
            self._stops = list(accumulate(lengths, initial=0))[1:]
            size = sum(lengths)
            self._rows = chosen(rows, (size,))
            if inner is None:  # lists of any length: the first row tells
                inner = (self._first_length(lengths),)
            self._row = inner
        file.left = None  # rows may be asked for again and again
        self.shape = (sum(map(len, self._rows)), *self._row)
        self.extra = self._extra()

    def pieces(self) -> Iterator[Callable[[], Bytes]]:
        """See Reader."""
        step = max(1, PIECE_BYTES // max(1, math.prod(self._row) * self.dtype.itemsize))
        found = self._flat(step)
        return repeat(lambda: next(found, np.empty(0, np.uint8)))

    def _flat(self, step: int) -> Iterator[Bytes]:
        """The elements of the chosen rows, some rows at a time."""
        for rows in self._rows:
            group = bisect_right(self._stops, rows.start)
            while group < len(self._stops) and (first := self._stops[group - 1] if group else 0) < rows.stop:
                at = first
                with _Told(self.name, self._source):
                    for batch in self._valid(group, step):
                        start, stop = max(rows.start - at, 0), min(rows.stop - at, batch.num_rows)
                        for begin in range(start, stop, step):
                            yield self._elements(batch.column(0), at, begin, min(begin + step, stop))
                        at += batch.num_rows
                group += 1

    def _valid(self, group: int, step: int) -> Iterator[Any]:
        """The column's rows of a group, some at a time; those that contradict themselves would end the process."""
        for batch in self._batches(group, step):
            batch.validate(full=True)
            yield batch

    def _elements(self, array: Any, at: int, start: int, stop: int) -> Bytes:
        """Rows [start, stop) of a batch, whose first row is `at`, flat."""
        array = array.slice(start, stop - start)
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        while pa.types.is_nested(array.type):
            width = _width(array.type)
            if array.null_count:
                raise Content(f"row {at + start} or one after it is null")
            if width is None:
                odd = np.flatnonzero(np.diff(array.offsets.to_numpy()) != self._row[0])
                if len(odd):
                    row, size = at + start + int(odd[0]), len(array[int(odd[0])])
                    raise Content(f"row {row} has {size} entries, and the first row {self._row[0]}")
            array = array.flatten()
        if array.null_count:
            raise Content(f"row {at + start} or one after it has null entries")
        return np.ascontiguousarray(array.to_numpy(zero_copy_only=False)).view(np.uint8)

    def _first_length(self, lengths: list[int]) -> int:
        """The entries of the first row."""
        group = next((at for at, length in enumerate(lengths) if length), None)
        if group is None:
            return 0
        batch = next(self._valid(group, 1), None)
        if batch is None or not batch.num_rows:
            raise Content("its footer contradicts itself")
        first = batch.column(0)[0]
        return len(first) if first.is_valid else 0

    @abstractmethod
    def _begin(self, file: Any) -> Any:
        """Opens the file; its schema."""

    @abstractmethod
    def _lengths(self) -> list[int]:
        """The rows of every group, or batch."""

    @abstractmethod
    def _batches(self, group: int, step: int) -> Iterator[Any]:
        """The column's rows of a group, some at a time."""

    @abstractmethod
    def _extra(self) -> int:
        """The bytes that reading takes beside the pieces."""


class _Parquet(_Column):
    name = "Parquet"

    def _begin(self, file: Any) -> Any:
        # Buffered: a column of a group is not read in whole.
        self._file = ParquetFile(
            file,
            buffer_size=1 << 20,
            pre_buffer=False,
            thrift_string_size_limit=HEADER_BYTES,
            thrift_container_size_limit=MOST_PARTS,
        )
        return self._file.schema_arrow

    def _lengths(self) -> list[int]:
        meta = self._file.metadata
        return [meta.row_group(each).num_rows for each in range(meta.num_row_groups)]

    def _batches(self, group: int, step: int) -> Iterator[Any]:
        name = self._file.schema_arrow.names[self._index]
        return iter(self._file.iter_batches(step, row_groups=[group], columns=[name], use_threads=False))

    def _extra(self) -> int:
        return 4 * PIECE_BYTES  # a page, its dictionary, and what they become


class _Arrow(_Column):
    name = "Arrow"

    def _begin(self, file: Any) -> Any:
        self._file = file
        self._every = ipc.open_file(file)
        if any(map(_has_dictionary, self._every.schema.types)):  # all are read, whatever column is, and kept
            raise Content("it has columns of categories (dictionaries), which are read from Parquet only")
        return self._every.schema

    def _lengths(self) -> list[int]:
        """Batches tell their rows when they are read: in the narrowest column, which the file does not say without."""
        schema = self._every.schema
        narrowest = min(range(len(schema.names)), key=lambda at: _bits(schema.field(at).type))
        reader = self._of(narrowest)
        return [reader.get_batch(each).num_rows for each in range(self._every.num_record_batches)]

    def _of(self, index: int) -> Any:
        options = ipc.IpcReadOptions(included_fields=[index], use_threads=False)
        return ipc.open_file(self._file, options=options)

    def _batches(self, group: int, step: int) -> Iterator[Any]:  # noqa: ARG002  # a batch is read as a whole
        yield self._of(self._index).get_batch(group)

    def _extra(self) -> int:
        longest = max((stop - start for start, stop in zip([0, *self._stops], self._stops, strict=False)), default=0)
        return 2 * longest * math.prod(self._row) * self.dtype.itemsize  # as it is stored, and decompressed


class _Told:
    """Turns what pyarrow raises of a file's content into Content."""

    _errors = (pa.ArrowException, ValueError, OSError, KeyError, IndexError)

    def __init__(self, name: str, file: _File) -> None:
        self._name, self._file = name, file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not isinstance(error, self._errors):
            return
        failed, self._file.failed = self._file.failed, None
        if failed is not None:  # of which pyarrow has made an error of its own
            raise failed from None
        raise Content(f"it is no {self._name} file that can be read: {str(error)[:200]}") from None


def _entry(kind: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The type of a column's entries, and the shape of a row: None where rows of lists have lengths of their own."""
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            raise Content("its tensors are permuted; save them in the order of their dimensions")
        return kind.value_type, tuple(kind.shape)
    shape: tuple[int, ...] = ()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return kind.value_type, None
    while pa.types.is_fixed_size_list(kind):
        shape, kind = (*shape, kind.list_size), kind.value_type
    return kind, shape


def _has_dictionary(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    inner = (kind.field(at).type for at in range(kind.num_fields))
    return bool(pa.types.is_dictionary(kind)) or any(map(_has_dictionary, inner))


def _width(kind: Any) -> int | None:
    return getattr(kind, "list_size", None)


def _bits(kind: Any) -> float:
    try:
        return float(kind.bit_width)
    except ValueError:
        return math.inf


class _File(io.RawIOBase):
    """An object as Python's files are, for pyarrow.

    left: the bytes that may still be read, None: any number. A footer may name one place of the file a thousand times;
    what is read of an honest one until its rows are known is its footer, twice, and everything else at most once.
    """

    def __init__(self, source: Object) -> None:
        super().__init__()
        self._source, self._at = source, 0
        self.left: int | None = 3 * source.size + _TAIL
        self.failed: Exception | None = None  # why it could not be read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._at, self._source.size)[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._source.size if size is None or size < 0 else min(self._at + size, self._source.size)
        try:
            data = self._take(stop)
        except Exception as error:
            self.failed = error
            raise
        self._at += len(data)
        return data

    def _take(self, stop: int) -> bytes:
        if self.left is not None:
            self.left -= max(0, stop - self._at)
            if self.left < 0:
                raise Content("its footer names the same bytes again and again")
        return self._source.read(self._at, stop) if self._at < stop else b""
