"""Chunks without a network: what is here and what is missing, whose bytes go where, and messages read by hand."""

from __future__ import annotations

import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from queryselect.v1 import selection_pb2
from queryselect_service import wire
from queryselect_service.checks import Array
from queryselect_service.errors import Busy, DataLoss, InvalidInput
from queryselect_service.request import Request
from queryselect_service.settings import Settings
from queryselect_service.strategy import POINTWISE_ENTRIES, load
from queryselect_service.upload import WINDOW, Blocks, Coverage, Part, Upload, held_bytes
from tests.service.test_errors import FAR, MARGIN, request, tensor

load()
ROWS = 10_000
RNG = np.random.default_rng(0)
P = RNG.dirichlet(np.ones(4), ROWS)
X = RNG.normal(size=(ROWS, 3)).astype(np.float32)


# What is here


@given(spans=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))))
def test_coverage_is_a_set_of_byte_numbers(spans):
    """A stretch is noted whole or not at all."""
    coverage, here = Coverage(), set()
    for start, length in spans:
        new = set(range(start, start + length))
        assert coverage.add(start, start + length) == here.isdisjoint(new)
        if here.isdisjoint(new):
            here |= new
        assert coverage.total == len(here)
        assert coverage.prefix == next(number for number in range(1000) if number not in here)


@given(order=st.permutations(range(12)))
def test_coverage_in_any_order_ends_as_one_stretch(order):
    coverage = Coverage()
    for number in order:
        assert coverage.add(5 * number, 5 * number + 5)
    assert (coverage.total, coverage.prefix) == (60, 60)
    assert coverage._starts == [0], "a long upload must not grow the list"
    assert not any(coverage.add(number, number + 1) for number in range(60))


# Blocks


class Memory:
    """What was set aside; more than `most` is refused."""

    def __init__(self, most: float = float("inf")) -> None:
        self.asked: list[int] = []
        self.most = most

    def reserve(self, nbytes: int) -> None:
        if sum(self.asked) + nbytes > self.most:
            raise Busy("full", retry_after=1.0)
        self.asked.append(nbytes)


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8)


def blocks_of(memory: Memory, **arrays: np.ndarray) -> Blocks:
    told = {
        name: Array(f"pool.{name}", torch.from_numpy(array[:1]).dtype, array.shape) for name, array in arrays.items()
    }
    return Blocks(told, len(next(iter(arrays.values()))), memory.reserve)


def addresses(block) -> set[int]:
    return {buffer.ctypes.data for buffer in block.buffers.values()}


def test_blocks_in_order_use_two_sets_of_buffers_over_and_over():
    """Rows that come in order are never held: a block that is scored lends its memory to the next."""
    memory, seen = Memory(), set()
    blocks = blocks_of(memory, probabilities=P, embeddings=X)
    for start in range(0, ROWS, 1000):
        rows = slice(start, start + 1000)
        blocks.write("probabilities", start * 32, as_bytes(P[rows]))
        blocks.write("embeddings", start * 12, as_bytes(X[rows]))
        while blocks.full:
            block = blocks.full.popleft()
            here = slice(block.rows.start, block.rows.start + 4096)
            assert np.array_equal(block.tensors["probabilities"], P[here])
            assert np.array_equal(block.tensors["embeddings"], X[here])
            seen |= addresses(block)
            blocks.give_back(block)
    assert block.rows.start == 8192, "every block came"
    assert len(seen) <= 2 * 2
    assert not memory.asked


