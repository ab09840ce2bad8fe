"""SelectStream by raw calls: the answer is the unary one however the bytes come.

After every stream nothing stays set aside for it.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2, selection_pb2_grpc, strategy_pb2, tensor_pb2
from queryselect_service import strategy as registry
from queryselect_service import wire
from queryselect_service.request import INTEGER_INPUTS
from queryselect_service.stream import READ_AHEAD, Inbox
from tests import plugins
from tests.service.streams import (
    LISTS,
    LONG_P,
    LONG_X,
    MIB,
    POOL_SCORES,
    RNG,
    Code,
    Talk,
    ask,
    assert_same,
    by_kind,
    chunk,
    cut,
    free,
    long_request,
    ordered,
    read,
    refused,
    serves,
    start,
    streamed,
    waiting,
    whole,
)
from tests.service.test_errors import (
    FAR,
    RANDOM,
    at_work,
    request,
    sleepy,
    tensor,
)

pytestmark = pytest.mark.usefixtures("no_bugs")


# The good stream


def test_admitted_comes_before_any_chunk_is_sent(running, channel):
    first, data = streamed(request(request_id="job-3"))
    with Talk(channel, first) as talk:
        admitted = talk.until("admitted")
        assert admitted.request_id == "job-3"
        assert admitted.reserved_bytes > 0
        assert running.frontend.service.engine.host.reserved == admitted.reserved_bytes
        assert MIB <= admitted.recommended_chunk_bytes <= 4 * MIB
        talk.send(*cut("pool.probabilities", data["pool.probabilities"], 100))
        talk.end()
        result = talk.until("result")
        assert list(talk.call) == []
        assert dict(talk.call.trailing_metadata())["x-request-id"] == result.request_id == "job-3"
    info = result.info
    parts = [getattr(info, name).ToNanoseconds() for name in ("queue", "receive", "decode", "transfer", "kernel")]
    assert 0 < sum(parts) <= info.total.ToNanoseconds()
    assert info.receive.ToNanoseconds() > 0
    free(running)


def test_a_request_id_may_come_as_metadata_and_is_made_up_otherwise(channel):
    named = ask(channel, whole(request()), metadata=(("x-request-id", "abc"),))
    assert named.admitted.request_id == named.response.request_id == "abc"
    one, two = (ask(channel, whole(request())).admitted.request_id for _ in range(2))
    assert one != two
    assert len(one) == 32


def typed(x: torch.Tensor) -> tensor_pb2.Tensor:
    data = x.contiguous().view(torch.uint8).numpy().tobytes()
    return tensor_pb2.Tensor(dtype=wire.NUMBERS[x.dtype], shape=x.shape, data=data)


#: Of the inputs that a strategy can do without, such as it can't do without all of.
NEEDED = {("drop_query", "head_weights"), ("prob_cover", "probabilities")}


def some_request(name: str, dtype: torch.dtype, rows: int) -> selection_pb2.SelectRequest:
    """A request for any strategy, with lists of rows of both kinds and ids."""
    strategy, message = registry.STRATEGIES[name], strategy_pb2.Strategy()
    strategy = strategy.bound(strategy.spec(), ())
    getattr(message, name).SetInParent()
    letters = {"N": rows, "D": 3, "C": 4, "K": 2, "P": 5, "L": 2, "M": 6}

    def scales(count: int) -> list[selection_pb2.Scale]:
        widths = ((2, 4), (3, 2))
        return [
            selection_pb2.Scale(
                embeddings=some_tensor("embeddings", [count, z], dtype),
                gradients=some_tensor("gradients", [count, g], dtype),
            )
            for z, g in widths
        ]

    pool, references = {}, {role: selection_pb2.ReferenceSet() for role in strategy.roles}
    for each in strategy.inputs:
        shape = [letters[letter] for letter in each.shape.split()]
        if each.role is not None:
            references[each.role].role = selection_pb2.ReferenceRole.Value(f"REFERENCE_ROLE_{each.role}")
            if each.field == "scales":
                references[each.role].scales.extend(scales(shape[0]))
            else:
                getattr(references[each.role], each.field).CopyFrom(some_tensor(each.field, shape, dtype))
        elif each.name == "scales":
            pool[each.name] = scales(rows)
        elif each.required or (name, each.name) in NEEDED:
            pool[each.name] = some_tensor(each.name, shape, dtype)
    mask = np.zeros(rows, bool)
    mask[[4, 5]] = True
    return request(
        message,
        budget=5,
        **pool,
        num_rows=rows,
        labeled=tensor(np.array([1, 3])),
        excluded=tensor(mask),
        ids=selection_pb2.Ids(integers=tensor(np.arange(rows) + 10**9)),
        seed=7,
        returns=[POOL_SCORES] if strategy.pool_scores else [],
        references=references.values(),
    )


def some_tensor(name: str, shape: list[int], dtype: torch.dtype) -> tensor_pb2.Tensor:
    if name in INTEGER_INPUTS:
        return typed(torch.from_numpy(RNG.integers(0, 3, shape)))
    if name == "misclassified":
        return typed(torch.from_numpy(RNG.integers(0, 2, shape).astype(bool)))
    if name in ("probabilities", "samples"):
        return typed(torch.from_numpy(RNG.dirichlet(np.ones(shape[-1]), shape[:-1])).to(dtype))
    numbers = torch.from_numpy(RNG.normal(size=shape))
    return typed((numbers.abs() if name == "weights" else numbers).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_the_answer_is_the_unary_one_however_the_bytes_come(running, channel, name, dtype):
    """Cut anywhere, within elements and within rows, in any order, the tensors one after the other or mixed."""
    message = some_request(name, dtype, 13)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert len(unary.ids.integers.data) == 5 * 8
    first, data = streamed(message)
    assert {*LISTS[::2], "pool.ids.integers"} <= set(data)
    ways = [(1, "shuffled"), (7, "reversed"), (7, "lists last"), (37, "reversed, lists last"), (37, "shuffled")]
    for size, order in [*ways, (MIB, "straight"), (MIB, "lists last")]:
        chunks = [each for path in data for each in cut(path, data[path], size)]
        answer = ask(channel, [first, *ordered(chunks, order)])
        assert_same(answer.response, unary)
    free(running)


@pytest.mark.parametrize("name", sorted(registry.STRATEGIES))
def test_some_tensors_may_come_inside_the_start(channel, name):
    message = some_request(name, torch.float32, 50)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    _, every = streamed(message)
    for path in every:
        first, data = streamed(message, path)
        assert_same(ask(channel, [first, *cut(path, data[path], 99)]).response, unary)
    assert_same(ask(channel, [start(message)]).response, unary)


@cache
def long_answer(target: str, name: str) -> selection_pb2.SelectResponse:
    with grpc.insecure_channel(target) as channel:
        return selection_pb2_grpc.SelectionServiceStub(channel).Select(long_request(name))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_borders_and_order_of_chunks_change_nothing(running, target, channel, data):
    """Over several blocks of rows, with and without checksums."""
    name = data.draw(st.sampled_from(["margin", "entropy", "k_center_greedy"]))
    first, tensors = streamed(long_request(name))
    pieces = []
    for path, whole_bytes in tensors.items():
        borders = data.draw(st.lists(st.integers(0, len(whole_bytes)), max_size=12))
        pieces += [
            (path, at, whole_bytes[at:to])
            for at, to in itertools.pairwise(sorted([0, len(whole_bytes), *borders]))  # some are empty
        ]
    crc = data.draw(st.booleans())
    chunks = [
        chunk(*piece, crc32=zlib.crc32(piece[2])) if crc else chunk(*piece)
        for piece in data.draw(st.permutations(pieces))
    ]
    assert_same(ask(channel, [first, *chunks]).response, long_answer(target, name))


def test_rows_of_many_entries_are_scored_in_the_same_blocks(channel):
    """A block has fewer than 4096 rows where they are wide: also where chunks don't end with rows."""
    wide = torch.from_numpy(RNG.normal(size=(900, 3000))).half()
    message = request(strategy_pb2.Strategy(entropy=strategies.Entropy()), logits=typed(wide), returns=[POOL_SCORES])
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message)
    chunks = cut("pool.logits", data["pool.logits"], 1_000_003)
    for order in (chunks, chunks[::-1]):
        assert_same(ask(channel, [first, *order]).response, unary)


