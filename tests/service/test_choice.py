"""Which rows a selection may still choose: quotas, cost budget and least gain, against a walk in plain Python."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from queryselect_service import choice as choices
from queryselect_service.choice import Choice, Limits
from queryselect_service.quotas import NO_GROUP, Quota, QuotaLimit
from queryselect_service.selection import StopReason
from queryselect_service.shards import Slices, Whole

N = 24
CUTS = [[0, N], [0, 9, N], [0, 4, 4, N]]
EVERYTHING = torch.ones(N, dtype=torch.bool)


def limits_of(*quotas: tuple[Quota, list[int]], costs=None, max_cost=None, min_gain=None) -> Limits:
    return Limits(
        tuple(quota for quota, _ in quotas),
        tuple(torch.tensor(values, dtype=torch.int64) for _, values in quotas),
        None if costs is None else torch.tensor(costs, dtype=torch.float64),
        max_cost,
        min_gain,
    )


def most(quota: Quota, value: int) -> float:
    if value == NO_GROUP:
        return math.inf
    said = next((each.max for each in quota.limits if each.value == value), None)
    said = quota.default_max if said is None else said
    return math.inf if said is None else said


def brute_force(scores, k: int, candidates, limits: Limits) -> list[int]:
    """One row after the other, by the rules as they are written."""
    groups = [(quota, values.tolist()) for quota, values in zip(limits.quotas, limits.values, strict=True)]
    costs = [0.0] * N if limits.costs is None else limits.costs.tolist()
    budget = math.inf if limits.max_cost is None else limits.max_cost
    allowed = [
        row
        for row in range(N)
        if candidates[row] and costs[row] <= budget and all(most(quota, at[row]) > 0 for quota, at in groups)
    ]
    picks: list[int] = []
    while len(picks) < k:
        free = [
            row
            for row in allowed
            if row not in picks
            and sum(costs[each] for each in picks) + costs[row] <= budget
            and all(sum(at[each] == at[row] for each in picks) < most(quota, at[row]) for quota, at in groups)
        ]
        for quota, at in groups:
            missing = {
                each.value: min(each.min, sum(at[row] == each.value for row in allowed))
                - sum(at[row] == each.value for row in picks)
                for each in quota.limits
            }
            wanted = [row for row in free if missing.get(at[row], 0) > 0]
            if sum(max(0, each) for each in missing.values()) >= k - len(picks) and wanted:
                free = wanted
        best = max(free, key=lambda row: (float(scores[row]), -row), default=None)
        if best is None or (limits.min_gain is not None and scores[best] < limits.min_gain):
            break
        picks.append(best)
    return picks


def greedy(scores, k: int, candidates, limits: Limits, pool=None) -> Choice:
    """Takes the best row until the limits or the budget end it."""
    choice = Choice(k, candidates, pool or Whole(len(scores)), limits)
    choice.picks = []
    for _ in range(choice.steps):
        row, score = choice.best(scores)
        if choice.ends(score):
            break
        choice.take(row)
        choice.picks.append(int(row))
    return choice


def walked(scores, k: int, candidates, limits: Limits, pool=None) -> Choice:
    choice = Choice(k, candidates, pool or Whole(len(scores)), limits)
    rows, found = choice.walk(scores, k)
    choice.picks = rows.tolist()
    choice.found = found
    return choice


@st.composite
def quotas(draw):
    """Rules that a request may make, and groups of the rows."""
    values = draw(st.lists(st.sampled_from([NO_GROUP, 0, 1, 2, 7]), min_size=N, max_size=N))
    default = draw(st.sampled_from([None, 0, 1, 3]))
    rules = []
    for value in draw(st.sets(st.sampled_from([0, 1, 2, 9]))):
        highest = draw(st.sampled_from([None, 0, 2, 5]))
        bar = default if highest is None else highest
        rules.append(QuotaLimit(value, draw(st.integers(0, 3 if bar is None else min(bar, 3))), highest))
    return Quota("group", default, tuple(rules)), values


@st.composite
def problems(draw):
    """Scores with ties, candidates, a budget and limits."""
    scores = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=N, max_size=N)), dtype=torch.float64)
    candidates = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=N, max_size=N))) > 0
    candidates[draw(st.integers(0, N - 1))] = True
    k = draw(st.integers(1, int(candidates.sum())))
    costs = draw(st.none() | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.5]), min_size=N, max_size=N))
    limits = limits_of(
        *draw(st.lists(quotas(), max_size=2)),
        costs=costs,
        max_cost=None if costs is None else draw(st.sampled_from([0.0, 1.0, 4.5, 100.0])),
        min_gain=draw(st.none() | st.sampled_from([-1.0, 3.0, 20.0])),
    )
    return scores, k, candidates, limits


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_taking_the_best_and_walking_down_are_the_walk_in_python(problem):
    expected = brute_force(*problem)
    one, two = greedy(*problem), walked(*problem)
    assert one.picks == two.picks == expected
    assert two.found.tolist() == problem[0][expected].tolist()
    assert (one.stop_reason, one.notices) == (two.stop_reason, two.notices)


@settings(max_examples=100, deadline=None)
@given(problem=problems(), batch=st.integers(1, 5))
def test_a_walk_in_small_batches_is_the_same(problem, batch):
    before, choices.WALK_ROWS = choices.WALK_ROWS, batch
    try:
        assert walked(*problem).picks == brute_force(*problem)
    finally:
        choices.WALK_ROWS = before


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_picks_keep_to_the_limits_and_the_reason_is_the_one(problem):
    _, k, candidates, limits = problem
    choice = walked(*problem)
    picks = choice.picks
    assert len(set(picks)) == len(picks) <= k
    assert candidates[picks].all()
    assert choice.allowed[picks].all()
    for quota, values in zip(limits.quotas, limits.values, strict=True):
        for value, count in zip(*np.unique(values[picks], return_counts=True), strict=True):
            assert count <= most(quota, value)
    if limits.costs is not None:
        assert choice.cost_of(torch.tensor(picks, dtype=torch.int64)) <= limits.max_cost
    short = len(picks) < k
    assert (choice.stop_reason is StopReason.MAX_ITEMS) == (not short)
    assert any("picks:" in each.message for each in choice.notices) == short
    if choice.stop_reason is StopReason.MAX_COST:  # there is a row that no quota holds back, too dear for what is left
        left = limits.max_cost - choice.cost_of(torch.tensor(picks, dtype=torch.int64))
        taken = [values[picks].tolist() for values in limits.values]
        rest = [
            row
            for row in set(candidates.nonzero().squeeze(1).tolist()) - set(picks)
            if all(
                its.count(int(values[row])) < most(quota, int(values[row]))
                for quota, values, its in zip(limits.quotas, limits.values, taken, strict=True)
            )
        ]
        assert rest
        assert limits.costs[rest].min() > left - 1e-9


@settings(max_examples=100, deadline=None)
@given(rule=quotas(), data=st.data())
def test_the_minima_of_one_quota_are_met_where_there_are_rows(rule, data):
    quota, values = rule
    fewest = sum(each.min for each in quota.limits)
    k = data.draw(st.integers(max(1, fewest), N))
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=N, max_size=N)), dtype=torch.float64)
    picks = walked(scores, k, EVERYTHING, limits_of((quota, values))).picks
    for each in quota.limits:
        assert sum(values[row] == each.value for row in picks) >= min(each.min, values.count(each.value))


# Slices


def in_slices(group, scores, candidates, k, limits, small):
    if small:
        choices.WALK_ROWS = 3
    told = []
    for way in (greedy, walked):
        choice = way(scores, k, candidates, limits, Slices(len(scores), group))
        spent = choice.cost_of(torch.tensor(choice.picks, dtype=torch.int64))
        told.append((choice.picks, choice.stop_reason, choice.notices, spent))
    return told


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_slices_choose_what_one_place_chooses(slices, cuts):
    rng = np.random.default_rng(0)
    values = [int(each) for each in rng.integers(-1, 4, N)]
    pairs = [int(each) for each in rng.integers(0, 12, N)]
    costs = rng.choice([0.1, 1.0, 2.5], N).tolist()
    group = Quota("group", 4, (QuotaLimit(2, min=3), QuotaLimit(3, max=1), QuotaLimit(9, min=1)))
    scores, candidates = torch.from_numpy(rng.integers(0, 6, N)).double(), torch.from_numpy(rng.random(N) > 0.2)
    for limits in (
        Limits(),
        limits_of((group, values), (Quota("pair", 1), pairs)),
        limits_of((group, values), costs=costs, max_cost=6.0),
        limits_of(costs=costs),
        limits_of((Quota("pair", 1), pairs), costs=costs, max_cost=0.05, min_gain=2.0),
        limits_of(min_gain=3.0),
    ):
        for k in (3, 15):
            whole = greedy(scores, k, candidates, limits)
            spent = whole.cost_of(torch.tensor(whole.picks, dtype=torch.int64))
            parts = [
                (scores[a:b], candidates[a:b], k, limits.mapped(lambda x, a=a, b=b: x[a:b].clone()), k == 15)
                for a, b in pairwise(cuts)
            ]
            for told in slices.run(in_slices, *parts):
                for picks, reason, notices, cost in told:
                    assert picks == whole.picks
                    assert (reason, notices, cost) == (whole.stop_reason, whole.notices, spent)


# What is told


def test_a_full_quota_is_told_with_its_numbers():
    values = [0] * 10 + [1] * 14
    choice = walked(torch.arange(N).double(), 5, EVERYTHING, limits_of((Quota("video", 1), values)))
    assert choice.picks == [23, 9]
    assert choice.stop_reason is StopReason.QUOTAS
    (notice,) = choice.notices
    assert notice.message == "2 of 5 picks: quota 'video' is full for 22 of the 22 candidates left"


def test_a_spent_budget_is_told_with_its_numbers():
    choice = walked(-torch.arange(N).double(), 9, EVERYTHING, limits_of(costs=[0.75] * N, max_cost=4.0))
    assert choice.picks == [0, 1, 2, 3, 4]
    assert choice.stop_reason is StopReason.MAX_COST
    (notice,) = choice.notices
    assert notice.message == "5 of 9 picks: 3.75 of the cost budget of 4 spent; the cheapest row left costs 0.75"


def test_a_dear_row_is_passed_over_for_a_cheaper_one():
    costs = [3.0, 2.0, 1.0] + [5.0] * (N - 3)
    choice = walked(-torch.arange(N).double(), 3, EVERYTHING, limits_of(costs=costs, max_cost=4.0))
    assert choice.picks == [0, 2]
    assert choice.cost_of(torch.tensor(choice.picks)) == 4.0


def test_a_small_gain_is_told_with_its_numbers():
    scores = torch.linspace(1, 0, N, dtype=torch.float64)
    choice = greedy(scores, N, EVERYTHING, limits_of(min_gain=0.9))
    assert choice.picks == [0, 1, 2]
    assert choice.stop_reason is StopReason.MIN_GAIN
    (notice,) = choice.notices
    assert notice.message == "3 of 24 picks: the best gain left is 0.869565, below min_gain 0.9"


def test_minima_without_enough_candidates_are_told_and_cost_no_pick():
    rules = (QuotaLimit(7, min=3), *(QuotaLimit(value, min=1) for value in range(20, 28)))
    choice = walked(torch.arange(N).double(), 12, EVERYTHING, limits_of((Quota("class", None, rules), [7] + [0] * 23)))
    assert len(choice.picks) == 12
    assert choice.picks[-1] == 0
    assert choice.stop_reason is StopReason.MAX_ITEMS
    (notice,) = choice.notices
    assert notice.message.startswith("quota 'class': value 7 wants at least 3, has 1: 1 candidate; quota 'class': ")
    assert notice.message.endswith("has 0: 0 candidates; and 4 more")


def test_minima_whose_rows_have_become_too_dear_give_way():
    """Three rows of group 7 are wanted, and the money is gone after the first: other rows are free again."""
    values, costs = [7] * 3 + [0] * 21, [2.0] * 3 + [0.0] * 21
    limits = limits_of((Quota("class", None, (QuotaLimit(7, min=3),)), values), costs=costs, max_cost=3.0)
    for way in (greedy, walked):
        choice = way(-torch.arange(N).double(), 3, EVERYTHING, limits)
        assert choice.picks == [0, 3, 4]
        assert choice.reopens
        (notice,) = choice.notices
        assert notice.message == "quota 'class': value 7 wants at least 3, has 1: 3 candidates"


def test_without_limits_nothing_is_asked_of_the_device():
    """On torch's device without memory every question would fail."""
    with torch.device("meta"):
        candidates, scores = torch.ones(N, dtype=torch.bool), torch.zeros(N)
    choice = Choice(3, candidates, Whole(N))
    for _ in range(choice.steps):
        row, score = choice.best(scores)
        assert not choice.ends(score)
        choice.take(row)
    assert not choice.excess
    assert choice.stop_reason is StopReason.MAX_ITEMS
    assert choice.notices == ()
    assert choice.cost_of(row[None]) is None


