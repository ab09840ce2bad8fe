"""Items of several rows: sentences of tokens, images of boxes or pixels."""

from __future__ import annotations

import itertools
from typing import Annotated

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queryselect import Client, InvalidInput, Unsupported
from queryselect.strategies import v1 as messages
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2
from queryselect_service import strategy as registry
from queryselect_service.strategy import PLUGINS, STRATEGIES
from tests import plugins
from tests.service.streams import MIB, POOL_SCORES, Code, Talk, ask, assert_same, cut, free, ordered, streamed
from tests.service.test_errors import FAR, RANDOM, P, at, fail, quota, request, tensor
from tests.service.test_stream import some_request

registry.load()
pytestmark = pytest.mark.usefixtures("no_bugs")

AGGREGATIONS = {
    "MEAN": np.mean,
    "MAX": np.max,
    "SUM": np.sum,
    "TOP_K_MEAN": lambda rows: np.sort(rows)[-2:].mean(),
}
#: Strategies that score every row by itself, and do so without another one.
POINTWISE = sorted(name for name, each in STRATEGIES.items() if each.pointwise and not each.base_parameter)
ROWS, ITEMS = 60, 14
S = selection_pb2


def some_items(seed: int, rows: int = ROWS, items: int = ITEMS) -> np.ndarray:
    """The items of rows in no order; some have no rows, the last one among them."""
    return np.random.default_rng(seed).choice(np.setdiff1d(np.arange(items), [3, 8, items - 1]), rows)


def put_together(scores: np.ndarray, of: np.ndarray, how: str, items: int = ITEMS) -> np.ndarray:
    """The items' scores by their definition; NaN for an item without rows."""
    return np.array([AGGREGATIONS[how](scores[of == item]) if (of == item).any() else np.nan for item in range(items)])


def best(scores: np.ndarray, k: int) -> list[int]:
    """The k highest, NaN left out, ties to the lowest."""
    return sorted(np.flatnonzero(~np.isnan(scores)).tolist(), key=lambda item: (-scores[item], item))[:k]


def picks_of(answer: S.SelectResponse) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The picks, their scores, and every item's."""
    scores, every = (np.frombuffer(each.data) for each in (answer.scores, answer.pool_scores))
    return np.frombuffer(answer.indices.data, np.int64).tolist(), scores, every


def predictions(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(3), rows)


# Scores


