"""What is large goes by stream: the same picks, and no copy of the caller's arrays."""

from __future__ import annotations

import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect import (
    Client,
    InvalidInput,
    Margin,
    Picks,
    _transport,
    _upload,
)
from queryselect.v1 import selection_pb2, strategy_pb2
from queryselect_service import wire
from queryselect_service.upload import Part
from tests.client.fake import Fake, failure
from tests.client.streams import (
    BUDGET,
    MASK,
    RNG,
    UPLOAD,
    X32,
    N,
    X,
    assert_same,
    select,
    sent_in_full,
    streamed,
)
from tests.client.test_client import KINDS, POOL, beside, told
from tests.client.test_client import N as FEW
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("nothing_is_left")


# What is streamed


@pytest.mark.parametrize(
    ("options", "stream"),
    [
        ({"excluded": np.zeros(4 << 20, bool)}, False),
        ({"excluded": np.zeros((4 << 20) + 1, bool)}, True),
        ({"excluded": np.zeros(3 << 20, bool), "candidates": np.ones(3 << 20, bool)}, True),  # together
        ({"num_rows": 10**6, "budget": 4 << 16}, False),  # 16 bytes per pick
        ({"num_rows": 10**6, "budget": (4 << 16) + 1}, True),
        ({"num_rows": (512 << 10) - 2, "return_pool_scores": True}, False),  # 8 bytes per row
        ({"num_rows": 512 << 10, "return_pool_scores": True}, True),
        ({"num_rows": 10**9}, False),
        ({"num_rows": 5, "embeddings": X32}, False),  # not read by the strategy, and not sent
    ],
)
def test_what_is_over_4_mib_is_streamed(options: dict[str, Any], stream: bool) -> None:
    with Fake() as fake, Client(fake.target) as client:
        client.select("random", **{"budget": 1, **options})
        assert (len(fake.requests), len(fake.attempts)) == (1, int(stream))


def test_a_large_answer_alone_is_streamed(local: Client, remote: Client) -> None:
    options = {"num_rows": 1_000_000, "seed": 3, "return_pool_scores": True}
    here, there = (client.select("random", 20, **options) for client in (local, remote))
    assert streamed(there)
    assert_same(here, there)
    there.pool_scores[:] = 0  # the caller's own
    many = remote.select("random", 300_000, num_rows=1_000_000, seed=3)
    assert streamed(many)
    assert_same(local.select("random", 300_000, num_rows=1_000_000, seed=3), many)


def test_a_stream_tells_who_calls_and_which_call_it_is() -> None:
    with Fake() as fake, Client(fake.target, token="secret") as client:
        picks = client.select(Margin(), 1, **UPLOAD, request_id="mine")
        assert fake.metadata[0]["authorization"] == "Bearer secret"
        assert (fake.attempt.start.request_id, picks.info.request_id) == ("mine", "mine")


# The same picks


