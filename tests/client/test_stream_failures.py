"""Streams that stop when told to, are tried again where that is safe, and fail with what the server says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

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
    QuerySelectError,
    TooLarge,
    Unavailable,
)
from tests.client.conftest import Slow
from tests.client.fake import Fake, failure
from tests.client.streams import (
    AT,
    BUDGET,
    MASK,
    UPLOAD,
    X32,
    N,
    assert_same,
    select,
    sent_in_full,
    serving,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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
def test_control_c_cancels_a_stream(at: str, control_c: Callable[[], None]) -> None:
    with Fake(at=at) as fake, Client(fake.target) as client:
        fake.hold.clear()

        def press() -> None:
            until(in_phase(fake))
            control_c()

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