@pytest.mark.parametrize("paths", [("pool.probabilities",), ("pool.embeddings",), ()], ids=["one", "other", "both"])
def test_a_pointwise_kernel_of_two_inputs_may_have_one_inside_the_start(running, channel, paths):
    """Rows meet, whichever of their inputs came in which way."""
    custom = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled"))
    inputs = {"probabilities": tensor(LONG_P), "embeddings": tensor(LONG_X)}
    message = request(custom, **inputs, returns=[POOL_SCORES])
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message, *paths)
    chunks = [each for path in data for each in cut(path, data[path], 10_001)]
    assert_same(ask(channel, [first, *chunks]).response, unary)
    serves(running, channel)


@pytest.mark.parametrize("paths", [("pool.probabilities",), ("pool.embeddings",), ()], ids=["one", "other", "both"])
def test_blocks_of_rows_are_the_same_whichever_inputs_are_streamed(channel, paths):
    """Their size follows from the widest input, also where that came inside the start."""
    x = torch.from_numpy(RNG.normal(size=(900, 3000))).half()
    custom = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled"))
    message = request(custom, probabilities=tensor(LONG_P[:900]), embeddings=typed(x))
    first, data = streamed(message, *paths)
    plugins.scaled_rows.clear()
    ask(channel, [first, *(each for path in data for each in cut(path, data[path], MIB))])
    step = registry.block_rows(3000)
    assert step < 900
    assert list(plugins.scaled_rows) == [min(step, 900 - first) for first in range(0, 900, step)]