def test_without_limits_a_walk_is_the_ranking_and_what_it_takes_is_taken():
    scores = torch.tensor([3.0, 9.0, 9.0, 1.0])
    choice = Choice(3, torch.tensor([True, True, True, False]), Whole(4))
    rows, found = choice.walk(scores, 2)
    assert rows.tolist() == [1, 2]
    assert found.tolist() == [9.0, 9.0]
    assert choice.free.tolist() == [True, False, False, False]
    assert choice.walk(scores, 1)[0].tolist() == [0]


# More picks than are kept


def test_oversampling_gives_more_steps_and_more_money_but_no_dearer_rows():
    costs = [1.0] * 20 + [9.0, 5.0, 5.5, 4.0]
    choice = Choice(4, EVERYTHING, Whole(N), limits_of(costs=costs, max_cost=5.0))
    choice.oversample(3)
    assert choice.steps == 12
    taken = []
    for _ in range(choice.steps):
        row, score = choice.best(torch.arange(N).double())
        if choice.ends(score):
            break
        choice.take(row)
        taken.append(int(row))
    assert taken == [23, 21, 19, 18, 17, 16, 15, 14]  # 15 are spent, and nothing dearer than 5
    assert choice.excess
    for row in (23, 21, 19, 18):
        assert choice.excess
        choice.drop(torch.tensor(row))
    assert not choice.excess
    assert choice.stop_reason is StopReason.MAX_ITEMS


