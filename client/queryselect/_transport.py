"""Ways to a service: over gRPC, or in this process. The client does not tell them apart."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import grpc
from numpy.typing import NDArray

from queryselect._errors import Cancelled, DataLoss, Unavailable, from_rpc, from_status
from queryselect._picks import enum_name
from queryselect._request import Prepared
from queryselect._upload import Download, Upload, serialize
from queryselect.v1 import (
    selection_pb2,
    selection_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    strategy_pb2_grpc,
)

Answer = TypeVar("Answer")

_SERVICE = selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].full_name

#: Told the phase, the work done and the work in all (None where unknown).
Report = Callable[[str, int, int | None], object]
#: A response, and its tensors that came apart from it, by name.
Response = tuple[selection_pb2.SelectResponse, Mapping[str, NDArray[Any]]]

MIB = 1 << 20
#: Requests of at most so many bytes, with answers no larger, go in one message; larger ones are streamed.
UNARY_BYTES = 4 * MIB
#: Room for a message: what a server may answer at once, which is mostly the ids of a million picks.
ANSWER_BYTES = 256 * MIB


#: How requests are shared among servers where the target names several, as a headless Service of Kubernetes does: in
#: turn, and none to a server that says that it is not ready, so that one that drains is left before it refuses.
BALANCED = {"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": _SERVICE}}
#: gRPC's words where servers are there and none is known to be ready.
_UNREADY = re.compile("backend unhealthy|health check call failed")
#: Targets that never leave this machine.
_LOOPBACK = re.compile(r"(dns:/*|ipv4:|ipv6:)?(localhost|127\.[\d.]+|\[::1\]|::1)(:\d+)?$|unix:")


class Cancel:
    """A caller's wish to stop, which reaches whatever runs just now."""

    def __init__(self) -> None:
        self.event, self._lock = threading.Event(), threading.Lock()
        self._stop: Callable[[], Any] | None = None

    def attach(self, stop: Callable[[], Any]) -> None:
        """Names what to call on cancel; calls it at once where the wish came before."""
        with self._lock:
            self._stop = stop
        if self.event.is_set():
            stop()

    def cancel(self) -> None:
        """Stops what runs."""
        self.event.set()
        with self._lock:
            stop = self._stop
        if stop is not None:
            stop()


class Transport(Protocol):
    """A way to a service. Methods raise QuerySelectError; timeouts are in seconds, None for none."""

    def select(self, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report) -> Response: ...

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse: ...

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse: ...

    def close(self) -> None: ...