@pytest.mark.parametrize("paths", [("pool.candidates",), ("pool.labeled", "pool.candidates")], ids=["one", "both"])
def test_candidates_that_are_labeled_may_be_streamed(running, channel, paths):
    """Labelled rows may be chosen where they are listed as candidates: the list may still be on its way."""
    lists = {"labeled": tensor(np.arange(9)), "candidates": tensor(np.arange(6))}
    message = request(FAR, budget=6, **lists)
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    first, data = streamed(message, *paths)
    chunks = [each for path in data for each in cut(path, data[path], 20)]
    for order in (chunks, chunks[::-1]):
        assert_same(ask(channel, [first, *order]).response, unary)
    free(running)


def test_an_input_that_is_not_read_may_be_streamed_and_hold_anything(running, channel):
    message = request(embeddings=tensor(np.full((10, 3), np.nan)))
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert unary.warnings
    assert_same(ask(channel, whole(message, 13)).response, unary)
    first, data = streamed(message)
    failure = refused(running, channel, first, *cut("pool.probabilities", data["pool.probabilities"], 50))
    assert failure.code is Code.DATA_LOSS, "what was announced must come, read or not"


def test_an_empty_list_of_rows_needs_no_chunk(channel):
    message = request(excluded=tensor(np.empty(0, np.int64)), labeled=tensor(np.empty(0, np.int32).astype(np.int64)))
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(message)
    assert_same(ask(channel, whole(message)).response, unary)


