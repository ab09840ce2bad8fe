"""Arrays of any library as numpy views, and their type on the wire. Copies only what can't be viewed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from queryselect._errors import InvalidInput
from queryselect.v1 import tensor_pb2

DTYPES = {
    "float64": tensor_pb2.DATA_TYPE_F64,
    "float32": tensor_pb2.DATA_TYPE_F32,
    "float16": tensor_pb2.DATA_TYPE_F16,
    "bfloat16": tensor_pb2.DATA_TYPE_BF16,
    "int64": tensor_pb2.DATA_TYPE_I64,
    "int32": tensor_pb2.DATA_TYPE_I32,
    "uint8": tensor_pb2.DATA_TYPE_U8,
    "bool": tensor_pb2.DATA_TYPE_BOOL,
}
#: Integer types without a number on the wire; they widen to int64.
WIDENED = ("int8", "int16", "uint16", "uint32", "uint64")


@dataclass(frozen=True)
class WireArray:
    """An array ready to travel: contiguous, little-endian. index: the pandas index it came with."""

    data: np.ndarray[Any, Any]
    dtype: tensor_pb2.DataType.ValueType
    shape: tuple[int, ...]
    index: Any = None

    @property
    def shape_text(self) -> str:
        """The shape as messages write it: (1797 64)."""
        return f"({' '.join(map(str, self.shape))})"

    def header(self) -> tensor_pb2.Tensor:
        """The tensor without its bytes."""
        return tensor_pb2.Tensor(dtype=self.dtype, shape=self.shape, streamed=tensor_pb2.Streamed())


def to_wire(value: Any, path: str, *, rows: bool = False) -> WireArray:
    """numpy, torch, pandas, or anything with __array__ or __dlpack__ -> what travels.

    rows: whether the value is a list of integers or a mask; an empty list then has no type of its own.
    Raises InvalidInput for what is no array of numbers.
    """
    index = getattr(value, "index", None) if hasattr(value, "to_numpy") else None
    array, name = as_numpy(value, path)
    if rows and not array.size and array.dtype.kind in "fO":
        array, name = array.astype(np.int64), "int64"
    if name == "uint64" and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidInput(f"{path} has integers over 2^63 - 1", field=path)
    if name in WIDENED or (rows and name == "uint8"):
        array, name = array.astype(np.int64), "int64"
    if name not in DTYPES:
        raise InvalidInput(f"{path} needs an array of numbers; it has type {name}", field=path)
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes (1,) of ()
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return WireArray(array, DTYPES[name], array.shape, index)


def as_numpy(value: Any, path: str) -> tuple[np.ndarray[Any, Any], str]:
    """The value as a numpy array, and the name of its element type."""
    if isinstance(value, np.ma.MaskedArray) and value.mask.any():
        raise InvalidInput(f"{path} has masked entries, which do not travel; fill or drop them", field=path)
    try:
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            return _of_torch(value.detach().cpu())
        if isinstance(value, (set, frozenset)):
            array = np.asarray(sorted(value))
        elif hasattr(value, "to_numpy"):
            array = value.to_numpy()
        elif hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            array = np.from_dlpack(value)
        else:
            array = np.asarray(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path} can't be read as an array: {error}", field=path) from None
    if array.dtype.name == "bfloat16":  # the type of ml_dtypes
        return array.view(np.int16), "bfloat16"
    return array, array.dtype.name


def _of_torch(tensor: Any) -> tuple[np.ndarray[Any, Any], str]:
    """The same of a tensor on the host, without importing torch where it can be avoided."""
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type: its bits do
        import torch  # noqa: PLC0415  # the caller has it

        return tensor.contiguous().view(torch.int16).numpy(), "bfloat16"
    array = tensor.numpy()
    return array, array.dtype.name
