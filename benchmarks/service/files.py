"""Tensors in files of every format that a request may refer to."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet

from benchmarks.service.requests import NUMPY, Array
from queryselect.v1 import tensor_pb2

#: The name of the tensor, or of the column, beside another.
COLUMN = "chosen"
#: The bytes of an element.
WIDTHS = {number: np.dtype(kind).itemsize for number, kind in NUMPY.items()} | {tensor_pb2.DATA_TYPE_BF16: 2}
SUFFIXES = (".npy", ".safetensors", ".parquet", ".arrow")
#: How columns may be compressed.
COMPRESSIONS = {".parquet": ("none", "snappy", "zstd"), ".arrow": ("uncompressed", "lz4", "zstd")}


def holds(suffix: str, tensor: tensor_pb2.Tensor) -> bool:
    """Whether a format has such tensors: columns have rows, and lists of one length that is not 0."""
    if tensor.dtype == tensor_pb2.DATA_TYPE_BF16:
        return suffix == ".safetensors"
    return suffix in {".npy", ".safetensors"} or (len(tensor.shape) > 0 and 0 not in tensor.shape)


def content(suffix: str, tensor: tensor_pb2.Tensor, compression: str = "") -> bytes:
    """A file with the tensor in it. compression: of columns."""
    if suffix == ".safetensors":
        return _safetensors(tensor)
    values: Array = np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))
    out = io.BytesIO()
    if suffix == ".npy":
        np.save(out, values)
        return out.getvalue()
    flat: Any = pa.array(values.ravel())
    if values.ndim > 1:
        flat = pa.FixedSizeListArray.from_arrays(flat, values[0].size)
    table = pa.table({"other": pa.array(range(len(values))), COLUMN: flat})
    if suffix == ".parquet":
        pa.parquet.write_table(table, out, row_group_size=17, compression=compression)
    else:
        pa.feather.write_feather(table, out, chunksize=17, compression=compression)
    return out.getvalue()


def _safetensors(tensor: tensor_pb2.Tensor) -> bytes:
    kind = tensor_pb2.DataType.Name(tensor.dtype).removeprefix("DATA_TYPE_")
    entry = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [8, 8 + len(tensor.data)]}
    other = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    header = json.dumps({"other": other, COLUMN: entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8) + tensor.data
