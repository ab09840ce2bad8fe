"""How fast a pool gets to the server, and what that costs.

One run measures, in alternation: a plain TCP connection over the loopback (into memory that is kept, as an upload is,
and into one small buffer again and again), the client's stream, a unary call beside it, and the same pool read by
reference from files that the system has in its cache; the server's peak memory and its CPU seconds per GB; then
`k_center_greedy` on a million rows by stream, and how soon a cancelled one stops.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
from pyarrow.parquet import write_table
from tqdm import tqdm

from benchmarks.machine import MB, Usage, in_flight
from benchmarks.service.loopback import QUIETLY, process, receiver, tcp
from queryselect import Cancelled, Client, RowRange, TensorRef
from queryselect.v1 import selection_pb2, selection_pb2_grpc, tensor_pb2

DIMS = 384
#: The payload of a way, and how often each goes.
GIGABYTES, ROUNDS = 1.0, 5
#: Of `k_center_greedy`.
ROWS, BUDGET = 1_000_000, 100

Row = dict[str, float]


def stream(client: Client, pool: np.ndarray[Any, Any] | TensorRef) -> float:
    """Seconds from `admitted` to the last byte in its place, its value checked: the server's own measure."""
    info = client.select("custom", 1, params={"name": "hold"}, embeddings=pool).info
    return info.receive + info.decode


def unary(stub: selection_pb2_grpc.SelectionServiceStub, pool: np.ndarray[Any, Any]) -> float:
    """Seconds of the whole call: nobody can say when the bytes have come."""
    request = selection_pb2.SelectRequest()
    request.strategy.custom.name = "hold"
    request.stop.max_items = 1
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=pool.shape, data=pool.tobytes())
    request.pool.embeddings.CopyFrom(tensor)
    del tensor
    started = time.perf_counter()
    stub.Select(request)
    return time.perf_counter() - started


def files(pool: np.ndarray[Any, Any], folder: Path) -> dict[str, TensorRef]:
    """The pool in files, by format."""
    np.save(folder / "pool.npy", pool)
    column = pa.FixedSizeListArray.from_arrays(pa.array(pool.reshape(-1)), pool.shape[1])
    write_table(pa.table({"embeddings": column}), folder / "pool.parquet", compression="none", use_dictionary=False)
    return {f"file, {path.suffix}": TensorRef(uri=path.as_uri()) for path in sorted(folder.iterdir())}


def transport(gigabytes: float, rounds: int) -> dict[str, Row]:
    """Rate, CPU and memory of every way, medians over the rounds."""
    rows = int(gigabytes * 1e9 / DIMS / 4)
    pool = np.random.default_rng(0).standard_normal((rows, DIMS), np.float32)
    half = pool.astype(np.float16)
    size = pool.nbytes / 1e9
    inline = str(pool.nbytes + (64 << 20))
    seen: dict[str, list[Row]] = defaultdict(list)
    with (
        TemporaryDirectory() as folder,
        receiver() as (tcp_pid, tcp_port),
        process("-m", "benchmarks.service.server", *QUIETLY) as (pid, (port, _)),
        process("-m", "benchmarks.service.server", *QUIETLY, "--allow-uris", Path(folder).as_uri()) as (
            reading_pid,
            (reading_port, _),
        ),
        # A server of its own: after a message of a gigabyte, gRPC's allocator keeps much of it for the next.
        process("-m", "benchmarks.service.server", *QUIETLY, "--max-inline-bytes", inline) as (
            unary_pid,
            (unary_port, _),
        ),
        Client(f"127.0.0.1:{port}") as client,
        Client(f"127.0.0.1:{reading_port}") as reading,
        grpc.insecure_channel(f"127.0.0.1:{unary_port}", [("grpc.max_send_message_length", -1)]) as channel,
    ):
        stub = selection_pb2_grpc.SelectionServiceStub(channel)
        ways: dict[str, tuple[int, Callable[[], float], float]] = {
            "raw TCP, kept": (tcp_pid, lambda: tcp(tcp_port, pool, keep=True), size),
            "raw TCP, dropped": (tcp_pid, lambda: tcp(tcp_port, pool, keep=False), size),
            "stream": (pid, lambda: stream(client, pool), size),
            "stream, 16 bits": (pid, lambda: stream(client, half), size / 2),
            "unary": (unary_pid, lambda: unary(stub, pool), size),
        }
        for name, ref in files(pool, Path(folder)).items():
            ways[name] = (reading_pid, lambda ref=ref: stream(reading, ref), size)  # type: ignore[misc]
            stream(reading, TensorRef(uri=ref.uri, rows=[RowRange(start=0, stop=1000)]))
        stream(client, pool[:1000])  # what libraries take once
        unary(stub, pool[:1000])
        idle = {each: Usage(each).before for each in (tcp_pid, pid, reading_pid, unary_pid)}
        for _round in tqdm(range(rounds), desc="rounds", unit=""):
            for name, (watched, way, sent) in ways.items():
                usage, own = Usage(watched, idle[watched]), time.process_time()
                seconds = way()
                seen[name].append(
                    {
                        "GB/s": sent / seconds,
                        "receiver CPU s/GB": usage.cpu / sent,
                        "sender CPU s/GB": (time.process_time() - own) / sent,
                        "receiver peak MB": usage.peak,
                        "payload MB": sent * 1e3,
                    }
                )
    for each in seen.values():
        for row, beside in zip(each, seen["stream"], strict=True):
            row["stream / this"] = beside["GB/s"] / row["GB/s"]
    return {name: {key: statistics.median(row[key] for row in each) for key in each[0]} for name, each in seen.items()}


