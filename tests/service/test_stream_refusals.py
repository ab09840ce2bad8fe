"""What is wrong with a stream is named, by raw calls; after every fault the server serves the next."""

from __future__ import annotations

import socket
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from google.rpc import error_details_pb2

from queryselect.strategies import v1 as strategies
from queryselect.v1 import selection_pb2_grpc, strategy_pb2, tensor_pb2
from queryselect_service import wire
from tests.service.streams import (
    LONG_P,
    LONG_X,
    POOL_SCORES,
    Code,
    Request,
    ask,
    assert_same,
    by_kind,
    chunk,
    counted,
    cut,
    free,
    ordered,
    refused,
    serves,
    start,
    streamed,
    whole,
)
from tests.service.test_errors import (
    FAR,
    INVALID,
    MARGIN,
    OVER,
    UNSERVED,
    P,
    at,
    fail,
    request,
    sleepy,
    tensor,
)
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("no_bugs")


# What is wrong with the messages


NO_START = [
    ("nothing", []),
    ("a chunk first", [chunk("pool.probabilities", 0, P.tobytes()), *whole(request())]),
    ("an empty message first", [b"", *whole(request())]),
    ("a message of a newer client first", [bytes([0x7A, 0x00])]),
]


@pytest.mark.parametrize("messages", [each[1] for each in NO_START], ids=[each[0] for each in NO_START])
def test_a_stream_begins_with_a_start(running, channel, messages):
    failure = refused(running, channel, *messages)
    assert failure.code is Code.INVALID_ARGUMENT
    assert not failure.admitted
    assert failure.field == "start"
    assert "needs a start as its first message" in failure.words


FAULTS = [
    # what, messages after the start, field (None: the tensor's path), words
    ("another start", lambda *_: [start(request())], "start", "one start and then chunks"),
    ("an empty message", lambda *_: [b""], "start", "one start and then chunks"),
    ("an unknown path", lambda _, data: [chunk("pool.colors", 0, data)], "pool.colors",
     "there is a chunk of 'pool.colors'; streamed are: pool."),
    ("the path of an inline tensor", lambda *_: [chunk("pool.labeled", 0, b"12345678")], "pool.labeled",
     "streamed are: pool."),
    ("a negative offset", lambda path, data: [chunk(path, -1, data[:4])], None, "there is a chunk of bytes -1 to 3"),
    ("the most negative offset", lambda path, data: [chunk(path, -(2**63), data)], None, "there is a chunk of bytes -"),
    ("past the end", lambda path, data: [chunk(path, 1, data)], None, "there is a chunk of bytes 1 to "),
    ("far past the end", lambda path, data: [chunk(path, 2**63 - 1, data)], None, "there is a chunk of bytes 9223"),
    ("nothing past the end", lambda path, data: [chunk(path, len(data) + 1, b"")], None, "there is a chunk of bytes"),
    ("one byte of the chunk before", lambda path, data: [chunk(path, 0, data[:50]), chunk(path, 49, data[49:])], None,
     "bytes 49 to "),
    ("one byte of the chunk after", lambda path, data: [chunk(path, 50, data[50:]), chunk(path, 0, data[:51])], None,
     "bytes 0 to 51 of "),
    ("a chunk twice", lambda path, data: [chunk(path, 8, data[8:40])] * 2, None, "bytes 8 to 40 of "),
    ("within a chunk", lambda path, data: [chunk(path, 0, data[:-1]), chunk(path, 5, b"x")], None, "came before"),
    ("all over again", lambda path, data: [chunk(path, 0, data), chunk(path, 0, data)], None, "came before"),
]  # fmt: skip


@by_kind
@pytest.mark.parametrize(
    ("messages", "field", "words"), [each[1:] for each in FAULTS], ids=[each[0] for each in FAULTS]
)
def test_a_chunk_that_can_not_be_is_named_at_once(running, channel, message, path, data, messages, field, words):
    """The client need not send the rest to learn of it."""
    first, _ = streamed(message, path)
    failure = refused(running, channel, first, *messages(path, data), end=False)
    assert failure.code is Code.INVALID_ARGUMENT
    assert words in failure.words
    assert failure.field == (field or path)
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "INVALID_INPUT"


LOSSES = [
    ("nothing", lambda path, data: [], "did not come"),
    ("a gap", lambda path, data: [chunk(path, 0, data[:40]), chunk(path, 41, data[41:])], "1 of "),
    ("no beginning", lambda path, data: [chunk(path, 8, data[8:])], "8 of "),
    ("a short last chunk", lambda path, data: [chunk(path, 0, data[:64]), chunk(path, 64, data[64:-3])], "3 of "),
    ("only empty chunks", lambda path, data: [chunk(path, 0, b""), chunk(path, len(data), b"")], "did not come"),
    ("a checksum of other bytes", lambda path, data: [chunk(path, 0, data, crc32=zlib.crc32(data[1:]))], "CRC-32"),
    ("one bit of a checksum", lambda path, data: [chunk(path, 0, data, crc32=zlib.crc32(data) ^ 1 << 31)], "CRC-32"),
    ("a checksum of 0", lambda path, data: [chunk(path, 0, data, crc32=0)], "CRC-32"),
]  # fmt: skip


