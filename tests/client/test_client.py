"""The client's promises: the same answers in this process as from a server, and calls that stop when told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest

from queryselect import (
    Cancelled,
    Client,
    Custom,
    DeadlineExceeded,
    Entropy,
    InvalidInput,
    KCenterGreedy,
    Picks,
    QuerySelectError,
    Unsupported,
)
from queryselect.v1 import strategy_pb2
from queryselect_service import strategy as strategies
from tests.client.conftest import Slow
from tests.client.fake import Fake

N = 300
RNG = np.random.default_rng(0)
POOL = {
    "embeddings": RNG.normal(size=(N, 5)).astype("f4"),
    "logits": RNG.normal(size=(N, 4)),
    "samples": RNG.dirichlet(np.ones(4), (N, 3)),
    "gradients": RNG.normal(size=(N, 6)),
    "utilities": RNG.normal(size=N),
    "weights": RNG.random(N),
    "clusters": RNG.integers(0, 5, N),
    "labeled": [3, 1, 4, 15],
    "labels": [0, 1, 2, 3],
    "pending": np.arange(N) == 9,
    "excluded": [26],
}
POOL["embeddings"][200:] = POOL["embeddings"][:100]  # ties
POOL["embeddings"][50] = 0.0  # inert where rows are normalized
#: Rows beside the pool, for strategies that can't do without.
REFERENCES = {
    "VALIDATION": {
        "embeddings": RNG.normal(size=(40, 5)).astype("f4"),
        "gradients": RNG.normal(size=(40, 6)),
        "logits": RNG.normal(size=(40, 4)),
        "labels": RNG.integers(0, 4, 40),
    },
    "TARGET": {"samples": RNG.dirichlet(np.ones(4), (40, 3)), "weights": RNG.random(40)},
}
KINDS = [each.name for each in strategy_pb2.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields if each.name != "custom"]


def beside(description: strategy_pb2.StrategyDescription) -> dict[str, Any]:
    """Options for what a strategy can't do without beside the pool, and for what it alone can return."""
    found: dict[str, Any] = {"returns": ["PSEUDO_LABELS"]} if description.pseudo_labels else {}
    for each in description.references:
        if each.role in REFERENCES:
            found["reference"] = REFERENCES[each.role]
    return found


def told(picks: Picks) -> dict[str, Any]:
    """Everything in picks that two runs of a request share."""
    return {
        "indices": picks.indices.tolist(),
        "scores": picks.scores.tolist(),
        "score_kind": picks.score_kind,
        "stop_reason": picks.stop_reason,
        "strategy": picks.strategy,
        "warnings": [(each.code, each.message, each.rows.tolist()) for each in picks.warnings],
        "ids": None if picks.ids is None else picks.ids.tolist(),
        "pool_scores": None if picks.pool_scores is None else picks.pool_scores.tolist(),
        "pseudo_labels": None if picks.pseudo_labels is None else picks.pseudo_labels.tolist(),
        "cost_spent": picks.cost_spent,
        "info": [picks.info.device, picks.info.compute_dtype, picks.info.version, picks.info.seed, picks.info.sources],
    }


# local: and a server are the same


@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
@pytest.mark.parametrize("name", KINDS)
def test_every_strategy_gives_the_same_here_and_there(local: Client, remote: Client, name: str, task: str) -> None:
    (description,) = (each for each in local.strategies() if each.name == name)
    if strategy_pb2.Task.Value(f"TASK_{task}") not in description.tasks:
        for client in (local, remote):
            with pytest.raises(InvalidInput, match=f"{name} serves task") as caught:
                client.select(name, 20, **POOL, task=task)
            assert caught.value.field == "task"
        return
    options = {**POOL, "task": task, "seed": 7, "return_pool_scores": description.pool_scores, "ids": range(N)}
    options |= beside(description)
    here, there = (told(client.select(name, 20, **options)) for client in (local, remote))
    assert here == there
    assert len(set(here["indices"])) == 20
    assert not {1, 3, 4, 9, 15, 26} & set(here["indices"])
    if description.pool_scores:
        assert np.isneginf(np.array(here["pool_scores"])[[1, 3, 4, 9, 15, 26]]).all()