@pytest.mark.parametrize("task", ["MULTICLASS", "MULTILABEL"])
@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("name", POINTWISE)
def test_items_are_chosen_by_the_scores_of_their_rows(running, channel, name, how, task):
    """Of every strategy that scores rows by themselves, in one message and in chunks in any order."""
    if task not in STRATEGIES[name].tasks:
        pytest.skip("the strategy has no such task")
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    seed = len(name) + len(how)
    message = some_request(name, torch.float64, ROWS)
    message.task = strategy_pb2.Task.Value(f"TASK_{task}")
    for field in ("labeled", "excluded", "ids"):
        message.pool.ClearField(field)
    rows = np.frombuffer(stub.Select(message).pool_scores.data)
    of, labeled, excluded = some_items(seed), [0, 5], np.isin(np.arange(ITEMS), [6, 13])
    expected = put_together(rows, of, how)
    expected[[*labeled, *np.flatnonzero(excluded)]] = np.nan

    message.pool.item_rows.CopyFrom(tensor(of.astype(np.int32 if seed % 2 else np.int64)))
    message.pool.item_aggregation = S.ItemAggregation.Value(f"ITEM_AGGREGATION_{how}")
    message.pool.item_top_k = 2
    message.pool.labeled.CopyFrom(tensor(np.array(labeled)))
    message.pool.excluded.CopyFrom(tensor(excluded))
    message.pool.ids.integers.CopyFrom(tensor(np.arange(ITEMS) + 10**9))
    unary = stub.Select(message)
    picks, scores, every = picks_of(unary)
    assert picks == best(np.where(np.isfinite(every), every, np.nan), 5)  # equal ones differ in their last digits
    np.testing.assert_allclose(scores, expected[picks], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(every, np.nan_to_num(expected, nan=-np.inf), rtol=1e-12, atol=1e-14)
    assert np.frombuffer(unary.ids.integers.data, np.int64).tolist() == [item + 10**9 for item in picks]

    first, data = streamed(message)
    assert "pool.item_rows" in data
    for size, order in ((7, "shuffled"), (100, "reversed"), (MIB, "lists last")):
        chunks = ordered([each for path in data for each in cut(path, data[path], size)], order)
        assert_same(ask(channel, [first, *chunks]).response, unary)
    free(running)


def test_streams_of_several_blocks_are_like_one_message(running, channel):
    """Rows of an item in many blocks; its number before them and after them."""
    rows = 9000
    of, P = some_items(0, rows, 700), predictions(0, rows).astype(np.float32)
    for how, last in itertools.product(range(1, 5), (False, True)):
        message = request(
            budget=40, probabilities=tensor(P), item_rows=tensor(of), item_aggregation=how, item_top_k=3,
            excluded=tensor([4, 5]), costs=tensor(np.ones(700)), returns=[POOL_SCORES],
        )  # fmt: skip
        unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
        first, data = streamed(message)
        paths = sorted(data, key=lambda path: (path in ("pool.item_rows", "pool.excluded")) == last)
        chunks = [each for path in paths for each in cut(path, data[path], 10_000)]
        assert_same(ask(channel, [first, *chunks]).response, unary)
        some, data = streamed(message, "pool.item_rows", "pool.excluded")  # and the rows themselves in the start
        assert_same(
            ask(channel, [some, *(each for path in data for each in cut(path, data[path], 999))]).response, unary
        )
    free(running)


def test_noise_on_scores_belongs_to_items(local):
    """It is added to what becomes of the rows' scores."""
    samples = np.random.default_rng(0).dirichlet(np.ones(3), (ROWS, 4))
    of = np.sort(some_items(0) % 6)
    options = {"samples": samples, "item_rows": of, "return_pool_scores": True, "seed": 5}

    def power(beta: float) -> np.ndarray:
        return local.select("power_bald", 2, params={"form": "SOFTMAX", "beta": beta}, **options).pool_scores

    for how in ("MAX", "SUM"):
        options["item_aggregation"] = how
        plain = local.select("bald", 2, **options).pool_scores
        noise = power(0.0)
        assert len(np.unique(noise)) == len(noise)
        np.testing.assert_allclose(power(3.0), 3.0 * plain + noise, rtol=1e-12)


def test_random_draws_items_and_not_rows(local):
    """As it draws rows where every row is an item, however many rows the items have."""
    of = np.repeat(np.arange(9), [1, 1, 500, 1, 1, 1, 1, 1, 1])
    drawn = local.select("random", 9, item_rows=of, seed=2, return_pool_scores=True)
    plain = local.select("random", 9, num_rows=9, seed=2, return_pool_scores=True)
    assert drawn.indices.tolist() == plain.indices.tolist()
    assert drawn.pool_scores.tolist() == plain.pool_scores.tolist()


# Properties


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_items_of_one_row_each_are_the_rows(local, data):
    name = data.draw(st.sampled_from(["least_confidence", "margin", "entropy", "random"]))
    rows, seed = data.draw(st.integers(2, 40)), data.draw(st.integers(0, 99))
    fate = np.array(data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)))
    lists = {each: np.flatnonzero(fate == at) for at, each in enumerate(("labeled", "pending", "excluded"))}
    most = int((fate > 2).sum())
    if not most:
        return
    options = {**lists, "return_pool_scores": True, "seed": seed, "costs": np.arange(rows) % 4, "cost_budget": 9}
    budget = data.draw(st.integers(1, most))
    plain = local.select(name, budget, probabilities=predictions(seed, rows), **options)
    how = data.draw(st.sampled_from(list(AGGREGATIONS)))
    items = {"item_rows": np.arange(rows), "item_aggregation": how, "item_top_k": data.draw(st.integers(1, 3))}
    got = local.select(name, budget, probabilities=predictions(seed, rows), **items, **options)
    assert got.indices.tolist() == plain.indices.tolist()
    assert got.scores.tobytes() == plain.scores.tobytes()
    assert got.pool_scores.tobytes() == plain.pool_scores.tobytes()
    assert (got.stop_reason, got.cost_spent) == (plain.stop_reason, plain.cost_spent)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_order_of_rows_changes_nothing(local, data):
    """Scores are multiples of 1/8, of which sums are exact, and many items are equal."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    rows, items = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 12))
    top = rng.integers(4, 9, rows) / 8
    P, of = np.stack([top, 1 - top], 1), rng.integers(0, items, rows)
    options = {
        "budget": len(np.unique(of)),
        "item_aggregation": data.draw(st.sampled_from(list(AGGREGATIONS))),
        "item_top_k": 2,
        "return_pool_scores": True,
    }
    plain = local.select("least_confidence", probabilities=P, item_rows=of, **options)
    order = rng.permutation(rows)
    moved = local.select("least_confidence", probabilities=P[order], item_rows=of[order], **options)
    assert moved.indices.tolist() == plain.indices.tolist()
    assert moved.pool_scores.tobytes() == plain.pool_scores.tobytes()
    assert np.lexsort((plain.indices, -plain.scores)).tolist() == list(range(len(plain))), "ties to the lowest item"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_lists_costs_and_quotas_are_of_items(local, data):
    """Against the same request of which every item is a row with the item's score."""
    seed, how = data.draw(st.integers(0, 99)), data.draw(st.sampled_from(list(AGGREGATIONS)))
    of, P = some_items(seed), predictions(seed)
    rows = local.select("margin", 1, probabilities=P, return_pool_scores=True).pool_scores
    scores = put_together(rows, of, how)
    fate = np.array(data.draw(st.lists(st.integers(0, 8), min_size=ITEMS, max_size=ITEMS)))
    lists = {each: np.flatnonzero(fate == at) for at, each in enumerate(("labeled", "pending", "excluded"))}
    free = (fate > 2) & ~np.isnan(scores)
    if data.draw(st.booleans()):  # labelled items may be listed as candidates
        lists["candidates"] = np.flatnonzero(np.isin(fate, (0, 3, 4, 5)))
        free = np.isin(fate, (0, 3, 4, 5)) & ~np.isnan(scores)
    if not free.any():
        return
    if data.draw(st.booleans()):
        lists = {name: np.isin(np.arange(ITEMS), each) for name, each in lists.items()}
    groups, costs = np.arange(ITEMS) % 4, np.arange(ITEMS) % 3 + 0.5
    costs[fate == 2] = np.nan  # excluded: does not matter
    P[np.isin(of, np.flatnonzero(fate == 2))] = np.nan
    budget = data.draw(st.integers(1, int(free.sum())))
    got = local.select(
        "margin", budget, probabilities=P, item_rows=of, item_aggregation=how, item_top_k=2, num_items=ITEMS, **lists,
        groups=groups, max_per_group=2, costs=costs, cost_budget=6, ids=[f"s{item}" for item in range(ITEMS)],
        return_pool_scores=True,
    )  # fmt: skip
    picks: list[int] = []
    for item in best(np.where(free, scores, np.nan), ITEMS):
        fits = costs[[*picks, item]].sum() <= 6 and (groups[picks] == groups[item]).sum() < 2
        if fits and len(picks) < budget:
            picks.append(item)
    assert got.indices.tolist() == picks
    assert got.ids.tolist() == [f"s{item}" for item in picks]
    assert got.cost_spent == costs[picks].sum()
    np.testing.assert_allclose(
        got.pool_scores, np.where(free, scores, -np.inf), rtol=1e-12, atol=1e-14, err_msg="of items that may be chosen"
    )


