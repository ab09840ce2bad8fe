"""Rows beside the pool: what kernels get of them, however they come, and what is wrong with them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2

from queryselect import Client, Custom, InvalidInput
from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2
from queryselect_service import strategy as registry
from queryselect_service.maths.predictions import Predictions
from queryselect_service.shards import Whole
from queryselect_service.strategy import Input, ReferenceRole, Sizes
from queryselect_service.upload import held_bytes
from tests import plugins  # noqa: F401  # registers them
from tests.service.streams import LONG_X, MIB, POOL_SCORES, ask, assert_same, cut, ordered, refused, streamed
from tests.service.test_errors import FAR, GUIDED, MARGIN, P, X, at, detail, fail, request, tensor
from tests.service.test_upload import upload_of
from tests.slices import selected

pytestmark = pytest.mark.usefixtures("no_bugs")
S = selection_pb2
RNG = np.random.default_rng(0)
E = RNG.normal(size=(5, 3)).astype(np.float32)
Z = RNG.normal(size=(5, 4))
Q = np.exp(Z) / np.exp(Z).sum(1, keepdims=True)
W = RNG.random(5)
BETWEEN = strategy_pb2.Strategy(custom=strategies.Custom(name="between"))


def gains(mass, embeddings=E, pool=X):
    return pool.astype(float) @ (mass[:, None] * embeddings).sum(0)


def assert_gains(picks, expected):
    np.testing.assert_allclose(picks.pool_scores, expected, rtol=1e-9)
    assert picks.indices.tolist() == np.argsort(-expected, kind="stable")[: len(picks)].tolist()


def guided(client: Client, **options):
    return client.select(Custom(name="guided"), 4, embeddings=X, return_pool_scores=True, **options)


# What a kernel gets


@pytest.fixture(params=["local", "remote"])
def client(request: pytest.FixtureRequest) -> Client:
    return request.getfixturevalue(request.param)


def test_a_set_of_the_one_role_that_is_read_needs_no_role(client):
    for role in ({}, {"role": "LABELED"}):
        assert_gains(guided(client, reference={**role, "embeddings": E, "probabilities": Q}), gains(Q.max(1)))


def test_logits_stand_in_for_probabilities(client):
    assert_gains(guided(client, reference={"embeddings": E, "logits": Z}), gains(Q.max(1)))


def test_without_sets_a_kernel_gets_its_defaults(client):
    assert_gains(guided(client), X.astype(float).sum(1))


def test_rows_of_a_set_may_have_weights(client):
    assert_gains(guided(client, reference={"embeddings": E, "logits": Z, "weights": W}), gains(Q.max(1) * W))


def test_sets_of_one_role_are_one_after_the_other_and_weights_not_given_are_1(client):
    cut = {"embeddings": E[:2], "logits": Z[:2], "weights": W[:2]}, {"embeddings": E[2:], "logits": Z[2:]}
    mass = Q.max(1) * [*W[:2], 1, 1, 1]
    for sets in (cut, cut[::-1]):
        assert_gains(guided(client, references=sets), gains(mass))


def test_rows_of_the_pool_may_have_weights(client):
    mass = np.arange(10.0)
    assert_gains(guided(client, weights=mass), X.astype(float).sum(1) * mass)


def test_sets_of_several_roles(client):
    """Each with a number of rows of its own; scored row by row."""
    target = {"role": "TARGET", "logits": Z}
    got = client.select(Custom(name="between"), 3, embeddings=X, reference=target, return_pool_scores=True)
    assert_gains(got, X.astype(float).sum(1) * Q[:, 0].sum())
    sets = [{"role": "AVOID", "embeddings": E[:2]}, {**target, "weights": W}]
    got = client.select(Custom(name="between"), 3, embeddings=X, references=sets, return_pool_scores=True)
    assert_gains(got, X.astype(float).sum(1) * Q[:, 0].sum() * W.sum() - X.astype(float) @ E[:2].astype(float).mean(0))


def test_weights_that_a_kernel_can_not_do_without_are_1(client):
    got = client.select(Custom(name="weighed"), 2, num_rows=5, references=[{"weights": W}])
    assert got.scores.tolist() == [4 * W.sum(), 3 * W.sum()]


def test_labels_present_in_a_multi_label_task(client):
    present = 1 / (1 + np.exp(-Z))
    for given in ({"logits": Z}, {"probabilities": present}):
        picks = guided(client, reference={"embeddings": E, **given}, task="MULTILABEL")
        assert_gains(picks, gains(present.max(1)))


def test_excluded_rows_are_rows_of_the_pool(client):
    picks = guided(client, reference={"embeddings": E, "logits": Z}, excluded=[0, 3, 4])
    expected = gains(Q.max(1))
    expected[[0, 3, 4]] = -np.inf
    assert_gains(picks, expected)


def test_references_are_whole_in_every_slice(slices):
    inputs = {
        "embeddings": torch.from_numpy(X),
        "labeled_embeddings": torch.from_numpy(E),
        "labeled_logits": torch.from_numpy(Z),
    }
    everything = {"context": torch.empty(0, dtype=torch.int64), "candidates": torch.ones(10, dtype=torch.bool), "k": 4}
    whole = selected(registry.select(registry.PLUGINS["guided"], inputs, pool=Whole(10), **everything))
    sliced = slices.select("guided", inputs, [0, 3, 10], **everything)
    assert sliced.indices == whole.indices
    np.testing.assert_allclose(sliced.scores, whole.scores, rtol=1e-12)


# However they come


def long_request(strategy, *sets, **fields) -> S.SelectRequest:
    return request(strategy, embeddings=tensor(LONG_X), references=sets, returns=[POOL_SCORES], **fields)


STREAMS = {
    "whole": long_request(
        GUIDED,
        S.ReferenceSet(embeddings=tensor(E), logits=tensor(Z)),
        S.ReferenceSet(embeddings=tensor(E[:2]), logits=tensor(Z[:2]), weights=tensor(W[:2])),
        excluded=tensor(np.arange(9000) % 5 == 0),
        weights=tensor(np.arange(9000.0)),
    ),
    "in blocks": long_request(
        BETWEEN,
        S.ReferenceSet(role=S.REFERENCE_ROLE_TARGET, probabilities=tensor(Q), weights=tensor(W)),
        S.ReferenceSet(role=S.REFERENCE_ROLE_AVOID, embeddings=tensor(E)),
        S.ReferenceSet(role=S.REFERENCE_ROLE_LABELED, embeddings=tensor(E)),
        excluded=tensor(np.arange(9000) % 5 == 0),
    ),
}


@pytest.mark.parametrize("order", ["in order", "reversed", "shuffled"])
@pytest.mark.parametrize("message", STREAMS.values(), ids=STREAMS)
def test_references_may_be_streamed(channel, message, order):
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message)
    assert {"references[0].weights", "references[1].embeddings"} & set(data)
    chunks = [each for path in data for each in cut(path, data[path], 20_000)]
    assert_same(ask(channel, [first, *ordered(chunks, order)]).response, unary)


def test_the_client_streams_large_references(local, remote):
    rows = RNG.normal(size=(300_000, 3))
    reference = {"embeddings": rows, "logits": RNG.normal(size=(300_000, 2)), "labels": np.zeros(300_000)}
    here, there = (guided(client, reference=reference) for client in (local, remote))
    assert here.indices.tolist() == there.indices.tolist()
    assert here.pool_scores.tolist() == there.pool_scores.tolist()


def test_the_memory_of_references_is_set_aside():
    message = STREAMS["whole"]
    copy = S.SelectRequest()
    copy.CopyFrom(message)
    _, asked = upload_of(copy, "embeddings")
    theirs = sum(array.nbytes for each in asked.references for array in each.inputs.values())
    assert theirs == 7 * (12 + 32) + 16
    own = LONG_X.nbytes + 9000 * 8 + 9000
    assert held_bytes(asked) == own + theirs
    assert asked.sizes.inputs == LONG_X.nbytes + 9000 * 8 + theirs
    assert asked.sizes.M == 7
    del copy.references[1]
    _, single = upload_of(copy, "embeddings")
    assert single.sizes.M == 5
    assert asked.extra_bytes - single.extra_bytes == 2 * theirs - 5 * 44  # joined, and the rest of the second set


def test_the_rows_of_sets_that_are_read_are_counted():
    copy = S.SelectRequest()
    copy.CopyFrom(STREAMS["in blocks"])
    _, asked = upload_of(copy, "embeddings")
    assert asked.sizes.M == 10
    assert Sizes().M == 0


# What is wrong


GOOD = S.ReferenceSet(embeddings=tensor(E), logits=tensor(Z))
TARGET = S.ReferenceSet(role=S.REFERENCE_ROLE_TARGET, logits=tensor(Z))


def about(strategy, *sets, **fields) -> S.SelectRequest:
    return request(strategy, embeddings=tensor(X), references=sets, **fields)


def change(message: S.ReferenceSet, **fields) -> S.ReferenceSet:
    copy = S.ReferenceSet()
    copy.CopyFrom(message)
    for name, value in fields.items():
        copy.ClearField(name)
        if value is not None:
            getattr(copy, name).CopyFrom(value)
    return copy


WRONG = {
    "no role of two": (
        about(BETWEEN, TARGET, GOOD), "references[1].role",
        "references[1] needs a role; it has none, and between reads those of roles TARGET, AVOID"),
    "no role of none": (request(MARGIN, references=[GOOD]), "references[0].role", "margin reads no references"),
    "a role missing": (
        about(BETWEEN), "references",
        "needs references of role TARGET with probabilities of shape (M C); the request has none"),
    "an input missing": (
        about(GUIDED, GOOD, change(GOOD, embeddings=None)), "references[1].embeddings",
        "guided needs references[1].embeddings of shape (M D); the set has logits (5 4)"),
    "one of two missing": (
        about(GUIDED, change(GOOD, logits=None)), "references[0].probabilities",
        "needs references[0].probabilities or references[0].logits of shape (M C)"),
    "an empty set": (about(GUIDED, S.ReferenceSet()), "references[0].embeddings", "the set has no inputs"),
    "both of two": (about(GUIDED, change(GOOD, probabilities=tensor(Q))), "references[0].logits", "exactly one of"),
    "now one, now the other": (
        about(GUIDED, GOOD, change(GOOD, logits=None, probabilities=tensor(Q))), "references[1].probabilities",
        "where references[0], of the same role, has logits"),
    "two numbers of rows": (
        about(GUIDED, change(GOOD, logits=tensor(Z[:4]))), "references[0].logits",
        "M = 5 as in references[0].embeddings; it has (4 4)"),
    "other dimensions than the pool": (
        about(GUIDED, change(GOOD, embeddings=tensor(E[:, :2]))), "references[0].embeddings",
        "D = 3 as in pool.embeddings; it has (5 2)"),
    "other classes": (
        about(GUIDED, GOOD, change(GOOD, logits=tensor(Z[:, :3]))), "references[1].logits", "C = 4 as in"),
    "integers": (
        about(GUIDED, change(GOOD, embeddings=tensor(np.ones((5, 3), int)))), "references[0].embeddings",
        "it has int64"),
    "NaN": (
        about(GUIDED, GOOD, change(GOOD, embeddings=tensor(at(E, 3, 1, np.nan)))), "references[1].embeddings",
        "must be finite; row 3 has nan"),
    "sums": (about(GUIDED, change(GOOD, logits=None, probabilities=tensor(Z))), "references[0].probabilities", "row 0"),
    "negative weights": (
        about(GUIDED, change(GOOD, weights=tensor(W - W[1]))), "references[0].weights", "must not be negative"),
    "no weight": (about(GUIDED, change(GOOD, weights=tensor(0 * W))), "references[0].weights", "must not all be 0"),
    "negative weights of the pool": (about(GUIDED, weights=tensor(np.arange(10.0) - 3)), "pool.weights", "0 has -3"),
    "infinite weights of the pool": (about(GUIDED, weights=tensor(np.full(10, np.inf))), "pool.weights", "0 has inf"),
    "no weight in the pool": (
        about(GUIDED, weights=tensor(np.arange(10) // 9 * 1.0), excluded=tensor([9])), "pool.weights",
        "must not all be 0"),
}  # fmt: skip


@pytest.mark.parametrize(("message", "field", "words"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(running, channel, message, field, words):
    error, status, _ = fail(channel, message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    first, data = streamed(message)
    chunks = [each for path in data for each in cut(path, data[path], MIB)]
    failure = refused(running, channel, first, *chunks)
    assert (failure.field, failure.words) == (field, error.details())
    assert failure.status.details == status.details


UNREAD = {
    "input": (S.ReferenceSet(role=S.REFERENCE_ROLE_LABELED, labels=tensor([1, 2])), "labels"),
    "input of another role": (S.ReferenceSet(role=S.REFERENCE_ROLE_TARGET, embeddings=tensor(E)), "embeddings"),
    "samples kind": (S.ReferenceSet(role=S.REFERENCE_ROLE_LABELED, samples_kind=S.SAMPLES_KIND_LOGITS), "samples_kind"),
    "a role of a newer client": (S.ReferenceSet(role=9, embeddings=tensor(E)), "role"),
}


@pytest.mark.parametrize(("reference", "field"), UNREAD.values(), ids=UNREAD)
def test_what_no_strategy_here_reads_is_not_served(channel, reference, field):
    error, status, _ = fail(channel, request(references=[reference]))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field == f"references[0].{field}"


def test_what_another_strategy_reads_is_a_warning(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    theirs = change(GOOD)
    theirs.role = S.REFERENCE_ROLE_LABELED
    empty = S.ReferenceSet(role=S.REFERENCE_ROLE_AVOID)
    for message, words in (
        (request(FAR, references=[theirs]), "does not read references[0].embeddings, references[0].logits"),
        (request(MARGIN, embeddings=tensor(X), references=[empty]), "does not read pool.embeddings, references[0]"),
        (about(BETWEEN, theirs, TARGET), "between does not read references[0].embeddings, references[0].logits"),
    ):
        (warning,) = stub.Select(message).warnings
        assert warning.code == S.WARNING_CODE_UNUSED_INPUT
        assert warning.message.endswith(words)


def test_the_client_leaves_the_words_to_the_server(client):
    reference = {"role": "AVOID", "embeddings": E}
    (warning,) = client.select("margin", 2, probabilities=P, reference=reference).warnings
    assert (warning.code, warning.message) == ("UNUSED_INPUT", "margin does not read references[0]")
    with pytest.raises(InvalidInput, match="margin reads no references"):
        client.select("margin", 2, probabilities=P, reference={"embeddings": E})
    (warning,) = client.select("margin", 2, probabilities=P, reference={"role": "VALIDATION", "embeddings": E}).warnings
    assert (warning.code, warning.message) == ("UNUSED_INPUT", "margin does not read references[0]")


# What is said of them


def test_list_strategies_tells_roles_and_inputs(remote):
    (found,) = (each for each in remote.strategies() if each.name == "between")
    assert [each.name for each in found.inputs] == ["embeddings"]
    target, avoid = found.references
    assert (target.role, avoid.role) == ("TARGET", "AVOID")
    first, weights = target.inputs
    assert (first.name, first.shape, first.required, list(first.alternatives)) == (
        "probabilities", "M C", True, ["logits"],
    )  # fmt: skip
    assert (weights.name, weights.required) == ("weights", False)


def test_inputs_of_reference_sets_are_named_by_their_role():
    inputs = {each.name: each for each in registry.PLUGINS["guided"].inputs}
    mine = inputs["labeled_probabilities"]
    assert mine == Input("labeled_probabilities", "M C", False, Predictions, ReferenceRole.LABELED)
    assert mine.names == ("labeled_probabilities", "labeled_logits")
    assert (mine.field, mine.fields) == ("probabilities", ("probabilities", "logits"))
    assert inputs["weights"].role is None
    assert dataclasses.replace(mine, name="probabilities", role=None).names == ("probabilities", "logits")


def test_rows_of_no_role_are_a_mistake():
    def strays(strange_embeddings: Annotated[torch.Tensor, "M D"]):
        """Has no role."""

    with pytest.raises(ValueError, match="strange_embeddings has M rows"):
        registry.strategy(registry.Spec, kind=registry.ScoreKind.POINT, cost="", citation="")(strays)


def test_predictions_of_references_are_made_where_they_are_read():
    seen = {}

    def look(choice, labeled_probabilities):
        seen["is"] = labeled_probabilities
        return registry.Selection(torch.zeros(0, dtype=torch.int64), torch.zeros(0))

    strategy = dataclasses.replace(registry.PLUGINS["guided"], function=look, keywords=frozenset({"choice"}))
    inputs = {"labeled_logits": torch.from_numpy(Z)}
    options = {"context": torch.empty(0, dtype=torch.int64), "candidates": torch.ones(3, dtype=torch.bool), "k": 1}
    registry.select(strategy, inputs, pool=Whole(3), **options)
    assert isinstance(seen["is"], Predictions)
    np.testing.assert_allclose(seen["is"][:], Q)


@pytest.mark.parametrize("words", ["lacks", "has"])
def test_sets_of_one_role_have_the_same_parts_of_their_scales(local, words):
    whole = {"embeddings": X[:4], "gradients": X[:4]}
    sets = [
        {"scales": [whole, {"embeddings": X[:4], **each}], "misclassified": np.ones(4, bool)} for each in (whole, {})
    ]
    first, second = sets if words == "lacks" else sets[::-1]
    with pytest.raises(InvalidInput, match=rf"references\[1\] {words} scales\[1\].gradients") as caught:
        local.select("fisher_kernel", 2, scales=[{"embeddings": X, "gradients": X}] * 2, references=[first, second])
    assert caught.value.field == "references[1].scales[1].gradients"
