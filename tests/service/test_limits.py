"""Quotas and costs on their way through the service: inline, streamed in any order, with rows scored as they come."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from queryselect import Client, Custom
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2
from queryselect_service.quotas import Quota
from queryselect_service.strategy import Limits, load
from queryselect_service.terms import Terms
from queryselect_service.upload import held_bytes
from tests.service.streams import LONG_P, LONG_X, MIB, ask, assert_same, cut, ordered, refused, streamed
from tests.service.test_errors import FAR, RANDOM, P, X, quota, request, tensor
from tests.service.test_upload import upload_of

load()
pytestmark = pytest.mark.usefixtures("no_bugs")
LONG = 9000
S = selection_pb2


@cache
def limited(name: str) -> selection_pb2.SelectRequest:
    """Two quotas, costs that count and excluded rows whose costs are no costs."""
    strategy = strategy_pb2.Strategy()
    getattr(strategy, name).SetInParent()
    inputs = {"k_center_greedy": {"embeddings": tensor(LONG_X)}, "margin": {"probabilities": tensor(LONG_P)}}
    costs = np.arange(LONG) % 5 / 4
    gone = np.arange(LONG) % 7 == 3
    costs[gone] = -1
    return request(
        strategy,
        stop=S.Stop(max_items=40, max_cost=12.0),
        quotas=[
            S.Quota(name="pair", values=tensor(np.arange(LONG) // 2), default_max=1),
            S.Quota(
                name="class",
                values=tensor((np.arange(LONG) % 3 - 1).astype(np.int64)),
                limits=[S.QuotaLimit(value=0, min=3, max=4), S.QuotaLimit(value=1, max=9)],
            ),
        ],
        costs=tensor(costs),
        excluded=tensor(gone),
        labeled=tensor([8999, 18]),
        **inputs.get(name, {}),
    )


@pytest.mark.parametrize("size", [1000, MIB])
@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled", "lists last"])
@pytest.mark.parametrize("name", ["margin", "k_center_greedy", "random"])
def test_limits_may_be_streamed(channel, name, order, size):
    message = limited(name)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    picks = np.frombuffer(unary.indices.data, np.int64)
    assert unary.stop_reason == S.STOP_REASON_MAX_ITEMS or unary.cost_spent <= 12
    assert len(np.unique(picks // 2)) == len(picks) > 10
    assert 3 <= np.count_nonzero(picks % 3 == 1) <= 4
    assert unary.cost_spent == (picks % 5 / 4).sum() <= 12
    first, data = streamed(message)
    assert {"pool.costs", "pool.quotas[0].values", "pool.quotas[1].values"} <= set(data)
    chunks = [each for path in data for each in cut(path, data[path], size)]
    assert_same(ask(channel, [first, *ordered(chunks, order)]).response, unary)


def test_types_that_hold_the_same_numbers_mean_the_same(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    values, costs = np.arange(10) // 2, np.arange(10) % 3
    wanted = request(quotas=[quota(values=tensor(values), default_max=1)], costs=tensor(costs), budget=4)
    plain = stub.Select(wanted)
    assert plain.cost_spent > 0
    for some, price in ((np.uint8, np.float32), (np.int32, np.float64)):
        groups = quota(values=tensor(values.astype(some)), default_max=1)
        assert_same(stub.Select(request(quotas=[groups], costs=tensor(costs.astype(price)), budget=4)), plain)


def test_a_bad_cost_is_named_as_its_rows_come(running, channel):
    costs = np.ones(LONG)
    costs[5000] = -2
    message = request(FAR, embeddings=tensor(LONG_X), costs=tensor(costs))
    first, data = streamed(message, "pool.costs")
    chunks = cut("pool.costs", data["pool.costs"], 8000)
    failure = refused(running, channel, first, *chunks[:6], end=False)
    assert failure.field == "pool.costs"
    assert failure.words == "pool.costs must not be negative; row 5000 has -2"


def test_no_costs_no_sum_and_costs_alone_are_only_added_up(local: Client):
    plain = local.select("margin", 3, probabilities=P)
    assert plain.cost_spent is None
    priced = local.select("margin", 3, probabilities=P, costs=np.arange(10))
    assert priced.indices.tolist() == plain.indices.tolist()
    assert priced.cost_spent == plain.indices.sum()
    kernel = local.select(Custom(name="second_class"), 3, probabilities=P, costs=np.arange(10))  # which knows no limits
    assert kernel.cost_spent == kernel.indices.sum()


def test_a_least_gain_ends_a_walk(local: Client):
    gains = np.sort(X.sum(1))[::-1]
    got = local.select(Custom(name="guided"), 10, embeddings=X.astype(float), min_gain=float(gains[3]) - 1e-9)
    assert len(got) == 4
    assert got.stop_reason == "MIN_GAIN"
    assert f"the best gain left is {gains[4]:.4g}"[:-1] in got.warnings[0].message


def test_the_number_of_rows_may_be_told_by_limits_alone(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    for told in ({"costs": tensor(np.ones(10))}, {"quotas": [quota(default_max=1)]}):
        assert len(stub.Select(request(RANDOM, **told)).indices.data) == 16


def test_the_memory_of_limits_is_set_aside():
    """Their tensors on the way and in the types that selections use, and what keeping to them takes."""
    values, costs = np.arange(LONG, dtype=np.int64), np.ones(LONG)
    message = request(FAR, embeddings=tensor(LONG_X), quotas=[quota(values=tensor(values))], costs=tensor(costs))
    _, asked = upload_of(message, "embeddings", "costs")
    _, bare = upload_of(request(FAR, embeddings=tensor(LONG_X)), "embeddings")
    assert held_bytes(asked) - held_bytes(bare) == values.nbytes + costs.nbytes
    assert asked.extra_bytes - bare.extra_bytes == values.nbytes + costs.nbytes
    assert asked.terms.memory(LONG, 2) > 5 * LONG
    assert Terms(costs=asked.terms.costs).memory(LONG, 2) == bare.terms.memory(LONG, 2) == 0


def test_limits_that_ask_for_nothing_bind_nothing():
    assert not Limits().bind
    assert not Limits(costs=np.ones(3)).bind
    assert Limits((Quota("q"),), (np.ones(3),)).bind
    assert Limits(max_cost=0.0).bind
    assert Limits(min_gain=0.0).bind