# Items without rows


def test_items_without_rows_are_never_chosen_and_told(local):
    of = np.repeat([0, 2, 4, 7], 5)
    got = local.select(
        "margin", 2, probabilities=predictions(0, 20), item_rows=of, labeled=[1, 2], num_items=9, excluded=[5]
    )
    (warning,) = got.warnings
    assert (warning.code, warning.rows.tolist()) == ("INERT_ROWS", [3, 6, 8])
    assert warning.message == "3 items have no rows in pool.item_rows: never chosen"
    for options, count in (({}, 4), ({"pending": [3, 4]}, 3), ({"candidates": [0, 1, 3]}, 1)):
        with pytest.raises(InvalidInput, match=f"budget 5 but {count} candidates"):
            local.select("random", 5, item_rows=of, num_items=9, **options)
    got = local.select("random", 4, item_rows=of, num_items=9, validate_only=True)
    assert [each.message[:7] for each in got.warnings] == ["5 items"]
    got = local.select("random", 1, item_rows=of, candidates=[4, 6])
    assert [each.message[:11] for each in got.warnings] == ["1 item has "]
    assert not local.select("random", 1, item_rows=of, candidates=[4]).warnings


def test_items_may_be_more_than_rows(running, channel, local):
    """Memory is set aside for them once they are known, however their rows came."""
    message = request(RANDOM, budget=2, item_rows=tensor(np.array([5, 3_000_000, 7])), returns=[POOL_SCORES])
    first, data = streamed(message)
    with Talk(channel, first) as talk:
        reserved = talk.until("admitted").reserved_bytes
        assert reserved < MIB
        talk.send(*cut("pool.item_rows", data["pool.item_rows"], 5))
        talk.end()
        result = talk.until("result")
        assert list(result.pool_scores.shape) == [3_000_001]
        list(talk.call)
    free(running)
    here = local.select("random", 2, item_rows=[5, 3_000_000, 7], return_pool_scores=True)
    assert np.frombuffer(result.indices.data, np.int64).tolist() == here.indices.tolist()
    assert set(here.indices) < {5, 3_000_000, 7}