def large(rows: int, budget: int) -> Row:
    """`k_center_greedy` by stream: time and memory; and the time in which a cancelled one stops."""
    pool = np.random.default_rng(0).standard_normal((rows, DIMS), np.float32)
    with (
        process("-m", "queryselect_service", *QUIETLY) as (pid, (port, metrics)),
        Client(f"127.0.0.1:{port}") as client,
    ):
        usage = Usage(pid)
        started = time.perf_counter()
        picks = client.select("k_center_greedy", budget, embeddings=pool, progress=True)
        seconds = time.perf_counter() - started
        found = {
            "rows": rows,
            "budget": budget,
            "seconds": seconds,
            "receive s": picks.info.receive,
            "kernel s": picks.info.kernel,
            "server peak MB": usage.peak,
            "payload MB": pool.nbytes / MB,
        }
        stopped = [_cancel(client, metrics, pool) for _ in tqdm(range(5), desc="cancelled", unit="")]
        return {**found, "cancelled to stopped ms, worst of 5": 1e3 * max(stopped)}


def _cancel(client: Client, metrics: int, pool: np.ndarray[Any, Any]) -> float:
    """Seconds from cancel() in the middle of the kernel until the server holds nothing for it any more."""
    selecting = threading.Event()

    def note(phase: str, done: int, _: int | None) -> None:
        if phase == "selecting" and done > 0:
            selecting.set()

    job = client.submit("k_center_greedy", 1000, embeddings=pool, progress=note)
    if not selecting.wait(120):
        raise RuntimeError("the selection did not begin within 120 s")
    started = time.perf_counter()
    job.cancel()
    while in_flight(metrics):
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    try:
        job.result()
    except Cancelled:
        return seconds
    raise RuntimeError("the selection was over before it was cancelled")


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Every way of a pool to the server, and a large selection by stream."""
    ways = transport(0.01, 1) if quick else transport(GIGABYTES, ROUNDS)
    found = large(20_000, 10) if quick else large(ROWS, BUDGET)
    over = ways["stream"]["receiver peak MB"] - ways["stream"]["payload MB"]
    return {"ways": ways, "large": found, "server's peak memory over the payload, MB": over}


def show(found: dict[str, Any]) -> str:
    """The tables, for people."""
    ways, selection = found["ways"], found["large"]
    columns = list(next(iter(ways.values())))
    lines = [f"{'':18}" + "".join(f"{name:>20}" for name in columns)]
    lines += [f"{name:18}" + "".join(f"{row[key]:20.2f}" for key in columns) for name, row in ways.items()]
    over = found["server's peak memory over the payload, MB"]
    lines += ["", f"server's peak memory over the payload: {over:.0f} MB", ""]
    lines += [f"{key:30}{value:14.2f}" for key, value in selection.items()]
    return "\n".join(lines)
