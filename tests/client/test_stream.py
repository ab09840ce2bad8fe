"""What is large goes by stream: the same picks, no copy of the caller's arrays, and calls that stop when told to."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from queryselect import (
    Aborted,
    Busy,
    Cancelled,
    Client,
    Custom,
    DataLoss,
    DeadlineExceeded,
    InvalidInput,
    Job,
    Margin,
    Picks,
    QuerySelectError,
    TooLarge,
    Unavailable,
    _transport,
    _upload,
)
from queryselect.v1 import selection_pb2, strategy_pb2
from queryselect_service import server, wire
from queryselect_service.settings import Settings
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec
from queryselect_service.strategy import PLUGINS, ScoreKind, Selection, strategy
from queryselect_service.upload import Part
from tests.client.conftest import Slow
from tests.client.fake import Answer, Attempt, Fake, failure, in_chunks, in_one, progress
from tests.client.test_client import KINDS, POOL, told
from tests.client.test_client import N as FEW

N = 70_000
RNG = np.random.default_rng(0)
# Values that float16 and bfloat16 hold exactly: enough of them to be streamed, the first in two bytes each.
X = RNG.integers(-128, 128, (N, 32)) / 16
X32 = X[:, :16].astype("f4")
BUDGET = 10
UPLOAD = {"logits": X32}
#: A selection whose bytes take a while to come, and none to select.
MASK = np.zeros(5_000_000, bool)
AT = ["start", "middle", "end"]
ANSWER = {"indices": np.arange(500), "scores": RNG.normal(size=500), "pool_scores": RNG.normal(size=3000)}


def streamed(picks: Picks) -> bool:
    """Whether the picks came by stream: no other way takes time to receive."""
    return picks.info.receive > 0


def assert_same(here: Picks, there: Picks) -> None:
    """All that a selection tells is the same, bit by bit."""
    for name in ("indices", "scores", "pool_scores", "ids"):
        mine, other = getattr(here, name), getattr(there, name)
        assert (mine is None) == (other is None), name
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
            assert np.array_equal(mine, other), name
    warnings = [[(each.code, each.message, each.rows.tolist()) for each in picks.warnings] for picks in (here, there)]
    assert warnings[0] == warnings[1]
    for name in ("score_kind", "stop_reason", "strategy", "cost_spent"):
        assert getattr(here, name) == getattr(there, name), name


def until(done: Callable[[], Any], seconds: float = 5.0) -> bool:
    """Waits until something is so, at most so long."""
    end = time.monotonic() + seconds
    while not (found := done()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(found)


def at_work() -> set[threading.Thread]:
    """The threads of jobs, and those that draw chunks from an upload."""
    frames, found = sys._current_frames(), set()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        while frame is not None and frame.f_code.co_filename != _upload.__file__:
            frame = frame.f_back
        if frame is not None or thread.name == "queryselect-job":
            found.add(thread)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """However a call ends, its threads end soon after it."""
    before = at_work()
    yield
    assert until(lambda: not at_work() - before), at_work() - before


@contextmanager
def serving(**settings: Any) -> Iterator[tuple[server.Server, str]]:
    """A server of a test's own, and its address."""
    started = server.start(Settings(port=0, metrics_port=-1, **settings))
    try:
        yield started, f"127.0.0.1:{started.port}"
    finally:
        started.drain(0.0)


def select(fake: Fake, *, retries: int = 3, **options: Any) -> Picks:
    with Client(fake.target, retries=retries) as client:
        return client.select(Margin(), 1, **UPLOAD, **options)


def sent_in_full(attempt: Attempt) -> bool:
    return attempt.tensors == {"pool.logits": X32.tobytes()}


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


