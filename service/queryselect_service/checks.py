"""Single checks at the door: a tensor's type and shape, a list of rows, the values of an input.

Messages say what is needed, its shape, and what came; the first bad row is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from queryselect_service.errors import InvalidInput

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
#: Lists that no row may share.
DISJOINT = (("labeled", "pending", "excluded"), ("candidates", "pending", "excluded"))
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
#: Numbers per row that can't be negative.
MASSES = ("costs", "weights")
#: Rows whose values are checked at once.
BLOCK_ROWS = 4096
#: How far probabilities may be from a sum of 1: in general, and in bfloat16.
SUM_TOLERANCE, COARSE_SUM_TOLERANCE = 1e-3, 1e-2
#: The same where logarithms were sent, whose rounding counts by their size: that of -10, say, at half precision.
LOG_SUM_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: The rules that samples of each kind are held to.
SAMPLES_RULES = {"LOG_PROBABILITIES": "log_probabilities", "LOGITS": "logits"}


@dataclass
class Source:
    """Where a tensor is read from. dtype, shape: what the request says of it, where it does.

    format: such as NPY; empty where the address tells. rows: those that are taken, in this order; none: all. version:
    the one that must be found, and once opened the one that is read.
    """

    uri: str
    format: str
    column: str | None
    rows: tuple[range, ...]
    version: str | None
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None


@dataclass
class Array:
    """A tensor of the request: its path, its type and shape, and its elements once they are here.

    letters: what its dimensions are, such as "N D", where they are those of every such tensor. kind: of samples, what
    they are. source: where it is read from; until that is open, type and shape say nothing.
    """

    path: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Tensor | None = None
    letters: str = ""
    kind: str = ""
    source: Source | None = None

    @property
    def key(self) -> str:
        """Its path without what it belongs to: embeddings, scales[0].gradients."""
        return self.path.partition(".")[2]

    @property
    def name(self) -> str:
        """The last part of its path: what it is."""
        return self.path.rpartition(".")[2]

    @property
    def per_row(self) -> bool:
        """Whether it has an entry per row of the pool, or per item where these are others."""
        return self.letters.startswith(("N", "I"))

    @property
    def unit(self) -> str:
        """What it has an entry of: row or item."""
        return "item" if self.letters.startswith("I") else "row"

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def described(self) -> str:
        """Its name and shape for messages: `embeddings (1797 64)`."""
        return f"{self.name} {shape_text(self.shape)}"


def check_request_id(given: str) -> None:
    """Raises InvalidInput for an id that could not stand in metadata and in logs; none is fine."""
    if given and not REQUEST_ID.fullmatch(given):
        raise InvalidInput("request_id needs 1 to 128 printable ASCII characters; it has others", field="request_id")


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as messages write it: (1797 64)."""
    return f"({' '.join(map(str, shape))})"


def type_name(dtype: torch.dtype) -> str:
    """A type as messages write it: float32."""
    return str(dtype).removeprefix("torch.")