@pytest.mark.parametrize(
    ("strategy", "options", "code"),
    [
        (KCenterGreedy(normalize=True), {}, "INERT_ROWS"),
        (KCenterGreedy(), {"budget": 220, "labeled": [3]}, "COVERED"),
    ],
)
def test_warnings_are_the_same_here_and_there(
    local: Client, remote: Client, strategy: Any, options: dict[str, Any], code: str
) -> None:
    options = {"budget": 5, "embeddings": POOL["embeddings"], **options}
    here, there = (client.select(strategy, **options) for client in (local, remote))
    assert told(here) == told(there)
    assert code in [each.code for each in here.warnings]
    assert all(each.rows.dtype == np.int64 for each in here.warnings)


def test_a_plug_in_gives_the_same_here_and_there(local: Client, remote: Client, slow: Slow) -> None:
    params = {"name": "slow", "parameters": {"seconds": 0}}
    here, there = (client.select("custom", 2, params=params, num_rows=5) for client in (local, remote))
    assert told(here) == told(there)
    assert (here.strategy.name, dict(here.strategy.parameters)) == ("slow", {"seconds": 0.0})
    with pytest.raises(InvalidInput, match="did you mean seconds") as caught:
        remote.select("custom", 2, params={"name": "slow", "parameters": {"second": 0}}, num_rows=5)
    assert caught.value.field == "strategy.custom.parameters.second"


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("margin", {"logits": POOL["logits"][0]}),
        ("margin", {"logits": np.full((N, 3), np.nan)}),
        ("margin", {"logits": np.arange(N)[:, None]}),
        ("margin", {"probabilities": POOL["logits"]}),
        ("margin", {"probabilities": POOL["logits"], "logits": POOL["logits"]}),
        ("margin", {"logits": POOL["logits"], "params": {"top_k": 9}}),
        ("margin", {"logits": POOL["logits"], "params": {"label_aggregation": 99}}),
        ("random", {"num_rows": 0}),
        ("random", {"num_rows": 10, "budget": 11}),
        ("random", {"num_rows": 10, "budget": 0}),
        ("random", {"num_rows": 10, "budget": None}),
        ("random", {"num_rows": 10, "labeled": [1], "pending": [1]}),
        ("random", {"num_rows": 10, "item_rows": np.ones(10)}),
        ("random", {"num_rows": 10, "item_rows": -np.ones(10, int)}),
        ("random", {"item_rows": [0, 0, 2], "labeled": [3]}),
        ("random", {"item_rows": [0, 0, 2], "budget": 3}),
        ("random", {"item_rows": [0, 0, 2], "num_items": 2}),
        ("random", {"num_rows": 10, "item_top_k": 2}),
        ("k_center_greedy", {"embeddings": POOL["embeddings"], "item_rows": np.zeros(N, int)}),
        ("random", {"groups": [1, 2], "num_rows": 10}),
        ("margin", {"logits": POOL["logits"], "costs": -np.ones(N)}),
        ("margin", {"logits": POOL["logits"], "min_gain": 1.0}),
        ("margin", {"logits": POOL["logits"], "reference": {"embeddings": POOL["embeddings"]}}),
        ("random", {"num_rows": 10, "returns": ["PSEUDO_LABELS"]}),
        ("random", {"num_rows": 10**9}),
        (Custom(name="nobody's"), {"num_rows": 10}),
    ],
)
def test_errors_are_the_same_here_and_there(
    local: Client, remote: Client, strategy: Any, options: dict[str, Any]
) -> None:
    def error(client: Client) -> QuerySelectError:
        with pytest.raises(QuerySelectError) as caught:
            client.select(strategy, **{"budget": 1, "request_id": "the-id", **options})
        return caught.value

    here, there = error(local), error(remote)
    assert type(here) is type(there)
    assert (str(here), vars(here)) == (str(there), vars(there))
    assert there.code in {"INVALID_ARGUMENT", "OUT_OF_RANGE", "UNIMPLEMENTED"}


def test_progress_in_this_process_is_told_pick_by_pick(local: Client) -> None:
    told: list[tuple[str, int, int | None]] = []
    x = np.random.default_rng(0).normal(size=(50, 3))
    local.select("k_center_greedy", 4, embeddings=x, labeled=[0], progress=lambda *each: told.append(each))
    assert [each[1] for each in told] == [0, 0, 1, 2, 3, 4]
    assert {each[2] for each in told} == {4}


def test_a_token_does_not_travel_in_clear_text() -> None:
    with pytest.raises(ValueError, match="clear text"):
        Client("selection.example.org:50051", token="secret")
    for target in ("localhost:1", "127.0.0.1:1", "[::1]:1"):
        Client(target, token="secret").close()
    Client("selection.example.org:50051", token="secret", tls=True).close()


