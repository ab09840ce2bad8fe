"""Writes proto/testdata: requests, and what a server answers, as bytes that a client in any language can replay."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from grpc_status import rpc_status

from queryselect.v1 import selection_pb2, tensor_pb2
from queryselect_service import server
from queryselect_service.settings import Settings

FOLDER = Path(__file__).parent.parent / "proto" / "testdata"
UNARY, STREAM = "/queryselect.v1.SelectionService/Select", "/queryselect.v1.SelectionService/SelectStream"
#: What another server, version or machine answers differently, and a stored answer therefore lacks, by message.
LEFT_OUT = {"SelectResponse": ("info",), "Admitted": ("reserved_bytes",)}

Request, Start = selection_pb2.SelectRequest, selection_pb2.SelectStreamRequest
#: Sums of a few powers of two, which every type holds exactly: three classes, rows that sum to 1.
PROBABILITIES = np.array(
    [[0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.375, 0.375, 0.25], [0.5, 0.5, 0], [0.625, 0.25, 0.125], [1, 0, 0]]
)
EMBEDDINGS = np.array([[0, 0], [3, 4], [6, 8], [0, 1], [-3, 4], [5, -12]])


@dataclass(frozen=True)
class Case:
    """A call. about: what it shows. messages: what is sent."""

    about: str
    messages: tuple[Message, ...]

    @property
    def rpc(self) -> str:
        return UNARY if isinstance(self.messages[0], Request) else STREAM


@dataclass(frozen=True)
class Outcome:
    """How a call went: its answers without what is left out, or the status that it failed with."""

    answers: tuple[Message, ...]
    status: status_pb2.Status | None


def tensor(values: Any, kind: str) -> dict[str, Any]:
    """A tensor of a type by its name on the wire."""
    array = np.asarray(values)
    if kind == "BF16":  # the upper half of a float
        data = (array.astype("<f4").view("<u4") >> 16).astype("<u2")
    else:
        types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}
        data = array.astype(types[kind])
    return {"dtype": tensor_pb2.DataType.Value(f"DATA_TYPE_{kind}"), "shape": array.shape, "data": data.tobytes()}


def streamed(values: Any, kind: str) -> dict[str, Any]:
    """The same whose bytes come in chunks."""
    return {**tensor(values, kind), "data": None, "streamed": {}}


def chunk(path: str, offset: int, data: bytes, *, damage: int = 0) -> Start:
    """A part of a tensor with its checksum, which `damage` other than 0 makes a wrong one."""
    return Start(chunk={"path": path, "offset": offset, "data": data, "crc32": zlib.crc32(data) ^ damage})


def margin(probabilities: dict[str, Any], budget: int = 2) -> Request:
    return Request(pool={"probabilities": probabilities}, strategy={"margin": {}}, stop={"max_items": budget})


def cases() -> dict[str, Case]:
    """Every case, by the name of its files."""
    far = Request(
        pool={
            "embeddings": tensor(EMBEDDINGS, "F32"),
            "labeled": tensor([0], "I64"),
            "ids": {"strings": {"values": [f"image-{row}.png" for row in range(6)]}},
        },
        strategy={"k_center_greedy": {}},
        stop={"max_items": 3},
    )
    bait = Request(
        pool={
            "embeddings": tensor(EMBEDDINGS / 8, "F64"),
            "probabilities": tensor(PROBABILITIES, "F32"),
            "labeled": tensor([False, True, False, False, False, False], "BOOL"),
        },
        strategy={"bait": {"ridge": 0.5, "top_classes": 2, "oversampling": 1}},
        stop={"max_items": 2},
    )
    halves = Request(
        pool={
            "logits": tensor(EMBEDDINGS, "BF16"),
            "excluded": tensor([3], "I32"),
            "candidates": tensor([1, 4, 5], "I64"),
        },
        strategy={"entropy": {}},
        stop={"max_items": 2},
        returns=[selection_pb2.RETURN_POOL_SCORES],
    )
    limits = Request(
        pool={
            "probabilities": tensor(PROBABILITIES, "F16"),
            "quotas": [{"name": "video", "values": tensor([0, 0, 1, 1, 1, 2], "I32"), "default_max": 1}],
            "costs": tensor([1, 1, 4, 2, 1, 1], "I32"),
            "ids": {"integers": tensor(range(100, 106), "I64")},
        },
        strategy={"least_confidence": {}},
        stop={"max_items": 3, "max_cost": 3},
    )
    unasked = Request(
        pool={"probabilities": tensor(PROBABILITIES, "F32")}, strategy={"k_center_greedy": {}}, stop={"max_items": 3}
    )
    holes = np.where(EMBEDDINGS[:, :1] == -3, np.nan, PROBABILITIES)
    starts = [Start(start=margin(streamed(PROBABILITIES, "F64"))) for _ in range(2)]
    path, data = "pool.probabilities", PROBABILITIES.astype("<f8").tobytes()
    found = {
        "two_rows": Case(
            "The worked example of docs/clients.md", (margin(tensor(PROBABILITIES[:2], "F32"), budget=1),)
        ),
        "margin": Case(
            "Rows scored one by one; of equal scores the lowest row first", (margin(tensor(PROBABILITIES, "F64")),)
        ),
        "k_center_greedy": Case("Distances to what is labelled or chosen; ids are texts", (far,)),
        "bait": Case("A strategy with parameters; labelled rows by a mask", (bait,)),
        "entropy": Case("bfloat16, excluded rows, candidates, and the score of every row", (halves,)),
        "limits": Case(
            "A quota and a budget of costs end the selection early, with a warning; ids are numbers", (limits,)
        ),
        "missing_input": Case("A request without what its strategy reads", (unasked,)),
        "not_a_number": Case("A request with NaN in row 4", (margin(tensor(holes, "F64")),)),
        "stream": Case(
            "A start, then one tensor in three chunks, not in order, with checksums",
            (starts[0], chunk(path, 96, data[96:]), chunk(path, 0, data[:40]), chunk(path, 40, data[40:96])),
        ),
        "stream_damaged": Case(
            "A stream whose second chunk does not have the checksum that it says",
            (starts[1], chunk(path, 0, data[:96]), chunk(path, 96, data[96:], damage=1)),
        ),
    }
    for name, case in found.items():  # or the server would make ids up
        first = case.messages[0]
        (first if case.rpc == UNARY else first.start).request_id = name
    return found


def replay(channel: grpc.Channel, rpc: str, requests: list[bytes]) -> Outcome:
    """What a server makes of bytes. Progress, of which there may be any number, is left out."""
    answers, status = list[Message](), None
    try:
        if rpc == UNARY:
            (request,) = requests
            answers.append(selection_pb2.SelectResponse.FromString(channel.unary_unary(rpc)(request, timeout=60)))
        else:
            for data in channel.stream_stream(rpc)(iter(requests), timeout=60):
                answer = selection_pb2.SelectStreamResponse.FromString(data)
                if not answer.HasField("progress"):
                    answers.append(answer)
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
    return Outcome(tuple(map(comparable, answers)), status)


def comparable(answer: Message) -> Message:
    """The answer without what another server answers differently."""
    for name in LEFT_OUT.get(answer.DESCRIPTOR.name, ()):
        answer.ClearField(name)
    for field, value in answer.ListFields():
        if field.message_type and not field.is_repeated:
            comparable(value)
    return answer


def files(name: str, case: Case, outcome: Outcome) -> Iterator[tuple[str, str, Message]]:
    """The files of a case but for their suffixes: which part of the call, the name, the message."""
    for part, messages in (("requests", case.messages), ("responses", outcome.answers)):
        for number, message in enumerate(messages):
            place = f".{number}" if case.rpc == STREAM else ""
            yield part, f"{name}.{part[:-1]}{place}", message
    if outcome.status is not None:
        yield "status", f"{name}.status", outcome.status


def main() -> None:
    """Asks a server, and writes the files and their list."""
    for old in (*FOLDER.glob("*.binpb"), *FOLDER.glob("*.json")):
        old.unlink()
    started, listed = server.start(Settings(port=0, metrics_port=-1)), []
    with grpc.insecure_channel(f"127.0.0.1:{started.port}") as channel:
        for name, case in cases().items():
            outcome = replay(channel, case.rpc, [each.SerializeToString(deterministic=True) for each in case.messages])
            code = code_pb2.Code.Name(0 if outcome.status is None else outcome.status.code)
            parts: dict[str, list[str]] = {"requests": [], "responses": [], "status": []}
            for part, file, message in files(name, case, outcome):
                (FOLDER / f"{file}.binpb").write_bytes(message.SerializeToString(deterministic=True))
                (FOLDER / f"{file}.json").write_text(MessageToJson(message, preserving_proto_field_name=True) + "\n")
                parts[part].append(f"{file}.binpb")
            listed.append({"name": name, "about": case.about, "rpc": case.rpc, "code": code, **parts})
    started.drain(0.1)
    manifest = {"left_out": LEFT_OUT, "cases": listed}
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
