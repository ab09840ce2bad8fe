"""Every row of the error table that applies, through raw gRPC calls: code, field, words, and a server that lives on."""

from __future__ import annotations

import threading
import time

import grpc
import numpy as np
import pytest
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, strategy_pb2_grpc, tensor_pb2
from queryselect_service import server
from queryselect_service.settings import Settings
from tests import plugins
from tests.waiting import until

Tensor, Pool, Ids = tensor_pb2.Tensor, selection_pb2.Pool, selection_pb2.Ids
NUMBERS = {
    "float64": tensor_pb2.DATA_TYPE_F64,
    "float32": tensor_pb2.DATA_TYPE_F32,
    "int64": tensor_pb2.DATA_TYPE_I64,
    "int32": tensor_pb2.DATA_TYPE_I32,
    "bool": tensor_pb2.DATA_TYPE_BOOL,
    "uint8": tensor_pb2.DATA_TYPE_U8,
}
P = np.random.default_rng(0).dirichlet(np.ones(4), 10)
X = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
MARGIN = strategy_pb2.Strategy(margin=strategies.Margin())
RANDOM = strategy_pb2.Strategy(random=strategies.Random())
FAR = strategy_pb2.Strategy(k_center_greedy=strategies.KCenterGreedy())


GUIDED, SLEEPY = (strategy_pb2.Strategy(custom=strategies.Custom(name=name)) for name in ("guided", "sleepy"))


def tensor(array) -> Tensor:
    array = np.asarray(array)
    return Tensor(dtype=NUMBERS[array.dtype.name], shape=array.shape, data=array.tobytes())


def request(strategy=MARGIN, *, budget=2, stop=None, **fields) -> selection_pb2.SelectRequest:
    """A good request for margin; `fields` of the pool replace its inputs, other fields are the request's."""
    mine = {each.name for each in selection_pb2.SelectRequest.DESCRIPTOR.fields}
    pool = {name: value for name, value in fields.items() if name not in mine}
    rest = {name: value for name, value in fields.items() if name in mine}
    if strategy is MARGIN:
        pool.setdefault("probabilities", tensor(P))
    if strategy is FAR:
        pool.setdefault("embeddings", tensor(X))
    stop = selection_pb2.Stop(max_items=budget) if stop is None else stop
    return selection_pb2.SelectRequest(pool=Pool(**pool), strategy=strategy, stop=stop, **rest)


def at(array, row, column, value):
    array = array.copy()
    array[row, column] = value
    return array


def unknown_strategy() -> strategy_pb2.Strategy:
    """What a newer client's strategy looks like here: a field number that is in no proto file."""
    return strategy_pb2.Strategy.FromString(bytes([0xD2, 0x0F, 0x00]))  # field 250, an empty message


def detail(status, kind):
    for each in status.details:
        if each.Is(kind.DESCRIPTOR):
            found = kind()
            each.Unpack(found)
            return found
    return None


def fail(channel, message, **options):
    """The status, the details and the trailers of a call that must fail; the server serves the next call."""
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Select(message, **options)
    assert len(stub.Select(request()).indices.data) == 16
    return caught.value, rpc_status.from_call(caught.value), dict(caught.value.trailing_metadata())


S = selection_pb2


def limit(value: int, **bounds) -> selection_pb2.QuotaLimit:
    return S.QuotaLimit(value=value, **bounds)


