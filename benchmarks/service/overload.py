"""More clients than a server has room for, of every kind. Each answer is a result, or a refusal as documented."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from benchmarks.service.load import Ask, Seen, embeddings, merged, probabilities
from benchmarks.service.loopback import QUIETLY
from queryselect import Client, QuerySelectError

#: A server with less room than 64 clients want: places for 17 requests, and memory for a few large pools.
TIGHT = (*QUIETLY, "--max-queue", "16", "--max-host-bytes", str(96 << 20))
CLIENTS = 64
#: The most that a client waits before it cancels, in seconds.
CANCEL_WITHIN = 0.2
#: What a client that sends no more than it should gives up after, in seconds.
DEADLINE = 0.05


@dataclass(frozen=True)
class Guest:
    """What one client asks for, again and again. may_fail: the codes of refusals, beside "no room now"."""

    ask: Ask
    may_fail: frozenset[str] = frozenset()
    options: Mapping[str, Any] = field(default_factory=dict)
    cancels: bool = False


def samples(rows: int, count: int, classes: int) -> dict[str, Any]:
    """Those of a Bayesian model, (rows, count, classes)."""
    drawn = np.random.default_rng(0).random((rows, count, classes), np.float32) + np.float32(0.01)
    return {"samples": drawn / drawn.sum(-1, keepdims=True)}


def _broken() -> dict[str, Any]:
    found = probabilities(1_000, 10)
    found["probabilities"][700] = np.nan
    return found


LARGE = Ask("k_center_greedy", 50, partial(embeddings, 10_000, 128))
#: By name. What is larger than 4 MiB goes by stream.
GUESTS = {
    "margin": Guest(Ask("margin", 10, partial(probabilities, 1_000, 10))),
    "k_center_greedy, 5 MB": Guest(LARGE),
    "margin, larger": Guest(Ask("margin", 10, partial(probabilities, 10_000, 10))),
    "typiclust, 5 MB": Guest(Ask("typiclust", 20, partial(embeddings, 5_000, 256))),
    "invalid": Guest(Ask("margin", 10, _broken), frozenset({"INVALID_ARGUMENT"})),
    "bald, 5 MB": Guest(Ask("bald", 20, partial(samples, 4_000, 10, 32))),
    "cancelled": Guest(LARGE, frozenset({"CANCELLED"}), cancels=True),
    "in a hurry": Guest(LARGE, frozenset({"DEADLINE_EXCEEDED"}), {"timeout": DEADLINE}),
}
#: Picks by name of the guest.
Right = Mapping[str, list[int]]


def right_picks(target: str) -> dict[str, list[int]]:
    """What a server answers that nobody else asks."""
    with Client(target) as client:
        return {
            name: client.select(guest.ask.strategy, guest.ask.budget, **guest.ask.inputs()).indices.tolist()
            for name, guest in GUESTS.items()
            if name != "invalid"
        }


def flaw(error: QuerySelectError, may_fail: frozenset[str]) -> str:
    """What is not as documented about a refusal; nothing, as it should be.

    Who finds no room is told when to come back, in the details and in the header that gRPC's own retries follow.
    """
    if error.code in may_fail:
        return ""
    if error.code != "RESOURCE_EXHAUSTED":
        return str(error)
    call = error.__context__  # what the client's error was made of
    assert isinstance(call, grpc.Call)
    status, retry = rpc_status.from_call(call), error_details_pb2.RetryInfo()
    told = status is not None and any(each.Unpack(retry) for each in status.details)
    pushback = {each[0]: each[1] for each in call.trailing_metadata() or ()}.get("grpc-retry-pushback-ms")
    if told and pushback == str(retry.retry_delay.ToMilliseconds()):
        return ""
    return f"{error}, without RetryInfo and pushback that agree"


def visit(
    target: str, right: Right, names: Sequence[str], rude: bool, number: int, start: Callable[[], float]
) -> tuple[str, Seen]:
    """One client: its guest's name and what it saw. A flaw is counted as an answer of its own, in words.

    rude: whether of two clients of a name one comes back at once when refused, instead of when it was told to.
    """
    name = names[number % len(names)]
    guest, random = GUESTS[name], np.random.default_rng(number)
    inputs, patient = guest.ask.inputs(), not rude or number // len(names) % 2 == 0
    with Client(target, retries=0) as client:
        client.strategies()  # connects, and knows what to send
        seen, until = Seen(), start()
        while (began := time.monotonic()) < until:
            job = client.submit(guest.ask.strategy, guest.ask.budget, **inputs, **guest.options)
            if guest.cancels:
                time.sleep(random.uniform(0, CANCEL_WITHIN))
                job.cancel()
            pause = 0.0
            try:
                found = job.result().indices.tolist()
                answer = "result" if found == right[name] else f"wrong picks of {name}"
            except QuerySelectError as error:
                answer = flaw(error, guest.may_fail) or error.code
                pause = error.retry_after if patient else 0.0
            seen.answers[answer] += 1
            seen.seconds.append(time.monotonic() - began)
            time.sleep(max(0.0, min(pause, until - time.monotonic())))
    return name, seen


def tally(found: list[tuple[str, Seen]]) -> dict[str, dict[str, int]]:
    """Answers by guest."""
    whole: dict[str, Counter[str]] = {name: Counter() for name in GUESTS}
    for name, seen in found:
        whole[name] += seen.answers
    return {name: dict(answers) for name, answers in whole.items()}


def flaws(tallied: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The answers that are neither results nor refusals as documented."""
    allowed = {name: {"result", "RESOURCE_EXHAUSTED", *guest.may_fail} for name, guest in GUESTS.items()}
    return [f"{name}: {each}" for name, answers in tallied.items() for each in answers.keys() - allowed[name]]


# One client that takes what it can get, and one that takes its turn


#: A fifth of a second of the device or so, and small enough to travel in one message.
JOB = Ask("k_center_greedy", 400, partial(embeddings, 4_000, 64))
#: Requests that the greedy one keeps going, and how soon it is back where one was refused, in seconds.
AT_ONCE, BACK_AFTER = 40, 0.05


def take_turns(target: str, at_once: int, _: int, start: Callable[[], float]) -> Seen:
    """One client, over one connection, that keeps so many jobs going: each, when it is answered, is sent anew."""
    inputs, seen = JOB.inputs(), [Seen() for _ in range(at_once)]

    def again(mine: Seen, until: float) -> None:
        while (began := time.monotonic()) < until:
            try:
                client.select(JOB.strategy, JOB.budget, **inputs)
                mine.answers["result"] += 1
                mine.seconds.append(time.monotonic() - began)
            except QuerySelectError as error:
                mine.answers[flaw(error, frozenset()) or error.code] += 1
                time.sleep(BACK_AFTER)

    with Client(target, retries=0) as client:
        client.strategies()  # connects, and knows what to send
        until = start()
        threads = [threading.Thread(target=again, args=(mine, until)) for mine in seen]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    return merged(seen)