def test_more_items_than_there_is_memory_for_are_refused_once_they_are_known(serve):
    small, channel = serve(max_host_bytes=64 * MIB)
    message = request(RANDOM, budget=1, item_rows=tensor(np.array([5, 40_000_000])))
    unary, _, _ = fail(channel, message)
    first, data = streamed(message)
    with Talk(channel, first, *cut("pool.item_rows", data["pool.item_rows"], 5)) as talk:
        talk.end()
        failure = talk.failure()
    assert failure.code is unary.code() is Code.FAILED_PRECONDITION
    assert failure.admitted
    free(small)


# What may not matter


@pytest.mark.parametrize("order", ["straight", "reversed", "shuffled"])
def test_rows_of_excluded_items_may_hold_anything(running, channel, order):
    of = some_items(1)
    gone = np.array([0, 7])
    P = predictions(1)
    P[np.isin(of, gone)] = np.nan
    costs = np.where(np.isin(np.arange(ITEMS), gone), np.nan, 1.0)
    message = request(
        budget=4, probabilities=tensor(P), item_rows=tensor(of), excluded=tensor(gone), costs=tensor(costs),
        returns=[POOL_SCORES],
    )  # fmt: skip
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    picks, _, every = picks_of(unary)
    scores = put_together(1 + np.diff(np.sort(P)[:, -2:])[:, 0] * -1, of, "MEAN")
    assert picks == best(scores, 4)
    assert (every[gone] == -np.inf).all()
    first, data = streamed(message)
    chunks = ordered([each for path in data for each in cut(path, data[path], 50)], order)
    assert_same(ask(channel, [first, *chunks]).response, unary)
    for late in (["pool.item_rows"], ["pool.excluded"]):  # with the rows themselves in the start
        first, data = streamed(message, *late)
        assert_same(ask(channel, [first, *cut(late[0], data[late[0]], 50)]).response, unary)
    free(running)