def test_blocks_ask_for_memory_beyond_their_window_and_for_no_more_than_they_use():
    """Rows out of order are held as long as there is memory, and refused when there is none."""
    pool = RNG.normal(size=(4096 * 12, 2))
    block_bytes = 4096 * 16
    memory = Memory(most=3 * block_bytes)
    blocks = blocks_of(memory, embeddings=pool)
    for number in range(WINDOW):
        blocks.write("embeddings", number * block_bytes, as_bytes(pool[:1]))
    assert not memory.asked
    for number in range(WINDOW, WINDOW + 3):
        blocks.write("embeddings", number * block_bytes, as_bytes(pool[:1]))
    assert memory.asked == [block_bytes] * 3
    with pytest.raises(Busy):
        blocks.write("embeddings", (WINDOW + 3) * block_bytes, as_bytes(pool[:1]))
    first = slice(1, 4096)
    blocks.write("embeddings", 16, as_bytes(pool[first]))
    (done,) = blocks.full
    blocks.give_back(done)
    blocks.write("embeddings", (WINDOW + 3) * block_bytes, as_bytes(pool[:1]))  # in what was given back
    assert memory.asked == [block_bytes] * 3


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_blocks_hold_what_was_sent_however_it_was_cut(data):
    """Borders of chunks fall anywhere, in elements and in rows, and chunks come in any order."""
    rows = data.draw(st.integers(1, 9000))
    arrays = {
        "embeddings": np.arange(rows * 3, dtype=np.float32).reshape(rows, 3),
        "utilities": np.arange(rows, dtype=np.float64),
    }
    blocks, pieces = blocks_of(Memory(), **arrays), []
    for name, array in arrays.items():
        cuts = data.draw(st.lists(st.integers(0, array.nbytes), max_size=6))
        flat = as_bytes(array)
        pieces += [(name, start, flat[start:stop]) for start, stop in pairwise(sorted({0, array.nbytes, *cuts}))]
    for name, offset, piece in data.draw(st.permutations(pieces)):
        blocks.write(name, offset, piece)
    got = sorted(blocks.full, key=lambda block: block.rows.start)
    assert [block.rows.start for block in got] == list(range(0, rows, 4096))
    for name, array in arrays.items():
        assert np.array_equal(np.concatenate([block.tensors[name] for block in got]), array)


def test_rows_of_many_entries_come_in_smaller_blocks():
    wide = np.arange(300 * 4000, dtype=np.float64).reshape(300, 4000)
    blocks = blocks_of(Memory(), embeddings=wide)
    flat = as_bytes(wide)
    for start in reversed(range(0, len(flat), 999_999)):
        blocks.write("embeddings", start, flat[start : start + 999_999])
    step = POINTWISE_ENTRIES // 4000
    assert step < 300
    assert sorted((block.rows.start, len(block.tensors["embeddings"])) for block in blocks.full) == [
        (first, min(step, 300 - first)) for first in range(0, 300, step)
    ]
    for block in blocks.full:
        assert np.array_equal(block.tensors["embeddings"], wide[block.rows.start : block.rows.start + step])


# Uploads


def upload_of(message: selection_pb2.SelectRequest, *paths: str) -> tuple[Upload, Request]:
    """The upload of a request whose tensors at `paths` of the pool are streamed."""
    for path in paths:
        getattr(message.pool, path).streamed.SetInParent()
    asked = wire.decode(message, None, Settings())
    asked.check(Settings())
    return Upload(asked, Memory().reserve), asked


def far(**fields) -> selection_pb2.SelectRequest:
    return request(FAR, embeddings=tensor(X), **fields)


def part(path: str, offset: int, data: bytes, crc32: int | None = None) -> Part:
    return Part(path, offset, memoryview(data), crc32)


def test_a_tensor_is_copied_once_to_where_it_belongs():
    """A chunk may be let go as soon as it is written; the tensor is a view of one buffer."""
    upload, asked = upload_of(far(), "embeddings")
    data = bytearray(X.tobytes())
    for offset in reversed(range(0, len(data), 999)):
        assert asked.inputs["embeddings"].data is None
        chunk = data[offset : offset + 999]
        upload.write(part("pool.embeddings", offset, chunk))
        chunk[:] = bytes(len(chunk))
    upload.finish()
    got = asked.inputs["embeddings"].data
    assert np.array_equal(got, X)
    assert got.data_ptr() == upload._buffers["pool.embeddings"].ctypes.data
    assert (upload.received, upload.total) == (X.nbytes, X.nbytes)


def test_an_input_that_nobody_reads_is_counted_and_dropped():
    upload, asked = upload_of(request(MARGIN, probabilities=tensor(P), embeddings=tensor(X)), "embeddings")
    assert held_bytes(asked) == P.nbytes
    upload.write(part("pool.embeddings", 0, X.tobytes()[:-1]))
    assert not upload._buffers
    with pytest.raises(DataLoss, match=r"1 of 120000 bytes of pool\.embeddings did not come"):
        upload.finish()
    with pytest.raises(InvalidInput, match="came before"):
        upload.write(part("pool.embeddings", 5, b"x"))
    upload.write(part("pool.embeddings", X.nbytes - 1, b"x"))
    upload.finish()


