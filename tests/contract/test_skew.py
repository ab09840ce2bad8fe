"""Versions apart: clients of 0.1.0, the first release, call this server, and this client calls a server of 0.1.0.

Its messages are made of its proto, tests/data/proto-0.1.0.binpb, as generated code would make them. Releases after it
are held to it by `buf breaking`, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from queryselect import Client, InvalidInput, Typiclust, Unsupported
from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2, tensor_pb2
from tests import plugins  # noqa: F401  # registers them
from tests.service.test_errors import detail

IMAGE = Path(__file__).parent.parent / "data" / "proto-0.1.0.binpb"
FILES = FileDescriptorSet.FromString(IMAGE.read_bytes()).file
RELEASED = descriptor_pool.DescriptorPool()
for file in FILES:
    RELEASED.Add(file)


def old(name: str) -> type[Message]:
    """A message of 0.1.0, by its name in queryselect.v1."""
    return message_factory.GetMessageClass(RELEASED.FindMessageTypeByName(f"queryselect.v1.{name}"))


RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 5)).astype(np.float32)
P = RNG.dirichlet(np.ones(4), 200).astype(np.float32)
#: Of every strategy of 0.1.0: inputs and parameters.
STRATEGIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "random": ({"num_rows": 200}, {}),
    "least_confidence": ({"probabilities": P}, {"label_aggregation": "LABEL_AGGREGATION_MEAN"}),
    "margin": ({"probabilities": P}, {}),
    "entropy": ({"logits": np.log(P)}, {}),
    "k_center_greedy": ({"embeddings": X}, {"normalize": True}),
    "custom": ({"probabilities": P}, {"name": "sharpness", "parameters": {"power": 2.0}}),
}


def tensor(array: np.ndarray) -> dict[str, Any]:
    number = {"float32": tensor_pb2.DATA_TYPE_F32, "int64": tensor_pb2.DATA_TYPE_I64}[array.dtype.name]
    return {"dtype": number, "shape": array.shape, "data": array.tobytes()}


def request(name: str, **more: Any) -> Message:
    """A request of 0.1.0 for a strategy."""
    inputs, parameters = STRATEGIES[name]
    pool = {key: tensor(value) if isinstance(value, np.ndarray) else value for key, value in inputs.items()}
    pool |= {"labeled": tensor(np.array([3, 8, 120]))}
    return old("SelectRequest")(pool=pool, strategy={name: parameters}, stop={"max_items": 7}, seed=3, **more)


def unary(channel: grpc.Channel, rpc: str, message: Message, answer: str) -> Message:
    """What the server answers a client of 0.1.0."""
    method = channel.unary_unary(f"/queryselect.v1.{rpc}", type(message).SerializeToString, old(answer).FromString)
    return method(message, timeout=60)


def strange(message: Message) -> bool:
    """Whether there is anything in the message that its proto does not know."""
    plain = type(message)()
    plain.CopyFrom(message)
    plain.DiscardUnknownFields()
    return plain.SerializeToString(deterministic=True) != message.SerializeToString(deterministic=True)


def of_files(pool: descriptor_pool.DescriptorPool) -> dict[str, tuple[Any, ...]]:
    """What travels of the fields, enum values and methods in the files of 0.1.0, as a pool knows them."""
    found: dict[str, tuple[Any, ...]] = {}
    for each in (pool.FindFileByName(file.name) for file in FILES if file.package.startswith("queryselect.")):
        for message in each.message_types_by_name.values():
            for field in message.fields:
                kind = field.message_type or field.enum_type
                found[field.full_name] = (
                    *(field.number, field.type, field.is_repeated, field.has_presence),
                    *(kind and kind.full_name, field.containing_oneof and field.containing_oneof.name),
                )
        for enum in each.enum_types_by_name.values():
            found |= {f"{enum.full_name}.{value.name}": (value.number,) for value in enum.values}
        for service in each.services_by_name.values():
            for method in service.methods:
                types = (method.input_type.full_name, method.output_type.full_name)
                found[method.full_name] = (*types, method.client_streaming, method.server_streaming)
    return found


def test_all_that_was_released_travels_as_it_did():
    now = of_files(descriptor_pool.Default())
    was = of_files(RELEASED)
    assert len(was) > 100
    assert {name: now.get(name) for name in was} == was


# An old client and this server


def test_the_strategies_of_that_release_are_all_tried():
    assert list(STRATEGIES) == [each.name for each in old("Strategy").DESCRIPTOR.oneofs_by_name["kind"].fields]


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_old_client_gets_the_picks_of_a_new_one(channel, remote, name):
    answer = unary(channel, "SelectionService/Select", request(name), "SelectResponse")
    inputs, parameters = STRATEGIES[name]
    strategy = getattr(strategy_pb2.Strategy(**{name: parameters}), name)
    wanted = remote.select(strategy, 7, **inputs, labeled=[3, 8, 120], seed=3)
    assert answer.indices.data == wanted.indices.tobytes()
    assert answer.scores.data == wanted.scores.tobytes()
    assert answer.score_kind == strategy_pb2.ScoreKind.Value(f"SCORE_KIND_{wanted.score_kind}")
    assert answer.strategy.WhichOneof("kind") == name
    assert (answer.info.seed, answer.info.version) == (3, wanted.info.version)


def test_an_old_client_streams(channel):
    """0.1.0 had the messages of a stream, before a server served them."""
    whole, start = request("margin"), request("margin")
    start.pool.probabilities.streamed.SetInParent()
    data, path = whole.pool.probabilities.data, "pool.probabilities"
    chunks = [{"path": path, "offset": at, "data": data[at : at + 999]} for at in range(0, len(data), 999)]
    kind = old("SelectStreamRequest")
    call = channel.stream_stream(
        "/queryselect.v1.SelectionService/SelectStream", kind.SerializeToString, old("SelectStreamResponse").FromString
    )
    answers = list(call(iter([kind(start=start), *(kind(chunk=each) for each in chunks)]), timeout=60))
    (result,) = (each.result for each in answers if each.HasField("result"))
    assert answers[0].HasField("admitted")
    assert result.indices == unary(channel, "SelectionService/Select", whole, "SelectResponse").indices


def test_an_old_client_asks_for_more_than_picks(channel):
    score_every_row = selection_pb2.RETURN_POOL_SCORES
    answer = unary(channel, "SelectionService/Select", request("margin", returns=[score_every_row]), "SelectResponse")
    assert list(answer.pool_scores.shape) == [200]


def test_an_old_client_is_told_what_is_wrong(channel):
    wrong = request("margin")
    wrong.stop.max_items = 201
    with pytest.raises(grpc.RpcError) as caught:
        unary(channel, "SelectionService/Select", wrong, "SelectResponse")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(rpc_status.from_call(caught.value), error_details_pb2.BadRequest).field_violations
    assert violation.field == "stop.max_items"


@pytest.mark.parametrize(
    ("rpc", "new"),
    [
        ("StrategyService/ListStrategies", strategy_pb2.ListStrategiesResponse),
        ("ServerService/GetServerInfo", server_pb2.GetServerInfoResponse),
    ],
)
def test_an_old_client_reads_descriptions_and_keeps_what_it_does_not_know(channel, rpc, new):
    question = rpc.partition("/")[2]
    answer = unary(channel, rpc, old(f"{question}Request")(), f"{question}Response")
    passed_on = new.FromString(answer.SerializeToString())
    assert strange(answer)
    assert not strange(passed_on)
    if question == "ListStrategies":
        assert {each.name for each in answer.strategies} >= set(STRATEGIES) - {"custom"}
        assert {each.name for each in passed_on.strategies if each.items} >= {"margin"}  # newer than 0.1.0
    else:
        assert answer.limits.rows > 0
        assert passed_on.limits.upload_grace.seconds > 0  # newer than 0.1.0


# This client and an old server


class OldServer:
    """Answers as a server of 0.1.0 does, in its words for what it does not know; and has no SelectStream."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        for service, method, answer in (
            ("SelectionService", "Select", self.select),
            ("StrategyService", "ListStrategies", self.describe),
            ("ServerService", "GetServerInfo", self.tell),
        ):
            handler = grpc.unary_unary_rpc_method_handler(
                answer, old(f"{method}Request").FromString, old(f"{method}Response").SerializeToString
            )
            handlers = grpc.method_handlers_generic_handler(f"queryselect.v1.{service}", {method: handler})
            self._server.add_generic_rpc_handlers((handlers,))
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(0).wait()

    def select(self, message: Message, context: grpc.ServicerContext) -> Message:
        self.requests.append(message)
        if message.pool.HasField("item_rows"):
            self._refuse(context, "this server does not serve pool.item_rows yet", "pool.item_rows")
        name = message.strategy.WhichOneof("kind")
        if name is None:
            assert len(UnknownFieldSet(message.strategy))
            self._refuse(
                context, f"this server does not know that strategy; it has {', '.join(STRATEGIES)}", "strategy"
            )
        k = message.stop.max_items
        return old("SelectResponse")(
            indices={"dtype": tensor_pb2.DATA_TYPE_I64, "shape": [k], "data": np.arange(k).tobytes()},
            scores={"dtype": tensor_pb2.DATA_TYPE_F64, "shape": [k], "data": np.zeros(k).tobytes()},
            score_kind="SCORE_KIND_POINT",
            stop_reason="STOP_REASON_MAX_ITEMS",
            strategy=message.strategy,
            info={"version": "0.1.0"},
            request_id=message.request_id,
        )

    def describe(self, *_) -> Message:
        needs = {name: [{"name": each, "required": True} for each in inputs if each != "num_rows"]
                 for name, (inputs, _) in STRATEGIES.items() if name != "custom"}  # fmt: skip
        return old("ListStrategiesResponse")(
            strategies=[{"name": name, "inputs": each} for name, each in needs.items()]
        )

    def tell(self, *_) -> Message:
        return old("GetServerInfoResponse")(version="0.1.0", limits={"rows": 1000})

    def _refuse(self, context: grpc.ServicerContext, words: str, field: str) -> None:
        status = status_pb2.Status(code=code_pb2.UNIMPLEMENTED, message=words)
        status.details.add().Pack(
            error_details_pb2.BadRequest(field_violations=[{"field": field, "description": words}])
        )
        context.abort_with_status(rpc_status.to_status(status))


