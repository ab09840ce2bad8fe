"""What a bad token costs, by what is bad: the check itself in this process, and a refused call of a server."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.progress import Progress
from benchmarks.service.loopback import QUIETLY, process
from queryselect import _tokens
from queryselect.v1 import server_pb2, server_pb2_grpc
from queryselect_service import auth
from queryselect_service.errors import Unauthenticated

#: Tokens in the file.
FEW, MANY = 1, 10_000
#: How often each is tried, in this process and over gRPC.
CHECKS, CALLS = 20_000, 2000

Row = dict[str, Any]
Metadata = tuple[tuple[str, str], ...]


def headers(token: str) -> dict[str, Metadata]:
    """What is sent, by what is bad of it."""
    start, _, secret = token.rpartition("_")

    def other(digit: str) -> str:
        return "0" if digit != "0" else "1"

    sent = {
        "right": token,
        "wrong first digit": f"{start}_{other(secret[0])}{secret[1:]}",
        "wrong last digit": f"{start}_{secret[:-1]}{other(secret[-1])}",
        "another secret": f"{start}_{'5a' * 32}",
        "unknown name": f"qs_nobody-here_{secret}",
        "malformed": f"{start}_{secret[:-1]}",
    }
    found: dict[str, Metadata] = {name: (("authorization", f"Bearer {each}"),) for name, each in sent.items()}
    return found | {"missing": (), "7 KB": (("authorization", "Bearer " + "x" * 7000),)}


def file(folder: Path, count: int) -> tuple[Path, str]:
    """A file of so many tokens, and one of them."""
    path, made = folder / f"tokens-{count}.toml", [_tokens.make(f"team-{number}") for number in range(count)]
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "team-{number}"\nsalt = "{salt.hex()}"\nhash = "{hashed.hex()}"\n'
            for number, (_, salt, hashed) in enumerate(made)
        )
    )
    return path, made[count // 2][0]


def timed(tries: dict[str, Callable[[], object]], count: int) -> dict[str, Row]:
    """The microseconds of each, all in turn and in another order every time, so that what disturbs meets all alike."""
    names, seconds = list(tries), {name: np.empty(count) for name in tries}
    for number in range(count):
        random.shuffle(names)
        for name in names:
            began = time.perf_counter()
            tries[name]()
            seconds[name][number] = time.perf_counter() - began
    parts = {name: np.percentile(1e6 * each, (10, 50, 90)) for name, each in seconds.items()}
    return {
        name: dict(zip(("p10 us", "p50 us", "p90 us"), map(float, each), strict=True)) for name, each in parts.items()
    }


def checked(tokens: auth.Tokens, metadata: Metadata) -> Callable[[], object]:
    """One check in this process."""

    def check() -> None:
        with suppress(Unauthenticated):
            tokens.caller(metadata)

    return check


def called(channel: grpc.Channel, metadata: Metadata) -> Callable[[], object]:
    """One call of a server."""
    ask, request = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo, server_pb2.GetServerInfoRequest()

    def call() -> None:
        try:
            ask(request, metadata=metadata)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)  # every error that a stub raises is one
            if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
                raise

    return call


def measure(*, quick: bool = False) -> Row:
    """The times of every kind of token: checked with few and with many in the file, and sent to a server."""
    checks, calls = (50, 5) if quick else (CHECKS, CALLS)
    found: dict[str, dict[str, Row]] = {}
    with Progress(3, "tokens") as progress, tempfile.TemporaryDirectory() as folder:
        for count in (FEW, MANY):
            title = f"check, {count} token{'s' if count > 1 else ''} in the file"
            progress.now(title)
            path, token = file(Path(folder), count)
            tokens = auth.Tokens(path)
            found[title] = timed({name: checked(tokens, each) for name, each in headers(token).items()}, checks)
            progress.step()
        progress.now("calls")
        path, token = file(Path(folder), FEW)
        with (
            process("-m", "queryselect_service", *QUIETLY, "--token-file", str(path)) as (_, (port, _)),
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            found["call of GetServerInfo"] = timed(
                {name: called(channel, each) for name, each in headers(token).items()}, calls
            )
        progress.step()
    return {"checks": checks, "calls": calls, "times": found}


def show(found: Row) -> str:
    """The tables, for people."""
    lines = [f"each tried {found['checks']} times in this process and {found['calls']} times over gRPC, all in turn"]
    for title, rows in found["times"].items():
        lines.append(f"{title:36}{'p10 us':>10}{'p50 us':>10}{'p90 us':>10}")
        lines += [f"  {name:34}" + "".join(f"{each:10.2f}" for each in row.values()) for name, row in rows.items()]
    return "\n".join(lines)