def test_what_is_held_is_what_is_set_aside():
    """A pool that is scored as it comes counts by its blocks, anything else in full."""
    mask = np.zeros(ROWS, bool)
    message = request(MARGIN, probabilities=tensor(P), excluded=tensor(mask))
    _, pointwise = upload_of(message, "probabilities", "excluded")
    assert held_bytes(pointwise) == WINDOW * 4096 * 32 + ROWS
    _, whole = upload_of(far(excluded=tensor(mask)), "embeddings", "excluded")
    assert held_bytes(whole) == X.nbytes + ROWS
    _, checked = upload_of(far(validate_only=True), "embeddings")
    assert held_bytes(checked) == WINDOW * 4096 * 12


def test_a_wrong_checksum_changes_nothing():
    """The bytes may be sent again."""
    upload, _ = upload_of(far(), "embeddings")
    data = X.tobytes()
    with pytest.raises(DataLoss, match=r"bytes 0 to 120000 of pool\.embeddings changed"):
        upload.write(part("pool.embeddings", 0, data, zlib.crc32(data) ^ 1))
    assert upload.received == 0
    upload.write(part("pool.embeddings", 0, data, zlib.crc32(data)))
    upload.finish()


@pytest.mark.parametrize("inputs", [{"probabilities": P}, {"embeddings": X}], ids=["in blocks", "whole"])
def test_rows_are_looked_at_when_the_lists_of_rows_are_here(inputs):
    """Only then is it known whose values matter."""
    ((name, good),) = inputs.items()
    array = good.copy()
    array[[5000, 9000]] = np.nan
    strategy = MARGIN if name == "probabilities" else FAR
    lists = np.arange(5000, 5001)
    upload, _ = upload_of(request(strategy, **{name: tensor(array)}, excluded=tensor(lists)), name, "excluded")
    upload.write(part(f"pool.{name}", 0, array.tobytes()))
    with pytest.raises(InvalidInput, match="must be finite; row 9000 has nan"):
        upload.write(part("pool.excluded", 0, lists.tobytes()))


def test_a_bad_row_is_named_when_the_rows_before_it_are_here():
    """Not at the end: a long upload must not be for nothing."""
    array = X.copy()
    array[100] = np.inf
    upload, _ = upload_of(request(FAR, embeddings=tensor(array)), "embeddings")
    data = array.tobytes()
    upload.write(part("pool.embeddings", 12, data[12 : 4096 * 12]))
    with pytest.raises(InvalidInput, match="row 100 has inf") as caught:
        upload.write(part("pool.embeddings", 0, data[:12]))
    assert caught.value.field == "pool.embeddings"


# Messages read by hand


def varint(value: int, padding: int = 0) -> bytes:
    """A number as protobuf writes it, and `padding` bytes longer than it need be."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(padding):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def prefixed(tag: int, data: bytes, padding: int = 0) -> bytes:
    return bytes([tag]) + varint(len(data), padding) + data


PADDING = st.sampled_from([0, 0, 0, 1, 4, 5, 8])
BYTES = st.binary(max_size=12)
OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([2**63 - 1, 2**63, 2**64 - 1]))
PATHS = st.one_of(st.sampled_from([b"", b"pool.embeddings", "pool.ü漢".encode()]), BYTES)
UNKNOWN = st.one_of(
    st.builds(lambda number, value: bytes([number << 3]) + varint(value), st.integers(5, 15), OFFSETS),
    st.builds(lambda number, data: prefixed(number << 3 | 2, data), st.integers(5, 15), BYTES),
    st.builds(lambda number, value: bytes([number << 3 | 5]) + bytes([value] * 4), st.integers(5, 15), st.just(7)),
    st.builds(lambda number, value: bytes([number << 3 | 1]) + bytes([value] * 8), st.integers(1, 15), st.just(7)),
    st.just(b"\x2b\x08\x01\x2c"),  # a group
)
FIELDS = st.one_of(
    st.builds(prefixed, st.just(0x0A), PATHS, PADDING),
    st.builds(lambda value, more: b"\x10" + varint(value, more), OFFSETS, PADDING),
    st.builds(prefixed, st.just(0x1A), BYTES, PADDING),
    st.builds(lambda data: b"\x25" + data, st.binary(min_size=4, max_size=4)),
)
CHUNKS = st.lists(st.one_of(FIELDS, FIELDS, FIELDS, UNKNOWN), max_size=6).map(b"".join)
OURS = st.permutations(["path", "offset", "data", "crc32"])
MESSAGES = st.lists(
    st.one_of(
        st.builds(prefixed, st.just(0x12), CHUNKS, PADDING),
        st.builds(prefixed, st.just(0x12), CHUNKS),
        st.just(prefixed(0x0A, selection_pb2.SelectRequest(seed=3, request_id="start").SerializeToString())),
        UNKNOWN,
    ),
    min_size=1,
    max_size=2,
).map(b"".join)


def by_protobuf(data: bytes):
    """What protobuf says, as one thing to compare: a chunk's fields, a start, a message of neither, or no message."""
    try:
        message = selection_pb2.SelectStreamRequest.FromString(data)
    except DecodeError:
        return DecodeError
    if message.WhichOneof("message") == "chunk":
        chunk = message.chunk
        return chunk.path, chunk.offset, chunk.data, chunk.crc32 if chunk.HasField("crc32") else None
    return message.start if message.HasField("start") else message


