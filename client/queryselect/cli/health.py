"""`queryselect health`: asks a server's health service, for people, containers and scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(arguments: Sequence[str]) -> int:
    """Prints the status. Returns 0 where it is SERVING, 1 where it is not, 2 where nobody answers."""
    parser = argparse.ArgumentParser(prog="queryselect health", description="Asks whether a server is ready.")
    parser.add_argument("target", nargs="?", default="localhost:50051", help="host:port (default %(default)s)")
    parser.add_argument(
        "--service", default="queryselect.v1.SelectionService", help="default %(default)s; '' is liveness"
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds (default %(default)s)")
    chosen = parser.parse_args(arguments)
    with grpc.insecure_channel(chosen.target) as channel:
        request = health_pb2.HealthCheckRequest(service=chosen.service)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]  # missing in its stubs
                request, timeout=chosen.timeout
            )
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # every error that a stub raises is one
            print(f"{chosen.target}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 2
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1
