"""Every failure that the service names, and whose fault it is.

    ServiceError
    ├── InvalidInput       the request is wrong: shapes, values, parameters        INVALID_ARGUMENT
    ├── OverLimit          the request is right, but larger than a fixed limit     OUT_OF_RANGE
    ├── DoesNotFit         the request can never fit this device                   FAILED_PRECONDITION
    ├── Unsupported        this server does not serve that (yet)                   UNIMPLEMENTED
    ├── NotFound           there is nothing at an address to read from             NOT_FOUND
    ├── PermissionDenied   the server may not read from there                      PERMISSION_DENIED
    │   └── SourceRefused  the store does not let it                               PERMISSION_DENIED
    ├── Unauthenticated    no token, or none that is known here                    UNAUTHENTICATED
    │   └── TokenExpired   one that was good                                       UNAUTHENTICATED
    ├── Busy               no room now; the same request may succeed later         RESOURCE_EXHAUSTED
    ├── OutOfMemory        the device ran out in spite of the estimate             RESOURCE_EXHAUSTED
    ├── DataLoss           bytes changed on the way, or did not come               DATA_LOSS
    ├── Aborted            the stream was silent for too long                      ABORTED
    │   ├── TooSlow        the upload was too slow for too long                    ABORTED
    │   └── ObjectChanged  what is read by reference is another version now        ABORTED
    ├── Unavailable        the server is draining                                  UNAVAILABLE
    │   ├── DeviceLost     its device does not work                                UNAVAILABLE
    │   └── SourceUnavailable  where it reads from does not answer                 UNAVAILABLE
    ├── Cancelled          the caller went away                                    CANCELLED
    └── DeadlineExceeded   the caller's deadline passed                            DEADLINE_EXCEEDED

Anything else that is raised is a bug of ours: INTERNAL (status.py). A RuntimeError of torch never becomes a client's
fault. Kernels raise InvalidInput; they know no gRPC, so codes are names here.
"""

from __future__ import annotations

from typing import ClassVar

import torch


class ServiceError(Exception):
    """A failure with a name. `field` is the path of what is wrong in the request, such as `pool.embeddings`.

    limit: what was full or too much, one of few words of ours.
    """

    code: ClassVar[str]
    reason: ClassVar[str]
    limit: str = ""
    retry_after: float | None = None

    def __init__(self, message: str, *, field: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.field, self.metadata = message, field, metadata or {}

    @property
    def cause(self) -> str:
        """What it is counted under: nothing of it is the caller's."""
        return f"{self.reason}:{self.limit}" if self.limit else self.reason


class InvalidInput(ServiceError):
    """The request can't mean anything: fix the request."""

    code, reason = "INVALID_ARGUMENT", "INVALID_INPUT"

    def of(self, owner: str, path: str) -> InvalidInput:
        """The same complaint about a part, as one about its owner, whose parts stand at `path`."""
        return InvalidInput(f"{owner}: {self.message}", field=f"{path}.{self.field}")


class OverLimit(ServiceError):
    """The request is over a fixed limit of size: send less, or ask the operator."""

    code, reason = "OUT_OF_RANGE", "OVER_LIMIT"

    def __init__(
        self, what: str, size: int, limit: int, *, name: str, field: str = "", whose: str = "this server's"
    ) -> None:
        """`what` is counted by `size`; `limit` is the most allowed, and `name` the limit's name in Settings.

        whose: the limit's owner.
        """
        super().__init__(
            f"{what}: {size} is over {whose} limit of {limit} ({name})",
            field=field,
            metadata={"limit": str(limit), "size": str(size), "setting": name},
        )
        self.limit = name


class DoesNotFit(ServiceError):
    """No wait will make the request fit: send less, or to a larger device."""

    code, reason = "FAILED_PRECONDITION", "DOES_NOT_FIT"

    def __init__(self, what: str, estimate: int, place: str, capacity: int) -> None:
        """`what` needs about `estimate` bytes at `place`, which has `capacity`."""
        super().__init__(
            f"{what} needs about {estimate} bytes on {place}, which has {capacity}",
            metadata={"estimate": str(estimate), "capacity": str(capacity), "device": place},
        )


class Unsupported(ServiceError):
    """Not served here: use another server, or leave it out."""

    code, reason = "UNIMPLEMENTED", "UNSUPPORTED"


class NotFound(ServiceError):
    """There is nothing at an address: name another."""

    code, reason = "NOT_FOUND", "NOT_FOUND"


class PermissionDenied(ServiceError):
    """Requests may not name that address: ask the server's operator."""

    code, reason = "PERMISSION_DENIED", "NOT_ALLOWED"


class SourceRefused(PermissionDenied):
    """A store does not let this server read what it may, or what the server has to show it does not work."""

    reason = "SOURCE_REFUSED"


class Unauthenticated(ServiceError):
    """Nobody that this server knows: ask its operator for a token. Says what is needed, never what came."""

    code, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"


class TokenExpired(Unauthenticated):
    """A token that was good until it ended. `name` is its own: who shows its secret may be named."""

    reason = "TOKEN_EXPIRED"

    def __init__(self, name: str) -> None:
        super().__init__("this token has expired; the server's operator makes another by `queryselect token`")
        self.name = name


#: What Busy can be for want of: `limit` is one of these. A share is what another client is given in one's place.
BUSY = ("queue", "queue_wait", "host_memory", "device_memory", "rpcs", "streams", "selections", "share")


class Busy(ServiceError):
    """There is no room now: try again after `retry_after` seconds."""

    code, reason = "RESOURCE_EXHAUSTED", "BUSY"

    def __init__(self, message: str, *, retry_after: float, limit: str = "") -> None:
        super().__init__(message)
        self.retry_after, self.limit = retry_after, limit


class OutOfMemory(Busy):
    """The device ran out of memory; its caches are empty now, so trying again may help."""

    reason = "OUT_OF_MEMORY"


class DataLoss(ServiceError):
    """Bytes changed on the way, or did not come: send the same again."""

    code, reason = "DATA_LOSS", "DATA_LOSS"


class Aborted(ServiceError):
    """The stream was silent for too long: start again."""

    code, reason = "ABORTED", "IDLE"


class TooSlow(Aborted):
    """The upload was too slow for too long: start again, from nearer by."""

    reason = "SLOW"


class ObjectChanged(Aborted):
    """What is read by reference is another version now: start again, naming the one that is meant."""

    reason = "CHANGED"


class Unavailable(ServiceError):
    """The server is going away: try another."""

    code, reason = "UNAVAILABLE", "DRAINING"


class DeviceLost(Unavailable):
    """The server's device does not work: try another server, or again when it does."""

    reason = "DEVICE_LOST"


class SourceUnavailable(Unavailable):
    """Where the server reads a tensor from does not answer: try again."""

    reason = "SOURCE"


class Cancelled(ServiceError):
    """The caller does not want the answer any more."""

    code, reason = "CANCELLED", "CANCELLED"


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed."""

    code, reason = "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ended: the device's, Python's, that of torch's allocator on the host or of the system's threads.

    The last two have no error of their own.
    """
    texts = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED", "can't start new thread")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
