"""One SelectStream: a start, chunks in, the answer out. Without gRPC: an iterator of messages in, one of messages out.

Requirements that the design meets:

- What can be refused is refused before the bytes travel: `admitted` says that they may.
- The device is not held while bytes travel: a slow client would hold up everyone. A stream has its place and its memory
  from the start, and joins the line for the device when its bytes are here.
- A strategy that scores rows one by one scores them as they come, a few blocks per turn on the device.
- Silence ends a stream, and so does an upload that is too slow for too long; the server's own slowness counts as
  neither.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import closing
from typing import TYPE_CHECKING

from queryselect.v1 import selection_pb2
from queryselect_service import wire
from queryselect_service.call import Call
from queryselect_service.engine import POLL, Place
from queryselect_service.errors import Aborted, Cancelled, InvalidInput, ServiceError, TooSlow
from queryselect_service.queue import Job
from queryselect_service.request import Request
from queryselect_service.scores import Scores
from queryselect_service.sources.fetch import Fetch
from queryselect_service.strategy import Selection
from queryselect_service.upload import Part, Upload, held_bytes, in_blocks

if TYPE_CHECKING:
    from queryselect_service.service import Service

#: Messages that are read before they are asked for: what lets the next come while one is copied.
READ_AHEAD = 2
#: The least time between two messages of progress, in seconds.
PROGRESS_EVERY = 0.2


class Inbox:
    """The client's messages, read by another thread, so that silence and cancellation are noticed."""

    def __init__(self, messages: Iterator[wire.StreamMessage], threads: Executor) -> None:
        self._messages, self._waiting = messages, deque[wire.StreamMessage]()
        self._changed, self._ended, self._closed = threading.Condition(), False, False
        self._error: Exception | None = None
        self._ahead = 1  # nothing but the start until there is room for more
        threads.submit(self._read)

    def _read(self) -> None:
        try:
            for message in self._messages:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._waiting) < self._ahead or self._closed)
                    if self._closed:
                        return
                    self._waiting.append(message)
                    del message
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001  # whoever reads is told, or finds that the caller has gone
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def admit(self) -> None:
        """Chunks may come."""
        with self._changed:
            self._ahead = READ_AHEAD
            self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Waits for a message or the end, at most so long; whether there is something to take."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting) or self._ended, seconds)

    def take(self) -> wire.StreamMessage | None:
        """The next message, after `wait`; None at the end.

        Raises Cancelled where the messages broke off, InvalidInput where one is none.
        """
        with self._changed:
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
        if isinstance(self._error, ServiceError):
            raise self._error
        if self._error is not None:
            raise Cancelled("the caller has gone") from self._error
        return None

    def close(self) -> None:
        """Nobody reads any more."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()


class Stream:
    """One SelectStream at work."""

    def __init__(self, service: Service, messages: Iterator[wire.StreamMessage], call: Call) -> None:
        self._service, self._call, self._times = service, call, call.times
        self._inbox = Inbox(messages, service.readers)
        self._waited = 0.0  # seconds for the client's messages
        self._told = 0.0  # when progress was told last
        self._step: tuple[int, int] | None = None  # of the selection: done, total
        call.report = self._note

    def close(self) -> None:
        """Reads no more."""
        self._inbox.close()

    def start(self) -> selection_pb2.SelectRequest:
        """The first message. Raises InvalidInput where it is no start."""
        with self._times.phase("receive"):
            first = next((message for message in self._messages() if message is not None), None)
        if first is None:
            self._call.ended_early()
        if not isinstance(first, selection_pb2.SelectRequest):
            raise InvalidInput("a stream needs a start as its first message; it has another, or none", field="start")
        return first

    def run(self, start: selection_pb2.SelectRequest) -> Iterator[wire.StreamResponse]:
        """What follows the start. Raises ServiceError."""
        request, fetch = self._service.read(start, self._call, None)
        del start  # its tensors are read
        yield from self.answers(request, fetch, {})

    def answers(self, request: Request, fetch: Fetch, large: wire.Large | None) -> Iterator[wire.StreamResponse]:
        """What follows a checked start. large: see wire.encode. Raises ServiceError."""
        service, call, times = self._service, self._call, self._times
        blockwise = any(in_blocks(request, array) for array in request.arrays)
        selection, held = None, held_bytes(request) + fetch.held_bytes
        with closing(fetch), service.engine.admit(request, call, held=held, resident=not blockwise) as place:
            upload = Upload(request, place.reserve, call.check)
            scores = Scores(request, place, upload) if blockwise else None
            self._inbox.admit()
            yield wire.encode_admitted(call.request_id, place.reserved)
            with times.phase("receive"):
                yield from self._receive(upload, scores, fetch)
            place.settle()
            if not request.validate_only:
                values = None if scores is None else scores.values
                left = None if scores is None else float(request.size)  # the ranking of what is scored
                job = place.start_selection(lambda: request.problem(call.check, values), left)
                yield from self._progress(place, job)
                selection = place.result(job)
            answer = service.answer(selection, request, call, large)
            with times.phase("encode"):
                yield from wire.encode_result(answer, large)

    def _messages(self) -> Iterator[wire.StreamMessage | None]:
        """The client's messages; None where none came for a while. Raises Aborted after too long a silence."""
        silent, limit = time.monotonic(), self._service.settings.idle_stream
        while True:
            self._call.check()
            asked = time.monotonic()
            come = self._inbox.wait(POLL)
            self._waited += time.monotonic() - asked
            if not come:
                if time.monotonic() - silent > limit:
                    raise Aborted(f"the stream was silent for {limit:g} s")
                yield None
                continue
            message = self._inbox.take()
            if message is None:
                return
            said = not isinstance(message, Part) or len(message.data) > 0
            yield message
            if said:
                silent = time.monotonic()  # what was done with the message is no silence

    def _receive(self, upload: Upload, scores: Scores | None, fetch: Fetch) -> Iterator[wire.StreamResponse]:
        """Takes the chunks, and has rows scored as they come."""
        total = upload.total
        for message in self._parts(fetch, upload):
            if isinstance(message, Part):
                with self._times.phase("decode"), self._service.desk:
                    upload.write(message)
            elif message is not None:
                raise InvalidInput("a stream has one start and then chunks; it has another message", field="start")
            self._check_pace(upload.received)
            if scores is not None:
                scores.advance(self._call)
            if self._may_tell():
                yield wire.encode_progress("RECEIVING", upload.received, total)
        if upload.received < upload.total:
            self._call.ended_early()
        with self._times.phase("decode"), self._service.desk:
            upload.finish()
        while scores is not None and not scores.finish(self._call, PROGRESS_EVERY):
            ahead = scores.ahead()
            if ahead is not None:
                yield wire.encode_progress("QUEUED", ahead, None)

    def _parts(self, fetch: Fetch, upload: Upload) -> Iterator[wire.StreamMessage | None]:
        """The client's messages, and what is read by reference: as much of it at a time, then the rest."""
        read, come, parts = 0, 0, fetch.parts()
        theirs = upload.total - fetch.total
        for message in self._messages():
            if isinstance(message, Part) and message.path in fetch:
                raise InvalidInput(f"{message.path} is read by reference; there is a chunk of it", field=message.path)
            yield message
            come += len(message.data) if isinstance(message, Part) else 0
            while read * theirs < come * fetch.total and (part := next(parts, None)) is not None:
                yield part
                read += len(part.data)
        yield from parts

    def _check_pace(self, received: int) -> None:
        """Raises TooSlow where the client has kept its place and its memory waiting for too long."""
        settings = self._service.settings
        rate, late = settings.min_upload_rate, self._waited - settings.upload_grace
        if received < rate * late:
            words = f"{received} bytes came in {self._waited:.0f} s, fewer than {rate} per second beyond the first"
            raise TooSlow(f"{words} {settings.upload_grace:g} s")

    def _progress(self, place: Place, job: Job[Selection]) -> Iterator[wire.StreamResponse]:
        """Tells how far the selection is until it has ended."""
        while not place.wait(job, PROGRESS_EVERY):
            if self._step is not None:
                yield wire.encode_progress("SELECTING", *self._step)
            elif not job.begun:
                yield wire.encode_progress("QUEUED", place.ahead(job), None)

    def _note(self, done: int, total: int) -> None:
        """Called from the device's thread."""
        self._step = (done, total)

    def _may_tell(self) -> bool:
        now = time.monotonic()
        if now - self._told < PROGRESS_EVERY:
            return False
        self._told = now
        return True
