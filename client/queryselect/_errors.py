"""Every error that the client raises.

QuerySelectError                code, request_id, retryable, retry_after
├── InvalidInput (ValueError)     the request is wrong; .field says where: fix the call
├── TooLarge                      over a limit of the server or the device: send less
├── Busy                          no room now: try again after .retry_after seconds (the client did)
├── Unavailable                   no server, or one that is stopping: try again (the client did)
├── Aborted                       the stream was idle, or a referenced object changed: start again
├── DataLoss                      bytes were lost on the way: try again (the client did, once)
├── NotFound                      a referenced object is not there
├── PermissionDenied              the server may not read that
├── Unauthenticated               no token, or a wrong one
├── Unsupported                   this server does not serve it
├── DeadlineExceeded (TimeoutError)
├── Cancelled
└── ServerBug                     a bug of the server; .error_id stands in its log
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status


class QuerySelectError(Exception):
    """Any failure of a call. code: gRPC's name for it. retryable: whether the same call may succeed later.

    retry_after: seconds after which the server asks to be tried again; 0 where it does not say.
    """

    default_code: ClassVar[str] = "UNKNOWN"
    retryable: bool = False
    retry_after: float = 0.0

    def __init__(self, message: str, *, code: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.code, self.request_id = code or self.default_code, request_id


class InvalidInput(QuerySelectError, ValueError):
    """The request is wrong. field: the path of what is wrong, such as `pool.embeddings`."""

    default_code = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", code: str = "", request_id: str = "") -> None:
        super().__init__(message, code=code, request_id=request_id)
        self.field = field


class TooLarge(QuerySelectError):
    """The request is over a limit of the server or its device."""

    default_code = "OUT_OF_RANGE"


class Busy(QuerySelectError):
    """The server has no room now. retry_after: seconds until it may have."""

    default_code = "RESOURCE_EXHAUSTED"
    retryable = True


class Unavailable(QuerySelectError):
    """There is no server at the address, or it is stopping."""

    default_code = "UNAVAILABLE"
    retryable = True


class Aborted(QuerySelectError):
    """The stream was idle for too long, or a referenced object changed."""

    default_code = "ABORTED"


class DataLoss(QuerySelectError):
    """Bytes were lost or changed on the way."""

    default_code = "DATA_LOSS"
    retryable = True


class NotFound(QuerySelectError):
    """A referenced object does not exist."""

    default_code = "NOT_FOUND"


class PermissionDenied(QuerySelectError):
    """The server's operator does not allow that address."""

    default_code = "PERMISSION_DENIED"


class Unauthenticated(QuerySelectError):
    """The server wants a token, or another one."""

    default_code = "UNAUTHENTICATED"


class Unsupported(QuerySelectError):
    """The server does not serve that strategy or field."""

    default_code = "UNIMPLEMENTED"


class DeadlineExceeded(QuerySelectError, TimeoutError):
    """The timeout passed before the answer came."""

    default_code = "DEADLINE_EXCEEDED"


class Cancelled(QuerySelectError):
    """The call was cancelled."""

    default_code = "CANCELLED"


class ServerBug(QuerySelectError):
    """A bug of the server. error_id: what to look for in its log."""

    default_code = "INTERNAL"
    error_id: str = ""


_CLASSES: dict[str, type[QuerySelectError]] = {
    each.default_code: each
    for each in (
        InvalidInput, TooLarge, Busy, Unavailable, Aborted, DataLoss, NotFound, PermissionDenied, Unauthenticated,
        Unsupported, DeadlineExceeded, Cancelled, ServerBug,
    )
}  # fmt: skip


def from_status(status: status_pb2.Status, request_id: str = "") -> QuerySelectError:
    """The error that a google.rpc.Status tells of."""
    known = code_pb2.Code.DESCRIPTOR.values_by_number.get(status.code)
    code = "UNKNOWN" if known is None else known.name
    retry, violation, info = (
        _detail(status.details, kind)
        for kind in (error_details_pb2.RetryInfo(), error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo())
    )
    kind = _CLASSES.get(code, QuerySelectError)
    # gRPC's own "message larger than max" carries no RetryInfo; the same message will never fit. What can never fit the
    # device is FAILED_PRECONDITION.
    if code == "FAILED_PRECONDITION" or (code == "RESOURCE_EXHAUSTED" and retry is None):
        kind = TooLarge
    error = kind(status.message, code=code, request_id=request_id)
    if isinstance(error, InvalidInput) and violation is not None and violation.field_violations:
        error.field = violation.field_violations[0].field
    if retry is not None:
        error.retry_after = retry.retry_delay.ToMilliseconds() / 1000
    if isinstance(error, ServerBug) and info is not None:
        error.error_id = info.metadata.get("error_id", "")
    return error


def _detail(details: list[AnyMessage], into: error_details_pb2.ErrorInfo) -> error_details_pb2.ErrorInfo | None:
    for each in details:
        if each.Unpack(into):
            return into
    return None


def from_rpc(error: grpc.Call, request_id: str = "") -> QuerySelectError:
    """The error that a failed RPC tells of. request_id: what was sent, where the server does not say."""
    trailers = {each[0]: each[1] for each in error.trailing_metadata() or ()}
    request_id = str(trailers.get("x-request-id", request_id))
    try:
        status = rpc_status.from_call(error)
    except (DecodeError, ValueError):  # details that can't be read, or that contradict the call's own code
        status = None
    if status is None:  # gRPC itself failed, or a proxy
        message = error.details() or ""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = "the timeout passed before the answer came"
        status = status_pb2.Status(code=error.code().value[0], message=message)
    found = from_status(status, request_id)
    pushback = trailers.get("grpc-retry-pushback-ms")
    if pushback is not None:
        # A negative or unreadable pushback says: never again (gRPC's retry design, A6).
        if str(pushback).isdecimal():
            found.retry_after = max(found.retry_after, int(pushback) / 1000)
        else:
            found.retryable = False
    return found
