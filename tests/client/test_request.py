"""What reaches the server: the request that was meant, and no byte that the strategy does not read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import queryselect
from queryselect import (
    LABEL_AGGREGATION_MAX,
    LABEL_AGGREGATION_TOP_K_MEAN,
    Client,
    Custom,
    Entropy,
    InvalidInput,
    KCenterGreedy,
    Margin,
    Random,
)
from queryselect._request import to_strategy
from queryselect.v1 import selection_pb2, strategy_pb2
from tests import plugins  # noqa: F401  # registers them
from tests.client.fake import Fake

N = 50
RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(N, 8)), RNG.normal(size=(N, 3)).astype("f4")
KINDS = [each.name for each in strategy_pb2.Strategy.DESCRIPTOR.oneofs_by_name["kind"].fields]


def sent(pool: selection_pb2.Pool) -> set[str]:
    return {field.name for field, _ in pool.ListFields()}


# Strategies


@pytest.mark.parametrize("name", KINDS)
def test_a_name_is_the_empty_message(name: str) -> None:
    camel = "".join(part.capitalize() for part in name.split("_"))
    assert to_strategy(name) == to_strategy(getattr(queryselect, camel)())
    assert to_strategy(name).WhichOneof("kind") == name


@pytest.mark.parametrize(
    ("name", "params", "typed"),
    [
        ("random", None, Random()),
        ("k_center_greedy", {"normalize": True}, KCenterGreedy(normalize=True)),
        ("k_center_greedy", {"normalize": np.True_}, KCenterGreedy(normalize=True)),
        ("k_center_greedy", {"normalize": None}, KCenterGreedy()),
        ("margin", {"label_aggregation": "MAX"}, Margin(label_aggregation=LABEL_AGGREGATION_MAX)),
        ("margin", {"label_aggregation": LABEL_AGGREGATION_MAX}, Margin(label_aggregation=LABEL_AGGREGATION_MAX)),
        (
            "entropy",
            {"label_aggregation": "TOP_K_MEAN", "top_k": np.int64(2)},
            Entropy(label_aggregation=LABEL_AGGREGATION_TOP_K_MEAN, top_k=2),
        ),
        (
            Entropy(label_aggregation=LABEL_AGGREGATION_TOP_K_MEAN),
            {"top_k": 2},
            Entropy(label_aggregation=LABEL_AGGREGATION_TOP_K_MEAN, top_k=2),
        ),
    ],
)
def test_shorthand_is_the_typed_message(fake: Fake, recorded: Client, name: Any, params: Any, typed: Any) -> None:
    recorded.select(name, 1, params=params, embeddings=X, logits=Z)
    recorded.select(typed, 1, embeddings=X, logits=Z)
    shorthand, message = fake.requests
    assert shorthand.strategy == message.strategy
    assert getattr(message.strategy, message.strategy.WhichOneof("kind")) == typed


def test_shorthand_reaches_a_plug_in() -> None:
    typed = Custom(name="mine")
    typed.parameters.update({"beta": 2.0, "form": "SOFT"})
    given = to_strategy("custom", {"name": "mine", "parameters": {"beta": 2.0, "form": "SOFT"}})
    assert given.custom == typed


def test_the_callers_message_is_neither_changed_nor_shared(fake: Fake, recorded: Client) -> None:
    mine = Margin()
    picks = recorded.select(mine, 1, params={"top_k": 2}, logits=Z)
    assert mine == Margin()
    assert fake.request.strategy.margin.top_k == picks.strategy.top_k == 2


@pytest.mark.parametrize(
    ("strategy", "params", "field", "words"),
    [
        ("margn", None, "strategy", "did you mean 'margin'"),
        ("k_centre_greedy", None, "strategy", "did you mean 'k_center_greedy'"),
        ("Margin", None, "strategy", "did you mean 'margin'"),
        ("zzz", None, "strategy", "This client knows .*custom, discriminative"),
        ("", None, "strategy", "no query strategy ''"),
        (selection_pb2.Stop(), None, "strategy", "queryselect.v1.Stop is no query strategy"),
        ("margin", {"topk": 2}, "strategy.margin.topk", "did you mean 'top_k'"),
        ("random", {"seed": 2}, "strategy.random.seed", "no parameter 'seed'"),
        (Margin(), {"label_agregation": "MAX"}, "strategy.margin.label_agregation", "mean 'label_aggregation'"),
        ("margin", {"label_aggregation": "MEDIAN"}, "strategy.margin.label_aggregation", "one of MEAN, SUM, MAX, TOP"),
        ("margin", {"label_aggregation": "max"}, "strategy.margin.label_aggregation", "it is 'max'"),
        ("margin", {"label_aggregation": True}, "strategy.margin.label_aggregation", "it is True"),
        ("margin", {"top_k": "two"}, "strategy.margin.top_k", "strategy.margin.top_k"),
        ("margin", {"top_k": True}, "strategy.margin.top_k", "a whole number; it is True"),
        ("margin", {"top_k": 2**40}, "strategy.margin.top_k", "strategy.margin.top_k"),
        ("k_center_greedy", {"normalize": 1}, "strategy.k_center_greedy.normalize", "True or False; it is 1"),
        ("margin", "top_k", "strategy.margin", "needs a mapping"),
        ("custom", {"parameters": {"x": X}}, "strategy.custom.parameters", "plain values"),
    ],
)
def test_a_wrong_strategy_or_parameter_is_named(recorded: Client, strategy, params, field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        recorded.submit(strategy, 1, params=params, embeddings=X, logits=Z)
    assert caught.value.field == field


# Inputs


@pytest.mark.parametrize(
    ("strategy", "read"),
    [("margin", {"logits"}), ("k_center_greedy", {"embeddings"}), ("random", {"num_rows"}), (Entropy(), {"logits"})],
)
def test_inputs_that_are_not_read_stay_here(fake: Fake, recorded: Client, strategy: Any, read: set[str]) -> None:
    picks = recorded.select(
        strategy,
        1,
        embeddings=X,
        logits=Z,
        gradients=X,
        samples=np.ones((N, 2, 3)),
        clusters=np.arange(N),
        head_weights=np.ones((3, 8)),
        labels=[0, 1],
        labeled=[4, 5],
        pending=[6],
        excluded=np.arange(N) == 7,
        ids=[str(row) for row in range(N)],
    )
    assert sent(fake.request.pool) == read | {"labeled", "pending", "excluded"}
    assert fake.request.pool.num_rows == (N if strategy == "random" else 0)
    assert picks.ids.tolist() == ["0"]


@pytest.mark.parametrize(
    "rows",
    [{"embeddings": X}, {"labeled": np.zeros(N, bool)}, {"ids": range(N)}, {"utilities": np.ones(N)}, {"num_rows": N}],
)
def test_the_number_of_rows_is_told_where_nothing_sent_tells_it(
    fake: Fake, recorded: Client, rows: dict[str, Any]
) -> None:
    recorded.select("random", 1, **rows)
    assert fake.request.pool.num_rows == N


def test_arguments_that_are_none_are_as_if_not_given(fake: Fake, recorded: Client) -> None:
    recorded.select("margin", 1, logits=Z, probabilities=None, labeled=None, reference=None, task=None, ids=None)
    assert sent(fake.request.pool) == {"logits"}
    assert not fake.request.HasField("task")


def test_no_input_that_is_not_read_is_warned_of(client: Client) -> None:
    assert client.select("margin", 2, logits=Z, embeddings=X).warnings == ()


def test_bytes_arrive_as_they_are(fake: Fake, recorded: Client) -> None:
    bf16 = torch.from_numpy(Z).bfloat16()
    recorded.select("margin", 1, logits=bf16, labeled=[2, 1], excluded=np.arange(N) == 3)
    pool = fake.request.pool
    assert pool.logits.data == bf16.view(torch.int16).numpy().tobytes()
    assert list(pool.logits.shape) == [N, 3]
    assert pool.logits.dtype == queryselect.v1.tensor_pb2.DATA_TYPE_BF16
    assert np.frombuffer(pool.labeled.data, "<i8").tolist() == [2, 1]
    assert pool.excluded.data == (np.arange(N) == 3).tobytes()


def test_every_option_arrives(fake: Fake, recorded: Client) -> None:
    recorded.select(
        "margin",
        np.int64(7),
        logits=Z,
        cost_budget=2,
        min_gain=0.5,
        costs=np.ones(N),
        task="MULTILABEL",
        seed=2**64 - 1,
        returns=["PSEUDO_LABELS"],
        return_pool_scores=True,
        validate_only=True,
        request_id="mine",
        samples_kind="LOGITS",
        item_aggregation="TOP_K_MEAN",
        item_top_k=3,
        model="resnet",
    )
    request = fake.request
    assert (request.stop.max_items, request.stop.max_cost, request.stop.min_gain) == (7, 2.0, 0.5)
    assert (request.task, request.seed, request.validate_only) == (strategy_pb2.TASK_MULTILABEL, 2**64 - 1, True)
    assert list(request.returns) == [selection_pb2.RETURN_PSEUDO_LABELS, selection_pb2.RETURN_POOL_SCORES]
    assert request.request_id == "mine"
    assert request.pool.samples_kind == selection_pb2.SAMPLES_KIND_LOGITS
    assert request.pool.item_aggregation == selection_pb2.ITEM_AGGREGATION_TOP_K_MEAN
    assert (request.pool.item_top_k, request.pool.model) == (3, "resnet")
    assert request.pool.costs.data == np.ones(N).tobytes()


def test_nested_inputs_arrive(fake: Fake, recorded: Client) -> None:
    group = np.arange(N) % 5
    recorded.select(
        Custom(name="nobody's"),
        1,
        num_rows=N,
        reference={"role": "VALIDATION", "embeddings": X, "labels": group},
        scales=[{"embeddings": X, "gradients": Z}],
        quotas=[{"name": "video", "values": group, "default_max": 2, "limits": [{"value": 1, "max": 3}]}],
        inputs={"pixels": X, "a.b": Z, "keys": X},
    )
    pool, (reference,) = fake.request.pool, fake.request.references
    assert reference.role == selection_pb2.REFERENCE_ROLE_VALIDATION
    assert (reference.embeddings.data, reference.labels.data) == (X.tobytes(), group.tobytes())
    assert (pool.scales[0].embeddings.data, pool.scales[0].gradients.data) == (X.tobytes(), Z.tobytes())
    (quota,) = pool.quotas
    assert (quota.name, quota.default_max, quota.values.data) == ("video", 2, group.tobytes())
    assert (quota.limits[0].value, quota.limits[0].max, quota.limits[0].HasField("min")) == (1, 3, False)
    assert {name: each.data for name, each in pool.inputs.items()} == {
        "pixels": X.tobytes(),
        "a.b": Z.tobytes(),
        "keys": X.tobytes(),
    }


def test_references_keep_their_order(fake: Fake, recorded: Client) -> None:
    references = [{"role": "AVOID", "weights": X[0]}, {"weights": X[1]}]
    recorded.select(Custom(name="nobody's"), 1, num_rows=N, references=references)
    assert [each.weights.data for each in fake.request.references] == [X[0].tobytes(), X[1].tobytes()]


def test_references_that_are_not_read_stay_here(fake: Fake, recorded: Client) -> None:
    """Their sets go, so that the server can say what it does not read."""
    rows = {"embeddings": X, "logits": Z, "labels": np.arange(N), "weights": X[:, 0]}
    references = [rows, {"role": "AVOID", **rows}, {"role": "LABELED", **rows}]
    recorded.select(Custom(name="guided"), 1, embeddings=X, references=references)
    read = {"embeddings", "logits", "weights"}
    told = [{field.name for field, _ in each.ListFields()} for each in fake.request.references]
    assert told == [read, {"role"}, {"role", *read}]
    recorded.select("random", 1, num_rows=N, reference=rows)
    assert [each.ListFields() for each in fake.requests[-1].references] == [[]]


def test_a_reference_or_references(recorded: Client) -> None:
    with pytest.raises(TypeError, match="a reference or several"):
        recorded.submit("random", 1, num_rows=N, reference={"labels": [1]}, references=[{"labels": [1]}])


# What is wrong with a call is said before anything is sent


@pytest.mark.parametrize("value", [X, None])
def test_an_unknown_argument_is_a_type_error(fake: Fake, recorded: Client, value: Any) -> None:
    with pytest.raises(TypeError, match="no argument 'embedings'; did you mean 'embeddings'"):
        recorded.submit("random", 1, num_rows=N, embedings=value)
    assert not fake.requests


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"task": "MULTI"}, "task"),
        ({"returns": ["SCORES"]}, "returns"),
        ({"seed": -1}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"seed": True}, "seed"),
        ({"budget": "ten"}, "stop.max_items"),
        ({"budget": True}, "stop.max_items"),
        ({"budget": 1.5}, "stop.max_items"),
        ({"cost_budget": "x"}, "stop.max_cost"),
        ({"validate_only": "yes"}, "validate_only"),
        ({"request_id": 5}, "request_id"),
        ({"num_rows": "x"}, "pool.num_rows"),
        ({"samples_kind": "LOGIT"}, "pool.samples_kind"),
        ({"reference": X}, "references[0]"),
        ({"reference": {"role": "VALID"}}, "references[0].role"),
        ({"references": [{}, {"labels": ["a"]}]}, "references[1].labels"),
        ({"reference": {"label": [1]}}, "references[0].label"),
        ({"quotas": [{"values": "x"}]}, "pool.quotas[0].values"),
        ({"quotas": [{"limits": [{"value": "x"}]}]}, "pool.quotas[0].limits[0].value"),
        ({"inputs": {"pixels": "x"}}, "pool.inputs[pixels]"),
    ],
)
def test_a_wrong_value_is_named(fake: Fake, recorded: Client, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        recorded.submit("random", **{"budget": 1, "num_rows": N, **options})
    assert caught.value.field == field
    assert field.rpartition(".")[2] in str(caught.value)
    assert not fake.requests


@pytest.mark.parametrize(
    ("options", "came"),
    [
        ({"embeddings": X}, "embeddings (50 8)"),
        ({"embeddings": X, "labeled": [1], "utilities": np.ones(N)}, "embeddings (50 8), labeled (1), utilities (50)"),
        ({"num_rows": N}, "no inputs"),
    ],
)
def test_a_missing_input_is_told_with_what_came(fake: Fake, recorded: Client, options: Any, came: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        recorded.submit("margin", 1, **options)
    assert (
        str(caught.value)
        == f"margin needs pool.probabilities or pool.logits or pool.samples of shape (N C); the request has {came}"
    )
    assert caught.value.field == "pool.probabilities"
    assert not fake.requests