@pytest.fixture
def lists_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of rows are no longer than other arrays where they travel in the start: a mask of N rows does not."""
    monkeypatch.setattr(_upload, "LIST_BYTES", _upload.SMALL_BYTES)


@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
@pytest.mark.parametrize("name", KINDS)
def test_every_strategy_gives_the_same_by_stream(
    local: Client, remote: Client, all_streamed: None, name: str, task: str
) -> None:
    (description,) = (each for each in local.strategies() if each.name == name)
    options = {**POOL, "task": task, "seed": 7, "return_pool_scores": description.pool_scores, "ids": range(FEW)}
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


# Answers in chunks


def backwards(chunks: list[selection_pb2.Chunk]) -> None:
    chunks.reverse()


def foreign(chunks: list[selection_pb2.Chunk]) -> None:
    chunks.insert(0, selection_pb2.Chunk(path="certificate", offset=0, data=b"of a newer server"))


@pytest.mark.parametrize("change", [lambda _: None, backwards, foreign])
def test_large_tensors_of_an_answer_come_in_chunks(change: Callable[[list], None]) -> None:
    with Fake(answers=[in_chunks(ANSWER, change)]) as fake:
        picks = select(fake)
        for name, array in ANSWER.items():
            found = getattr(picks, name)
            assert found.dtype == array.dtype
            assert found.tolist() == array.tolist()
            found[:] = 0  # the caller's own
        assert picks.pseudo_labels is None


def without_one(chunks: list[selection_pb2.Chunk]) -> None:
    del chunks[3]


def without_the_last(chunks: list[selection_pb2.Chunk]) -> None:
    chunks.pop()


def shorter(chunks: list[selection_pb2.Chunk]) -> None:
    chunks[0].data = chunks[0].data[:-1]


def twice_and_one_missing(chunks: list[selection_pb2.Chunk]) -> None:
    chunks[1].CopyFrom(chunks[0])


def beyond_the_end(chunks: list[selection_pb2.Chunk]) -> None:
    chunks[0].offset = 1 << 30


def nothing(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
    return iter(())


def chunks_without_a_result(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
    yield Answer(chunk=selection_pb2.Chunk(path="scores", offset=0, data=bytes(8)))


BROKEN = [
    nothing,
    chunks_without_a_result,
    *(
        in_chunks(ANSWER, each)
        for each in (without_one, without_the_last, shorter, twice_and_one_missing, beyond_the_end)
    ),
]
BROKEN_NAMES = [
    "nothing",
    "no result",
    "without one",
    "without the last",
    "shorter",
    "twice and one missing",
    "beyond the end",
]


@pytest.mark.parametrize("broken", BROKEN, ids=BROKEN_NAMES)
def test_an_answer_that_is_not_whole_is_asked_for_once_more(broken: Callable) -> None:
    with Fake(answers=[broken, in_chunks(ANSWER)]) as fake:
        assert select(fake).pool_scores.tolist() == ANSWER["pool_scores"].tolist()
        assert len(fake.attempts) == 2
    with Fake(answers=[broken, broken]) as fake:
        with pytest.raises(DataLoss, match="answer") as caught:
            select(fake, request_id="mine")
        assert (caught.value.code, caught.value.request_id, len(fake.attempts)) == ("DATA_LOSS", "mine", 2)


def test_what_a_newer_server_tells_beside_is_no_error() -> None:
    def newer(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
        yield Answer()
        yield Answer.FromString(b"\x7a\x00")  # field 15, empty
        yield from in_one(request)

    with Fake(answers=[newer]) as fake:
        assert len(select(fake)) == 1


def test_a_phase_of_a_newer_server_is_no_error() -> None:
    def newer(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
        yield progress(77, 1, 2)
        yield from in_one(request)

    seen: list[tuple[str, int, int | None]] = []
    with Fake(answers=[newer]) as fake:
        assert len(select(fake, progress=lambda *each: seen.append(each))) == 1
    assert ("77", 1, 2) in seen


# Progress


@pytest.fixture
def stepping() -> Iterator[str]:
    """A plug-in that takes a quarter of a second per pick, and tells so. Its name."""

    def stepping(*, k: int, pool: Shards) -> Selection:
        for step in range(k):
            pool.progress(step, k)
            time.sleep(0.25)
        return Selection(torch.arange(k), torch.zeros(k, dtype=torch.float64))

    strategy(Spec, kind=ScoreKind.KEY, cost="k/4 s", citation="none", pool_scores=False)(stepping)
    yield "stepping"
    del PLUGINS["stepping"]


def assert_orderly(seen: list[tuple[str, int, int | None]], total: int, budget: int) -> None:
    """Bytes first, then picks; no step back; from nothing to all."""
    phases = ["receiving", "queued", "selecting"]
    order = [phases.index(phase) for phase, _, _ in seen]
    assert order == sorted(order)
    for wanted, whole in (("receiving", total), ("selecting", budget)):
        counts = [done for phase, done, _ in seen if phase == wanted]
        assert counts == sorted(counts)
        assert {each for phase, _, each in seen if phase == wanted} == {whole}
        assert max(counts) <= whole
    assert seen[0] == ("receiving", 0, total)
    assert seen[-1] == ("selecting", budget, budget)


def test_progress_of_a_stream_is_told_in_bytes_and_then_in_picks(remote: Client, stepping: str) -> None:
    seen: list[tuple[str, int, int | None]] = []
    remote.select(Custom(name=stepping), 3, excluded=MASK, progress=lambda *each: seen.append(each))
    assert_orderly(seen, MASK.nbytes, 3)
    assert any(phase == "receiving" and done for phase, done, _ in seen)
    assert {1, 2} & {done for phase, done, _ in seen if phase == "selecting"}


@pytest.mark.parametrize(("name", "argument"), [("margin", "logits"), ("k_center_greedy", "embeddings")])
def test_progress_never_goes_back(remote: Client, name: str, argument: str) -> None:
    seen: list[tuple[str, int, int | None]] = []
    remote.select(name, BUDGET, **{argument: X32}, progress=lambda *each: seen.append(each))
    assert_orderly(seen, X32.nbytes, BUDGET)


def test_progress_true_is_a_bar_in_bytes_and_then_in_picks(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        (selection_pb2.PHASE_RECEIVING, X32.nbytes // 2, X32.nbytes),
        (selection_pb2.PHASE_QUEUED, 2, None),
        (selection_pb2.PHASE_QUEUED, 1, None),
        (selection_pb2.PHASE_SELECTING, 1, 5),
        (selection_pb2.PHASE_SELECTING, 3, 5),
    ]

    def slowly(request: selection_pb2.SelectRequest) -> Iterator[Answer]:
        for step in steps:
            time.sleep(0.15)  # a bar is drawn ten times a second
            yield progress(*step)
        yield from in_one(request)

    with Fake(answers=[slowly]) as fake, Client(fake.target) as client:
        client.select(Margin(), 5, **UPLOAD, progress=True)
    drawn = capsys.readouterr().err
    lines = [line.split("[")[0] for line in drawn.split("\r")]
    told = {phase: [line for line in lines if line.startswith(phase)] for phase in ("receiving", "queued", "selecting")}
    assert "2.24M/4.48M" in told["receiving"][-1]
    assert not any("4480000" in line for line in told["queued"]), "bytes are no requests"
    assert any("3/5" in line for line in told["selecting"]), "a bar that stands still"
    assert "5/5" in told["selecting"][-1]
    assert lines.index(told["receiving"][0]) < lines.index(told["queued"][0]) < lines.index(told["selecting"][0])


def test_a_callback_that_fails_during_an_upload_fails_the_call_there_too() -> None:
    def fail(phase: str, done: int, total: int | None) -> None:
        if done:
            raise ZeroDivisionError(phase)

    with Fake(at="middle") as fake, Client(fake.target) as client:
        fake.hold.clear()
        with pytest.raises(ZeroDivisionError, match="receiving"):
            client.select(Margin(), 1, **UPLOAD, progress=fail)
        assert fake.attempt.gone.wait(5)
        assert fake.attempt.received < X32.nbytes
        fake.hold.set()
        assert len(client.select(Margin(), 1, **UPLOAD)) == 1


def test_a_call_given_up_takes_no_room_on_the_server() -> None:
    with serving() as (started, address), Client(address) as client:
        room = started.frontend.service.engine.host
        with pytest.raises(ZeroDivisionError):
            client.select("k_center_greedy", 10, embeddings=X32, progress=lambda _, done, __: 1 / (done == 0))
        assert until(lambda: not (room.taken or room.reserved or started.frontend._selecting))


# Stopping


def in_phase(fake: Fake) -> Callable[[], bool]:
    """Whether the only stream hangs where it is told to."""

    def hangs() -> bool:
        if not fake.attempts:
            return False
        attempt = fake.attempts[-1]
        return {
            "start": True,
            "middle": attempt.received >= attempt.limit,
            "end": attempt.received == X32.nbytes,
        }[fake.at]

    return hangs


@contextmanager
def hanging(at: str) -> Iterator[tuple[Fake, Client, Job]]:
    """A stream that hangs there; once it is over, the next works."""
    with Fake(at=at) as fake, Client(fake.target) as client:
        fake.hold.clear()
        job = client.submit(Margin(), 1, **UPLOAD, request_id="mine")
        assert until(in_phase(fake))
        yield fake, client, job
        assert fake.attempt.gone.wait(5)
        fake.hold.set()
        assert len(client.select(Margin(), 1, **UPLOAD, timeout=30)) == 1


@pytest.mark.parametrize("at", AT)
def test_a_stream_can_be_cancelled_in_every_phase(at: str) -> None:
    with hanging(at) as (fake, _, job):
        began = time.monotonic()
        job.cancel()
        with pytest.raises(Cancelled) as caught:
            job.result(timeout=5)
        assert time.monotonic() - began < 2
        assert (caught.value.code, caught.value.request_id) == ("CANCELLED", "mine")
        assert len(fake.attempts) == 1
        if at != "end":
            assert fake.attempt.received < X32.nbytes


def test_a_stream_can_be_cancelled_in_the_kernel(target: str, slow: Slow) -> None:
    with Client(target) as client:
        job = client.submit(Custom(name="slow"), 1, excluded=MASK)
        assert slow.started.wait(30)
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(timeout=1)
        assert slow.stopped.wait(1)
        assert len(client.select("random", 3, num_rows=5, timeout=5)) == 3


@pytest.mark.parametrize("stop", [lambda job, _: job.cancel(), lambda _, client: client.close()])
def test_a_stream_that_waits_to_try_again_can_be_cancelled(stop: Callable[[Job, Client], None]) -> None:
    with Fake(failure("UNAVAILABLE", retry=60), at="middle") as fake, Client(fake.target) as client:
        job = client.submit(Margin(), 1, **UPLOAD)
        assert until(lambda: fake.attempts and fake.attempt.gone.is_set())
        stop(job, client)
        with pytest.raises(Cancelled):
            job.result(timeout=5)
        assert len(fake.attempts) == 1


@pytest.mark.parametrize("at", ["start", "middle"])
def test_control_c_cancels_a_stream(at: str) -> None:
    with Fake(at=at) as fake, Client(fake.target) as client:
        fake.hold.clear()

        def press() -> None:
            until(in_phase(fake))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt):
            client.select(Margin(), 1, **UPLOAD)
        assert fake.attempt.gone.wait(2)
        assert fake.attempt.received < X32.nbytes
        fake.hold.set()
        assert len(client.select(Margin(), 1, **UPLOAD, timeout=30)) == 1


@pytest.mark.parametrize("at", AT)
def test_closing_a_client_cancels_its_streams(at: str) -> None:
    with Fake(at=at) as fake:
        fake.hold.clear()
        with Client(fake.target) as client:
            job = client.submit(Margin(), 1, **UPLOAD)
            assert until(in_phase(fake))
        with pytest.raises(Cancelled):
            job.result(timeout=2)
        assert fake.attempt.gone.wait(2)


@pytest.mark.parametrize("options", [UPLOAD, {"logits": X32[:5]}], ids=["stream", "unary"])
def test_a_client_closed_before_the_call_is_out_cancels_it(options: dict[str, Any]) -> None:
    with Fake() as fake:
        client = Client(fake.target)
        with pytest.raises(Cancelled):
            client.select(Margin(), 1, **options, progress=lambda *_: client.close())
        assert not fake.requests


@pytest.mark.parametrize("at", AT)
def test_a_timeout_counts_in_every_phase(at: str) -> None:
    with Fake(at=at) as fake, Client(fake.target) as client:
        client.strategies()
        fake.hold.clear()
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded) as caught:
            client.select(Margin(), 1, **UPLOAD, timeout=0.7, request_id="mine")
        assert 0.69 < time.monotonic() - began < 2
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.code, caught.value.request_id) == ("DEADLINE_EXCEEDED", "mine")
        assert fake.attempt.gone.wait(2)
        assert (fake.attempt.received == X32.nbytes) == (at == "end")
        fake.hold.set()
        assert len(client.select(Margin(), 1, **UPLOAD, timeout=30)) == 1
        assert len(fake.attempts) == 2


def test_a_timeout_stops_the_kernel_of_a_stream(target: str, slow: Slow) -> None:
    with Client(target) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.select(Custom(name="slow"), 1, excluded=MASK, timeout=1.0)
        assert 0.99 < time.monotonic() - began < 3
        assert slow.started.is_set()
        assert slow.stopped.wait(1)
        assert len(client.select("random", 3, num_rows=5, timeout=5)) == 3


# Trying again


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize(
    ("code", "options"),
    [("UNAVAILABLE", {}), ("RESOURCE_EXHAUSTED", {"retry": 0.02}), ("DATA_LOSS", {})],
)
def test_what_may_pass_is_sent_again_as_a_whole(at: str, code: str, options: dict[str, Any]) -> None:
    with Fake(failure(code, **options), at=at) as fake:
        assert len(select(fake)) == 1
        first, second = fake.attempts
        assert first.start == second.start
        assert sent_in_full(second)
        assert not second.too_early
        assert (first.received == X32.nbytes) == (at == "end")


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize(("code", "options"), [("UNAVAILABLE", {}), ("RESOURCE_EXHAUSTED", {"retry": 0.02})])
def test_a_stream_is_tried_so_often_and_no_more(code: str, options: dict[str, Any], retries: int) -> None:
    with Fake(*[failure(code, **options)] * 9, at="middle") as fake:
        with pytest.raises((Busy, Unavailable)) as caught:
            select(fake, retries=retries)
        assert caught.value.code == code
        assert len(fake.attempts) == retries + 1


@pytest.mark.parametrize("at", ["start", "middle"])
@pytest.mark.parametrize("options", [{"retry": 0.5}, {"retry": 0.01, "pushback": "500"}])
def test_the_wait_that_is_asked_for_is_honoured(at: str, options: dict[str, Any]) -> None:
    with Fake(failure("RESOURCE_EXHAUSTED", **options), at=at) as fake:
        select(fake)
        first, second = fake.times
        assert 0.49 < second - first < 4


@pytest.mark.parametrize(
    ("code", "options", "kind"),
    [
        ("RESOURCE_EXHAUSTED", {"retry": 0.01, "pushback": "-1"}, Busy),
        ("UNAVAILABLE", {"pushback": "-1"}, Unavailable),
        ("RESOURCE_EXHAUSTED", {}, TooLarge),
        ("RESOURCE_EXHAUSTED", {"pushback": "10"}, TooLarge),
        ("OUT_OF_RANGE", {}, TooLarge),
        ("FAILED_PRECONDITION", {"retry": 0.01}, TooLarge),
        ("INVALID_ARGUMENT", {"retry": 0.01}, InvalidInput),
        ("ABORTED", {"retry": 0.01}, Aborted),
    ],
)
@pytest.mark.parametrize("at", ["start", "middle"])
def test_what_will_not_pass_is_streamed_once(code: str, options: dict[str, Any], kind: type, at: str) -> None:
    with Fake(failure(code, **options), at=at) as fake:
        with pytest.raises(kind) as caught:
            select(fake)
        assert (caught.value.code, caught.value.retryable, len(fake.attempts)) == (code, False, 1)


@pytest.mark.parametrize(
    ("failures", "works", "calls"),
    [(["DATA_LOSS", "DATA_LOSS"], False, 2), (["UNAVAILABLE", "DATA_LOSS"], True, 3)],
)
def test_lost_data_is_streamed_once_more(failures: list[str], works: bool, calls: int) -> None:
    with Fake(*map(failure, failures), at="end") as fake:
        if works:
            assert len(select(fake)) == 1
        else:
            with pytest.raises(DataLoss):
                select(fake)
        assert len(fake.attempts) == calls


def test_the_timeout_bounds_all_tries_of_a_stream() -> None:
    with Fake(*[failure("UNAVAILABLE")] * 1000, at="middle") as fake:
        began = time.monotonic()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            select(fake, retries=1000, timeout=1.0)
        assert time.monotonic() - began < 3
        assert 2 <= len(fake.attempts) < 30


def test_each_try_of_a_stream_has_only_the_time_that_is_left() -> None:
    with Fake(failure("UNAVAILABLE", retry=0.3)) as fake:
        select(fake, timeout=5.0)
        first, second = fake.remaining
        assert second < first - 0.2 < 5  # gRPC rounds what it tells


def test_a_wait_past_the_timeout_of_a_stream_is_not_begun() -> None:
    with Fake(failure("RESOURCE_EXHAUSTED", retry=60), at="middle") as fake:
        began = time.monotonic()
        with pytest.raises(Busy):
            select(fake, timeout=10.0)
        assert time.monotonic() - began < 5
        assert len(fake.attempts) == 1


def test_a_server_that_dies_during_an_upload_is_unavailable() -> None:
    with Fake(at="middle") as fake, Client(fake.target, retries=1) as client:
        fake.hold.clear()
        job = client.submit(Margin(), 1, **UPLOAD)
        assert until(in_phase(fake))
        fake._server.stop(0)
        with pytest.raises(Unavailable) as caught:
            job.result(timeout=10)
        assert caught.value.retryable


# What servers refuse


@contextmanager
def counting(client: Client) -> Iterator[list[None]]:
    """One entry for every try."""
    tries: list[None] = []
    ask = client._transport.select

    def count(*each: Any) -> Any:
        tries.append(None)
        return ask(*each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client._transport, "select", count)
        yield tries


def test_grpcs_own_refusal_of_a_long_chunk_is_too_large() -> None:
    with Fake(max_receive=200_000) as fake:
        with pytest.raises(TooLarge, match="larger than max") as caught:
            select(fake)
        assert (caught.value.code, caught.value.retryable, len(fake.attempts)) == ("RESOURCE_EXHAUSTED", False, 1)


def test_what_a_server_does_not_take_at_once_it_takes_by_stream(local: Client) -> None:
    with serving(max_inline_bytes=1024) as (_, address), Client(address) as client:
        with counting(client) as tries, pytest.raises(TooLarge, match="bytes of the answer") as answer:
            client.select("random", 1, num_rows=1000, return_pool_scores=True)
        assert (answer.value.code, answer.value.retryable, len(tries)) == ("OUT_OF_RANGE", False, 1)
        with counting(client) as tries, pytest.raises(TooLarge, match="larger than max") as request:
            client.select("margin", 1, logits=X32[:20_000])
        assert (request.value.code, request.value.retryable, len(tries)) == ("RESOURCE_EXHAUSTED", False, 1)
        options = {"num_rows": 1_000_000, "return_pool_scores": True}
        assert_same(local.select("random", 1, **options), client.select("random", 1, **options))
        assert_same(local.select("margin", 1, logits=X32), client.select("margin", 1, logits=X32))


def failing(client: Client, name: str = "margin", **options: Any) -> QuerySelectError:
    """What a selection raises, at its only try."""
    with counting(client) as tries, pytest.raises(QuerySelectError) as caught:
        client.select(name, **{"budget": 1, "request_id": "mine", **options})
    assert len(tries) == 1
    assert caught.value.request_id == "mine"
    return caught.value


def with_nan(row: int) -> np.ndarray:
    x = X32.copy()
    x[row, 5] = np.nan
    return x


@pytest.mark.parametrize(
    ("name", "options", "field", "words"),
    [
        ("margin", {"logits": with_nan(66_666)}, "pool.logits", "row 66666"),
        ("k_center_greedy", {"embeddings": with_nan(66_666)}, "pool.embeddings", "row 66666"),
        ("margin", {"logits": X32, "excluded": np.zeros(N + 1, bool)}, "pool.excluded", f"mask of shape ({N})"),
        ("margin", {"logits": X32, "candidates": [*range(9000), 5]}, "pool.candidates", "row 5 twice"),
        ("margin", {"logits": X32, "budget": N + 1}, "stop.max_items", f"but {N} candidates"),
        ("margin", {"logits": X32, "num_rows": N - 1}, "pool.logits", f"N = {N - 1}"),
    ],
)
def test_what_is_wrong_with_a_stream_is_named_as_in_this_process(
    local: Client, remote: Client, lists_apart: None, name: str, options: dict[str, Any], field: str, words: str
) -> None:
    here, there = failing(local, name, **options), failing(remote, name, **options)
    assert isinstance(there, InvalidInput)
    assert (there.code, there.field) == ("INVALID_ARGUMENT", field)
    assert words in str(there)
    assert (str(here), vars(here)) == (str(there), vars(there))


def test_a_bad_row_that_is_excluded_does_not_matter(local: Client, remote: Client, lists_apart: None) -> None:
    options = {"logits": with_nan(66_666), "excluded": np.arange(N) == 66_666}
    assert_same(local.select("margin", BUDGET, **options), remote.select("margin", BUDGET, **options))


def test_what_is_too_large_is_refused_before_it_travels() -> None:
    seen: list[tuple[str, int, int | None]] = []
    with serving(max_rows=N - 1) as (_, address), Client(address) as client:
        error = failing(client, logits=X32, progress=lambda *each: seen.append(each))
    assert isinstance(error, TooLarge)
    assert (error.code, error.retryable) == ("OUT_OF_RANGE", False)
    assert str(N) in str(error)
    assert seen == [("receiving", 0, X32.nbytes)]


def test_what_fits_no_device_is_too_large() -> None:
    with serving(max_host_bytes=X32.nbytes + 1000) as (_, address), Client(address) as client:
        error = failing(client, "k_center_greedy", embeddings=X32)
    assert isinstance(error, TooLarge)
    assert (error.code, error.retryable) == ("FAILED_PRECONDITION", False)


def test_a_server_without_room_is_busy_until_it_has_some(slow: Slow) -> None:
    with serving(max_streams_per_peer=1) as (_, address), Client(address) as client:
        first = client.submit("custom", 1, params={"name": "slow"}, excluded=MASK)
        assert slow.started.wait(30)
        with Client(address, retries=0) as hasty, pytest.raises(Busy, match="1 streams open") as caught:
            hasty.select(Margin(), 1, **UPLOAD)
        assert (caught.value.retryable, caught.value.retry_after) == (True, 1.0)
        began = time.monotonic()
        second = client.submit(Margin(), 1, **UPLOAD)
        time.sleep(0.3)
        first.cancel()
        assert len(second.result(timeout=10)) == 1
        assert time.monotonic() - began > 0.99
        with pytest.raises(Cancelled):
            first.result(timeout=5)


@pytest.mark.parametrize("options", [UPLOAD, {"logits": X32[:5]}], ids=["stream", "unary"])
def test_a_call_refused_at_the_door_keeps_its_id(options: dict[str, Any]) -> None:
    with serving() as (started, address), Client(address, retries=0) as client:
        started.frontend.drain(0.0)
        with pytest.raises(Unavailable, match="stopping") as caught:
            client.select(Margin(), 1, **options, request_id="mine")
        assert caught.value.request_id == "mine"
