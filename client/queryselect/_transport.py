"""Ways to a service: over gRPC, or in this process. The client does not tell them apart."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import grpc

from queryselect._errors import Cancelled, TooLarge, from_rpc, from_status
from queryselect._request import Prepared
from queryselect.v1 import (
    selection_pb2,
    selection_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
    strategy_pb2,
    strategy_pb2_grpc,
)

Answer = TypeVar("Answer")

#: Told the work done and the work in all.
Report = Callable[[int, int], None]

MIB = 1 << 20
#: What fits one message to a server with default limits.
INLINE_BYTES = 64 * MIB
#: Room for the answer: pool_scores of a full message, a million picks, and their ids.
ANSWER_BYTES = 256 * MIB


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

    def select(
        self, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report
    ) -> selection_pb2.SelectResponse: ...

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse: ...

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse: ...

    def close(self) -> None: ...


class Remote:
    """A server, over gRPC."""

    def __init__(self, target: str, *, token: str | None, tls: bool | grpc.ChannelCredentials | None) -> None:
        options = [
            ("grpc.max_send_message_length", INLINE_BYTES + MIB),
            ("grpc.max_receive_message_length", ANSWER_BYTES),
            ("grpc.enable_retries", 0),  # the client retries by itself: gRPC's own forgets requests over 256 KiB
        ]
        if tls:
            credentials = grpc.ssl_channel_credentials() if tls is True else tls
            self._channel = grpc.secure_channel(target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(target, options)
            if token and not _LOOPBACK.match(target):
                raise ValueError(f"a token would travel in clear text to {target}; use tls")
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._selection = selection_pb2_grpc.SelectionServiceStub(self._channel)
        self._strategy = strategy_pb2_grpc.StrategyServiceStub(self._channel)
        self._server = server_pb2_grpc.ServerServiceStub(self._channel)

    def select(
        self,
        prepared: Prepared,
        timeout: float | None,
        cancel: Cancel,
        report: Report,  # noqa: ARG002  # a unary call tells nothing on its way
    ) -> selection_pb2.SelectResponse:
        """One unary call with every array inside."""
        if prepared.num_bytes > INLINE_BYTES:
            raise TooLarge(f"the inputs are {prepared.num_bytes} bytes; one message takes {INLINE_BYTES}")
        call = self._selection.Select.future(prepared.inline(), timeout=timeout, metadata=self._metadata)
        cancel.attach(call.cancel)
        return _result(call.result, prepared.message.request_id)

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse:
        """Asks for the strategies."""
        request = strategy_pb2.ListStrategiesRequest()
        return _result(lambda: self._strategy.ListStrategies(request, timeout=timeout, metadata=self._metadata))

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse:
        """Asks for the description."""
        request = server_pb2.GetServerInfoRequest()
        return _result(lambda: self._server.GetServerInfo(request, timeout=timeout, metadata=self._metadata))

    def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        self._channel.close()


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

    def select(
        self, prepared: Prepared, timeout: float | None, cancel: Cancel, report: Report
    ) -> selection_pb2.SelectResponse:
        """One call; arrays are not copied."""
        call = self._local.call(prepared.message.request_id, timeout, report)
        cancel.attach(call.gone.set)
        buffers = {path: array.data for path, array in prepared.arrays.items()}
        try:
            return self._local.select(prepared.message, buffers, call)
        except self._failure as error:
            raise from_status(error.status, call.request_id) from error.__cause__

    def list_strategies(self, timeout: float | None) -> strategy_pb2.ListStrategiesResponse:  # noqa: ARG002
        """Asks for the strategies."""
        return self._local.list_strategies()

    def server_info(self, timeout: float | None) -> server_pb2.GetServerInfoResponse:  # noqa: ARG002
        """Asks for the description."""
        return self._local.server_info()

    def close(self) -> None:
        """There is nothing to close."""
