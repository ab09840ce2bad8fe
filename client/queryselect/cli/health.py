"""`queryselect health`: asks a server's health service, for people, containers and scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(arguments: Sequence[str]) -> int:
    """Prints the status. Returns 0 where it is SERVING, 1 where it is not, 2 where nobody answers."""
    parser = argparse.ArgumentParser(prog="queryselect health", description="Asks whether a server is ready.")
    parser.add_argument("target", nargs="?", default="localhost:50051", help="host:port (default %(default)s)")
    parser.add_argument(
        "--service", default="queryselect.v1.SelectionService", help="default %(default)s; '' is liveness"
    )
    parser.add_argument(
        "--tls", action="store_true", help="speak TLS by the public CAs that gRPC knows; what follows implies it"
    )
    parser.add_argument("--ca", help="PEM file of the CAs to trust instead")
    parser.add_argument("--cert", help="PEM file of the certificate to show, where the server asks for one")
    parser.add_argument("--key", help="PEM file of its private key")
    parser.add_argument("--server-name", help="name that the server's certificate is for (default: the target's host)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default %(default)s)")
    chosen = parser.parse_args(arguments)
    if (chosen.cert is None) != (chosen.key is None):
        parser.error("--cert and --key need each other")
    try:
        channel = _channel(chosen)
    except OSError as error:
        parser.error(str(error))
    with channel:
        request = health_pb2.HealthCheckRequest(service=chosen.service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]  # missing in its stubs
                request, timeout=chosen.timeout
            )
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # every error that a stub raises is one
            unknown = f"no service {chosen.service!r} there" if error.code() is grpc.StatusCode.NOT_FOUND else ""
            print(f"{chosen.target}: {error.code().name}: {unknown or error.details()}", file=sys.stderr)
            return 2
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _channel(chosen: argparse.Namespace) -> grpc.Channel:
    """The connection. Raises OSError for a file that can't be read."""
    files = [None if path is None else Path(path).read_bytes() for path in (chosen.ca, chosen.key, chosen.cert)]
    if not (chosen.tls or chosen.server_name or any(files)):
        return grpc.insecure_channel(chosen.target)
    options = [("grpc.ssl_target_name_override", chosen.server_name)] if chosen.server_name else None
    return grpc.secure_channel(chosen.target, grpc.ssl_channel_credentials(*files), options)
