""".safetensors: the length of a JSON header, the header, then the elements of every tensor it names."""

from __future__ import annotations

import json
import math

import torch

from queryselect_service.sources.objects import HEAD_BYTES, HEADER_BYTES, Content, Object, Reader, Stretches, names_text

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

#: The most dimensions of a tensor.
MOST_DIMS = 64


def read(source: Object, column: str | None, rows: tuple[range, ...]) -> Reader:
    """The tensor named `column`, or the only one. Raises Content."""
    head = source.read(0, min(HEAD_BYTES, source.size))
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > min(HEADER_BYTES, source.size - 8):
        raise Content("it is no .safetensors file that can be read")
    text = head[8 : 8 + length]
    if len(text) < length:
        text += source.read(8 + len(text), 8 + length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {str(name): (each["dtype"], each["shape"], each["data_offsets"]) for name, each in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Content("its header can't be read") from None
    if column is None and len(tensors) == 1:
        (column,) = tensors
    if column not in tensors:
        raise Content(f"it needs column, the name of one of its {len(tensors)} tensors; {names_text(tensors)}")
    dtype, shape, offsets = tensors[column]
    if dtype not in DTYPES:
        raise Content(f"its type is {str(dtype)[:40]!r}; {', '.join(DTYPES)} are read")
    # Bounded before they are multiplied, which of long numbers takes minutes in which no other thread runs.
    whole = all(
        isinstance(each, list) and len(each) <= MOST_DIMS and all(type(x) is int and 0 <= x < 1 << 63 for x in each)
        for each in (shape, offsets)
    )
    if not whole or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise Content("its header contradicts itself")
    return Stretches(source, DTYPES[dtype], tuple(shape), 8 + length + offsets[0], rows)
