"""proto/testdata: the requests are what scripts/testdata.py makes, and a server answers their bytes as is stored."""

from __future__ import annotations

import json

import numpy as np
import pytest
from google.protobuf.json_format import Parse
from google.rpc import code_pb2, error_details_pb2, status_pb2

from queryselect.v1 import selection_pb2
from scripts import testdata

MANIFEST = json.loads((testdata.FOLDER / "manifest.json").read_text())
CASES = {each["name"]: each for each in MANIFEST["cases"]}
KINDS = {
    (testdata.UNARY, "request"): selection_pb2.SelectRequest,
    (testdata.UNARY, "response"): selection_pb2.SelectResponse,
    (testdata.STREAM, "request"): selection_pb2.SelectStreamRequest,
    (testdata.STREAM, "response"): selection_pb2.SelectStreamResponse,
}


def stored(name: str, part: str) -> list[bytes]:
    return [(testdata.FOLDER / file).read_bytes() for file in CASES[name][part]]


def message(file: str):
    name, part = file.split(".")[:2]
    kind = status_pb2.Status if part == "status" else KINDS[CASES[name]["rpc"], part]
    return kind.FromString((testdata.FOLDER / file).read_bytes())


def without_scores(response):
    """The response without words, and its scores apart from it: they may differ in the last digits between machines."""
    kept = type(response).FromString(response.SerializeToString())
    result = kept.result if kept.DESCRIPTOR.name == "SelectStreamResponse" else kept
    scores = []
    for tensor in (result.scores, result.pool_scores):
        scores.append(np.frombuffer(tensor.data, "<f8"))
        tensor.ClearField("data")
    for warning in result.warnings:
        warning.ClearField("message")
    return kept, scores


def without_words(status):
    """What is promised of a status."""
    if status is None:
        return None
    told = [status.code]
    for packed in status.details:
        if packed.Unpack(info := error_details_pb2.ErrorInfo()):
            told.append((info.domain, info.reason))
        elif packed.Unpack(bad := error_details_pb2.BadRequest()):
            told.append([each.field for each in bad.field_violations])
    return told


def test_the_manifest_lists_every_file_and_every_case():
    assert list(CASES) == list(testdata.cases())
    listed = {file for case in CASES.values() for part in ("requests", "responses", "status") for file in case[part]}
    assert listed == {path.name for path in testdata.FOLDER.glob("*.binpb")}
    assert {path.name for path in testdata.FOLDER.glob("*.json")} == {
        *(file.replace(".binpb", ".json") for file in listed),
        "manifest.json",
    }
    assert MANIFEST["left_out"] == {name: list(fields) for name, fields in testdata.LEFT_OUT.items()}


def test_it_is_small():
    assert sum(path.stat().st_size for path in testdata.FOLDER.iterdir()) < 100_000


@pytest.mark.parametrize("name", CASES)
def test_requests_are_what_is_made_today(name):
    """make testdata writes them anew."""
    case = testdata.cases()[name]
    assert (CASES[name]["about"], CASES[name]["rpc"]) == (case.about, case.rpc)
    assert stored(name, "requests") == [each.SerializeToString(deterministic=True) for each in case.messages]


@pytest.mark.parametrize("name", CASES)
def test_a_server_answers_the_bytes_as_is_stored(channel, name):
    """By a generic channel: no stub of ours has a part in it."""
    found = testdata.replay(channel, CASES[name]["rpc"], stored(name, "requests"))
    wanted = [message(file) for file in CASES[name]["responses"]]
    assert len(found.answers) == len(wanted)
    for one, other in zip(map(without_scores, found.answers), map(without_scores, wanted), strict=True):
        assert one[0] == other[0]
        for ours, theirs in zip(one[1], other[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=0)
    (status,) = [message(file) for file in CASES[name]["status"]] or [None]
    assert without_words(found.status) == without_words(status)
    assert CASES[name]["code"] == code_pb2.Code.Name(0 if found.status is None else found.status.code)


@pytest.mark.parametrize("path", sorted(testdata.FOLDER.glob("*.binpb")), ids=lambda path: path.stem)
def test_the_json_beside_it_says_the_same(path):
    stored = message(path.name)
    assert Parse(path.with_suffix(".json").read_text(), type(stored)()) == stored


@pytest.mark.parametrize("path", sorted(testdata.FOLDER.glob("*.response*.binpb")), ids=lambda path: path.stem)
def test_answers_lack_what_another_server_answers_differently(path):
    assert testdata.comparable(message(path.name)) == message(path.name)


def test_other_picks_are_seen(channel):
    """What compares above can fail."""
    request = testdata.cases()["margin"].messages[0]
    request.stop.max_items = 1
    (answer,) = testdata.replay(channel, testdata.UNARY, [request.SerializeToString()]).answers
    assert without_scores(answer)[0] != without_scores(message("margin.response.binpb"))[0]


def test_other_errors_are_seen():
    names = ("missing_input", "not_a_number", "stream_damaged")
    assert len({repr(without_words(message(f"{name}.status.binpb"))) for name in names}) == len(names)
    assert without_words(message("missing_input.status.binpb")) != without_words(None)
