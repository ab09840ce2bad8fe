"""NumPy's .npy: a header that a literal tells, then the elements. Never an array of objects, which would be pickled."""

from __future__ import annotations

import io
import warnings
from tokenize import TokenError

import numpy as np
import torch

from queryselect_service.sources.objects import HEAD_BYTES, Content, Object, Reader, Stretches

# Of headers as Python 2 wrote them, which is a caller's affair and no line of the log.
warnings.filterwarnings("ignore", message="Reading `.npy` or `.npz` file required additional header parsing")

#: Types by NumPy's names for them, little-endian.
DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}
#: What NumPy raises of a header that is none.
BROKEN = (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError, OverflowError, TokenError)
#: What reads a header, by the format's version. Version 3 is for names of fields, which are not read here.
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read(source: Object, column: str | None, rows: tuple[range, ...]) -> Reader:
    """The array. Raises Content."""
    if column is not None:
        raise Content("an .npy file has one array, and no column to choose")
    head = io.BytesIO(source.read(0, min(HEAD_BYTES, source.size)))
    try:
        shape, columns_first, dtype = HEADERS[np.lib.format.read_magic(head)](head)
    except BROKEN:
        raise Content("it is no .npy file that can be read") from None
    if dtype.str not in DTYPES:
        known = ", ".join(np.dtype(each).name for each in DTYPES)
        raise Content(f"its type is {dtype.str[:40]!r}; little-endian {known} are read")
    if columns_first and len(shape) > 1:
        raise Content("its order is Fortran's; save it by np.ascontiguousarray")
    return Stretches(source, DTYPES[dtype.str], shape, head.tell(), rows)
