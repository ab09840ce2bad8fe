"""Arrays of every library travel with the same values, without a copy where that is possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect._arrays import to_wire
from queryselect.v1 import tensor_pb2

N = 40
# Values that float16 and bfloat16 hold exactly.
X = np.random.default_rng(0).integers(-128, 128, (N, 6)) / 16
LABELED = [3, 7, 30]


class OnlyArray:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._array


class OnlyDlpack:
    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **options) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


FLOATS = {
    "f64": lambda x: x.copy(),
    "f32": lambda x: x.astype("f4"),
    "f16": lambda x: x.astype("f2"),
    "big-endian f64": lambda x: x.astype(">f8"),
    "big-endian f32": lambda x: x.astype(">f4"),
    "fortran order": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": read_only,
    "torch f64": torch.from_numpy,
    "torch f32": lambda x: torch.from_numpy(x).float(),
    "torch f16": lambda x: torch.from_numpy(x).half(),
    "torch bf16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch requires_grad": lambda x: torch.tensor(x, requires_grad=True),
    "torch bf16 requires_grad": lambda x: torch.tensor(x, dtype=torch.bfloat16, requires_grad=True),
    "torch non-contiguous": lambda x: torch.from_numpy(x.T.copy()).T,
    "torch bf16 non-contiguous": lambda x: torch.from_numpy(x.T.copy()).bfloat16().T,
    "DataFrame": pd.DataFrame,
    "lists": lambda x: x.tolist(),
    "tuples": lambda x: tuple(map(tuple, x.tolist())),
    "list of arrays": list,
    "__array__": OnlyArray,
    "__dlpack__": OnlyDlpack,
}
ROWS = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "i64": np.array,
    "i32": lambda rows: np.array(rows, np.int32),
    "i8": lambda rows: np.array(rows, np.int8),
    "u8": lambda rows: np.array(rows, np.uint8),
    "u64": lambda rows: np.array(rows, np.uint64),
    "big-endian": lambda rows: np.array(rows, ">i4"),
    "descending": lambda rows: rows[::-1],
    "torch": torch.tensor,
    "torch u8": lambda rows: torch.tensor(rows, dtype=torch.uint8),
    "Series": pd.Series,
    "Index": pd.Index,
    "mask": lambda rows: np.isin(np.arange(N), rows),
    "list mask": lambda rows: np.isin(np.arange(N), rows).tolist(),
    "torch mask": lambda rows: torch.from_numpy(np.isin(np.arange(N), rows)),
    "Series mask": lambda rows: pd.Series(np.isin(np.arange(N), rows)),
}


def values(wire) -> torch.Tensor:
    """What the bytes on the wire mean, read without our own decoder."""
    types = {
        tensor_pb2.DATA_TYPE_F64: torch.float64,
        tensor_pb2.DATA_TYPE_F32: torch.float32,
        tensor_pb2.DATA_TYPE_F16: torch.float16,
        tensor_pb2.DATA_TYPE_BF16: torch.bfloat16,
    }
    return torch.frombuffer(bytearray(wire.data.tobytes()), dtype=types[wire.dtype]).reshape(wire.shape).double()


@pytest.mark.parametrize("kind", FLOATS)
def test_every_kind_of_array_has_the_same_values_and_picks(local: Client, kind: str) -> None:
    given = FLOATS[kind](X)
    assert torch.equal(values(to_wire(given, "pool.embeddings")), torch.from_numpy(X))
    expected = local.select("k_center_greedy", 8, embeddings=X, labeled=LABELED)
    picks = local.select("k_center_greedy", 8, embeddings=given, labeled=LABELED)
    assert picks.indices.tolist() == expected.indices.tolist()


def test_bf16_scores_are_those_of_the_same_values_in_f32(local: Client) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(N, 4))).bfloat16()
    narrow, wide = (local.select("entropy", 10, logits=z) for z in (logits, logits.float()))
    assert narrow.indices.tolist() == wide.indices.tolist()
    assert narrow.scores.tolist() == wide.scores.tolist()


@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_of_row_list_means_the_same_rows(local: Client, kind: str) -> None:
    expected = local.select("k_center_greedy", 8, embeddings=X, labeled=np.array(LABELED))
    picks = local.select("k_center_greedy", 8, embeddings=X, labeled=ROWS[kind](LABELED))
    assert picks.indices.tolist() == expected.indices.tolist()


def test_a_range_is_a_row_list(local: Client) -> None:
    picks = local.select("k_center_greedy", N - 30, embeddings=X, labeled=range(30))
    assert sorted(picks.indices.tolist()) == list(range(30, N))


@pytest.mark.parametrize("empty", [[], (), set(), range(0), np.array([]), np.array([], np.int32), torch.tensor([])])
@pytest.mark.parametrize("name", ["labeled", "pending", "excluded", "labels"])
def test_empty_row_lists_mean_no_rows(client: Client, name: str, empty: Any) -> None:
    expected = client.select("k_center_greedy", 4, embeddings=X)
    picks = client.select("k_center_greedy", 4, embeddings=X, **{name: empty})
    assert picks.indices.tolist() == expected.indices.tolist()
    assert to_wire(empty, f"pool.{name}", rows=True).data.dtype.kind == "i"


@pytest.mark.parametrize(
    ("given", "base"),
    [
        (X, X),
        (read_only(X), None),
        (X.astype("f2"), None),
        (torch.from_numpy(X), X),
        (torch.from_numpy(X).requires_grad_(), X),
        (pd.Series(X[:, 0].copy()), None),
        (OnlyArray(X), X),
        (OnlyDlpack(X), X),
        (X[5:20], X),
    ],
)
def test_contiguous_arrays_are_not_copied(given: Any, base: np.ndarray | None) -> None:
    if base is None:
        base = given.to_numpy() if isinstance(given, pd.Series) else given
    assert np.shares_memory(to_wire(given, "x").data, base)


def test_contiguous_bf16_is_not_copied() -> None:
    given = torch.from_numpy(X).bfloat16()
    assert to_wire(given, "x").data.ctypes.data == given.data_ptr()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("strategy", ["k_center_greedy", "margin"])
def test_the_callers_arrays_are_not_changed(local: Client, strategy: str, kind: str) -> None:
    name = "embeddings" if strategy == "k_center_greedy" else "logits"
    given, again = FLOATS[kind](X.copy()), FLOATS[kind](X.copy())
    local.select(strategy, 8, labeled=LABELED, excluded=[0], **{name: given})
    assert torch.equal(values(to_wire(given, "x")), values(to_wire(again, "x")))


@pytest.mark.parametrize(
    "bad",
    [
        [["a", "b"]] * N,
        np.full((N, 2), None),
        [[1.0, None]] * N,
        [[1.0], [1.0, 2.0]],
        X.astype(complex),
        X.astype(np.longdouble),
        np.full((N, 2), np.datetime64("2026-01-01")),
        np.full((N, 2), 2**63, np.uint64),
        np.full((N, 2), 2**70, object),
        {"a": 1},
        {1, "a"},
        "text",
        pd.DataFrame({"a": ["x"] * N}),
        pd.DataFrame({"a": [1.0, pd.NA] * (N // 2)}),
        torch.from_numpy(X).to(torch.complex64),
        torch.from_numpy(X).to(torch.complex64).conj(),
        torch.from_numpy(X).to_sparse(),
        torch.from_numpy(X).to(torch.float8_e4m3fn),
    ],
    ids=repr,
)
def test_what_is_no_array_of_numbers_is_invalid_and_named(local: Client, bad: Any) -> None:
    with pytest.raises(InvalidInput, match=r"pool\.embeddings") as caught:
        local.select("k_center_greedy", 1, embeddings=bad)
    assert caught.value.field == "pool.embeddings"


@pytest.mark.parametrize("bad", [["a"], [None], [1.5], [[1, 2]], [-1], [N], [3, 3], np.ones(N - 1, bool), "ab"])
def test_what_is_no_row_list_is_invalid_and_named(client: Client, bad: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        client.select("k_center_greedy", 1, embeddings=X, labeled=bad)
    assert caught.value.field == "pool.labeled"


NAMES = [f"image-{row:02}" for row in range(N)]


@pytest.mark.parametrize(
    "options",
    [
        {"embeddings": pd.DataFrame(X, index=NAMES)},
        {"embeddings": X, "labeled": pd.Series(np.arange(N) < 5, index=NAMES)},
        {"embeddings": X, "weights": pd.Series(np.ones(N), index=NAMES)},
        {"embeddings": X, "ids": NAMES},
        {"embeddings": X, "ids": np.array(NAMES)},
        {"embeddings": X, "ids": pd.Index(NAMES)},
        {"embeddings": X, "ids": pd.Series(NAMES, index=range(100, 100 + N))},
        {"embeddings": pd.DataFrame(X, index=NAMES[::-1]), "ids": NAMES},
    ],
)
def test_ids_come_from_the_index_unless_they_are_given(client: Client, options: dict[str, Any]) -> None:
    picks = client.select("k_center_greedy", 6, **options)
    assert picks.ids is not None
    assert picks.ids.tolist() == [NAMES[row] for row in picks.indices]


def test_ids_may_be_anything(local: Client) -> None:
    days = pd.date_range("2026-01-01", periods=N)
    picks = local.select("k_center_greedy", 3, embeddings=pd.DataFrame(X, index=days))
    assert (picks.ids == days.to_numpy()[picks.indices]).all()
    assert local.select("random", 3, ids=NAMES).ids.shape == (3,)  # ids alone tell N
    assert local.select("random", 3, num_rows=N).ids is None


@pytest.mark.parametrize("ids", [NAMES[1:], [*NAMES, "one more"], [], "text", X])
@pytest.mark.parametrize("rows", [{"embeddings": X}, {"num_rows": N}, {"candidates": np.ones(N, bool)}])
def test_ids_need_one_per_row(local: Client, rows: dict[str, Any], ids: Any) -> None:
    with pytest.raises(InvalidInput, match="one id per row") as caught:
        local.select("random", 3, **rows, ids=ids)
    assert caught.value.field == "pool.ids"