def unify(array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    """Holds the array's shape against its letters, and against what is known of them.

    sizes: letter -> its size and the path that first told it; new letters are added.
    """
    letters, names = array.letters, array.letters.split()
    if len(array.shape) != len(names):
        raise InvalidInput(f"{array.path} needs shape ({letters}); it has {shape_text(array.shape)}", field=array.path)
    for letter, size in zip(names, array.shape, strict=True):
        if size < 1:
            raise InvalidInput(
                f"{array.path} needs shape ({letters}) with {letter} at least 1; it has {shape_text(array.shape)}",
                field=array.path,
            )
        known, teller = sizes.setdefault(letter, (size, array.path))
        if size != known:
            raise InvalidInput(
                f"{array.path} needs shape ({letters}) with {letter} = {known} as in {teller}; "
                f"it has {shape_text(array.shape)}",
                field=array.path,
            )


def check_type(array: Array, allowed: tuple[torch.dtype, ...]) -> None:
    """Raises InvalidInput where the array's type is not one of `allowed`."""
    if array.dtype not in allowed:
        names = " or ".join(type_name(each) for each in allowed)
        raise InvalidInput(f"{array.path} needs type {names}; it has {type_name(array.dtype)}", field=array.path)


def row_list(array: Array, data: Tensor, size: int, unit: str = "row") -> Tensor:
    """The rows (r,) that a boolean mask (size,) or integer indices name, ascending, int64. unit: what rows are called.

    Raises InvalidInput for a mask of another length, a row out of range, or one listed twice.
    """
    if array.dtype is torch.bool:
        if len(data) != size:
            raise InvalidInput(f"{array.path} needs a mask of shape ({size}); it has ({len(data)})", field=array.path)
        return data.nonzero().squeeze(1)
    rows = data.long().sort().values
    if len(rows):
        for row in (int(rows[0]), int(rows[-1])):
            if not 0 <= row < size:
                words = f"{array.path} lists {unit} {row}; {unit}s are 0 to {size - 1}"
                raise InvalidInput(words, field=array.path)
    _refuse_twice(rows, f"{array.path} lists {unit} {{}} twice", array.path)
    return rows


def check_disjoint(rows: dict[str, Tensor], unit: str = "row") -> None:
    """Raises InvalidInput where a row stands in two lists that exclude each other. unit: what rows are called."""
    for names in DISJOINT:
        lists = [(name, rows[name]) for name in names if name in rows]
        for at, (name, mine) in enumerate(lists):
            for other, theirs in lists[:at]:
                both = torch.cat([mine, theirs]).sort().values
                _refuse_twice(both, f"pool.{other} and pool.{name} both list {unit} {{}}", f"pool.{name}")


def _refuse_twice(rows: Tensor, message: str, path: str) -> None:
    """rows: ascending."""
    twice = rows[1:][rows[1:] == rows[:-1]]
    if len(twice):
        raise InvalidInput(message.format(int(twice[0])), field=path)


def elements(path: str, data: np.ndarray[Any, Any], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor at `path` as a view of its bytes, an array of any shape and type.

    Raises InvalidInput for truth values that are neither 0 nor 1.
    """
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    flat = data.reshape(-1).view(np.uint8)
    if dtype is torch.bool and flat.max() > 1:
        raise InvalidInput(f"{path} needs truth values of 0 or 1; it has others", field=path)
    return torch.from_numpy(flat).view(dtype).reshape(shape)


def check_values(
    array: Array,
    data: Tensor,
    *,
    first: int = 0,
    multilabel: bool,
    excluded: Callable[[Tensor], Tensor] | None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Raises InvalidInput, naming the first bad row, where the values can't be what the path says they are.

    data: (n, ...), the rows from `first` on. multilabel: whether each column of probabilities stands alone. excluded:
    tells of rows (r,) which are those whose values don't matter, (r,) bool. check: called between blocks of rows; may
    raise.
    """
    if not data.is_floating_point() and array.name not in MASSES:
        return
    name, parts = array.name, 1  # how many distributions a row has
    if name == "samples":
        name, parts = SAMPLES_RULES.get(array.kind, "probabilities"), array.shape[1]
    flat = data.reshape(len(data) * parts, -1)
    step = max(1, BLOCK_ROWS // parts) * parts
    for start in range(0, len(flat), step):
        check()
        block = flat[start : start + step]
        if _surely_fine(name, block, multilabel=multilabel):
            continue
        for need, bad, came in _rules(name, block, multilabel):
            rows = bad.nonzero().squeeze(1)
            if excluded is not None and len(rows):
                rows = rows[~excluded((rows + start) // parts + first)]
            if len(rows):
                row = int(rows[0])
                at = (row + start) // parts + first
                raise InvalidInput(f"{array.path} {need}; {array.unit} {at} {came(block[row])}", field=array.path)


def _surely_fine(name: str, block: Tensor, *, multilabel: bool) -> bool:
    """One pass that no bad value survives: NaN and infinities stay what they are in sums, least and greatest values.

    False says nothing: large finite values may add up to infinity.
    """
    if name == "logits":
        top = block.amax(1)
        return bool((top < torch.inf).all() and (multilabel or (top > -torch.inf).all()))
    if name == "log_probabilities":
        fine = bool(block.amax() <= 0)
        return fine and (multilabel or bool((block.double().exp().sum(1) - 1).abs().max() <= SUM_TOLERANCE))
    if name == "probabilities":
        low, high = block.aminmax()
        whole = high <= 1 if multilabel else (block.sum(1, dtype=torch.float64) - 1).abs().max() <= SUM_TOLERANCE
        return bool(low >= 0) and bool(whole)
    if name in MASSES and not bool(block.amin() >= 0):
        return False
    return bool(block.sum(dtype=torch.float64 if block.dtype is torch.float64 else torch.float32).isfinite())


#: What is needed, which rows (b,) fail it, and the words for such a row.
Rule = tuple[str, Tensor, Callable[[Tensor], str]]


def _rules(name: str, block: Tensor, multilabel: bool) -> Iterator[Rule]:
    if name == "logits":
        yield _entries("must not be NaN or +inf", lambda x: ~(x < torch.inf), block)
        if not multilabel:
            yield "must have a class above -inf", block.amax(1) == -torch.inf, lambda _: "has none"
        return
    if name == "log_probabilities":
        yield from _log_rules(block, multilabel)
        return
    yield _entries("must be finite", lambda x: ~x.isfinite(), block)
    if name in ("probabilities", *MASSES):
        yield _entries("must not be negative", lambda x: x < 0, block)
    if name == "probabilities":
        tolerance = COARSE_SUM_TOLERANCE if block.dtype is torch.bfloat16 else SUM_TOLERANCE
        if multilabel:
            yield _entries("must be at most 1", lambda x: x > 1 + tolerance, block)
        else:
            off = (block.sum(1, dtype=torch.float64) - 1).abs() > tolerance
            yield f"must sum to 1 within {tolerance}", off, lambda row: f"sums to {row.double().sum():.6g}"


def _log_rules(block: Tensor, multilabel: bool) -> Iterator[Rule]:
    yield _entries("must not be NaN or +inf", lambda x: ~(x < torch.inf), block)
    tolerance = LOG_SUM_TOLERANCES.get(block.dtype, SUM_TOLERANCE)
    if multilabel:
        yield _entries("must be logarithms of at most 0", lambda x: x > tolerance, block)
        return
    sums = block.double().exp().sum(1)
    need = f"must be logarithms of probabilities that sum to 1 within {tolerance}"
    yield need, ~((sums - 1).abs() <= tolerance), lambda row: f"has a sum of {row.double().exp().sum():.6g}"


def _entries(need: str, breaks: Callable[[Tensor], Tensor], block: Tensor) -> Rule:
    """A rule that every entry has to keep; `breaks` tells which entries don't."""
    return need, breaks(block).any(1), lambda row: f"has {float(row[breaks(row)][0]):g}"
