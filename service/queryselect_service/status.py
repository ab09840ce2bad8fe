"""From an exception to what travels: a google.rpc.Status with details, and gRPC's own code and metadata."""

from __future__ import annotations

import logging
import uuid
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from queryselect_service.errors import OutOfMemory, ServiceError, out_of_memory
from queryselect_service.logs import fields
from queryselect_service.queue import RETRY_AFTER

DOMAIN = "queryselect"
#: The longest texts sent, in bytes. They travel in headers, percent-encoded or in base64, which hold 8 KiB in all.
MESSAGE_BYTES, FIELD_BYTES = 1000, 200

log = logging.getLogger(__name__)


#: Why an RPC failed where we have no name for it.
BUG = "BUG"


def cause(error: BaseException) -> str:
    """Why an RPC failed, in words of ours alone: what it is counted under, and what the log says."""
    error = _named(error)
    return error.cause if isinstance(error, ServiceError) else BUG


def _named(error: BaseException) -> BaseException:
    """The error itself, or our name for it: memory may end anywhere, and that is no bug."""
    if not isinstance(error, ServiceError) and out_of_memory(error):
        return OutOfMemory("this server is out of memory", retry_after=RETRY_AFTER)
    return error


def from_exception(error: BaseException, request_id: str) -> status_pb2.Status:
    """The status that tells a caller about `error`. Anything that is not ours is a bug: logged, and told by an id."""
    error = _named(error)
    if not isinstance(error, ServiceError):
        return _bug(error, request_id)
    message, field = _short(error.message, MESSAGE_BYTES), _short(error.field, FIELD_BYTES)
    status = status_pb2.Status(code=getattr(code_pb2, error.code), message=message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    status.details.add().Pack(info)
    if field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _short(text: str, most: int) -> str:
    """The text, or as much of its beginning as fits `most` bytes; ? where something is no character."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= most else data[: most - 3].decode(errors="ignore") + "…"


def _bug(error: BaseException, request_id: str) -> status_pb2.Status:
    error_id = uuid.uuid4().hex
    log.error("bug %s", error_id, exc_info=error, extra=fields(error_id=error_id, request_id=request_id))
    status = status_pb2.Status(code=code_pb2.INTERNAL, message=f"a bug of the server; its log has error id {error_id}")
    info = error_details_pb2.ErrorInfo(reason=BUG, domain=DOMAIN, metadata={"error_id": error_id})
    status.details.add().Pack(info)
    return status


def to_grpc(error: BaseException, request_id: str) -> grpc.Status:
    """What context.abort_with_status takes: the status in the trailers, the request's id, and when to come back."""
    error = _named(error)
    plain: Any = rpc_status.to_status(from_exception(error, request_id))  # a named tuple, which its stubs do not say
    extra = [("x-request-id", request_id)]
    if isinstance(error, ServiceError) and error.retry_after is not None:
        extra.append(("grpc-retry-pushback-ms", str(round(error.retry_after * 1000))))
    replaced: grpc.Status = plain._replace(trailing_metadata=(*plain.trailing_metadata, *extra))
    return replaced
