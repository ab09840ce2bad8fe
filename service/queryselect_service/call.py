"""One caller, as everything behind the transport knows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from queryselect_service.errors import Busy, Cancelled, DeadlineExceeded, OverLimit
from queryselect_service.times import Times

#: The messages of a caller who leaves may end as if that were all; how soon after gRPC says that it left, in seconds.
LEAVING = 0.25


@dataclass(frozen=True)
class Caller:
    """Whose token came, and what it may have beside the server's own limits; None: as much as those allow.

    max_rows: N of one request. max_bytes: host memory of one request. max_in_flight: selections at a time.
    """

    name: str
    max_rows: int | None = None
    max_bytes: int | None = None
    max_in_flight: int | None = None

    def check_rows(self, rows: int) -> None:
        """Raises OverLimit."""
        self._check("rows", rows, self.max_rows, "max_rows")

    def check_bytes(self, nbytes: int) -> None:
        """Raises OverLimit."""
        self._check("bytes of host memory", nbytes, self.max_bytes, "max_bytes")

    def _check(self, what: str, size: int, limit: int | None, name: str) -> None:
        if limit is not None and size > limit:
            raise OverLimit(what, size, limit, name=name, field="pool", whose="this token's")


#: Who calls where no token is needed.
ANYONE = Caller("")


@dataclass(eq=False)
class Call:
    """One caller: whether it still wants the answer, until when (time.monotonic), and whom to tell how far it is.

    peer: whose request it is; what is shared is shared fairly between peers. Where callers show tokens a peer is a
    token: who opens more connections has no more then, nor have more machines of one team, and a labelling tool that
    serves several teams gives each its own. Elsewhere it is a connection. caller: what its token allows.
    admitted: whether it has its place and its memory. reserved: the bytes that were set aside then. begun: whether the
    device has worked for it. device: the name of that one. stirred: set when anything happened that whoever waits for
    this call should look at.
    strategy, sizes: what it asks for, by a name that this server knows and by letter, as far as that has been read.
    uploaded: the bytes of its messages so far. fetched: of its tensors, read by reference. times: where its time goes.
    """

    request_id: str
    deadline: float | None = None
    report: Callable[[int, int], None] = lambda *_: None
    peer: str = ""
    caller: Caller = ANYONE
    reserved: int = 0
    admitted: bool = False
    begun: bool = False
    device: str = ""
    refused: tuple[str, float] | None = None  # why, and the seconds after which to come back
    strategy: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)
    uploaded: int = 0
    fetched: int = 0
    times: Times = field(default_factory=Times)
    gone: threading.Event = field(default_factory=threading.Event)
    stirred: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raises Cancelled, DeadlineExceeded, or Busy where the call was refused."""
        if self.deadline is not None and time.monotonic() > self.deadline:  # first: then the caller goes, too
            raise DeadlineExceeded("the caller's deadline has passed")
        if self.gone.is_set():
            raise Cancelled("the caller has gone")
        if self.refused is not None:
            words, retry_after = self.refused
            raise Busy(words, retry_after=retry_after, limit="share")

    def ended_early(self) -> None:
        """The messages are fewer than they must be. Raises as `check` does where that is because the caller leaves."""
        if self.gone.wait(LEAVING):
            self.check()

    def leave(self) -> None:
        """The caller has gone."""
        self.gone.set()
        self.stirred.set()

    def refuse(self, words: str, retry_after: float) -> None:
        """Has whoever works for the call raise Busy soon."""
        self.refused = (words, retry_after)
        self.stirred.set()