@pytest.mark.parametrize("token", ["secret\n", "secret\r\nx: y", "sécret", "secret\0", "\tsecret"])
def test_a_token_that_can_not_travel_is_refused_at_once_and_not_told(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII") as caught:
        Client("localhost:1", token=token)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"retries": -1}, {"retries": 1.5}, {"timeout": "5"}, {"timeout": float("nan")}])
def test_wrong_options_of_a_client_are_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs a"):
        Client("localhost:1", **options)


def test_only_local_itself_is_local() -> None:
    with Client("local:50051", retries=0) as client, pytest.raises(QuerySelectError):
        client.server_info()


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        (KCenterGreedy, {"embeddings": np.eye(3)}, r"KCenterGreedy\(\), not the class"),
        ("k_center_greedy", {"embeddings": np.eye(3), "params": {"normalize": "yes"}}, "True or False; it is 'yes'"),
        ("random", {"num_rows": 3, "budget": 1.5}, "whole number within 64 bits; it is 1.5"),
        ("random", {"num_rows": 3, "scales": 3}, "pool.scales needs a list; it is a int"),
        ("random", {"num_rows": 3, "inputs": 3}, "pool.inputs needs a mapping; it is a int"),
        ("random", {"embeddings": np.eye(4), "probabilities": np.eye(3)}, "pool.probabilities needs 4 rows"),
        ("random", {"utilities": np.ma.masked_greater(np.arange(3.0), 1)}, "masked entries"),
    ],
)
def test_slips_are_told_in_words(local: Client, strategy: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        local.select(strategy, **{"budget": 1, **options})


def test_one_return_may_be_given_by_its_name_alone(local: Client) -> None:
    assert local.select("random", 1, num_rows=3, returns="POOL_SCORES").pool_scores is not None


def test_picks_show_the_first_few_at_a_prompt(local: Client) -> None:
    line = np.array([[0.0], [1.0], [2.0], [9.0], [3.0], [4.0], [7.0]])
    picks = local.select("k_center_greedy", 6, embeddings=line, labeled=[0])
    assert repr(picks) == "Picks(6 by KCenterGreedy, DISTANCE, MAX_ITEMS: 3 (9), 5 (4), 2 (2), 6 (2), 1 (1), …)"
    short = local.select("k_center_greedy", 2, embeddings=line[:2].repeat(2, axis=0), labeled=[0])
    assert repr(short) == "Picks(2 by KCenterGreedy, DISTANCE, MAX_ITEMS, COVERED: 2 (1), 1 (0))"


def test_a_request_id_that_cannot_be_logged_is_refused_here_and_there(local: Client, remote: Client) -> None:
    for client in (local, remote):
        with pytest.raises(InvalidInput, match="printable ASCII") as caught:
            client.select("random", 1, num_rows=3, request_id="a b\n")
        assert caught.value.field == "request_id"


def test_descriptions_are_the_same_here_and_there(local: Client, remote: Client) -> None:
    assert local.strategies() == remote.strategies()
    assert {each.name for each in remote.strategies()} == {*strategies.STRATEGIES, *strategies.PLUGINS}
    here, there = local.server_info(), remote.server_info()
    assert (here.version, here.limits, here.dtypes) == (there.version, there.limits, there.dtypes)
    assert here.devices[0].name == there.devices[0].name


# Picks


def test_picks_are_what_the_documentation_says(client: Client) -> None:
    ids = [f"item {row}" for row in range(N)]
    picks = client.select(Entropy(), 5, logits=POOL["logits"], ids=ids, return_pool_scores=True, seed=3)
    assert (picks.indices.dtype, picks.scores.dtype, picks.pool_scores.dtype) == (np.int64, np.float64, np.float64)
    assert (picks.indices.shape, picks.scores.shape, picks.pool_scores.shape) == ((5,), (5,), (N,))
    assert (len(picks), picks.score_kind, picks.stop_reason) == (5, "POINT", "MAX_ITEMS")
    assert list(picks) == [(row, picks.pool_scores[row]) for row in picks.indices.tolist()]
    assert picks.scores.tolist() == sorted(picks.pool_scores.tolist(), reverse=True)[:5]
    assert isinstance(picks.strategy, Entropy)
    assert picks.strategy.HasField("label_aggregation")  # resolved
    assert (picks.pseudo_labels, picks.cost_spent, picks.warnings) == (None, None, ())
    assert (picks.info.seed, picks.info.compute_dtype) == (3, "f64")
    assert 0 < picks.info.kernel <= picks.info.total < 60
    for array in (picks.indices, picks.scores, picks.pool_scores):
        array[:] = 0  # the caller's own


def test_picks_become_a_frame(client: Client) -> None:
    plain = client.select("margin", 3, logits=POOL["logits"])
    frame = plain.to_pandas()
    assert list(frame.columns) == ["row", "score"]
    assert list(zip(frame["row"], frame["score"], strict=True)) == list(plain)
    named = client.select("margin", 3, logits=pd.DataFrame(POOL["logits"], index=np.arange(N) + 1000)).to_pandas()
    assert list(named.columns) == ["id", "row", "score"]
    assert (named["id"] == named["row"] + 1000).all()


def test_validate_only_picks_nothing(client: Client) -> None:
    picks = client.select("margin", 3, logits=POOL["logits"], validate_only=True, ids=range(N))
    assert (len(picks), list(picks), picks.ids.tolist()) == (0, [], [])
    assert picks.strategy.HasField("label_aggregation")
    with pytest.raises(InvalidInput):
        client.select("margin", N + 1, logits=POOL["logits"], validate_only=True)


def test_the_request_id_is_echoed(client: Client) -> None:
    assert client.select("random", 1, num_rows=5, request_id="mine-1").info.request_id == "mine-1"
    made = {client.select("random", 1, num_rows=5).info.request_id for _ in range(2)}
    assert len(made - {""}) == 2
    with pytest.raises(InvalidInput) as caught:
        client.select("random", 6, num_rows=5, request_id="mine-2")
    assert caught.value.request_id == "mine-2"


# Progress


def test_progress_calls_back(client: Client) -> None:
    seen: list[tuple[Any, ...]] = []
    client.select("random", 3, num_rows=5, progress=lambda *each: seen.append(each))
    assert seen[0] == ("selecting", 0, 3)
    assert seen[-1] == ("selecting", 3, 3)


def test_progress_true_is_a_bar(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.select("random", 3, num_rows=5)
    assert capsys.readouterr().err == ""
    client.select("random", 3, num_rows=5, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_callback_that_fails_fails_the_call(client: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        client.select("random", 3, num_rows=5, progress=lambda *_: 1 / 0)


# Jobs


def test_a_job_is_done_in_the_background(client: Client) -> None:
    job = client.submit("margin", 4, logits=POOL["logits"])
    picks = job.result(timeout=30)
    assert job.done()
    assert picks.indices.tolist() == client.select("margin", 4, logits=POOL["logits"]).indices.tolist()
    job.cancel()  # too late
    assert job.result() is picks


def test_a_cancelled_job_stops_there_and_the_next_is_served(client: Client, slow: Slow) -> None:
    job = client.submit(Custom(name="slow"), 1, num_rows=5, request_id="mine")
    assert slow.started.wait(30)
    with pytest.raises(TimeoutError, match="goes on") as caught:
        job.result(timeout=0.01)
    assert not isinstance(caught.value, QuerySelectError)
    assert not job.done()
    job.cancel()
    with pytest.raises(Cancelled) as stopped:
        job.result(timeout=5)
    assert (stopped.value.code, stopped.value.request_id) == ("CANCELLED", "mine")
    assert slow.stopped.wait(2)
    job.cancel()
    assert job.done()
    assert len(client.select("random", 3, num_rows=5, timeout=5)) == 3


def test_a_job_can_be_cancelled_while_it_waits_for_its_turn(client: Client, slow: Slow) -> None:
    first = client.submit("custom", 1, params={"name": "slow"}, num_rows=5)
    assert slow.started.wait(30)
    second = client.submit("random", 1, num_rows=5)
    second.cancel()
    with pytest.raises(Cancelled):
        second.result(timeout=5)
    assert not first.done()
    first.cancel()
    with pytest.raises(Cancelled):
        first.result(timeout=5)


@pytest.mark.parametrize("per", ["call", "client"])
def test_a_timeout_stops_the_kernel(address: str, slow: Slow, per: str) -> None:
    options = {"timeout": 1.0} if per == "call" else {}
    with Client(address, timeout=1.0 if per == "client" else None) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            client.select(Custom(name="slow"), 1, num_rows=5, request_id="mine", **options)
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.code, caught.value.request_id) == ("DEADLINE_EXCEEDED", "mine")
        assert slow.started.is_set()
        assert slow.stopped.wait(2)
        assert len(client.select("random", 3, num_rows=5)) == 3


def test_a_timeout_that_is_over_at_once(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.select("random", 1, num_rows=5, timeout=0.0)


def test_control_c_cancels(client: Client, slow: Slow, control_c: Callable[[], None]) -> None:
    def press() -> None:
        slow.started.wait(30)
        control_c()

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        client.select(Custom(name="slow"), 1, num_rows=5)
    assert slow.stopped.wait(2)
    assert len(client.select("random", 3, num_rows=5, timeout=5)) == 3


def test_a_client_may_be_shared_by_threads(address: str) -> None:
    calls = [(name, seed) for seed in range(4) for name in ("random", "margin", "k_center_greedy", "entropy")]

    def picks(client: Client, call: tuple[str, int]) -> tuple[list[int], str]:
        name, seed = call
        found = client.select(name, 10 + seed, **POOL, seed=seed, request_id=f"{name}-{seed}")
        return found.indices.tolist(), found.info.request_id

    with Client(address) as alone:
        expected = [picks(alone, call) for call in calls]
    with Client(address) as shared, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda call: picks(shared, call), calls)) == expected


# Closing


def test_a_closed_client_says_so(address: str) -> None:
    client = Client(address)
    client.select("random", 1, num_rows=5)
    client.close()
    client.close()
    for call in (
        lambda: client.select("random", 1, num_rows=5),
        lambda: client.submit("random", 1, num_rows=5),
        client.strategies,
        client.server_info,
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_closing_cancels_what_runs(address: str, slow: Slow) -> None:
    with Client(address) as client:
        job = client.submit(Custom(name="slow"), 1, num_rows=5)
        assert slow.started.wait(30)
    with pytest.raises(Cancelled):
        job.result(timeout=5)
    assert slow.stopped.wait(2)


# Messages


def test_a_server_that_never_answers_holds_no_thread_longer_than_its_timeout() -> None:
    with Fake() as fake, Client(fake.target) as client, ThreadPoolExecutor(4) as threads:
        fake.hold.clear()
        fake.ListStrategies = fake.Select  # which hangs
        started = time.monotonic()
        jobs = [threads.submit(client.select, "random", 1, num_rows=5, timeout=1.0) for _ in range(4)]
        for job in jobs:
            assert isinstance(job.exception(timeout=30), DeadlineExceeded)
        assert time.monotonic() - started < 3


def test_a_server_without_descriptions_is_sent_everything() -> None:
    with Fake() as fake, Client(fake.target) as client:
        fake._described = None  # an answer that gRPC can't send: INTERNAL
        client.select("margin", 1, logits=POOL["logits"], embeddings=POOL["embeddings"])
        assert fake.request.pool.HasField("embeddings")


def test_who_has_listed_the_strategies_does_not_ask_for_them_again() -> None:
    with Fake() as fake, Client(fake.target) as client:
        client.strategies()
        fake._described = None  # asked again, it would fail, and everything would be sent
        client.select("margin", 1, logits=POOL["logits"], embeddings=POOL["embeddings"])
        assert not fake.request.pool.HasField("embeddings")


def test_an_unknown_number_from_a_newer_server_is_no_error() -> None:
    class Newer(Fake):
        def Select(self, request, context):
            answer = super().Select(request, context)
            answer.score_kind, answer.stop_reason, answer.info.compute_dtype = 77, 78, 79
            answer.warnings.add(code=80, message="new")
            return answer

    with Newer() as fake, Client(fake.target) as client:
        picks = client.select("random", 1, num_rows=5)
    assert (picks.score_kind, picks.stop_reason, picks.info.compute_dtype) == ("77", "78", "79")
    assert [each.code for each in picks.warnings] == ["80"]


def test_the_token_travels() -> None:
    with Fake() as fake, Client(fake.target, token="secret") as client:
        client.select("random", 1, num_rows=5)
        assert fake.metadata[0]["authorization"] == "Bearer secret"


def test_an_unknown_plug_in_is_unsupported(client: Client) -> None:
    with pytest.raises(Unsupported, match="nobody's"):
        client.select(Custom(name="nobody's"), 1, num_rows=5)
