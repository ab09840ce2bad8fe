"""What the RPCs do, without gRPC: a message in, a message out. The servicers and callers in this process share it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2
from queryselect_service import strategy as strategies
from queryselect_service import wire
from queryselect_service.call import ANYONE, Call, Caller
from queryselect_service.engine import Engine
from queryselect_service.errors import OverLimit
from queryselect_service.request import Request
from queryselect_service.settings import Settings
from queryselect_service.sources.fetch import Fetch, Sources
from queryselect_service.strategy import Selection
from queryselect_service.stream import Stream

VERSION = version("queryselect")
#: Selections under way beyond those that wait for the device: the one that runs, and streams that have just begun.
STREAMS_BEYOND = 8
#: Requests that are read at a time. With 64 clients on two cores the 99th percentile of health checks was 54 to 76 ms
#: with one, 75 to 102 with two, 87 to 129 with any number, and one gave a tenth more answers.
DESKS = max(1, (os.cpu_count() or 1) // 2)


class Service:
    """One engine and the strategies it runs."""

    def __init__(self, settings: Settings) -> None:
        strategies.load()
        self.settings, self.engine = settings, Engine(settings)
        # At which few read requests and check values at a time: Python runs one thread at a time, and every other that
        # wants to run makes health checks and new calls wait longer.
        self.desk = threading.Semaphore(DESKS)
        self.sources = Sources(settings)
        # For the messages of streams; a server has its own, which are there from the start.
        self.readers = ThreadPoolExecutor(thread_name_prefix="inbox")
        self._described: tuple[list[strategies.Strategy], strategy_pb2.ListStrategiesResponse] | None = None

    def select(
        self, message: selection_pb2.SelectRequest, call: Call, buffers: wire.Buffers | None = None
    ) -> selection_pb2.SelectResponse:
        """Selects. buffers: tensors that are not in the message, by path; they are the caller's own memory.

        Raises ServiceError.
        """
        request, fetch = self.read(message, call, buffers or {})
        return self.run(request, fetch, call, held=0 if buffers else request.nbytes)

    def read(
        self, message: selection_pb2.SelectRequest, call: Call, buffers: wire.Buffers | None
    ) -> tuple[Request, Fetch]:
        """What a message asks for, checked, and what is to be read for it by reference. Raises ServiceError.

        buffers: see wire.decode. The request's tensors are not the message's memory, which may go.
        """
        with call.times.phase("decode"), self.desk:
            request = wire.decode(message, buffers, self.settings)
            call.strategy = request.strategy.name
            fetch = self.sources.fetch(request, call)
            if not fetch:
                request.check(self.settings, call.check)
        if fetch:
            with call.times.phase("receive"):
                fetch.open()
            with call.times.phase("decode"), self.desk:  # now types and shapes are known
                request.check(self.settings, call.check)
        call.sizes = {**request.letters, "k": request.max_items or 0}
        call.caller.check_rows(max(request.size, request.reference_rows))
        return request, fetch

    def run(
        self, request: Request, fetch: Fetch, call: Call, *, held: int, largest_answer: int | None = None
    ) -> selection_pb2.SelectResponse:
        """Selects. held: bytes of the request's tensors that this process keeps for it. Raises ServiceError.

        largest_answer: bytes that the answer may have.
        """
        size, selection = request.answer_bytes, None
        if largest_answer is not None and size > largest_answer:
            raise OverLimit("bytes of the answer", size, largest_answer, name="max_inline_bytes", field="returns")
        if fetch:  # as a stream whose client sends nothing
            with closing(Stream(self, iter(()), call)) as stream:
                *_, last = stream.answers(request, fetch, None)
            return last.result
        if not request.validate_only:
            with self.engine.admit(request, call, held=held) as place:
                selection = place.run(lambda: request.problem(call.check))
        return self.answer(selection, request, call)

    def select_stream(self, messages: Iterator[wire.StreamMessage], call: Call) -> Stream:
        """A stream of messages to be answered."""
        return Stream(self, messages, call)

    def answer(
        self, selection: Selection | None, request: Request, call: Call, large: wire.Large | None = None
    ) -> selection_pb2.SelectResponse:
        """The answer. large: see wire.encode."""
        with call.times.phase("encode"):
            answer = wire.encode(selection, request, large)
        answer.request_id = call.request_id
        answer.info.CopyFrom(wire.encode_info(call.times, call.device or self.engine.name, request, VERSION))
        return answer

    def list_strategies(self) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy, by name."""
        every = [*strategies.STRATEGIES.values(), *strategies.PLUGINS.values()]
        if self._described is None or self._described[0] != every:  # every client asks once, many at a time
            ordered = sorted(every, key=lambda each: each.name)
            described = strategy_pb2.ListStrategiesResponse(strategies=map(wire.describe, ordered))
            self._described = (every, described)
        answer = strategy_pb2.ListStrategiesResponse()
        answer.CopyFrom(self._described[1])
        return answer

    def server_info(self, caller: Caller = ANYONE) -> server_pb2.GetServerInfoResponse:
        """Describes the server to a caller, with memory as the last probe saw it."""
        engine, devices = self.engine, []
        for each in engine.devices:
            _, memory = each.seen  # and not as it is now: a device may not answer
            devices.append(
                server_pb2.Device(
                    name=str(each),
                    model=each.model,
                    free_bytes=memory.get("free"),
                    total_bytes=memory.get("total"),
                    capacity_bytes=engine.host.capacity if each.capacity is None else each.capacity,
                )
            )
        return server_pb2.GetServerInfoResponse(
            version=VERSION,
            devices=devices,
            limits=wire.encode_limits(self.settings, caller),
            dtypes=list(wire.DTYPES),
            uri_schemes=self.sources.schemes,
            recommended_chunk_bytes=wire.RECOMMENDED_CHUNK_BYTES,
        )
