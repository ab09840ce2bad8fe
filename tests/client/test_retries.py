"""Only what may pass is tried again, no sooner than asked, no oftener than allowed, and never past the timeout."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np
import pytest

from queryselect import (
    Busy,
    Cancelled,
    Client,
    DataLoss,
    DeadlineExceeded,
    QuerySelectError,
    TooLarge,
    Unavailable,
)
from tests.client.fake import Fake, failure

#: (code, options of failure) of what may pass.
PASSING = [
    ("UNAVAILABLE", {}),
    ("UNAVAILABLE", {"retry": 0.02}),
    ("RESOURCE_EXHAUSTED", {"retry": 0.02}),
    ("RESOURCE_EXHAUSTED", {"retry": 0.02, "pushback": "20"}),
]
NEVER = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAUTHENTICATED",
]


def select(fake: Fake, *, retries: int = 3, **options: Any) -> int:
    with Client(fake.target, retries=retries) as client:
        return len(client.select("random", 1, num_rows=5, **options))


@pytest.mark.parametrize(("code", "options"), PASSING)
@pytest.mark.parametrize("times", [1, 3])
def test_what_may_pass_is_tried_again(code: str, options: dict[str, Any], times: int) -> None:
    with Fake(*[failure(code, **options)] * times) as fake:
        assert select(fake) == 1
        assert len(fake.requests) == times + 1
        assert len({each.SerializeToString(deterministic=True) for each in fake.requests}) == 1


@pytest.mark.parametrize(("code", "options"), PASSING)
@pytest.mark.parametrize("retries", [0, 2])
def test_it_is_tried_so_often_and_no_more(code: str, options: dict[str, Any], retries: int) -> None:
    with Fake(*[failure(code, **options)] * 9) as fake:
        with pytest.raises((Busy, Unavailable)) as caught:
            select(fake, retries=retries)
        assert caught.value.code == code
        assert len(fake.requests) == retries + 1


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("RESOURCE_EXHAUSTED", {"retry": 0.6}),
        ("RESOURCE_EXHAUSTED", {"retry": 0.01, "pushback": "600"}),
        ("RESOURCE_EXHAUSTED", {"retry": 0.6, "pushback": "10"}),
        ("UNAVAILABLE", {"retry": 0.6}),
        ("UNAVAILABLE", {"pushback": "600"}),
        ("DATA_LOSS", {"pushback": "600"}),
    ],
)
def test_the_wait_asked_for_is_honoured(code: str, options: dict[str, Any]) -> None:
    with Fake(failure(code, **options)) as fake:
        assert select(fake) == 1
        first, second = fake.times
        assert 0.59 < second - first < 5


@pytest.mark.parametrize("code", NEVER)
@pytest.mark.parametrize("options", [{}, {"pushback": "10"}])
def test_what_will_not_pass_is_tried_once(code: str, options: dict[str, Any]) -> None:
    with Fake(failure(code, **options)) as fake:
        with pytest.raises(QuerySelectError) as caught:
            select(fake)
        assert (caught.value.code, caught.value.retryable, len(fake.requests)) == (code, False, 1)


@pytest.mark.parametrize("pushback", ["-1", "never", "1.5"])
@pytest.mark.parametrize(
    ("code", "retry", "kind"),
    [("UNAVAILABLE", None, Unavailable), ("RESOURCE_EXHAUSTED", 0.01, Busy), ("DATA_LOSS", None, DataLoss)],
)
def test_a_server_can_forbid_to_come_back(code: str, retry: float | None, kind: type, pushback: str) -> None:
    with Fake(failure(code, retry=retry, pushback=pushback)) as fake:
        with pytest.raises(kind) as caught:
            select(fake)
        assert not caught.value.retryable
        assert len(fake.requests) == 1


@pytest.mark.parametrize("pushback", [None, "10"])
def test_exhausted_without_retry_info_is_too_large_and_tried_once(pushback: str | None) -> None:
    with Fake(failure("RESOURCE_EXHAUSTED", pushback=pushback)) as fake:
        with pytest.raises(TooLarge) as caught:
            select(fake)
        assert (caught.value.code, caught.value.retryable) == ("RESOURCE_EXHAUSTED", False)
        assert len(fake.requests) == 1


def test_grpcs_own_refusal_of_a_long_message_is_too_large() -> None:
    with Fake(max_receive=1024) as fake, Client(fake.target) as client:
        with pytest.raises(TooLarge, match="larger than max"):
            client.select("k_center_greedy", 1, embeddings=np.ones((1000, 1)))
        assert not fake.requests


@pytest.mark.parametrize(
    ("failures", "works", "calls"),
    [
        (["DATA_LOSS"], True, 2),
        (["DATA_LOSS", "DATA_LOSS"], False, 2),
        (["UNAVAILABLE", "DATA_LOSS"], True, 3),
        (["DATA_LOSS", "UNAVAILABLE", "DATA_LOSS"], False, 3),
    ],
)
def test_lost_data_is_sent_once_more(failures: list[str], works: bool, calls: int) -> None:
    with Fake(*map(failure, failures)) as fake:
        if works:
            assert select(fake) == 1
        else:
            with pytest.raises(DataLoss):
                select(fake)
        assert len(fake.requests) == calls


def test_the_timeout_bounds_all_tries() -> None:
    with Fake(*[failure("UNAVAILABLE")] * 1000) as fake:
        started = time.monotonic()
        with pytest.raises((Unavailable, DeadlineExceeded)):
            select(fake, retries=1000, timeout=1.0)
        assert time.monotonic() - started < 3
        assert 2 <= len(fake.requests) < 30


def test_each_try_has_only_the_time_that_is_left() -> None:
    with Fake(failure("UNAVAILABLE", retry=0.5)) as fake, Client(fake.target, timeout=1.0) as client:
        client.select("random", 1, num_rows=5)  # two calls
        fake.failures = [failure("UNAVAILABLE")] * 2
        fake.hold.clear()
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.select("random", 1, num_rows=5)
        assert time.monotonic() - started < 3


def test_a_wait_past_the_timeout_is_not_begun() -> None:
    with Fake(failure("RESOURCE_EXHAUSTED", retry=60)) as fake:
        started = time.monotonic()
        with pytest.raises(Busy) as caught:
            select(fake, timeout=10)
        assert time.monotonic() - started < 5
        assert caught.value.retry_after == 60
        assert len(fake.requests) == 1


def test_a_job_that_waits_to_try_again_can_be_cancelled() -> None:
    with Fake(failure("RESOURCE_EXHAUSTED", retry=60)) as fake, Client(fake.target) as client:
        job = client.submit("random", 1, num_rows=5)
        while not fake.requests:
            time.sleep(0.01)
        job.cancel()
        with pytest.raises(Cancelled):
            job.result(timeout=5)
        assert len(fake.requests) == 1


def test_without_a_server_it_is_unavailable() -> None:
    with socket.socket() as taken:  # bound, so that nobody else listens there
        taken.bind(("127.0.0.1", 0))
        with Client(f"127.0.0.1:{taken.getsockname()[1]}") as client:
            for call in (lambda: client.select("random", 1, num_rows=5), client.strategies, client.server_info):
                with pytest.raises(Unavailable) as caught:
                    call()
                assert (caught.value.code, caught.value.retryable) == ("UNAVAILABLE", True)
            # What can be seen from here needs no server.
            with pytest.raises(TypeError, match="no argument"):
                client.select("random", 1, bogus=5)


def test_a_peer_that_accepts_and_is_silent_costs_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with Client(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.5) as client, pytest.raises(DeadlineExceeded):
            client.select("random", 1, num_rows=5)
        assert time.monotonic() - started < 3