class Stubs:
    """What a server can be asked over one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.selection = selection_pb2_grpc.SelectionServiceStub(channel)
        # Beside the generated one, which would copy a chunk's bytes twice more.
        self.select_stream = channel.stream_stream(
            f"/{_SERVICE}/SelectStream", serialize, selection_pb2.SelectStreamResponse.FromString
        )
        self.strategy = strategy_pb2_grpc.StrategyServiceStub(channel)
        self.server = server_pb2_grpc.ServerServiceStub(channel)


class Remote:
    """A server, over gRPC; where its name leads to several, those that are ready, in turn.

    Where none says that it is ready, one is asked all the same. It says why it is not, where gRPC would not; and behind
    a proxy, which may send health's question to one server and the next request to another, or let it through to none,
    the answer of health is not everyone's.
    """

    def __init__(self, target: str, *, token: str | None, tls: bool | grpc.ChannelCredentials | None) -> None:
        options = [
            ("grpc.max_send_message_length", -1),  # what is too large, the server says
            ("grpc.max_receive_message_length", ANSWER_BYTES),
            ("grpc.enable_retries", 0),  # the client retries by itself: gRPC's own forgets requests over 256 KiB
            # A channel that has lost its servers tries to reach them by itself, by gRPC's defaults after a second first
            # and every two minutes in the end: so long after they are back calls would fail, and at once.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5_000),
        ]
        balanced = [*options, ("grpc.service_config", json.dumps(BALANCED))]
        if tls:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            channels = [grpc.secure_channel(target, credentials, each) for each in (balanced, options)]
        else:
            if token and not _LOOPBACK.match(target):
                raise ValueError(f"a token would travel in clear text to {target}; use tls")
            channels = [grpc.insecure_channel(target, each) for each in (balanced, options)]
        if token and not (token.isascii() and token.isprintable()):
            raise ValueError("a token has printable ASCII characters only; this one has others, perhaps a line break")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._ready, self._any = map(Stubs, channels)  # a channel connects when it is first asked

    def select(self, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report) -> Response:
        """One unary call with every array inside, or a stream where there is much to send or to be sent back."""
        way = self._stream if max(prepared.num_bytes, prepared.answer_bytes) > UNARY_BYTES else self._unary
        return self._asked(lambda stubs, left: way(stubs, prepared, left, cancel, report), timeout)

    def _asked(self, ask: Callable[[Stubs, float | None], Answer], timeout: float | None) -> Answer:
        """The answer of a server that is ready or, where none is known to be, of any."""
        began = time.monotonic()
        try:
            return ask(self._ready, timeout)
        except Unavailable as error:
            if not _UNREADY.search(str(error)):
                raise
        return ask(self._any, None if timeout is None else timeout - (time.monotonic() - began))

    def _unary(
        self, stubs: Stubs, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report
    ) -> Response:
        report("selecting", 0, prepared.message.stop.max_items)  # a unary call tells nothing on its way
        prepared.inline()
        request_id = prepared.message.request_id
        call = _begun(
            stubs.selection.Select.future, prepared.message, timeout=timeout, metadata=self._named(request_id)
        )
        cancel.attach(call.cancel)
        return _result(call.result, prepared.message.request_id), {}

    def _stream(
        self, stubs: Stubs, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report
    ) -> Response:
        upload, download = Upload(prepared), Download()
        if upload.num_bytes:
            report("receiving", 0, upload.num_bytes)
        request_id = prepared.message.request_id
        call = _begun(stubs.select_stream, iter(upload), timeout=timeout, metadata=self._named(request_id))
        cancel.attach(call.cancel)

        def listen() -> None:
            for response in call:
                if response.HasField("admitted"):
                    upload.admit(response.admitted.recommended_chunk_bytes)
                elif response.HasField("progress"):
                    progress = response.progress
                    phase = enum_name(selection_pb2.Phase.DESCRIPTOR, progress.phase).lower()
                    report(phase, progress.done, progress.total if progress.HasField("total") else None)
                elif response.HasField("result"):
                    download.start(response.result)
                elif response.HasField("chunk"):
                    download.write(response.chunk)

        try:
            _result(listen, prepared.message.request_id)
        finally:
            call.cancel()  # where the caller's own callback has failed; after the end it does nothing
            upload.stop()
        if download.message is None or not download.complete:
            raise DataLoss("the stream ended before the whole answer came", request_id=prepared.message.request_id)
        return download.message, download.arrays

    def _named(self, request_id: str) -> Any:
        """Metadata with the id, so that a server that refuses the call unread can name it too."""
        fine = request_id and request_id.isascii() and request_id.isprintable()  # what is not, the server refuses
        return (*self._metadata, ("x-request-id", request_id)) if fine else self._metadata

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse:
        """Asks for the strategies."""
        request = strategy_pb2.ListStrategiesRequest()
        return self._asked(
            lambda stubs, left: _result(
                lambda: stubs.strategy.ListStrategies(request, timeout=left, metadata=self._metadata)
            ),
            timeout,
        )

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse:
        """Asks for the description."""
        request = server_pb2.GetServerInfoRequest()
        return self._asked(
            lambda stubs, left: _result(
                lambda: stubs.server.GetServerInfo(request, timeout=left, metadata=self._metadata)
            ),
            timeout,
        )

    def close(self) -> None:
        """Closes the channels; running calls are cancelled."""
        for each in (self._ready, self._any):
            each.channel.close()


def _begun(start: Callable[..., Any], message: Any, **options: Any) -> Any:
    """The call. Raises Cancelled where the channel was closed a moment ago."""
    try:
        return start(message, **options)
    except ValueError as error:
        raise Cancelled(f"the client was closed: {error}") from None


def _result(ask: Callable[[], Answer], request_id: str = "") -> Answer:
    """The answer, or the error that a failed RPC tells of. request_id: what was sent, where the server can't tell."""
    try:
        return ask()
    except grpc.FutureCancelledError:
        raise Cancelled("the call was cancelled", request_id=request_id) from None
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)  # every error that a stub raises is one
        raise from_rpc(error, request_id) from None


class InProcess:
    """The service in this process."""

    def __init__(self) -> None:
        try:
            from queryselect_service.local import Local, StatusError  # noqa: PLC0415  # needs the [service] extra
        except ImportError as error:
            message = f'Client("local:") needs {error.name}: pip install "queryselect[service]"'
            raise ImportError(message) from error
        self._local, self._failure = Local(), StatusError

    def select(self, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report) -> Response:
        """One call; arrays are not copied."""
        report("selecting", 0, prepared.message.stop.max_items)

        failed: list[BaseException] = []

        def note(done: int, total: int) -> None:
            try:
                report("selecting", done, total)
            except BaseException as error:  # noqa: BLE001  # the caller's own: raised below, in the caller's thread
                failed.append(error)
                call.leave()

        call = self._local.call(prepared.message.request_id, timeout, note)
        cancel.attach(call.leave)
        buffers = {path: array.data for path, array in prepared.arrays.items()}
        try:
            return self._local.select(prepared.message, buffers, call), {}
        except self._failure as error:
            if failed:
                raise failed[0] from None
            raise from_status(error.status, call.request_id) from error.__cause__

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse:  # noqa: ARG002
        """Asks for the strategies."""
        return self._local.list_strategies()

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse:  # noqa: ARG002
        """Asks for the description."""
        return self._local.server_info()

    def close(self) -> None:
        """There is nothing to close."""
