"""What every answer to a selection promises, and every failure, whatever was sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from benchmarks.service.requests import NUMPY, Array
from queryselect.v1 import selection_pb2, tensor_pb2

Code = grpc.StatusCode
#: The codes that stand in the documentation for a server that neither drains nor asks who calls, and has no bug.
DOCUMENTED = {
    Code.INVALID_ARGUMENT, Code.OUT_OF_RANGE, Code.RESOURCE_EXHAUSTED, Code.ABORTED, Code.FAILED_PRECONDITION,
    Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.UNIMPLEMENTED, Code.DATA_LOSS, Code.DEADLINE_EXCEEDED, Code.CANCELLED,
}  # fmt: skip
#: Those that gRPC itself may say, at the caller's end.
OF_THE_CALLER = {Code.DEADLINE_EXCEEDED, Code.CANCELLED}
#: The pool's inputs that tell how many rows there are.
PER_ROW = ("embeddings", "probabilities", "logits", "samples", "gradients", "weights", "pseudo_labels", "clusters")


class Wrong(Exception):
    """Something that the service promises was not so."""


def check_failure(error: Any, *, ours: bool) -> None:
    """Raises Wrong for a code that is not documented, or for one without the details that go with it.

    ours: whether the method is; others' have no details.
    """
    code, words = error.code(), error.details()
    if code not in DOCUMENTED:
        raise Wrong(f"{code.name} is not documented: {words}")
    try:
        status = rpc_status.from_call(error)  # raises where code or message differ from gRPC's own
    except ValueError as wrong:
        if code in OF_THE_CALLER:  # the caller's own end came while the server's words were on their way
            return
        raise Wrong(f"the status differs from the call's: {wrong}") from wrong
    trailers = dict(error.trailing_metadata() or ())
    if status is None:
        oversize = code is Code.RESOURCE_EXHAUSTED and "larger than max" in words
        if ours and code not in OF_THE_CALLER and not oversize:
            raise Wrong(f"{code.name} comes without a status: {words}")
        return
    info, retry = _detail(status, error_details_pb2.ErrorInfo), _detail(status, error_details_pb2.RetryInfo)
    if info is None or not info.reason or info.domain != "queryselect":
        raise Wrong(f"{code.name} comes without ErrorInfo: {words}")
    if not words or "x-request-id" not in trailers:
        raise Wrong(f"{code.name} comes without words or without a request id")
    if code is Code.RESOURCE_EXHAUSTED and (retry is None or "grpc-retry-pushback-ms" not in trailers):
        raise Wrong(f"{code.name} does not say when to come back: {words}")


def _detail(status: Any, kind: Any) -> Any:
    for each in status.details:
        if each.Is(kind.DESCRIPTOR):
            found = kind()
            each.Unpack(found)
            return found
    return None


def check_answer(request: selection_pb2.SelectRequest, answer: selection_pb2.SelectResponse) -> None:
    """Raises Wrong where an answer is not one to its request."""
    for wrong in _wrong(request, answer):
        raise Wrong(wrong)


def _wrong(request: selection_pb2.SelectRequest, answer: selection_pb2.SelectResponse) -> Iterator[str]:
    if request.validate_only:
        if answer.HasField("indices"):
            yield "there are picks, though nothing was to be selected"
        return
    picks, scores = array(answer.indices), array(answer.scores)
    entries = _entries(request.pool)
    if picks.shape != scores.shape or picks.ndim != 1:
        yield f"there are {picks.shape} picks and {scores.shape} scores"
    if len(picks) > request.stop.max_items:
        yield f"there are {len(picks)} picks; the budget is {request.stop.max_items}"
    if len(set(picks.tolist())) < len(picks):
        yield f"a row is chosen twice: {picks}"
    if len(picks) and not (picks.min() >= 0 and (entries is None or picks.max() < entries)):
        yield f"a row out of range is chosen: {picks}; there are {entries}"
    if np.isnan(scores).any():
        yield f"a score is NaN: {scores}"
    yield from _wrong_rows(request.pool, picks)
    if answer.HasField("pool_scores") and answer.pool_scores.WhichOneof("source") == "data":
        pool_scores = array(answer.pool_scores)
        if np.isnan(pool_scores).any() or (entries is not None and pool_scores.shape != (entries,)):
            yield f"pool_scores are wrong: {pool_scores}"


def _wrong_rows(pool: selection_pb2.Pool, picks: Array) -> Iterator[str]:
    """Picks in lists of rows that may not be chosen, as far as those stand in the request."""
    for name in ("pending", "excluded", *(() if pool.HasField("candidates") else ("labeled",))):
        some = _rows(getattr(pool, name))
        if some is not None and np.isin(picks, some).any():
            yield f"a row is chosen that is {name}: {picks}"
    some = _rows(pool.candidates)
    if some is not None and not np.isin(picks, some).all():
        yield f"a row is chosen that is no candidate: {picks}"


def _entries(pool: selection_pb2.Pool) -> int | None:
    """The number of what is chosen among, if the request says it in so many words."""
    if pool.HasField("item_rows"):
        return pool.num_items if pool.HasField("num_items") else None
    if pool.HasField("num_rows"):
        return pool.num_rows
    given = {each.name for each, _ in pool.ListFields()}
    shapes = (getattr(pool, name).shape for name in PER_ROW if name in given)
    return next((shape[0] for shape in shapes if shape), None)  # none: read by reference


def _rows(tensor: tensor_pb2.Tensor) -> Array | None:
    """The rows of a list of rows that is here."""
    if tensor.WhichOneof("source") != "data":
        return None
    values = array(tensor)
    return values.nonzero()[0] if values.dtype == np.bool_ else values


def array(tensor: tensor_pb2.Tensor) -> Array:
    """The elements of a tensor that is here."""
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))
