"""Groups and limits as callers write them, and what travels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from queryselect import Client, InvalidInput
from queryselect.v1 import tensor_pb2
from tests.client.fake import Fake

N = 50
TYPES = {tensor_pb2.DATA_TYPE_I64: "<i8", tensor_pb2.DATA_TYPE_I32: "<i4"}


NAN = float("nan")
GROUPS = [
    # what the caller has, the numbers that travel
    ([3, 3, -1, 7], [3, 3, -1, 7]),
    (np.array([3, 3, -1, 7], np.int32), [3, 3, -1, 7]),
    (["b", "b", None, "a"], [0, 0, -1, 1]),
    ([True, True, None, False], [0, 0, -1, 1]),
    ([True, True, False, False], [0, 0, 1, 1]),
    (["b", "b", NAN, "nan"], [0, 0, -1, 1]),
    ([("a", 1), ("a", 1), None, ("a", 2)], [0, 0, -1, 1]),
    ([1.5, 1.5, NAN, 2.0], [0, 0, -1, 1]),
    (torch.tensor([1.5, 1.5, NAN, 2.0]), [0, 0, -1, 1]),
    (np.array(["x", "x", "", "y"]), [0, 0, 1, 2]),
    (np.array(["2020", "2020", "NaT", "2021"], "M8[D]"), [0, 0, -1, 1]),
    (np.array([True, True, False, False]), [0, 0, 1, 1]),
    (pd.Series(["x", "x", pd.NA, "y"], dtype="string"), [0, 0, -1, 1]),
    (pd.Series([1, 1, None, 3], dtype="Int64"), [0, 0, -1, 1]),
    (pd.Categorical(["x", "x", None, "y"]), [0, 0, -1, 1]),
]


@pytest.mark.parametrize(("groups", "codes"), GROUPS, ids=lambda each: type(each).__name__)
def test_groups_become_numbers(fake: Fake, recorded: Client, groups: Any, codes: list[int]) -> None:
    recorded.select("random", 1, groups=groups)
    (quota,) = fake.request.pool.quotas
    values = quota.values  # noqa: PD011  # a field
    assert (quota.name, quota.default_max) == ("groups", 1)
    assert np.frombuffer(values.data, TYPES[values.dtype]).tolist() == codes
    assert not fake.request.pool.HasField("num_rows"), "the groups tell it"


def test_limits_may_be_written_short(fake: Fake, recorded: Client) -> None:
    group = np.arange(N) % 5
    quotas = [{"name": "class", "values": group, "limits": {1: 3, np.int64(2): (1, 4), 3: (2, None)}}]
    recorded.select("random", 9, quotas=quotas, groups=group, max_per_group=2)
    mine, groups = fake.request.pool.quotas
    assert (groups.name, groups.default_max, mine.HasField("default_max")) == ("groups", 2, False)
    assert [(each.value, each.min, each.max, each.HasField("max")) for each in mine.limits] == [
        (1, 0, 3, True),
        (2, 1, 4, True),
        (3, 2, 0, False),
    ]


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({"groups": np.ones((N, 2))}, "groups", r"one group per row, \(N\); it has shape \(50 2\)"),
        ({"groups": [[1]] * N}, "groups", "can be compared: unhashable"),
        ({"groups": [2**63] * N}, "pool.quotas[0].values", "over 2"),
        ({"max_per_group": 2}, "max_per_group", "needs groups"),
        ({"groups": [1] * N, "max_per_group": "two"}, "pool.quotas[0].default_max", "a whole number"),
        ({"quotas": {"values": [1] * N}}, "pool.quotas", "needs a list"),
        (
            {"quotas": [{"values": [1] * N, "limits": {1: (1, 2, 3)}}]},
            "pool.quotas[0].limits",
            r"value 1 has \(1, 2, 3\)",
        ),
        ({"quotas": [{"values": [1] * N, "limits": {"a": 1}}]}, "pool.quotas[0].limits[0].value", "a whole number"),
    ],
)
def test_wrong_quotas_are_named(fake: Fake, recorded: Client, options: Any, field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        recorded.submit("random", 1, num_rows=N, **options)
    assert caught.value.field == field
    assert not fake.requests


def test_picks_share_no_more_groups_than_they_may(client: Client) -> None:
    """From the caller's words to the picks, here and on a server."""
    logits = np.random.default_rng(0).normal(size=(N, 3))
    groups = [f"video {row // 10}" if row < 40 else None for row in range(N)]
    picks = client.select("margin", N, logits=logits, groups=groups, max_per_group=2)
    assert len(picks) == 4 * 2 + 10
    assert picks.stop_reason == "QUOTAS"
    assert picks.cost_spent is None
    (warning,) = picks.warnings
    assert warning.code == "CONSTRAINED"
    assert warning.message == "18 of 50 picks: quota 'groups' is full for 32 of the 32 candidates left"


def test_picks_tell_what_they_cost(client: Client) -> None:
    costs = np.arange(N) / 4
    picks = client.select("random", N, costs=costs, cost_budget=10)
    assert picks.stop_reason == "MAX_COST"
    assert picks.cost_spent == costs[picks.indices].sum() <= 10
    picks = client.select("random", 5, costs=torch.from_numpy(costs).bfloat16())
    assert (picks.stop_reason, picks.cost_spent) == ("MAX_ITEMS", costs[picks.indices].sum())


def test_there_may_be_no_picks_at_all(client: Client) -> None:
    picks = client.select("random", 3, costs=np.ones(N), cost_budget=0.5, return_pool_scores=True)
    assert (len(picks), picks.cost_spent, picks.stop_reason) == (0, 0.0, "MAX_COST")
    assert picks.indices.dtype == np.int64
    assert (picks.pool_scores == -np.inf).all()
