"""What a session remembers: rows are not picked twice, and its state carries it over."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from queryselect import (
    LABEL_AGGREGATION_TOP_K_MEAN,
    Client,
    Custom,
    Entropy,
    InvalidInput,
    KCenterGreedy,
    Margin,
    Random,
    Session,
)
from tests.client.fake import Fake

N = 60
RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(N, 4)), RNG.normal(size=(N, 3))
STRATEGIES = [
    "random",
    Random(),
    "margin",
    KCenterGreedy(normalize=True),
    Entropy(label_aggregation=LABEL_AGGREGATION_TOP_K_MEAN, top_k=2),
]


def rows(picks: Any) -> list[int]:
    return picks.indices.tolist()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("answered", [True, False])
def test_rounds_never_repeat_rows(client: Client, strategy: Any, answered: bool) -> None:
    session = Session(client, strategy, embeddings=X, logits=Z, labeled=[0, 1, 2, 3, 4])
    seen = set(session.labeled)
    for _ in range(5):
        picked = rows(session.next(11))
        assert not seen & set(picked)
        seen |= set(picked)
        if answered:
            session.label(picked)
    assert seen == set(range(N))
    assert len(session.labeled) == (N if answered else 5)
    with pytest.raises(InvalidInput, match="budget 1 but 0 candidates"):
        session.next(1)


def test_picks_are_pending_until_labelled_or_released(local: Client) -> None:
    session = Session(local, "k_center_greedy", embeddings=X, labeled=[7])
    first = rows(session.next(4))
    assert (session.labeled, session.pending) == ([7], sorted(first))
    session.label(first[0])
    session.release(first[1:3])
    assert (session.labeled, session.pending) == (sorted([7, first[0]]), [first[3]])
    # What was released may be picked again: nothing has changed but one row more is labelled.
    again = local.select("k_center_greedy", 2, embeddings=X, labeled=[7, first[0]], pending=[first[3]])
    assert rows(session.next(2)) == rows(again) == first[1:3]


def test_rows_that_were_never_picked_can_be_labelled_but_not_released(local: Client) -> None:
    session = Session(local, "random", num_rows=N)
    session.label([5, 6])
    session.label(6)
    assert (session.labeled, session.pending) == ([5, 6], [])
    pending = rows(session.next(3))
    with pytest.raises(InvalidInput, match="row 5 is not pending"):
        session.release([*pending, 5])
    assert session.pending == sorted(pending)  # all or nothing


@pytest.mark.parametrize(
    "given",
    [
        [3, 8],
        (8, 3),
        {3, 8},
        np.array([3, 8, 8]),
        np.array([3, 8], np.uint8),
        torch.tensor([3, 8]),
        pd.Series([3, 8]),
        np.isin(np.arange(N), [3, 8]),
        torch.from_numpy(np.isin(np.arange(N), [3, 8])),
        np.isin(np.arange(N), [3, 8]).tolist(),
    ],
    ids=lambda given: f"{type(given).__name__}-{getattr(given, 'dtype', '')}",
)
def test_rows_come_as_lists_or_masks(local: Client, given: Any) -> None:
    session = Session(local, "random", num_rows=N, labeled=given)
    assert session.labeled == [3, 8]
    assert len(json.dumps(session.state())) > 0

    session = Session(local, "random", num_rows=N)
    session.label(given)
    assert session.labeled == [3, 8]

    session = Session(local, "random", num_rows=N, labeled=np.arange(N) > 8)
    session.next(9)
    session.release(given)
    assert session.pending == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("given", [[1.5], ["a"], [None], [[1, 2]], [-1], 1.0, "ab", None])
def test_what_is_no_row_is_refused(local: Client, given: Any) -> None:
    session = Session(local, "random", num_rows=N)
    for call in (session.label, session.release, lambda rows: Session(local, "random", labeled=rows)):
        with pytest.raises(InvalidInput):
            call(given)
    assert (session.labeled, session.pending) == ([], [])


def test_inputs_of_a_round_win_over_those_of_the_session(local: Client) -> None:
    session = Session(local, "margin", logits=Z)
    assert rows(session.next(5, logits=-Z)) == rows(local.select("margin", 5, logits=-Z))


def test_candidates_lose_what_was_picked(local: Client) -> None:
    session = Session(local, "margin", logits=Z, candidates=range(10), labeled=[0])
    assert sorted(rows(session.next(4)) + rows(session.next(5))) == list(range(1, 10))
    session = Session(local, "margin", logits=Z, labeled=np.arange(N) < 2)
    assert set(rows(session.next(3, candidates=np.arange(N) < 5))) == {2, 3, 4}


def test_random_draws_anew_each_round_and_the_same_for_the_same_seed(local: Client) -> None:
    def rounds(seed: int) -> list[list[int]]:
        session = Session(local, "random", num_rows=10_000, seed=seed)
        picked = []
        for _ in range(3):
            picked.append(rows(session.next(5)))
            session.release(picked[-1])
        return picked

    first = rounds(1)
    assert rounds(1) == first != rounds(2)
    assert len({tuple(each) for each in first}) == 3
    largest = Session(local, "random", num_rows=N, seed=2**64 - 1)
    assert len({*rows(largest.next(2)), *rows(largest.next(2))}) == 4


def test_a_failed_round_changes_nothing(local: Client) -> None:
    session = Session(local, "random", num_rows=N)
    before = session.state()
    with pytest.raises(InvalidInput):
        session.next(N + 1)
    assert session.state() == before


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_loaded_session_goes_on_as_if_nothing_had_been(client: Client, strategy: Any) -> None:
    options = {"embeddings": X, "logits": Z}
    session = Session(client, strategy, seed=5, labeled=np.arange(N) < 3, **options)
    session.label(rows(session.next(4))[:2])
    session.next(3)
    state = json.loads(json.dumps(session.state()))
    assert state == session.state()
    loaded = Session.load(state, client, **options)
    assert loaded.strategy == session.strategy
    assert loaded.state() == state
    for _ in range(3):
        first, second = session.next(4), loaded.next(4)
        assert (rows(first), first.scores.tolist()) == (rows(second), second.scores.tolist())


def test_a_plug_in_survives_too() -> None:
    strategy = Custom(name="mine")
    strategy.parameters.update({"beta": 0.1, "form": "SOFT", "deep": {"list": [1.0, None]}})
    state = json.loads(json.dumps(Session(None, strategy).state()))
    assert Session.load(state).strategy == strategy


def test_params_are_those_of_the_typed_message() -> None:
    session = Session(None, "entropy", params={"label_aggregation": "TOP_K_MEAN", "top_k": 2})
    assert session.strategy == STRATEGIES[-1]
    with pytest.raises(InvalidInput):
        Session(None, "entropy", params={"topk": 2})


def test_the_strategy_is_a_copy() -> None:
    strategy = Margin(top_k=1)
    session = Session(None, strategy)
    strategy.top_k = 2
    assert session.strategy.top_k == 1


def test_a_session_without_a_client_says_so(local: Client) -> None:
    session = Session.load(Session(local, "random").state(), num_rows=N)
    with pytest.raises(ValueError, match="no client"):
        session.next(1)
    session.client = local
    assert len(session.next(1)) == 1


def test_a_state_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="version 99"):
        Session.load({**Session(None, "random").state(), "version": 99})


def test_nothing_but_the_state_decides_the_request() -> None:
    with Fake() as fake, Client(fake.target) as client:
        session = Session(client, "random", num_rows=N, labeled=[1])
        session.next(1)
        session.label([0])
        Session.load(session.state(), client, num_rows=N).next(1)
        session.next(1)
        first, *again = fake.requests
    for each in (first, *again):
        each.ClearField("request_id")
    assert again[0] == again[1] != first


@pytest.mark.parametrize("name", ["labeled", "pending"])
def test_what_a_session_knows_by_itself_is_not_to_be_given(local: Client, name: str) -> None:
    session = Session(local, "random", num_rows=10)
    with pytest.raises(TypeError, match=f"knows {name} by itself"):
        session.next(1, **{name: [3]})
