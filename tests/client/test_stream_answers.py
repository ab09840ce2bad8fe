"""Answers that come in chunks, and progress on the way to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from queryselect import (
    Client,
    Custom,
    DataLoss,
    Margin,
)
from queryselect.v1 import selection_pb2
from queryselect_service.shards import Shards
from queryselect_service.spec import Spec
from queryselect_service.strategy import PLUGINS, ScoreKind, Selection, strategy
from tests.client.fake import Answer, Fake, in_chunks, in_one, progress
from tests.client.streams import (
    ANSWER,
    BUDGET,
    MASK,
    UPLOAD,
    X32,
    select,
    serving,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
        assert until(lambda: not (room.taken or room.reserved or started.frontend._selecting.taken))
