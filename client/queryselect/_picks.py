"""What a selection returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message
from numpy.typing import NDArray

from queryselect.v1 import selection_pb2, strategy_pb2, tensor_pb2

#: The types that an answer's tensors have.
NUMPY = {
    tensor_pb2.DATA_TYPE_F64: np.float64,
    tensor_pb2.DATA_TYPE_F32: np.float32,
    tensor_pb2.DATA_TYPE_I64: np.int64,
    tensor_pb2.DATA_TYPE_I32: np.int32,
}


@dataclass(frozen=True)
class Warning:  # noqa: A001  # the field's own word; only ever reached as picks.warnings
    """What the caller should know though all went well: a code, the same in words, the rows concerned."""

    code: str
    message: str
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Info:
    """How a request ran. Durations in seconds, peak_bytes in bytes (None where it can't be told)."""

    queue: float
    receive: float
    decode: float
    transfer: float
    kernel: float
    total: float
    device: str
    compute_dtype: str
    peak_bytes: int | None
    version: str
    seed: int
    sources: tuple[tuple[str, str, str], ...]
    request_id: str


@dataclass(frozen=True, eq=False, repr=False)
class Picks:
    """The chosen rows in the order of choice, best first; items, where item_rows told them.

    indices: (k,) int64. scores: (k,) float64, higher is more worth choosing; score_kind says what they are. ids: the
    caller's ids of the picks, if any were given. pool_scores: (N,) float64 when asked for, -inf where a row may not be
    chosen. strategy: the message with every parameter as it was used. cost_spent: when costs were given.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float64]
    score_kind: str
    stop_reason: str
    strategy: Message
    warnings: tuple[Warning, ...]
    info: Info
    ids: NDArray[Any] | None = None
    pool_scores: NDArray[np.float64] | None = None
    pseudo_labels: NDArray[np.int64] | None = None
    cost_spent: float | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        """What a person wants to see at a prompt: how many, by what, and the first few."""
        first = ", ".join(f"{row} ({score:.4g})" for row, score in list(self)[:5])
        more = ", …" if len(self) > 5 else ""
        warned = "".join(f", {each.code}" for each in self.warnings)
        name = type(self.strategy).__name__
        return f"Picks({len(self)} by {name}, {self.score_kind}, {self.stop_reason}{warned}: {first}{more})"

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Pairs of row and score, in the order of choice."""
        return iter(zip(self.indices.tolist(), self.scores.tolist(), strict=True))

    def to_pandas(self) -> Any:
        """A DataFrame with one row per pick, in the order of choice. Needs pandas."""
        import pandas as pd  # noqa: PLC0415  # optional

        columns = {"row": self.indices, "score": self.scores}
        if self.ids is not None:
            columns = {"id": self.ids, **columns}
        return pd.DataFrame(columns)


def from_response(message: selection_pb2.SelectResponse, ids: Any, apart: Mapping[str, NDArray[Any]]) -> Picks:
    """The picks that an answer tells of. ids: the caller's, or None. apart: its tensors that came beside it."""

    def tensor(name: str) -> NDArray[Any] | None:
        if name in apart:
            return apart[name]
        return to_numpy(getattr(message, name)) if message.HasField(name) else None  # type: ignore[arg-type]

    info, indices, scores = message.info, tensor("indices"), tensor("scores")
    indices = np.empty(0, np.int64) if indices is None else indices
    return Picks(
        indices=indices,
        scores=np.empty(0) if scores is None else scores,
        score_kind=enum_name(strategy_pb2.ScoreKind.DESCRIPTOR, message.score_kind),
        stop_reason=enum_name(selection_pb2.StopReason.DESCRIPTOR, message.stop_reason),
        strategy=getattr(message.strategy, message.strategy.WhichOneof("kind") or "custom"),
        warnings=tuple(
            Warning(
                enum_name(selection_pb2.WarningCode.DESCRIPTOR, each.code), each.message, np.array(each.rows, np.int64)
            )
            for each in message.warnings
        ),
        info=Info(
            **{
                name: getattr(info, name).ToNanoseconds() / 1e9
                for name in ("queue", "receive", "decode", "transfer", "kernel", "total")
            },
            device=info.device,
            compute_dtype=enum_name(tensor_pb2.DataType.DESCRIPTOR, info.compute_dtype).lower(),
            peak_bytes=info.peak_bytes if info.HasField("peak_bytes") else None,
            version=info.version,
            seed=info.seed,
            sources=tuple((each.path, each.uri, each.version) for each in info.sources),
            request_id=message.request_id,
        ),
        ids=None if ids is None else ids[indices],
        pool_scores=tensor("pool_scores"),
        pseudo_labels=tensor("pseudo_labels"),
        cost_spent=message.cost_spent if message.HasField("cost_spent") else None,
    )


def enum_name(descriptor: EnumDescriptor, number: int) -> str:
    """The value's name without its prefix; its number where a newer server sent one unknown here."""
    value = descriptor.values_by_number.get(number)
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(number) if value is None else str(value.name.removeprefix(prefix))


def to_numpy(message: tensor_pb2.Tensor) -> NDArray[Any]:
    """An inline tensor as an array of its own."""
    return np.frombuffer(message.data, NUMPY[message.dtype]).reshape(tuple(message.shape)).copy()
