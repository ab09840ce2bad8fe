"""What clients in other languages are shown: docs/clients.md, and the proto files that they need."""

from __future__ import annotations

import json
import re
from pathlib import Path

import google.rpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from queryselect._errors import from_status
from queryselect.strategies.v1 import Margin
from queryselect.v1 import selection_pb2, strategy_pb2, tensor_pb2
from queryselect_service import errors, status, wire
from queryselect_service.settings import Settings
from scripts import testdata

ROOT = Path(__file__).parent.parent.parent
COPIES = ROOT / "examples" / "proto" / "google" / "rpc"
PAGE = (ROOT / "docs" / "clients.md").read_text()
HEX = re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL)
MESSAGES = (
    *(getattr(selection_pb2, name) for name in ("SelectRequest", "SelectResponse", "Pool", "Stop")),
    *(tensor_pb2.Tensor, strategy_pb2.Strategy, Margin),
)
#: What the page's hex may name.
FIELDS = {(field.number, field.name) for each in MESSAGES for field in each.DESCRIPTOR.fields}


def data(block: str) -> bytes:
    """The bytes of a block; what follows # is for people."""
    return bytes.fromhex("".join(line.partition("#")[0] for line in block.splitlines()))


def rows(title: str) -> list[list[str]]:
    """The cells of the table whose first column has that title."""
    (table,) = re.findall(rf"^\| {re.escape(title)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("path", sorted(COPIES.iterdir()), ids=lambda path: path.name)
def test_copies_of_googles_proto_files_are_those_of_the_package(path):
    """googleapis-common-protos: where a newer one differs, copy its file."""
    (theirs,) = (Path(each) / path.name for each in google.rpc.__path__ if (Path(each) / path.name).exists())
    assert path.read_text() == theirs.read_text()


def test_the_worked_example_is_what_is_sent_and_what_comes_back(channel):
    elements, request, response = map(data, HEX)
    np.testing.assert_array_equal(np.frombuffer(elements, "<f4").reshape(2, 3), testdata.PROBABILITIES[:2])
    assert selection_pb2.SelectRequest.FromString(request).pool.probabilities.data == elements
    assert request == (testdata.FOLDER / "two_rows.request.binpb").read_bytes()
    (answer,) = testdata.replay(channel, testdata.UNARY, [request]).answers
    assert answer.SerializeToString(deterministic=True) == response


@pytest.mark.parametrize("block", HEX[1:], ids=["request", "response"])
def test_its_fields_and_lengths_are_named_as_they_are(block):
    """Of every line that begins a field: `key [length] … # number name … length bytes`."""
    fields = re.findall(r"^([0-9a-f]{2}) ([0-9a-f]{2}).*# +(\d+) (\w+)(?:, (\d+) byte)?", block, re.MULTILINE)
    assert len(fields) >= 8
    for key, length, number, name, nbytes in fields:
        assert (int(key, 16) >> 3, name) in FIELDS
        assert int(key, 16) >> 3 == int(number)
        has_length = int(key, 16) & 7 == 2
        assert has_length == bool(nbytes)
        assert not has_length or int(nbytes) == int(length, 16)


def test_the_table_of_types_is_the_servers():
    told = {name.strip("`"): (int(number), int(size)) for name, number, size, _ in rows("`DataType`")}
    types = {tensor_pb2.DataType.Name(number): (number, each.itemsize) for number, each in wire.DTYPES.items()}
    assert told == {name.removeprefix("DATA_TYPE_"): each for name, each in types.items()}


def test_the_table_of_errors_has_every_code_and_reason():
    told = {(code, reason) for code, reasons, *_ in rows("Code") for reason in named(reasons)}
    kinds, known = [errors.ServiceError], {("INTERNAL", status.BUG)}
    while kinds:
        kinds += (found := kinds.pop().__subclasses__())
        known |= {(each.code, each.reason) for each in found if each.__module__ == errors.__name__}
    assert told == known


@pytest.mark.parametrize(("code", "again", "reasons"), [(row[0], row[3], row[1]) for row in rows("Code")])
def test_what_is_to_be_tried_again_is_what_the_python_client_tries_again(code, again, reasons):
    failure = status_pb2.Status(code=code_pb2.Code.Value(code))
    if code == "RESOURCE_EXHAUSTED" and named(reasons):
        failure.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1)))
    assert from_status(failure).retryable == (again != "no")


def test_numbers_of_settings_are_their_defaults():
    told = re.findall(r"(\d+) (MiB|s) by default \(`(\w+)`", PAGE)
    assert {name for *_, name in told} == {"max_inline_bytes", "idle_stream"}
    for number, unit, name in told:
        assert getattr(Settings(), name) == int(number) * {"MiB": 1 << 20, "s": 1}[unit]


def test_the_service_config_is_that_of_the_programs():
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    config = json.loads(text)
    for program in ("go/main.go", "cpp/main.cc"):
        (theirs,) = re.findall(
            r"[`(]({\n  \"loadBalancingConfig.*?\n})", (ROOT / "examples" / program).read_text(), re.DOTALL
        )
        assert json.loads(theirs) == config
    assert (
        config["healthCheckConfig"]["serviceName"]
        == selection_pb2.DESCRIPTOR.services_by_name["SelectionService"].full_name
    )
