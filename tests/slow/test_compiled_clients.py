"""examples/go and examples/cpp, built with what Debian has: the Python client's picks, errors read, health heeded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from queryselect import Client
from queryselect.v1 import selection_pb2, selection_pb2_grpc
from tests.slow import pool, tools
from tests.slow.servers import Served, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
TESTDATA = ROOT / "proto" / "testdata"
SERVICE = "queryselect.v1.SelectionService"


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_go(folder: Path) -> Path:
    """Built as before modules: Debian's packages are no modules."""
    tools.install("golang-go", "golang-google-grpc-dev", "protobuf-compiler", "protoc-gen-go", "protoc-gen-go-grpc")
    # What protoc-gen-go 1.28 writes code for. Not installed, since grpc's package brings the one of before, which it is
    # in conflict with; found first, it stands in for it.
    newer = [tools.unpacked(each) for each in ("golang-github-golang-protobuf-1-5-dev", "golang-google-protobuf-dev")]
    (folder / "src").mkdir()
    (generate,) = re.findall(r"^protoc .*--go_out.*$", (ROOT / "docs" / "clients.md").read_text(), re.MULTILINE)
    run("sh", "-c", generate.replace("out=.", f"out={folder}/src"), cwd=ROOT)
    share = "usr/share/gocode"
    path = os.pathsep.join(map(str, (folder, *(each / share for each in newer), f"/{share}")))
    program = folder / "select"
    source = ROOT / "examples" / "go" / "main.go"
    run("go", "build", "-o", program, source, env={**os.environ, "GO111MODULE": "off", "GOPATH": path})
    return program


def with_make(folder: Path) -> Path:
    tools.install("g++", "libgrpc++-dev", "make", "pkg-config", "protobuf-compiler-grpc", "zlib1g-dev")
    (folder / "proto").symlink_to(ROOT / "proto")
    for name in ("cpp", "proto"):
        shutil.copytree(ROOT / "examples" / name, folder / "examples" / name, ignore=shutil.ignore_patterns("build"))
    run("make", "-j2", cwd=folder / "examples" / "cpp")
    return folder / "examples" / "cpp" / "build" / "select"


@pytest.fixture(scope="module", params=[with_go, with_make], ids=["go", "cpp"])
def program(request, tmp_path_factory) -> Path:
    return request.param(tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


def test_its_picks_are_those_of_the_python_client_and_it_reads_errors(program, server):
    before = server.ended("SelectStream", "OK")
    lines = [line.split(" ", 1) for line in run(program, server.target, timeout=120).splitlines()]
    assert server.ended("SelectStream", "OK") == before + 1
    both = {"embeddings": pool.embeddings(1000), "logits": pool.logits(1000), "labeled": [0, 1, 2]}
    parameters = {"ridge": 0.5, "fisher_scale": "SUM", "top_classes": 2}
    with Client(server.target) as client:
        margin = pool.picks(client, "margin", 5, **both)
        wanted = {
            "margin": margin,
            "stream": margin,
            "k_center_greedy": pool.picks(client, "k_center_greedy", 5, **both, params={"normalize": True}),
            "bait": pool.picks(client, "bait", 5, **both, params=parameters),
        }
    assert {name: json.loads(text) for name, text in lines[:4]} == wanted
    assert lines[4][1] in {"3", "InvalidArgument"}
    assert lines[5:] == [["reason", "INVALID_INPUT"], ["field", "pool.embeddings"]]


def test_stored_requests_are_answered_as_is_stored(program, server):
    cases = json.loads((TESTDATA / "manifest.json").read_text())["cases"]
    unary = {
        each["requests"][0]: each for each in cases if each["rpc"] == f"/{SERVICE}/Select" and each["code"] == "OK"
    }
    lines = run(program, server.target, *(TESTDATA / name for name in unary), timeout=120).splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == list(unary)
    for line, case in zip(lines, unary.values(), strict=True):
        answer = selection_pb2.SelectResponse.FromString((TESTDATA / case["responses"][0]).read_bytes())
        picks = json.loads(line.split(" ", 1)[1])
        assert [each["row"] for each in picks] == np.frombuffer(answer.indices.data, "<i8").tolist()
        np.testing.assert_allclose([each["score"] for each in picks], np.frombuffer(answer.scores.data), rtol=1e-9)


class Answers(selection_pb2_grpc.SelectionServiceServicer):
    """A server that answers by what is stored. ends: what a stream is told after its start."""

    def __init__(self, ends=None) -> None:
        self._ends = ends

    def Select(self, request, context):
        return selection_pb2.SelectResponse.FromString((TESTDATA / "two_rows.response.binpb").read_bytes())

    def SelectStream(self, request_iterator, context):
        next(request_iterator)
        yield from self._ends(request_iterator, context)


@contextmanager
def answering(ends=None) -> Iterator[tuple[str, health.HealthServicer]]:
    """Where such a server listens, and its health."""
    states, own = health.HealthServicer(), grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    selection_pb2_grpc.add_SelectionServiceServicer_to_server(Answers(ends), own)
    health_pb2_grpc.add_HealthServicer_to_server(states, own)
    port = own.add_insecure_port("127.0.0.1:0")
    own.start()
    try:
        yield f"127.0.0.1:{port}", states
    finally:
        own.stop(0).wait()


def admitted(**told) -> selection_pb2.SelectStreamResponse:
    return selection_pb2.SelectStreamResponse(admitted=told)


def refused(chunks, context):
    yield admitted(recommended_chunk_bytes=1)
    next(chunks)
    context.abort(grpc.StatusCode.ABORTED, "refused in mid-upload")


def forgotten(chunks, context):
    yield admitted(recommended_chunk_bytes=4096)


def without_a_length(chunks, context):
    yield admitted()
    context.abort(grpc.StatusCode.ABORTED, f"{sum(len(each.chunk.data) for each in chunks)} bytes came")


@pytest.mark.parametrize(
    ("ends", "words"),
    [(refused, "refused in mid-upload"), (forgotten, "EOF|before its answer"), (without_a_length, "16000 bytes came")],
)
def test_it_tells_how_a_stream_ended(program, ends, words):
    with answering(ends) as (target, states):
        states.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        done = subprocess.run([program, target], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.search(words, done.stderr)


def test_it_passes_over_a_server_that_says_it_is_not_ready(program):
    """The service config that docs/clients.md shows: a call goes to a server whose health says SERVING, or fails."""
    with answering() as (target, states):
        command = [program, target, TESTDATA / "two_rows.request.binpb"]
        states.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode != 0
        assert "health" in done.stderr
        states.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        assert "two_rows" in run(*command, timeout=120)