def test_messages_are_read_ahead_but_not_without_end():
    """A client that is faster than the device does not fill the host's memory."""
    pulled = []

    def messages():
        for number in range(100):
            pulled.append(number)
            yield number

    threads = ThreadPoolExecutor(2)
    inbox = Inbox(messages(), threads)
    assert inbox.wait(1.0)
    time.sleep(0.1)
    assert len(pulled) == 2  # one that waits and one in hand, before anything is admitted
    inbox.admit()
    time.sleep(0.1)
    assert len(pulled) == READ_AHEAD + 1
    taken = []
    while (number := inbox.take() if inbox.wait(1.0) else None) is not None:
        taken.append(number)
        assert len(pulled) <= number + READ_AHEAD + 2
    assert taken == list(range(100))
    stuck = Inbox(messages(), threads)
    stuck.close()
    threads.shutdown(wait=True)  # nobody reads, so its thread is free


# A pool that is never held


def memory_of(process: subprocess.Popen, name: str) -> int:
    """Bytes, as the kernel counts them."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


@contextmanager
def server_process(*flags: str):
    """A server in a process of its own."""
    command = [sys.executable, "-m", "queryselect_service", "--port", "0", "--metrics-port", "-1", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield process
        process.terminate()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell a process's memory")
def test_a_pool_larger_than_the_hosts_memory_is_scored_as_it_comes(local):
    """200 MB through a server that may hold 100 MB, and holds far less; the picks are those of the whole pool."""
    rows, classes = 500_000, 100
    header = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_F32, shape=[rows, classes], streamed=tensor_pb2.Streamed())
    with server_process("--max-host-bytes", "100000000") as process:
        p = np.random.default_rng(1).random((rows, classes), np.float32)
        p /= p.sum(1, keepdims=True)
        here = local.select("margin", 50, probabilities=p)
        flat = p.reshape(-1).view(np.uint8)

        def messages():
            yield start(request(probabilities=header, budget=50))
            for offset in range(0, len(flat), MIB):
                yield chunk("pool.probabilities", offset, flat[offset : offset + MIB].tobytes())

        address = process.stdout.readline().split(" on ")[1].split(",")[0]
        with grpc.insecure_channel(address) as channel:
            ask(channel, whole(request(probabilities=tensor(p[:20_000]))))  # what a first call takes
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the highest so far is forgotten
            before = memory_of(process, "VmRSS")
            answer = ask(channel, messages(), timeout=60)
            grown = memory_of(process, "VmHWM") - before
    assert answer.admitted.reserved_bytes < 100_000_000 < flat.nbytes
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    assert grown < flat.nbytes / 2, f"the server grew by {grown / 1e6:.0f} MB"


# Large answers


def test_scores_of_a_million_rows_come_in_chunks(running, channel, local):
    message = request(RANDOM, num_rows=1_000_000, budget=5, seed=3, returns=[POOL_SCORES])
    answer = ask(channel, [start(message)])
    here = local.select("random", 5, num_rows=1_000_000, seed=3, return_pool_scores=True)
    assert set(answer.apart) == {"pool_scores"}
    assert answer.largest <= 4 * MIB
    assert list(answer.response.pool_scores.shape) == [1_000_000]
    assert answer.response.pool_scores.data == here.pool_scores.tobytes()
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    free(running)


def test_every_large_tensor_of_an_answer_comes_in_chunks(running, channel, local):
    ids = np.random.default_rng(0).permutation(300_000)
    pool = {"num_rows": 300_000, "ids": selection_pb2.Ids(integers=tensor(ids))}
    answer = ask(channel, whole(request(RANDOM, budget=200_000, **pool)))
    here = local.select("random", 200_000, num_rows=300_000)
    assert set(answer.apart) == {"indices", "scores", "ids.integers"}
    assert answer.largest <= 4 * MIB
    assert answer.response.indices.data == here.indices.tobytes()
    assert answer.response.scores.data == here.scores.tobytes()
    assert answer.response.ids.integers.data == ids[here.indices].tobytes()
    free(running)


def test_a_client_that_leaves_a_large_answer_unread_holds_nothing(running, channel):
    message = request(RANDOM, num_rows=3_000_000, budget=5, returns=[POOL_SCORES])
    with Talk(channel, start(message)) as talk:
        talk.end()
        talk.until("result")
        talk.call.cancel()
        free(running)
    serves(running, channel)


# Only checked


@by_kind
def test_validate_only_looks_at_every_value_and_selects_nothing(running, channel, message, path, data):
    checked = selection_pb2.SelectRequest()
    checked.CopyFrom(message)
    checked.validate_only = True
    unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(checked)
    first, _ = streamed(checked, path)
    answer = ask(channel, [first, *cut(path, data, 33)])
    assert not answer.response.HasField("indices")
    assert not answer.response.HasField("stop_reason")
    assert_same(answer.response, unary)
    free(running)
    assert refused(running, channel, first).code is Code.DATA_LOSS
    bad = np.frombuffer(data, np.float64 if "probabilities" in path else np.float32).copy()
    bad[-1] = np.nan
    failure = refused(running, channel, first, chunk(path, 0, bad.tobytes()), end=False)
    assert (failure.code, failure.field) == (Code.INVALID_ARGUMENT, path)
    assert "row 9 has nan" in failure.words


def test_validate_only_holds_no_pool(serve):
    """Whatever the strategy: its rows are looked at and let go."""
    own, channel = serve(max_host_bytes=4_000_000)
    x = np.zeros((100_000, 16), np.float32)
    message = request(FAR, embeddings=tensor(x), validate_only=True)
    answer = ask(channel, whole(message, 100_001))
    assert answer.admitted.reserved_bytes < 4_000_000 < x.nbytes
    assert not answer.response.HasField("indices")
    serves(own, channel)


@by_kind
def test_validate_only_does_not_wait_for_the_device(running, channel, message, path, data):
    """Nothing is computed there; a unary call does not wait either."""
    working = at_work(selection_pb2_grpc.SelectionServiceStub(channel), 0.8)
    checked = selection_pb2.SelectRequest()
    checked.CopyFrom(message)
    checked.validate_only = True
    assert ask(channel, whole(checked)).response.HasField("strategy")
    assert not working.done()
    working.result()
    free(running)


# How far it is


@by_kind
def test_progress_tells_what_has_come(channel, message, path, data):
    first, _ = streamed(message, path)
    with Talk(channel, first) as talk:
        for each in cut(path, data, len(data) // 4):
            talk.send(each)
            time.sleep(0.15)
        talk.end()
        answer = read(talk.call)
    told = [(each.done, each.total) for each in answer.progress if each.phase == selection_pb2.PHASE_RECEIVING]
    assert len(told) >= 2
    assert told == sorted(told)
    assert all(0 <= done <= total == len(data) for done, total in told)
    assert len({done for done, _ in told}) > 1


def test_progress_tells_of_the_wait_and_of_the_selection(running, channel):
    """The wait in requests ahead, without a total; the selection in picks."""
    stub = selection_pb2_grpc.SelectionServiceStub(channel)
    working = at_work(stub, 0.8)
    before = stub.Select.future(sleepy(seconds=0.3))
    waiting(running, 1)
    x = np.random.default_rng(0).normal(size=(20_000, 40)).astype(np.float32)
    answer = ask(channel, whole(request(FAR, embeddings=tensor(x), budget=600)))
    queued = [each for each in answer.progress if each.phase == selection_pb2.PHASE_QUEUED]
    assert queued
    assert not any(each.HasField("total") for each in queued)
    assert all(0 <= each.done <= 1 for each in queued)
    selecting = [each for each in answer.progress if each.phase == selection_pb2.PHASE_SELECTING]
    assert selecting
    assert all(0 <= each.done <= each.total == 600 for each in selecting)
    steps = [each.done for each in selecting]
    assert steps == sorted(steps)
    phases = [each.phase for each in answer.progress]
    receiving = [selection_pb2.PHASE_RECEIVING] * phases.count(selection_pb2.PHASE_RECEIVING)
    assert phases == receiving + [each.phase for each in (*queued, *selecting)], "one phase after the other"
    working.result()
    before.result()
    free(running)