@by_kind
@pytest.mark.parametrize(("messages", "words"), [each[1:] for each in LOSSES], ids=[each[0] for each in LOSSES])
def test_bytes_that_do_not_come_or_change_are_a_loss(running, channel, message, path, data, messages, words):
    first, _ = streamed(message, path)
    failure = refused(running, channel, first, *messages(path, data))
    assert failure.code is Code.DATA_LOSS
    assert words in failure.words
    assert path in failure.words
    assert failure.detail(error_details_pb2.ErrorInfo).reason == "DATA_LOSS"


def test_a_path_of_any_length_does_not_hide_what_went_wrong(running, channel):
    """Errors travel in headers, which hold 8 KiB."""
    for path in ("x" * 9000, "漢" * 3000, "", "pool.\n\0"):
        failure = refused(running, channel, streamed(request())[0], chunk(path, 0, b"1"), end=False)
        assert failure.code is Code.INVALID_ARGUMENT
        assert "there is a chunk of '" in failure.words
        assert not path or failure.field[:60] == path[:60]


@pytest.mark.parametrize("name", ["labeled", "excluded"])
def test_a_list_of_rows_that_does_not_come_is_a_loss(running, channel, name):
    for strategy in (MARGIN, FAR):
        first, data = streamed(request(strategy, **{name: tensor([3, 4])}))
        chunks = [each for path in data for each in cut(path, data[path], 50) if path != f"pool.{name}"]
        failure = refused(running, channel, first, *chunks)
        assert failure.code is Code.DATA_LOSS
        assert f"16 of 16 bytes of pool.{name} did not come" in failure.words


@pytest.mark.parametrize("broken", [b"\x12\x05\x0a", b"\x12\x0c\x10" + b"\x80" * 10 + b"\x00", b"\xff"])
@pytest.mark.parametrize("admitted", [False, True])
def test_bytes_that_are_no_message_end_the_stream(running, channel, broken, admitted):
    first, _ = streamed(request())
    failure = refused(running, channel, *[first] * admitted, broken)
    assert failure.code is Code.INVALID_ARGUMENT
    assert f"these {len(broken)} bytes are no queryselect.v1.SelectStreamRequest" in failure.words


# What is wrong with the request


BEFORE = [
    *((what, message, Code.INVALID_ARGUMENT) for what, message, *_ in INVALID if "streamed" not in what),
    *((what, message, Code.UNIMPLEMENTED) for what, message, *_ in UNSERVED),
    *((what, message, Code.OUT_OF_RANGE) for what, message, *_ in OVER if "one message" not in what),
]


@pytest.mark.parametrize(
    ("message", "code"), [each[1:] for each in BEFORE], ids=[each[0].replace(" ", "-") for each in BEFORE]
)
def test_what_the_start_tells_is_refused_before_it_is_admitted(running, channel, message, code):
    """As a unary call of the same request is."""
    unary, _, _ = fail(channel, message)
    failure = refused(running, channel, start(message), end=False)
    assert failure.code is unary.code() is code
    assert failure.words == unary.details()
    assert not failure.admitted


def fits(value) -> bool:
    return isinstance(value, tensor_pb2.Tensor) and value.dtype in wire.DTYPES and 0 <= np.prod(value.shape) < 1e9


#: Of those whose tensors could be streamed: what can be seen without their elements, and what can't.
UNSEEN = [
    "sum", "negative", "NaN", "NaN in embeddings", "+inf logits", "a label over 1", "row out of range", "negative row",
    "row listed twice", "a mask of twos", "labeled and pending", "candidates and excluded", "budget over candidates",
    "budget over listed candidates", "negative costs", "negative whole costs", "infinite costs",
    "a negative item", "an item that a mask does not have", "an item that costs don't have",
    "an item that num_items does not have", "an item out of range", "an item listed twice", "an item in two lists",
    "budget over items", "budget over items with rows", "budget over listed items with rows",
    "bad values in a row of an item", "bad costs of an item",
]  # fmt: skip

STREAMABLE = [
    (what, message, what in UNSEEN)
    for what, message, *_ in INVALID
    if any(fits(value) for _, value in message.pool.ListFields())
    and all(
        fits(value) and len(value.data) == np.prod(value.shape) * wire.DTYPES[value.dtype].itemsize
        for _, value in message.pool.ListFields()
        if isinstance(value, tensor_pb2.Tensor)
    )
]


