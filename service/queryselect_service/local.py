"""The service in the caller's own process: what `Client("local:")` runs on. No server, no socket, no copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from google.rpc import status_pb2

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2
from queryselect_service import status
from queryselect_service.call import Call
from queryselect_service.checks import check_request_id
from queryselect_service.device import find
from queryselect_service.service import Service
from queryselect_service.settings import Settings


class StatusError(Exception):
    """A failure, as the status that a server would have sent."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


class Local:
    """A service without a server. Thread-safe."""

    def __init__(self) -> None:
        self._service = Service(Settings(device=str(find("auto")[0])))  # one caller needs no more

    def select(
        self,
        message: selection_pb2.SelectRequest,
        buffers: Mapping[str, np.ndarray[Any, Any]],
        call: Call,
    ) -> selection_pb2.SelectResponse:
        """Selects; tensors marked as streamed are taken from `buffers` by path. Raises StatusError."""
        try:
            check_request_id(message.request_id)
            return self._service.select(message, call, buffers)
        except Exception as error:
            raise StatusError(status.from_exception(error, call.request_id)) from error

    def call(self, request_id: str, timeout: float | None, report: Callable[[int, int], None]) -> Call:
        """A caller who wants the answer within `timeout` seconds; its `leave` cancels. report: told how far."""
        return Call(request_id, None if timeout is None else time.monotonic() + timeout, report=report)

    def list_strategies(self) -> strategy_pb2.ListStrategiesResponse:
        """Describes every strategy."""
        return self._service.list_strategies()

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """Describes this process as a server."""
        self._service.engine.probe()  # which a server's health does
        return self._service.server_info()