def quota(*limits, **fields) -> selection_pb2.Quota:
    return S.Quota(**{"values": tensor(np.arange(10) // 2), "limits": limits, **fields})


#: Two rows each of five items.
ITEMS = {"item_rows": tensor(np.arange(10) // 2)}
INVALID = [
    # what, request, field, words
    ("no strategy", request(strategy_pb2.Strategy(), probabilities=tensor(P)), "strategy", "none is set"),
    ("missing input", request(FAR, embeddings=None, probabilities=tensor(P)), "pool.embeddings",
     "k_center_greedy needs pool.embeddings of shape (N D); the request has probabilities (10 4)"),
    ("missing input with an alternative", request(MARGIN, probabilities=None, embeddings=tensor(X)), "pool.probabilities",
     "margin needs pool.probabilities or pool.logits or pool.samples of shape (N C); the request has embeddings (10 3)"),
    ("both of two", request(logits=tensor(P)), "pool.logits", "exactly one of probabilities and logits"),
    ("wrong number of dimensions", request(probabilities=tensor(P[0])), "pool.probabilities",
     "pool.probabilities needs shape (N C); it has (4)"),
    ("no rows", request(probabilities=tensor(P[:0])), "pool.probabilities", "N at least 1; it has (0 4)"),
    ("two numbers of rows", request(embeddings=tensor(X[:9])), "pool.probabilities", "it has (10 4)"),
    ("num_rows that disagrees", request(num_rows=11), "pool.probabilities", "N = 11 as in pool.num_rows"),
    ("no number of rows", request(RANDOM), "pool.num_rows", "random needs pool.num_rows"),
    ("no rows at all", request(RANDOM, num_rows=0), "pool.num_rows", "at least 1; it is 0"),
    ("integers for probabilities", request(probabilities=tensor(np.ones((3, 2), np.int64))), "pool.probabilities",
     "needs type float64 or float32 or float16 or bfloat16; it has int64"),
    ("floats for rows", request(labeled=tensor(np.zeros(2))), "pool.labeled", "needs type bool or int64 or int32"),
    ("bytes for rows", request(labeled=tensor(np.zeros(10, np.uint8))), "pool.labeled", "it has uint8"),
    ("no dtype", request(probabilities=Tensor(shape=[1, 1], data=b"\0")), "pool.probabilities", "needs a dtype"),
    ("no data", request(probabilities=Tensor(dtype=1, shape=[1, 1])), "pool.probabilities", "needs data"),
    ("too few bytes", request(probabilities=Tensor(dtype=1, shape=[2, 2], data=b"\0" * 31)), "pool.probabilities",
     "of shape (2 2) and type F64 needs 32 bytes; it has 31"),
    ("negative sizes", request(probabilities=Tensor(dtype=1, shape=[-2, -2], data=b"\0" * 32)), "pool.probabilities",
     "sizes of at least 0"),
    ("a huge shape", request(probabilities=Tensor(dtype=1, shape=[2**62, 2**62], data=b"")), "pool.probabilities", "memory can hold"),
    ("a huge shape of nothing", request(FAR, embeddings=Tensor(dtype=1, shape=[0, 2**61, 2], data=b"")), "pool.embeddings", "memory can hold"),
    ("streamed, but unary", request(probabilities=Tensor(dtype=1, shape=[2, 2], streamed=tensor_pb2.Streamed())),
     "pool.probabilities", "only SelectStream"),
    ("NaN", request(probabilities=tensor(at(P, 6, 1, np.nan))), "pool.probabilities", "must be finite; row 6 has nan"),
    ("NaN in embeddings", request(FAR, embeddings=tensor(at(X, 3, 2, np.inf))), "pool.embeddings", "row 3 has inf"),
    ("negative", request(probabilities=tensor(at(P, 5, 0, -0.25))), "pool.probabilities", "row 5 has -0.25"),
    ("sum", request(probabilities=tensor(P * np.linspace(1, 1.01, 10)[:, None])), "pool.probabilities",
     "must sum to 1 within 0.001; row 1 sums to 1.00111"),
    ("a label over 1", request(probabilities=tensor(at(P, 4, 0, 1.5)), task=strategy_pb2.TASK_MULTILABEL),
     "pool.probabilities", "at most 1; row 4 has 1.5"),
    ("+inf logits", request(probabilities=None, logits=tensor(at(P, 2, 1, np.inf))), "pool.logits", "row 2 has inf"),
    ("row out of range", request(labeled=tensor([3, 10])), "pool.labeled", "lists row 10; rows are 0 to 9"),
    ("negative row", request(pending=tensor([-1])), "pool.pending", "lists row -1"),
    ("row listed twice", request(excluded=tensor([4, 2, 4])), "pool.excluded", "lists row 4 twice"),
    ("short mask", request(labeled=tensor(np.ones(9, bool))), "pool.labeled", "a mask of shape (10); it has (9)"),
    ("a mask of twos", request(labeled=Tensor(dtype=8, shape=[10], data=b"\2" * 10)), "pool.labeled", "0 or 1"),
    ("labeled and pending", request(labeled=tensor([1, 2]), pending=tensor([2])), "pool.pending",
     "pool.labeled and pool.pending both list row 2"),
    ("candidates and excluded", request(candidates=tensor([1, 2, 3]), excluded=tensor([3])), "pool.excluded",
     "pool.candidates and pool.excluded both list row 3"),
    ("two-dimensional rows", request(labeled=tensor([[1]])), "pool.labeled", "a list of rows"),
    ("budget over candidates", request(budget=8, labeled=tensor([0, 1, 2])), "stop.max_items", "budget 8 but 7 candidates"),
    ("budget over listed candidates", request(budget=3, candidates=tensor([0, 1])), "stop.max_items", "but 2 candidates"),
    ("no budget", request(stop=S.Stop()), "stop.max_items", "is needed"),
    ("budget 0", request(budget=0), "stop.max_items", "at least 1; it is 0"),
    ("parameter out of range", request(strategy_pb2.Strategy(entropy=strategies.Entropy(top_k=0)), probabilities=tensor(P)),
     "strategy.entropy.top_k", "entropy: top_k must be at least 1; it is 0"),
    ("unknown parameter of a plug-in", request(strategy_pb2.Strategy(custom=strategies.Custom(
        name="sleepy", parameters={"second": 1})), num_rows=5), "strategy.custom.parameters.second", "did you mean seconds?"),
    ("a parameter of a plug-in that is no number", request(strategy_pb2.Strategy(custom=strategies.Custom(
        name="sleepy", parameters={"seconds": float("nan")})), num_rows=5), "strategy.custom.parameters.seconds", "it is nan"),
    ("a parameter of a plug-in without a value", request(strategy_pb2.Strategy(custom=strategies.Custom(
        name="sleepy", parameters=struct_pb2.Struct(fields={"seconds": struct_pb2.Value()}))), num_rows=5),
     "strategy.custom.parameters.seconds", "parameter seconds needs a value; it has none"),
    ("ids too few", request(ids=Ids(strings=S.Strings(values=["a"]))), "pool.ids", "N = 10"),
    ("ids of no kind", request(ids=Ids()), "pool.ids", "integers or strings"),
    ("ids of floats", request(ids=Ids(integers=tensor(np.ones(10)))), "pool.ids.integers", "int64"),
    ("scores that do not exist", request(strategy_pb2.Strategy(custom=strategies.Custom(name="sleepy")), num_rows=5,
     returns=[S.RETURN_POOL_SCORES]), "returns", "has no score for rows it does not choose"),
    ("request id", request(request_id="no spaces"), "request_id", "printable ASCII"),
    ("a quota without values", request(quotas=[S.Quota(name="video")]), "pool.quotas[0].values", "needs values of shape (N)"),
    ("values of too few rows", request(quotas=[quota(), quota(values=tensor(np.arange(9)))]), "pool.quotas[1].values",
     "N = 10 as in pool.probabilities; it has (9)"),
    ("values of floats", request(quotas=[quota(values=tensor(np.ones(10)))]), "pool.quotas[0].values",
     "needs type int64 or int32 or uint8; it has float64"),
    ("a negative default", request(quotas=[quota(default_max=-1)]), "pool.quotas[0].default_max", "at least 0; it is -1"),
    ("a negative minimum", request(quotas=[quota(limit(1, min=-2))]), "pool.quotas[0].limits[0].min", "it is -2"),
    ("a negative maximum", request(quotas=[quota(limit(1, max=-2))]), "pool.quotas[0].limits[0].max", "it is -2"),
    ("a minimum over the maximum", request(quotas=[quota(limit(1), limit(2, min=2, max=1))]), "pool.quotas[0].limits[1].min",
     "at most the value's max, 1; it is 2"),
    ("a minimum over the default", request(quotas=[quota(), quota(limit(2, min=2), default_max=1)]),
     "pool.quotas[1].limits[0].min", "at most the value's max, 1; it is 2"),
    ("minima over the budget", request(quotas=[quota(limit(1, min=2), limit(2, min=1))]), "pool.quotas[0].limits",
     "want at least 3 picks; stop.max_items is 2"),
    ("a value listed twice", request(quotas=[quota(limit(1), limit(5), limit(1))]), "pool.quotas[0].limits[2].value",
     "lists value 1 twice"),
    ("a limit of no value", request(quotas=[quota(S.QuotaLimit(max=1))]), "pool.quotas[0].limits[0].value", "needs a value"),
    ("a limit of no group", request(quotas=[quota(limit(-1, max=1))]), "pool.quotas[0].limits[0].value", "in no group"),
    ("negative costs", request(costs=tensor(np.arange(10.0) - 3)), "pool.costs", "must not be negative; row 0 has -3"),
    ("negative whole costs", request(costs=tensor(5 - np.arange(10))), "pool.costs", "must not be negative; row 6 has -1"),
    ("infinite costs", request(costs=tensor(np.array([1.0] * 8 + [np.inf, np.nan]))), "pool.costs", "finite; row 8 has inf"),
    ("costs of too few rows", request(costs=tensor(np.ones(9))), "pool.costs", "it has (9)"),
    ("costs of truth values", request(costs=tensor(np.ones(10, bool))), "pool.costs", "it has bool"),
    ("a cost budget without costs", request(stop=S.Stop(max_items=1, max_cost=2.0)), "pool.costs", "needs pool.costs"),
    ("a negative cost budget", request(stop=S.Stop(max_items=1, max_cost=-0.5), costs=tensor(np.ones(10))), "stop.max_cost",
     "at least 0; it is -0.5"),
    ("a cost budget that is no number", request(stop=S.Stop(max_items=1, max_cost=np.nan), costs=tensor(np.ones(10))),
     "stop.max_cost", "it is nan"),
    ("a least gain for points", request(stop=S.Stop(max_items=1, min_gain=0.0)), "stop.min_gain", "margin has no gains"),
    ("a least gain that is no number", request(GUIDED, stop=S.Stop(max_items=1, min_gain=np.nan), embeddings=tensor(X)),
     "stop.min_gain", "it is nan"),
    ("items of too few rows", request(item_rows=tensor(np.arange(9))), "pool.probabilities",
     "N = 9 as in pool.item_rows; it has (10 4)"),
    ("items as floats", request(item_rows=tensor(np.ones(10))), "pool.item_rows", "needs type int64 or int32; it has float64"),
    ("items as a mask", request(item_rows=tensor(np.ones(10, bool))), "pool.item_rows", "needs type int64 or int32; it has bool"),
    ("two-dimensional items", request(item_rows=tensor(np.ones((10, 1), int))), "pool.item_rows", "shape (N); it has (10 1)"),
    ("a negative item", request(item_rows=tensor(np.array([*range(9), -2]))), "pool.item_rows",
     "needs items of at least 0; row 9 has -2"),
    ("an item that a mask does not have", request(**ITEMS, labeled=tensor(np.zeros(4, bool))), "pool.item_rows",
     "needs items 0 to 3, of which pool.labeled tells; row 8 has 4"),
    ("an item that costs don't have", request(**ITEMS, costs=tensor(np.zeros(3))), "pool.item_rows",
     "needs items 0 to 2, of which pool.costs tells; row 6 has 3"),
    ("an item that num_items does not have", request(**ITEMS, num_items=4), "pool.item_rows",
     "needs items 0 to 3, of which pool.num_items tells; row 8 has 4"),
    ("costs and ids of other items", request(**ITEMS, costs=tensor(np.zeros(6)), ids=Ids(strings=S.Strings(values="abcde"))),
     "pool.ids", "needs shape (I) with I = 6 as in pool.costs; it has (5)"),
    ("a quota of rows, not of items", request(**ITEMS, num_items=5, quotas=[quota()]), "pool.quotas[0].values",
     "needs shape (I) with I = 5 as in pool.num_items; it has (10)"),
    ("a quota of items without values", request(**ITEMS, quotas=[S.Quota()]), "pool.quotas[0].values", "values of shape (I)"),
    ("a mask of rows, not of items", request(**ITEMS, num_items=5, excluded=tensor(np.zeros(10, bool))), "pool.excluded",
     "needs a mask of shape (5); it has (10)"),
    ("an item out of range", request(**ITEMS, labeled=tensor([4, 5])), "pool.labeled", "lists item 5; items are 0 to 4"),
    ("an item listed twice", request(**ITEMS, pending=tensor([4, 4])), "pool.pending", "lists item 4 twice"),
    ("an item in two lists", request(**ITEMS, labeled=tensor([4]), excluded=tensor([4])), "pool.excluded",
     "pool.labeled and pool.excluded both list item 4"),
    ("no items", request(**ITEMS, num_items=0), "pool.num_items", "at least 1; it is 0"),
    ("budget over items", request(**ITEMS, budget=6), "stop.max_items", "budget 6 but 5 candidates"),
    ("budget over items with rows", request(item_rows=tensor(np.arange(10) // 2 * 2), budget=5, labeled=tensor([0])),
     "stop.max_items", "budget 5 but 4 candidates"),
    ("budget over listed items with rows", request(item_rows=tensor(np.arange(10) // 2 * 2), candidates=tensor([1, 2, 3])),
     "stop.max_items", "budget 2 but 1 candidates"),
    ("bad values in a row of an item", request(**ITEMS, probabilities=tensor(at(P, 7, 1, np.nan)), excluded=tensor([2])),
     "pool.probabilities", "must be finite; row 7 has nan"),
    ("bad costs of an item", request(**ITEMS, costs=tensor(np.array([np.nan, 1, 1, np.nan, 1])), excluded=tensor([0])),
     "pool.costs", "must be finite; item 3 has nan"),
    ("an aggregation without items", request(item_aggregation=S.ITEM_AGGREGATION_MAX), "pool.item_rows",
     "pool.item_aggregation needs pool.item_rows of shape (N)"),
    ("the rows of an item without items", request(item_top_k=3), "pool.item_rows", "pool.item_top_k needs pool.item_rows"),
    ("a number of items without items", request(num_items=0), "pool.item_rows", "pool.num_items needs pool.item_rows"),
    ("the mean of none", request(**ITEMS, item_top_k=0), "pool.item_top_k", "at least 1; it is 0"),
    ("the mean of unknown many", request(**ITEMS, item_aggregation=S.ITEM_AGGREGATION_TOP_K_MEAN), "pool.item_top_k",
     "TOP_K_MEAN needs pool.item_top_k"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "field", "words"), [each[1:] for each in INVALID], ids=[each[0] for each in INVALID]
)
def test_what_is_wrong_is_named(channel, message, field, words):
    error, status, trailers = fail(channel, message)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error.details()
    assert words in error.details()
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field == field
    assert violation.description == error.details()
    info = detail(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == ("INVALID_INPUT", "queryselect")
    assert trailers["x-request-id"]


HUGE = Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[2, 65_537], data=bytes(2 * 65_537 * 4))
WIDE = np.zeros((1, 100_001))
OVER = [
    ("rows", request(RANDOM, num_rows=50_000_001), "max_rows", 50_000_001),
    ("rows without end", request(RANDOM, num_rows=2**62), "max_rows", 2**62),
    ("dims", request(FAR, budget=1, embeddings=HUGE), "max_dims", 65_537),
    ("classes", request(probabilities=None, budget=1, logits=tensor(WIDE)), "max_classes", 100_001),
    ("budget", request(RANDOM, num_rows=2_000_000, budget=1_000_001), "max_budget", 1_000_001),
    ("id", request(ids=Ids(strings=S.Strings(values=["x"] * 9 + ["é" * 65]))), "max_id_bytes", 130),
    ("references", request(references=[S.ReferenceSet()] * 17), "max_references", 17),
    ("quotas", request(quotas=[quota()] * 9), "max_quotas", 9),
    ("a quota's name", request(quotas=[quota(name="é" * 65)]), "max_id_bytes", 130),
    ("items", request(item_rows=tensor(np.array([3, 50_000_000] * 5))), "max_rows", 50_000_001),
    ("items without end", request(item_rows=tensor(np.array([3, 2**63 - 1] * 5))), "max_rows", 2**63),
    ("items by their number", request(**ITEMS, num_items=2**62), "max_rows", 2**62),
    ("an answer over one message", request(RANDOM, num_rows=10_000_000, returns=[S.RETURN_POOL_SCORES]),
     "max_inline_bytes", 80_000_032),
]  # fmt: skip


@pytest.mark.parametrize(("message", "limit", "size"), [each[1:] for each in OVER], ids=[each[0] for each in OVER])
def test_over_a_fixed_limit(channel, message, limit, size):
    error, status, _ = fail(channel, message)
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE, error.details()
    metadata = detail(status, error_details_pb2.ErrorInfo).metadata
    assert (metadata["setting"], metadata["size"]) == (limit, str(size))
    assert 0 < int(metadata["limit"]) < size
    assert limit in error.details()


UNSERVED = [
    ("a strategy of a newer client", request(unknown_strategy(), probabilities=tensor(P)), "strategy", "it has"),
    ("a plug-in that is not installed", request(strategy_pb2.Strategy(custom=strategies.Custom(name="nope")), num_rows=3),
     "strategy", "no plug-in 'nope'"),
    ("quotas, by a kernel that can't", request(SLEEPY, num_rows=10, quotas=[quota()]), "pool.quotas",
     "sleepy does not keep to pool.quotas"),
    ("a cost budget, by a kernel that can't", request(SLEEPY, stop=S.Stop(max_items=1, max_cost=1.0), costs=tensor(np.ones(10))),
     "stop.max_cost", "sleepy does not keep to stop.max_cost"),
    ("items, by a strategy that compares rows", request(FAR, item_rows=tensor(np.arange(10))), "pool.item_rows",
     "k_center_greedy does not serve pool.item_rows: it compares rows"),
    ("item aggregation of a newer client", request(item_rows=tensor(np.arange(10)), item_aggregation=9),
     "pool.item_aggregation", "value 9 of ItemAggregation"),
    ("an input that no strategy here reads", request(utilities=tensor(np.arange(10.0))), "pool.utilities", "yet"),
    ("samples kind of a newer client",
     request(samples=tensor(np.full((10, 2, 4), 0.25)), samples_kind=9), "pool.samples_kind", "value 9 of SamplesKind"),
    ("a model", request(model="encoder"), "pool.model", "yet"),
    ("raw inputs", request(inputs={"pixels": tensor(X)}), "pool.inputs", "yet"),
    ("outputs of a model", request(returns=[S.RETURN_MODEL_OUTPUTS]), "returns", "MODEL_OUTPUTS"),
    ("an element type of a newer client", request(probabilities=Tensor(dtype=12, shape=[1], data=b"1")),
     "pool.probabilities", "value 12 of DataType"),
    ("a task of a newer client", request(task=9), "task", "value 9 of Task"),
    ("an enum value of a newer client", request(strategy_pb2.Strategy(margin=strategies.Margin(label_aggregation=77))),
     "strategy.margin.label_aggregation", "value 77 of LabelAggregation"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "field", "words"), [each[1:] for each in UNSERVED], ids=[each[0] for each in UNSERVED]
)
def test_what_is_not_served_is_never_ignored(channel, message, field, words):
    error, status, _ = fail(channel, message)
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error.details()
    assert words in error.details()
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field == field


def test_an_unknown_strategy_is_answered_with_the_known_ones(channel):
    error, _, _ = fail(channel, request(unknown_strategy(), probabilities=tensor(P)))
    assert all(
        name in error.details() for name in ("entropy", "k_center_greedy", "least_confidence", "margin", "random")
    )


@pytest.mark.parametrize(
    "unread", [X, at(X, 3, 1, np.nan), np.ones((10, 2), np.int64)], ids=["good", "NaN", "integers"]
)
def test_an_input_that_is_not_read_is_a_warning(channel, unread):
    answer = selection_pb2_grpc.SelectionServiceStub(channel).Select(request(embeddings=tensor(unread)))
    (warning,) = answer.warnings
    assert warning.code == selection_pb2.WARNING_CODE_UNUSED_INPUT
    assert warning.message == "margin does not read pool.embeddings"


def sleepy(**parameters):
    custom = strategies.Custom(name="sleepy", parameters=parameters)
    return request(strategy_pb2.Strategy(custom=custom), num_rows=5)


def test_a_bug_is_told_by_an_id_that_the_log_repeats(channel, caplog):
    error, status, _ = fail(channel, sleepy(fail="bug"))
    assert error.code() is grpc.StatusCode.INTERNAL
    error_id = detail(status, error_details_pb2.ErrorInfo).metadata["error_id"]
    assert error_id in error.details()
    assert "secret" not in str(error) + str(status)
    assert error_id in caplog.text
    assert "secret traceback" in caplog.text


@pytest.mark.parametrize("memory", ["device", "host", "allocator", "thread"])
def test_memory_that_ends_fails_one_request(channel, memory):
    error, status, trailers = fail(channel, sleepy(fail=memory))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(status, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 1000
    assert trailers["grpc-retry-pushback-ms"] == "1000"
    assert "memory" in error.details()


def test_a_message_over_the_limit_is_refused_by_grpc_itself(channel):
    data = bytes(65 << 20)
    big = request(FAR, embeddings=Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[65 << 18, 1], data=data))
    error, status, trailers = fail(channel, big)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status is None
    assert "grpc-retry-pushback-ms" not in trailers


@pytest.mark.parametrize("text", ["漢" * 3000, "x" * 9000])
def test_long_texts_do_not_hide_what_went_wrong(channel, text):
    """Errors travel in headers, which hold 8 KiB."""
    custom = strategies.Custom(name=text)
    error, status, _ = fail(channel, request(strategy_pb2.Strategy(custom=custom), num_rows=5))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "no plug-in" in error.details()
    custom = strategies.Custom(name="sleepy", parameters={text: 1})
    error, status, _ = fail(channel, request(strategy_pb2.Strategy(custom=custom), num_rows=5))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = detail(status, error_details_pb2.BadRequest).field_violations
    assert violation.field.startswith("strategy.custom.parameters.")


def stopped_within(seconds: float) -> bool:
    """Whether no kernel was at work later than `seconds` from now."""
    edge = time.monotonic() + seconds
    time.sleep(seconds + 0.3)
    return plugins.last_seen["at"] < edge


def test_a_deadline_stops_the_kernel(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Select(sleepy(seconds=30), timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert stopped_within(0.25)
    assert stub.Select(request()).HasField("indices")


def test_a_cancel_stops_the_kernel(channel):
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    call = stub.Select.future(sleepy(seconds=30))
    before = time.monotonic()
    while plugins.last_seen["at"] < before:
        time.sleep(0.005)
    call.cancel()
    assert stopped_within(0.25)
    assert stub.Select(request()).HasField("indices")


def test_a_cancel_stops_a_real_kernel(channel):
    """k_center_greedy on 60,000 rows with 5,000 picks to go: minutes, unless it hears the caller leave."""
    x = np.random.default_rng(0).normal(size=(60_000, 200)).astype(np.float32)
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    call = stub.Select.future(request(FAR, embeddings=tensor(x), budget=5000))
    time.sleep(1.0)
    assert call.running()
    call.cancel()
    started = time.monotonic()
    stub.Select(request())  # waits for the device, which is free within 250 ms; the rest is for a busy machine
    assert time.monotonic() - started < 1.5


@pytest.fixture
def small():
    """A server with room for one request at work and one that waits."""
    started = server.start(Settings(port=0, metrics_port=-1, max_queue=1, queue_wait=0.4))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        yield started, selection_pb2_grpc.SelectionServiceStub(channel), channel
    started.drain(0.1)


def at_work(stub, seconds):
    before = time.monotonic()
    call = stub.Select.future(sleepy(seconds=seconds))
    while plugins.last_seen["at"] < before:
        time.sleep(0.005)
    return call


def busy(call, words):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value.details()
    assert words in caught.value.details()
    assert detail(rpc_status.from_call(caught.value), error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0


def test_a_full_queue_and_a_long_wait_are_busy_and_descriptions_never_wait(small):
    _, stub, own = small
    running = at_work(stub, 2.0)
    waiting = stub.Select.future(request())
    time.sleep(0.1)
    busy(lambda: stub.Select(request()), "waiting")
    started = time.monotonic()
    assert strategy_pb2_grpc.StrategyServiceStub(own).ListStrategies(strategy_pb2.ListStrategiesRequest()).strategies
    assert time.monotonic() - started < 1.0
    busy(waiting.result, "not free within 0.4 s")
    assert running.result().HasField("indices")
    assert stub.Select(request()).HasField("indices")


def test_who_came_first_is_served_first():
    """Twelve callers, one after the other: nobody overtakes."""
    started = server.start(Settings(port=0, metrics_port=-1))
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        stub = selection_pb2_grpc.SelectionServiceStub(channel)
        running, ended = at_work(stub, 0.8), []
        for name in range(12):
            stub.Select.future(sleepy(seconds=0.02)).add_done_callback(lambda _, name=name: ended.append(name))
            time.sleep(0.05)
        running.result()
        until(lambda: len(ended) == 12, 10)
    started.drain(0.1)
    assert ended == list(range(12))


def test_a_draining_server_finishes_what_runs_and_refuses_what_comes(small):
    started, stub, channel = small
    running = at_work(stub, 1.0)
    drain = threading.Thread(target=started.drain, args=(5.0,))
    drain.start()
    time.sleep(0.2)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Select(request(), timeout=2.0)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert detail(rpc_status.from_call(caught.value), error_details_pb2.ErrorInfo).reason == "DRAINING"
    ready = health_pb2.HealthCheckRequest(service="queryselect.v1.SelectionService")
    answer = health_pb2_grpc.HealthStub(channel).Check(ready)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert running.result().HasField("indices")
    drain.join()