@pytest.mark.parametrize(("message", "unseen"), [each[1:] for each in STREAMABLE], ids=[e[0] for e in STREAMABLE])
def test_what_is_wrong_with_a_streamed_tensor_is_told_as_of_any_other(running, channel, message, unseen):
    """Its header before it is admitted, its elements as they come: the field and the words are the unary call's."""
    unary, status, _ = fail(channel, message)
    first, data = streamed(message)
    chunks = [each for path in data for each in cut(path, data[path], 33)]
    for order in (chunks, chunks[::-1]):
        failure = refused(running, channel, first, *(order if unseen else []), end=False)
        assert (failure.code, failure.words) == (unary.code(), unary.details())
        assert failure.status.details == status.details
        assert failure.admitted == unseen


def test_the_cases_that_are_not_seen_before_admission_are_all_among_them():
    assert set(UNSEEN) <= {each[0] for each in STREAMABLE}


BAD_ROWS = {
    "in blocks": ("probabilities", LONG_P, MARGIN),
    "whole": ("embeddings", LONG_X, FAR),
}


@pytest.mark.parametrize(("name", "good", "strategy"), BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_is_named_while_the_upload_goes_on(running, channel, name, good, strategy, value):
    """The rest need not be sent."""
    message = request(strategy, **{name: tensor(at(good, 4100, 1, value))})
    first, data = streamed(message)
    path, elements = f"pool.{name}", data[f"pool.{name}"]
    sent = 8192 * len(elements) // 9000
    failure = refused(running, channel, first, *cut(path, elements[:sent], 1000), end=False)
    assert failure.admitted
    assert failure.code is Code.INVALID_ARGUMENT
    assert failure.field == path
    assert f"{path} must be finite; row 4100 has {value}" in failure.words


def test_probabilities_that_do_not_sum_to_1_are_named_while_the_upload_goes_on(running, channel):
    first, data = streamed(request(probabilities=tensor(at(LONG_P, 5000, 0, 0.9999) + at(LONG_P * 0, 5000, 1, 0.5))))
    sent = cut("pool.probabilities", data["pool.probabilities"][: 8192 * 8], 4096)
    failure = refused(running, channel, first, *sent, end=False)
    assert failure.field == "pool.probabilities"
    assert "must sum to 1 within 0.001; row 5000 sums to" in failure.words


@pytest.mark.parametrize("order", ["straight", "lists last", "shuffled"])
@pytest.mark.parametrize(("name", "good", "strategy"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_excluded_rows_may_hold_anything(running, channel, name, good, strategy, order):
    """Also where the list of them comes after the rows."""
    dirty = at(at(good, 4100, 1, np.nan), 8999, 0, np.inf)
    mask = np.isin(np.arange(9000), [4100, 8999, 5])
    clean = at(at(good, 4100, 1, 0.5), 8999, 0, 0.5)
    clean[[4100, 8999]] = 0.5
    for excluded in (tensor(mask), tensor(np.flatnonzero(mask))):
        message, same = (
            request(strategy, budget=9, **{name: tensor(each)}, excluded=excluded, returns=[POOL_SCORES])
            for each in (dirty, clean)
        )
        first, data = streamed(message)
        chunks = ordered([each for path in data for each in cut(path, data[path], 7001)], order)
        unary = selection_pb2_grpc.SelectionServiceStub(channel).Select(same)
        assert_same(ask(channel, [first, *chunks]).response, unary)
    first, data = streamed(request(strategy, **{name: tensor(dirty)}, excluded=tensor([4100])))
    chunks = ordered([each for path in data for each in cut(path, data[path], 7001)], order)
    failure = refused(running, channel, first, *chunks)
    assert failure.field == f"pool.{name}"
    assert "row 8999 has inf" in failure.words


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_a_mask_of_other_bytes_than_0_and_1_is_refused_as_it_comes(running, channel, byte):
    """In any chunk, and before the rows come."""
    mask = bytearray(9000)
    mask[8000] = byte
    excluded = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BOOL, shape=[9000], data=bytes(mask))
    for strategy, inputs in ((MARGIN, {"probabilities": tensor(LONG_P)}), (FAR, {"embeddings": tensor(LONG_X)})):
        first, data = streamed(request(strategy, **inputs, excluded=excluded))
        failure = refused(running, channel, first, *cut("pool.excluded", data["pool.excluded"], 1000), end=False)
        assert failure.field == "pool.excluded"
        assert "needs truth values of 0 or 1" in failure.words


def test_a_budget_over_the_candidates_is_refused_as_soon_as_it_is_known(running, channel):
    for lists in ({"labeled": tensor(np.arange(9))}, {"candidates": tensor([4])}):
        for strategy in (MARGIN, FAR):
            message = request(strategy, **lists)
            inline, _ = streamed(message, *(["pool.probabilities"] if strategy is MARGIN else ["pool.embeddings"]))
            failure = refused(running, channel, inline, end=False)
            assert (failure.admitted, failure.field) == (False, "stop.max_items")
            assert "budget 2 but 1 candidates" in failure.words
            first, data = streamed(message)
            (path,) = (f"pool.{name}" for name in lists)
            failure = refused(running, channel, first, *cut(path, data[path], 5), end=False)
            assert (failure.admitted, failure.field) == (True, "stop.max_items")
            assert "budget 2 but 1 candidates" in failure.words


def test_a_kernel_that_fails_fails_one_stream(running, channel, caplog):
    """While rows come, and in the selection: a bug is told by an id that the log repeats."""
    scaled = strategy_pb2.Strategy(custom=strategies.Custom(name="scaled", parameters={"fail": True}))
    early = whole(request(scaled, probabilities=tensor(LONG_P), embeddings=tensor(LONG_X)))
    for messages, end in ((early, False), ([start(sleepy(fail="bug"))], True)):
        failure = refused(running, channel, *messages, end=end)
        assert failure.code is Code.INTERNAL
        assert "secret" not in str(failure.status)
        assert failure.detail(error_details_pb2.ErrorInfo).metadata["error_id"] in caplog.text
    for memory in ("device", "host", "allocator"):
        failure = refused(running, channel, start(sleepy(fail=memory)))
        assert failure.code is Code.RESOURCE_EXHAUSTED
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
    caplog.clear()


# Frames by hand


DATA, HEADERS, RESET, SETTINGS, GOAWAY = 0, 1, 3, 4, 7

END_STREAM, END_HEADERS = 1, 4


def frame(kind: int, flags: int, payload: bytes, number: int = 1) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", number) + payload


def message_frame(message: Request, flags: int = 0) -> bytes:
    data = message.SerializeToString()
    return frame(DATA, flags, b"\0" + struct.pack(">I", len(data)) + data)


def opening(target: str) -> bytes:
    """What a connection and a stream begin with."""
    fields = {
        ":method": "POST", ":scheme": "http", ":path": "/queryselect.v1.SelectionService/SelectStream",
        ":authority": target, "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    literal = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, b"", 0) + frame(HEADERS, END_HEADERS, literal)


def over(connection: socket.socket) -> bool:
    """Reads until the server has ended the stream, or the connection; whether it has."""
    buffer = b""
    with suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            buffer += data
            while len(buffer) >= 9 and len(buffer) >= 9 + int.from_bytes(buffer[:3], "big"):
                kind, flags = buffer[3], buffer[4]
                if kind in (RESET, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                    return True
                buffer = buffer[9 + int.from_bytes(buffer[:3], "big") :]
    return True


@pytest.mark.parametrize("ending", ["with a chunk", "by itself"])
def test_a_chunk_after_the_end_is_no_part_of_the_stream(running, target, channel, ending):
    """A client that breaks HTTP/2's rules: what came too late does not complete an upload, and hurts nobody."""
    first, data = streamed(request())
    one, two = cut("pool.probabilities", data["pool.probabilities"], 160)
    end = [message_frame(one, END_STREAM)]
    if ending == "by itself":
        end = [message_frame(one), frame(DATA, END_STREAM, b"")]
    before = counted(running, "OK")
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(b"".join([opening(target), message_frame(first), *end, message_frame(two)]))
        assert over(connection)
        free(running)
        assert counted(running, "OK") == before
    serves(running, channel)


def test_frames_by_hand_make_a_good_stream(running, target, channel):
    """So that the test above tests what it says."""
    before = counted(running, "OK")
    *messages, last = whole(request(), 160)
    frames = [*map(message_frame, messages), message_frame(last, END_STREAM)]
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(opening(target) + b"".join(frames))
        assert over(connection)
        free(running)
    assert counted(running, "OK") == before + 1


@pytest.mark.parametrize("how", ["reset", "cut off", "garbage"])
def test_a_connection_that_breaks_within_a_chunk_holds_nothing(running, target, channel, how):
    first, data = streamed(request())
    (piece,) = cut("pool.probabilities", data["pool.probabilities"], 320)
    host = running.frontend.service.engine.host
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(opening(target) + message_frame(first) + message_frame(piece)[:100])
        assert until(lambda: host.taken == 1)
        if how == "reset":
            rest = message_frame(piece)[100:]
            connection.sendall(rest + frame(RESET, 0, struct.pack(">I", 8)))
        elif how == "garbage":
            connection.sendall(b"\xff" * 4000)
        else:
            connection.shutdown(socket.SHUT_RDWR)
        free(running)
    serves(running, channel)
