"""What the RPCs do, without gRPC: a message in, a message out. The servicers and callers in this process share it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2
from queryselect_service import strategy as strategies
from queryselect_service import wire
from queryselect_service.engine import Call, Engine, Times
from queryselect_service.errors import OverLimit
from queryselect_service.request import Request
from queryselect_service.settings import Settings
from queryselect_service.strategy import Selection
from queryselect_service.stream import Stream

VERSION = version("queryselect")


class Service:
    """One engine and the strategies it runs."""

    def __init__(self, settings: Settings) -> None:
        strategies.load()
        self.settings, self.engine = settings, Engine(settings)

    def select(
        self,
        message: selection_pb2.SelectRequest,
        call: Call,
        buffers: wire.Buffers | None = None,
        *,
        largest_answer: int | None = None,
    ) -> selection_pb2.SelectResponse:
        """Selects. buffers: tensors that are not in the message, by path. Raises ServiceError.

        largest_answer: bytes that the answer may have.
        """
        started, times = time.monotonic(), Times()
        request = wire.decode(message, buffers or {}, self.settings)
        request.check(self.settings, call.check)
        size = request.answer_bytes
        if largest_answer is not None and size > largest_answer:
            raise OverLimit("bytes of the answer", size, largest_answer, name="max_inline_bytes", field="returns")
        times.decode = time.monotonic() - started
        selection = None
        if not request.validate_only:
            held = 0 if buffers else sum(array.nbytes for array in request.arrays)  # or they are the caller's own
            with self.engine.admit(request, call, times, held=held) as place:
                selection = place.run(lambda: request.problem(call.check))
        return self.answer(selection, request, call, times, started)

    def select_stream(self, messages: Iterator[wire.StreamMessage], call: Call) -> Stream:
        """A stream of messages to be answered."""
        return Stream(self, messages, call)

    def answer(
        self,
        selection: Selection | None,
        request: Request,
        call: Call,
        times: Times,
        started: float,
        large: wire.Large | None = None,
    ) -> selection_pb2.SelectResponse:
        """The answer. started: when the request came (time.monotonic). large: see wire.encode."""
        answer = wire.encode(selection, request, large)
        answer.request_id = call.request_id
        total = time.monotonic() - started
        answer.info.CopyFrom(
            wire.encode_info(times, total, str(self.engine.device), request.compute_dtype, request.seed, VERSION)
        )
        return answer

    def list_strategies(self) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy, by name."""
        every = (*strategies.STRATEGIES.values(), *strategies.PLUGINS.values())
        return strategy_pb2.ListStrategiesResponse(
            strategies=[wire.describe(each) for each in sorted(every, key=lambda each: each.name)]
        )

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Describes the server."""
        free, total = self.engine.memory()
        device = server_pb2.Device(
            name=str(self.engine.device), model=self.engine.model, free_bytes=free, total_bytes=total
        )
        return server_pb2.GetServerInfoResponse(
            version=VERSION,
            devices=[device],
            limits=wire.encode_limits(self.settings),
            dtypes=list(wire.DTYPES),
            recommended_chunk_bytes=wire.RECOMMENDED_CHUNK_BYTES,
        )