def test_oversampling_has_no_more_steps_than_candidates():
    choice = Choice(4, torch.arange(N) < 10, Whole(N))
    choice.oversample(5)
    assert choice.steps == 10
    rows, _ = choice.walk(torch.zeros(N), choice.steps)
    assert choice.excess
    assert choice.droppable(rows).all()
    for row in rows[:6]:
        choice.drop(row)
    assert not choice.excess


def test_a_minimum_holds_what_it_needs():
    values = [7, 7, 7, 1] + [0] * 20
    quota = Quota("class", None, (QuotaLimit(7, min=2), QuotaLimit(1, min=1)))
    choice = Choice(3, EVERYTHING, Whole(N), limits_of((quota, values)))
    choice.oversample(2)
    rows, _ = choice.walk(-torch.arange(N).double(), choice.steps)
    assert rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert choice.droppable(rows).tolist() == [True, True, True, False, True, True]
    choice.drop(rows[1])
    kept = rows[[0, 2, 3, 4, 5]]
    assert choice.droppable(kept).tolist() == [False, False, False, True, True]
    for row in (4, 5):
        choice.drop(torch.tensor(row))
    assert not choice.excess
    assert choice.notices == ()
    assert choice.droppable(rows[[0, 2, 3]]).all()  # something must go