def by_hand(data: bytes):
    try:
        message = wire.read_stream_request(data)
    except InvalidInput:  # our name for it
        return DecodeError
    if isinstance(message, Part):
        return message.path, message.offset, bytes(message.data), message.crc32
    return message


@settings(deadline=None, max_examples=600)
@given(data=MESSAGES)
def test_a_chunk_read_by_hand_is_what_protobuf_reads(data):
    """Fields in any order, more than once, unknown, of another type, with lengths written longer than they need be."""
    assert by_hand(data) == by_protobuf(data)


@settings(deadline=None, max_examples=600)
@given(data=MESSAGES, draw=st.data())
@example(data=prefixed(0x12, b"\x10\x05\x1a\x01a\x25\1\2\3\4"), draw=None)
def test_a_broken_chunk_is_what_protobuf_says_it_is(data, draw):
    """Cut off anywhere, or with any byte changed: never another answer, never another error."""
    if draw is None:
        broken = [data[:stop] for stop in range(len(data) + 1)]
    else:
        at = draw.draw(st.integers(0, len(data) - 1))
        broken = [data[:at], data[:at] + bytes([draw.draw(st.integers(0, 255))]) + data[at + 1 :]]
    for each in broken:
        assert by_hand(each) == by_protobuf(each), each.hex()


@pytest.mark.parametrize("tag", [b"", b"\x0a", b"\x10", b"\x1a"], ids=["message", "path", "offset", "data"])
@pytest.mark.parametrize("length", range(1, 13))
@pytest.mark.parametrize("ends", [True, False])
def test_numbers_longer_than_protobuf_allows_are_no_numbers(tag, length, ends):
    """Protobuf reads 5 bytes of a length and 10 of a number, and refuses the message that has more."""
    number = b"\x80" * (length - 1) + (b"\x00" if ends else b"\x80")
    rest = b"\x25\0\0\0\0" if tag else b""
    data = b"\x12" + number if not tag else prefixed(0x12, tag + number + rest)
    assert by_hand(data) == by_protobuf(data)


@given(
    order=OURS, path=st.text(max_size=8), offset=st.integers(0, 2**63 - 1), data=BYTES, crc32=st.integers(0, 2**32 - 1)
)
def test_a_plain_chunk_is_read_without_protobuf_and_its_bytes_are_not_copied(order, path, offset, data, crc32):
    fields = {
        "path": prefixed(0x0A, path.encode()),
        "offset": b"\x10" + varint(offset),
        "data": prefixed(0x1A, data),
        "crc32": b"\x25" + crc32.to_bytes(4, "little"),
    }
    message = prefixed(0x12, b"".join(fields[name] for name in order))
    found = wire._read_chunk(message)
    assert found == Part(path, offset, memoryview(data), crc32)
    assert found.data.obj is message


def test_what_is_no_chunk_is_a_start_or_nothing_known():
    start = selection_pb2.SelectRequest(request_id="a")
    made = selection_pb2.SelectStreamRequest(start=start).SerializeToString()
    assert wire.read_stream_request(made) == start
    assert wire.read_stream_request(made + prefixed(0x12, b"\x10\x07")).offset == 7, "the last of a oneof counts"
    assert wire.read_stream_request(b"") == selection_pb2.SelectStreamRequest()
    assert wire.read_stream_request(prefixed(0x7A, b"newer")).WhichOneof("message") is None
