"""Items of several rows: what travels of them, what stays here, and rounds of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from queryselect import Client, InvalidInput, Session, _transport, _upload
from queryselect._request import prepare
from queryselect.v1 import selection_pb2
from tests.client.fake import Fake

N, I = 50, 12
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(N, 3)).astype("f4")
#: Item 4 has no rows, and neither has the last one.
OF = np.sort(RNG.choice(np.setdiff1d(np.arange(I - 1), [4]), N))
OF[-1] = I - 2


def sent(fake: Fake) -> set[str]:
    return {field.name for field, _ in fake.request.pool.ListFields()}


@pytest.mark.parametrize(
    "of", [OF, OF.tolist(), OF.astype(np.uint8), pd.Series(OF, index=range(7, N + 7)), torch.from_numpy(OF)]
)
def test_rows_say_which_item_they_are_of(fake: Fake, recorded: Client, of: Any) -> None:
    picks = recorded.select("margin", 1, logits=Z, item_rows=of, item_aggregation="TOP_K_MEAN", item_top_k=3)
    pool = fake.request.pool
    assert np.frombuffer(pool.item_rows.data, np.int64).tolist() == OF.tolist()
    assert (pool.item_aggregation, pool.item_top_k) == (selection_pb2.ITEM_AGGREGATION_TOP_K_MEAN, 3)
    assert (pool.num_items, pool.HasField("num_rows")) == (I - 1, False)
    assert picks.ids is None, "the index of rows is none of items"


def test_an_index_of_rows_is_none_of_items(client: Client) -> None:
    logits = pd.DataFrame(Z, index=[f"token {row}" for row in range(N)])
    assert client.select("margin", 2, logits=logits).ids is not None
    assert client.select("margin", 2, logits=logits, item_rows=OF).ids is None
    costs = pd.Series(np.ones(I), index=[f"sentence {item}" for item in range(I)])
    picks = client.select("margin", 2, logits=logits, item_rows=OF, costs=costs)
    assert picks.ids.tolist() == [f"sentence {item}" for item in picks.indices]


@pytest.mark.parametrize(
    "told",
    [
        {"costs": np.ones(I)},
        {"groups": ["a"] * I},
        {"excluded": np.zeros(I, bool)},
        {"ids": [str(item) for item in range(I)]},
        {"num_items": I},
    ],
    ids=lambda each: next(iter(each)),
)
def test_the_number_of_items_is_told_where_nothing_sent_tells_it(
    fake: Fake, recorded: Client, client: Client, told: dict[str, Any]
) -> None:
    recorded.select("random", 1, item_rows=OF, **told)
    assert "num_rows" not in sent(fake)
    assert fake.request.pool.num_items == (I if {*told} & {"ids", "num_items"} else 0)
    picks = client.select("random", 1, item_rows=OF, return_pool_scores=True, labeled=[I - 1], **told)
    assert len(picks.pool_scores) == I


def test_ids_are_of_items(client: Client) -> None:
    ids = [f"sentence {item}" for item in range(I)]
    picks = client.select("margin", 4, logits=Z, item_rows=OF, ids=ids, candidates=[1, 2, 3, 5])
    assert picks.ids.tolist() == [ids[item] for item in picks.indices]
    assert sorted(picks.indices) == [1, 2, 3, 5]
    for wrong, more in ((I - 2, {}), (N, {"costs": np.ones(I)})):
        size = I if more else I - 1
        with pytest.raises(InvalidInput, match=rf"one id per item, \({size}\); it has \({wrong}\)") as caught:
            client.submit("margin", 1, logits=Z, item_rows=OF, ids=range(wrong), **more)
        assert caught.value.field == "pool.ids"


@pytest.mark.parametrize("items", [N, 3 * N])
def test_what_is_of_items_is_streamed_before_the_rows(
    local: Client, remote: Client, monkeypatch: pytest.MonkeyPatch, items: int
) -> None:
    """Fewer and more items than rows: their arrays do not travel row by row, and rows can be scored as they come."""
    monkeypatch.setattr(_transport, "UNARY_BYTES", -1)
    monkeypatch.setattr(_upload, "SMALL_BYTES", -1)
    monkeypatch.setattr(_upload, "LIST_BYTES", -1)
    monkeypatch.setattr(_upload, "CHUNK_BYTES", (61, 61))
    of = np.arange(N) * (items // N)
    inputs = {
        "logits": Z,
        "item_rows": of,
        "costs": np.ones(items),
        "groups": np.arange(items) // 2,
        "excluded": [int(of[1])],
    }
    plain: dict[str, Any] = {"params": None, "task": None, "seed": 0, "validate_only": False, "request_id": None}
    prepared = prepare("margin", inputs, descriptions={}, stop={"max_items": 5}, returns=[], **plain)
    upload = _upload.Upload(prepared)
    upload.admit(61)
    _, *chunks = (each for each in upload if isinstance(each, bytes) or each.HasField("start"))
    order = [selection_pb2.SelectStreamRequest.FromString(bytes(each)).chunk.path for each in chunks]
    rows = order.index("pool.logits")
    assert set(order[:rows]) == {"pool.item_rows", "pool.costs", "pool.quotas[0].values", "pool.excluded"}
    assert set(order[rows:]) == {"pool.logits"}
    here, there = (client.select("margin", 5, **inputs, return_pool_scores=True) for client in (local, remote))
    assert there.info.receive > 0
    assert here.indices.tolist() == there.indices.tolist()
    assert here.pool_scores.tolist() == there.pool_scores.tolist()


def test_an_answer_has_a_score_per_item(remote: Client, local: Client) -> None:
    """It may be much larger than the request, and is streamed then."""
    options = {"item_rows": [0, 1_000_000], "return_pool_scores": True}
    here, there = (client.select("random", 2, **options) for client in (local, remote))
    assert here.indices.tolist() == there.indices.tolist()
    assert here.pool_scores.tobytes() == there.pool_scores.tobytes()
    assert len(there.pool_scores) == 1_000_001


def test_a_session_picks_items(client: Client) -> None:
    inputs: dict[str, Any] = {"item_rows": OF, "item_aggregation": "MAX", "num_items": I}
    session = Session(client, "margin", logits=Z, labeled=[I - 1], **inputs)
    some, seen = set(OF.tolist()), set()
    for _ in range(2):
        picked = session.next(3).indices.tolist()
        assert not seen & set(picked)
        seen |= set(picked)
        session.label(picked[:2])
        session = Session.load(json.loads(json.dumps(session.state())), client, logits=Z, **inputs)
    session = Session.load(session.state(), client)  # what changes may come with each round
    last = session.next(len(some - seen), logits=Z, **inputs).indices.tolist()
    assert set(last) == some - seen
    with pytest.raises(InvalidInput, match="budget 1 but 0 candidates"):
        session.next(1, logits=Z, **inputs)


def test_a_session_says_which_labelled_item_there_is_none_of(client: Client) -> None:
    session = Session(client, "margin", logits=Z, item_rows=OF, labeled=[I - 1])
    with pytest.raises(InvalidInput, match=f"lists item {I - 1}; items are 0 to {I - 2}"):
        session.next(1)