def test_dropping_what_costs_nothing_saves_nothing():
    costs = [4.0, 0.0, 4.0] + [9.0] * 21
    quota = Quota("class", None, (QuotaLimit(1, min=1),))
    choice = Choice(3, EVERYTHING, Whole(N), limits_of((quota, [0, 0, 1] + [0] * 21), costs=costs, max_cost=5.0))
    choice.oversample(2)
    rows, _ = choice.walk(-torch.arange(N).double(), choice.steps)
    assert rows.tolist() == [0, 1, 2]
    assert choice.excess
    assert choice.droppable(rows).tolist() == [True, False, False]
    assert choice.droppable(rows[1:]).tolist() == [False, True]  # the minimum gives way to the cost


def test_a_score_of_minus_infinity_is_a_score():
    scores = torch.tensor([-torch.inf] * 3 + [1.0] + [-torch.inf] * (N - 4))
    quota = (Quota("pair", 1), list(np.arange(N) // 2))
    for limits in (Limits(), limits_of(quota)):
        assert walked(scores, 3, EVERYTHING, limits).picks == ([3, 0, 1] if not limits.bind else [3, 0, 4])


def test_what_is_dropped_for_its_cost_is_why_picks_are_missing():
    costs = [4.0, 4.0, 4.0] + [9.0] * 21
    for least in (-5.0, -1.5):  # the money ends the first round, or the gain
        limits = limits_of(costs=costs, max_cost=5.0 if least < -2 else 6.0, min_gain=least)
        choice = Choice(2, EVERYTHING, Whole(N), limits)
        choice.oversample(2)
        rows, _ = choice.walk(-torch.arange(N).double(), choice.steps)
        assert rows.tolist() == [0, 1]
        assert choice.excess
        choice.drop(rows[0])
        assert not choice.excess
        assert choice.stop_reason is StopReason.MAX_COST
        (notice,) = choice.notices
        words = f"4 of the cost budget of {limits.max_cost:g} spent; the cheapest row left costs 4"
        assert notice.message == f"1 of 2 picks: {words}"