@pytest.fixture(scope="module")
def server() -> Iterator[OldServer]:
    running = OldServer()
    yield running
    running.close()


@pytest.fixture
def client(server) -> Iterator[Client]:
    with Client(server.target, retries=0) as client:
        yield client


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_old_server_knows_all_that_a_new_client_sends_for_what_was_released(server, client, name):
    inputs, parameters = STRATEGIES[name]
    strategy = getattr(strategy_pb2.Strategy(**{name: parameters}), name)
    picks = client.select(
        strategy, 2, **inputs, labeled=[3], pending=[4], seed=7, return_pool_scores=True, request_id="a"
    )
    sent = server.requests[-1]
    assert not strange(sent)
    assert sent.strategy.WhichOneof("kind") == name
    assert (sent.seed, sent.stop.max_items, sent.request_id) == (7, 2, "a")
    assert (picks.indices.tolist(), picks.score_kind, picks.stop_reason) == ([0, 1], "POINT", "MAX_ITEMS")
    assert (picks.info.version, picks.info.device, picks.info.request_id) == ("0.1.0", "", "a")


def test_a_new_strategy_is_unsupported_and_the_message_lists_those_that_there_are(client):
    with pytest.raises(Unsupported, match="it has random, least_confidence, margin, entropy, k_center_greedy"):
        client.select(Typiclust(), 2, embeddings=X)