@pytest.fixture
def all_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a pool is, all of it is streamed, in chunks that end within rows and within numbers."""
    monkeypatch.setattr(_transport, "UNARY_BYTES", -1)
    monkeypatch.setattr(_upload, "SMALL_BYTES", -1)
    monkeypatch.setattr(_upload, "LIST_BYTES", -1)
    monkeypatch.setattr(_upload, "CHUNK_BYTES", (997, 997))


@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
@pytest.mark.parametrize("name", KINDS)
def test_every_strategy_gives_the_same_by_stream(
    local: Client, remote: Client, all_streamed: None, name: str, task: str
) -> None:
    (description,) = (each for each in local.strategies() if each.name == name)
    options = {**POOL, "task": task, "seed": 7, "return_pool_scores": description.pool_scores, "ids": range(FEW)}
    options |= beside(description)
    if strategy_pb2.Task.Value(f"TASK_{task}") not in description.tasks:
        with pytest.raises(InvalidInput, match=f"{name} serves task") as caught:
            remote.select(name, 20, **options)
        assert caught.value.field == "task"
        return
    here, there = (client.select(name, 20, **options) for client in (local, remote))
    assert streamed(there)
    assert told(here) == told(there)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"budget": 220, "labeled": [3]}, "COVERED"),
        ({"budget": 5, "params": {"normalize": True}}, "INERT_ROWS"),
    ],
)
def test_warnings_are_the_same_by_stream(
    local: Client, remote: Client, all_streamed: None, options: dict[str, Any], code: str
) -> None:
    options = {"embeddings": POOL["embeddings"], **options}
    here, there = (client.select("k_center_greedy", **options) for client in (local, remote))
    assert streamed(there)
    assert code in [each.code for each in there.warnings]
    assert_same(here, there)


def strided(x: np.ndarray) -> np.ndarray:
    return np.repeat(x, 2, axis=0)[::2]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.setflags(write=False)
    return x


FORMS = {
    "f64": lambda x: x,
    "f32": lambda x: x.astype("f4"),
    "f16": lambda x: x.astype("f2"),
    "big-endian": lambda x: x.astype(">f4"),
    "fortran order": lambda x: np.asfortranarray(x.astype("f4")),
    "strided": lambda x: strided(x.astype("f4")),
    "reversed": lambda x: x[::-1].astype("f4")[::-1],
    "read-only": lambda x: read_only(x.astype("f4")),
    "torch bf16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch f16, transposed": lambda x: torch.from_numpy(x.T.copy()).half().T,
    "pandas": lambda x: pd.DataFrame(x.astype("f4"), index=np.arange(len(x)) + 1000),
}


@pytest.fixture(scope="module")
def plainly(local: Client) -> dict[str, Picks]:
    """What this process picks from the values as float64."""
    return {
        "margin": local.select("margin", BUDGET, logits=X, return_pool_scores=True),
        "k_center_greedy": local.select("k_center_greedy", BUDGET, embeddings=X, return_pool_scores=True),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "argument"), [("margin", "logits"), ("k_center_greedy", "embeddings")])
def test_every_kind_of_array_gives_the_same_by_stream(
    remote: Client, plainly: dict[str, Picks], name: str, argument: str, form: str
) -> None:
    given = FORMS[form](X)
    ids = None if form == "pandas" else np.arange(N) + 1000
    picks = remote.select(name, BUDGET, **{argument: given}, ids=ids, return_pool_scores=True)
    assert streamed(picks)
    expected = plainly[name]
    assert picks.indices.tolist() == expected.indices.tolist()
    assert picks.ids.tolist() == (expected.indices + 1000).tolist()
    assert np.array_equal(picks.pool_scores, expected.pool_scores)
    assert picks.scores.tolist() == expected.scores.tolist()
    assert np.array_equal(given.float() if isinstance(given, torch.Tensor) else given, X), "the caller's own"


ROWS = np.random.default_rng(1).permutation(N)

LISTS = {
    "masks": {
        "labeled": np.isin(np.arange(N), ROWS[:40]),
        "excluded": np.isin(np.arange(N), ROWS[40:20_000]),
        "candidates": np.isin(np.arange(N), ROWS[30_000:]),
    },
    "lists": {"labeled": ROWS[:40].tolist(), "excluded": ROWS[40:20_000], "candidates": ROWS[30_000:].tolist()},
    "both": {"labeled": ROWS[:30].tolist(), "pending": np.isin(np.arange(N), ROWS[30:40]), "excluded": ROWS[40:9040]},
}


@pytest.mark.parametrize("lists", LISTS)
@pytest.mark.parametrize(("name", "argument"), [("entropy", "logits"), ("k_center_greedy", "embeddings")])
def test_long_lists_of_rows_give_the_same_by_stream(
    local: Client, remote: Client, lists_apart: None, name: str, argument: str, lists: str
) -> None:
    options = {argument: X32, **LISTS[lists], "return_pool_scores": True, "ids": np.arange(N) * 2}
    here, there = (client.select(name, BUDGET, **options) for client in (local, remote))
    assert streamed(there)
    assert_same(here, there)


def test_masks_of_millions_give_the_same_by_stream(local: Client, remote: Client) -> None:
    masks = {"excluded": np.arange(len(MASK)) % 3 == 0, "candidates": np.arange(len(MASK)) % 7 == 1}
    masks["candidates"] &= ~masks["excluded"]
    here, there = (client.select("random", 50, **masks, labeled=[1, 2]) for client in (local, remote))
    assert streamed(there)
    assert_same(here, there)
    assert masks["candidates"][there.indices].all()


def test_validate_only_looks_at_every_row_of_a_stream(remote: Client) -> None:
    assert len(remote.select("margin", 3, logits=X32, validate_only=True)) == 0
    bad = X32.copy()
    bad[N - 5, 3] = np.nan
    with pytest.raises(InvalidInput, match=f"row {N - 5} "):
        remote.select("margin", 3, logits=bad, validate_only=True)


def test_many_threads_stream_at_once_through_one_client(local: Client, target: str) -> None:
    arrays = [np.random.default_rng(seed).normal(size=(50_000, 30)).astype("f4") for seed in range(8)]
    calls = [("margin", "logits"), ("k_center_greedy", "embeddings")] * 4

    def picks(client: Client, position: int) -> Picks:
        name, argument = calls[position]
        return client.select(name, 5, **{argument: arrays[position]}, return_pool_scores=True)

    with Client(target) as shared, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda position: picks(shared, position), range(8)))
    for position in range(8):
        assert streamed(found[position])
        assert_same(picks(local, position), found[position])


# Chunks


def test_no_chunk_is_sent_before_the_server_admits_it() -> None:
    with Fake() as fake, Client(fake.target) as client:
        fake.hold.clear()
        job = client.submit(Margin(), 1, **UPLOAD)
        assert until(lambda: fake.attempts)
        time.sleep(0.3)
        assert not job.done()
        fake.hold.set()
        job.result(timeout=30)
        assert not fake.attempt.too_early
        assert sent_in_full(fake.attempt)


@pytest.mark.parametrize(
    ("recommended", "length"),
    [
        (-1, 64 << 10),
        (0, 64 << 10),
        ((64 << 10) - 1, 64 << 10),
        (100_001, 100_001),
        (1 << 20, 1 << 20),
        (4 << 20, 4 << 20),
        ((4 << 20) + 1, 4 << 20),
        (1 << 40, 4 << 20),
    ],
)
def test_chunks_are_as_long_as_the_server_likes_within_reason(recommended: int, length: int) -> None:
    with Fake(chunk_bytes=recommended) as fake:
        select(fake)
        chunks = fake.attempt.chunks
        assert [path for path, _, _ in chunks] == ["pool.logits"] * len(chunks)
        length -= length % X32[0].nbytes  # whole rows
        assert [offset for _, offset, _ in chunks] == list(range(0, X32.nbytes, length))
        assert {each for _, _, each in chunks[:-1]} == {length}
        assert sent_in_full(fake.attempt)


class Silent(Fake):
    """Describes no strategy, so that it is sent everything."""

    def ListStrategies(self, request, context):
        context.abort_with_status(failure("UNIMPLEMENTED"))


def test_what_is_small_travels_in_the_start() -> None:
    inside = {
        "head_weights": RNG.normal(size=(64, 128)),  # 64 KiB
        "labeled": [3, 1],
        "excluded": np.zeros(4 << 20, bool),  # lists of rows may be longer
    }
    apart = {**UPLOAD, "labels": np.arange((8 << 10) + 1), "candidates": np.ones((4 << 20) + 1, bool)}
    with Silent() as fake, Client(fake.target) as client:
        client.select(Margin(), 1, **inside, **apart)
        pool = fake.attempt.start.pool
        for name, value in inside.items():
            assert getattr(pool, name).data == np.asarray(value).tobytes()
        for name in apart:
            assert getattr(pool, name).WhichOneof("source") == "streamed"
        assert fake.attempt.tensors == {f"pool.{name}": value.tobytes() for name, value in apart.items()}


def test_lists_of_rows_come_first_and_then_arrays_side_by_side(lists_apart: None) -> None:
    arrays = {
        "embeddings": RNG.normal(size=(N, 20)),
        "samples": RNG.normal(size=(N, 3, 5)).astype("f4"),
        "labeled": np.arange(10_000),
        "costs": RNG.random(N),
        "head_weights": RNG.normal(size=(500, 20)),
        "candidates": np.ones(N, bool),
        "weights": RNG.random(N).astype("f2"),
        "labels": np.zeros(10_000, np.int64),
    }
    first = {f"pool.{name}" for name in ("labeled", "candidates", "head_weights", "labels")}
    with Silent(chunk_bytes=100_000) as fake, Client(fake.target) as client:
        client.select(Margin(), 1, **arrays)
        assert fake.attempt.tensors == {f"pool.{name}": array.tobytes() for name, array in arrays.items()}
        paths = [path for path, _, _ in fake.attempt.chunks]
        begin = next(at for at, path in enumerate(paths) if path not in first)
        assert not first & set(paths[begin:])
        # However far one array is, the others are as far, give or take a chunk.
        side_by_side = fake.attempt.chunks[begin:]
        far = [offset / arrays[path.removeprefix("pool.")].nbytes for path, offset, _ in side_by_side]
        assert far == sorted(far)
        assert len({path for path, _, _ in side_by_side}) == 4


@given(st.text(max_size=40), st.integers(0, (1 << 63) - 1), st.binary(max_size=400))
def test_a_chunk_is_what_protobuf_makes_of_it(path: str, offset: int, data: bytes) -> None:
    made = _upload.chunk(path, offset, memoryview(data))
    chunk = selection_pb2.Chunk(path=path, offset=offset, data=data)
    assert made == selection_pb2.SelectStreamRequest(chunk=chunk).SerializeToString()
    assert wire.read_stream_request(made) == Part(path, offset, memoryview(data))


@pytest.mark.parametrize("length", [127, 128, (1 << 14) - 1, 1 << 14, 1 << 20, (1 << 21) + 1, 4 << 20])
def test_a_long_chunk_is_what_protobuf_makes_of_it(length: int) -> None:
    data = np.arange(length, dtype=np.uint8)
    made = _upload.chunk("pool.embeddings", length, data.data)
    chunk = selection_pb2.Chunk(path="pool.embeddings", offset=length, data=data.tobytes())
    assert made == selection_pb2.SelectStreamRequest(chunk=chunk).SerializeToString()
    assert wire.read_stream_request(made) == Part("pool.embeddings", length, data.data)


def test_chunks_are_views_of_the_callers_array() -> None:
    seen: list[memoryview] = []
    made = _upload.chunk

    def note(path: str, offset: int, data: memoryview) -> bytes:
        seen.append(data)
        return made(path, offset, data)

    with pytest.MonkeyPatch.context() as patch, Fake() as fake:
        patch.setattr(_upload, "chunk", note)
        select(fake)
    assert len(seen) == len(fake.attempt.chunks)
    assert all(np.shares_memory(np.frombuffer(each, np.uint8), X32) for each in seen)


UPLOADER = """
import sys
import numpy as np
from queryselect import Client, Margin

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

with Client(sys.argv[1]) as client:
    client.select(Margin(), 1, logits=np.ones((50_000, 30), np.float32))
    x = np.ones((2_500_000, 30), np.float32)
    before = peak()
    client.select(Margin(), 1, logits=x)
    print(x.nbytes, before, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' own account of memory")
def test_an_upload_takes_no_memory_to_speak_of() -> None:
    with Fake(keep=False) as fake:
        ran = subprocess.run(
            [sys.executable, "-c", UPLOADER, fake.target], check=True, capture_output=True, text=True, timeout=60
        )
        size, before, after = map(int, ran.stdout.split())
        assert fake.attempts[1].received == size == 300_000_000
        assert before > size
        assert after - before < 32 << 20


def test_a_job_that_is_done_lets_go_of_the_array() -> None:
    x = X32.copy()
    alive = weakref.ref(x)
    with Fake() as fake, Client(fake.target) as client:
        job = client.submit(Margin(), 1, logits=x)
        job.result(timeout=30)
        del x
        assert until(lambda: alive() is None)