def test_a_bad_row_in_the_start_is_found_once_it_is_known_to_count(channel):
    """The excluded rows come after it, with items and without."""
    for more in ({}, {"item_rows": tensor(np.arange(10))}):
        for late in ("pool.excluded", "pool.item_rows"):
            if late == "pool.item_rows" and not more:
                continue
            bad = request(probabilities=tensor(at(P, 6, 1, np.nan)), excluded=tensor([5]), **more)
            first, data = streamed(bad, late)
            with Talk(channel, first, *cut(late, data[late], 99)) as talk:
                talk.end()
                failure = talk.failure()
            assert (failure.code, failure.field) == (Code.INVALID_ARGUMENT, "pool.probabilities")
            assert "row 6 has nan" in failure.words
            good = request(probabilities=tensor(at(P, 6, 1, np.nan)), excluded=tensor([6]), **more)
            first, data = streamed(good, late)
            assert ask(channel, [first, *cut(late, data[late], 99)]).response.indices.data


def test_weights_of_excluded_items_do_not_count(local):
    """Of a plug-in that reads them."""
    P, W = predictions(0, 6), np.array([0.0, 0, 0, 0, 1, 1])

    @registry.pointwise(registry.Spec, cost="O(N C)", citation="2026")
    def weighted(probabilities: Annotated[torch.Tensor, "N C"], weights: Annotated[torch.Tensor, "N"]) -> torch.Tensor:
        return probabilities.amax(-1) * weights

    try:
        with Client("local:") as client:
            options = {"probabilities": P, "weights": W, "item_rows": [0, 0, 1, 1, 2, 2]}
            custom = messages.Custom(name="weighted")
            assert client.select(custom, 1, **options).indices.tolist() == [2]
            with pytest.raises(InvalidInput, match="must not all be 0"):
                client.select(custom, 1, **options, excluded=[2])
    finally:
        del PLUGINS["weighted"]


def test_a_quota_of_items_is_told_in_their_number(channel):
    message = request(
        item_rows=tensor(np.arange(10) // 2), quotas=[quota(values=tensor(np.arange(5) // 2), default_max=1)]
    )
    message.stop.max_items = 4
    answer = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert list(answer.indices.shape) == [3]
    assert answer.stop_reason == S.STOP_REASON_QUOTAS


# Who serves them


def test_only_strategies_with_scores_of_rows_or_without_rows_serve_items(channel, local):
    serving = {name for name, each in {**STRATEGIES, **PLUGINS}.items() if each.serves_items}
    assert {*POINTWISE, "random", "power_bald", "scaled", "sleepy", "weighed"} <= serving
    assert not serving & {"k_center_greedy", "bait", "bait_binary", "bait_diagonal", "fisher_kernel", "guided"}
    assert {each.name for each in local.strategies() if each.items} == serving
    for name in sorted(set(STRATEGIES) - serving):
        message = strategy_pb2.Strategy()
        getattr(message, name).SetInParent()
        error, status, _ = fail(channel, request(message, item_rows=tensor(np.arange(10))))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert error.details().startswith(f"{name} does not serve pool.item_rows: ")
        (violation,) = next(
            found.field_violations
            for each in status.details
            if each.Unpack(found := error_details_pb2.BadRequest())
        )  # fmt: skip
        assert violation.field == "pool.item_rows"


def test_a_plug_in_without_rows_gets_items_for_rows(local):
    assert plugins.sleepy.__name__ in PLUGINS
    got = local.select(messages.Custom(name="sleepy"), 2, item_rows=[0, 0, 1, 3, 3], labeled=[0])
    assert got.indices.tolist() == [1, 3]
    with pytest.raises(Unsupported, match="compares rows"):
        local.select(FAR.k_center_greedy, 1, embeddings=np.eye(3), item_rows=[0, 0, 1])