def test_what_an_old_server_does_not_serve_is_unsupported(client):
    with pytest.raises(Unsupported, match="item_rows"):
        client.select("margin", 2, probabilities=P, item_rows=np.arange(200) // 2, num_items=150)


def test_an_rpc_that_an_old_server_does_not_have_is_unsupported(client):
    """gRPC's own answer, without details."""
    with pytest.raises(Unsupported):
        client.select("k_center_greedy", 2, embeddings=np.zeros((300_000, 4), np.float32))


def test_descriptions_of_an_old_server_are_read(client):
    assert [each.name for each in client.strategies()] == [each for each in STRATEGIES if each != "custom"]
    with pytest.raises(InvalidInput, match=r"pool\.embeddings"):  # seen here, by what the server says that it reads
        client.select("k_center_greedy", 2, probabilities=P)
    info = client.server_info()
    assert (info.version, info.limits.rows) == ("0.1.0", 1000)
    assert not info.limits.HasField("upload_grace")


#: Fields of requests that are newer than 0.1.0, and why nothing is lost where a server does not see them.
HARMLESS = {"Pool.num_items": "only with item_rows, which a server that does not know items refuses"}


def test_no_field_of_a_request_may_be_overlooked_by_an_old_server():
    """Protobuf ignores what it does not know: such a field needs a reason to be in HARMLESS, or a new number elsewhere.

    A new strategy is seen: no field of the oneof that the old server knows is set.
    """
    new, waiting = set(), [selection_pb2.SelectStreamRequest.DESCRIPTOR]
    seen = set(waiting)
    while waiting:
        message = waiting.pop()
        try:
            known = RELEASED.FindMessageTypeByName(message.full_name).fields_by_name
        except KeyError:
            continue  # of a new strategy
        for field in message.fields:
            if field.name not in known and not (field.containing_oneof and message.name == "Strategy"):
                new.add(f"{message.name}.{field.name}")
            if field.message_type and field.message_type not in seen:
                seen.add(field.message_type)
                waiting.append(field.message_type)
    assert new == set(HARMLESS)
