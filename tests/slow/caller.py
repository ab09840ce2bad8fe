"""A client that goes as far as one phase of a selection, says so, and waits to be killed.

python -m tests.slow.caller TARGET PHASE
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np

from queryselect._upload import chunk, serialize
from queryselect.v1 import selection_pb2, selection_pb2_grpc, server_pb2, server_pb2_grpc, strategy_pb2, tensor_pb2

ROWS, DIMS, CHUNK = 70_000, 200, 1 << 20
#: In the order of a stream; then that of a unary call.
PHASES = ("connected", "opened", "admitted", "upload", "queue", "kernel", "download", "unary kernel")


def here() -> None:
    """This is the phase."""
    print("here", flush=True)  # noqa: T201  # for whoever waits to end this process
    time.sleep(60)


def pool() -> np.ndarray:
    return np.random.default_rng(0).random((ROWS, DIMS), np.float32)


def request(data: bytes | None, num_rows: int = 0) -> selection_pb2.SelectRequest:
    """A selection that takes minutes; without data, of what is streamed. num_rows: random keys for so many instead."""
    found = selection_pb2.SelectRequest(stop={"max_items": ROWS - 5})
    if num_rows:
        found.strategy.CopyFrom(strategy_pb2.Strategy(random={}))
        found.pool.num_rows = num_rows
        found.stop.max_items = 5
        found.returns.append(selection_pb2.RETURN_POOL_SCORES)
        return found
    found.strategy.CopyFrom(strategy_pb2.Strategy(k_center_greedy={}))
    embeddings = found.pool.embeddings
    embeddings.dtype = tensor_pb2.DATA_TYPE_F32
    embeddings.shape.extend((ROWS, DIMS))
    if data is None:
        embeddings.streamed.SetInParent()
    else:
        embeddings.data = data
    return found


def messages(
    channel: grpc.Channel, phase: str, admitted: threading.Event
) -> Iterator[selection_pb2.SelectStreamRequest | bytes]:
    if phase == "opened":
        # What a connection carries comes in order: once this is answered, the server knows of the stream.
        server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest(), timeout=10)
        here()
    yield selection_pb2.SelectStreamRequest(start=request(None, 3_000_000 if phase == "download" else 0))
    if phase == "download":
        return
    data = pool().reshape(-1).view(np.uint8).data
    admitted.wait()
    if phase == "admitted":
        here()
    for offset in range(0, len(data), CHUNK):
        if phase == "upload" and offset > len(data) // 2:
            here()
        yield chunk("pool.embeddings", offset, data[offset : offset + CHUNK])


def main(target: str, phase: str) -> None:
    admitted = threading.Event()
    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(10)
        if phase == "connected":
            here()
        if phase == "unary kernel":
            call = selection_pb2_grpc.SelectionServiceStub(channel).Select.future(request(pool().tobytes()))
            here()
            call.cancel()
        stream = channel.stream_stream(
            "/queryselect.v1.SelectionService/SelectStream", serialize, selection_pb2.SelectStreamResponse.FromString
        )
        for answer in stream(messages(channel, phase, admitted)):
            progress = selection_pb2.Phase.Name(answer.progress.phase).removeprefix("PHASE_")
            if answer.HasField("admitted"):
                admitted.set()
            elif (phase, progress) in {("queue", "QUEUED"), ("kernel", "SELECTING")} or (
                phase == "download" and answer.HasField("result")
            ):
                here()


if __name__ == "__main__":
    main(*sys.argv[1:])
