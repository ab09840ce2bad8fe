"""The log: an object of JSON a line that tells all there is to know of a request but its data."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
import warnings

import grpc
import numpy as np
import pytest

from queryselect import Client
from queryselect.v1 import selection_pb2_grpc, strategy_pb2
from queryselect_service import logs
from tests.service.streams import ask, whole
from tests.service.test_errors import FAR, X, request, sleepy, tensor

ACCESS = "queryselect_service.servicer"
#: What would do harm in a log: another line, a terminal's commands, what ends a value.
HOSTILE = ('a\n{"level": "CRITICAL"}', "a\r2026 CRITICAL", "\x1b[2J\x1b]0;x\x07", 'a" code="OK', "  ", "{}", "%s%n")


@pytest.fixture
def lines(serve):
    """A server; its channel; and the lines that a handler with a formatter has written since, as objects."""
    _, channel = serve()
    stream = io.StringIO()
    handler, logger = logging.StreamHandler(stream), logging.getLogger("queryselect_service")
    handler.setFormatter(logs.JsonFormatter())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def written(count: int) -> list[dict]:
        until = time.monotonic() + 5
        while len(found := stream.getvalue().splitlines()) < count:
            assert time.monotonic() < until
            time.sleep(0.01)
        assert stream.getvalue().isascii()
        return [json.loads(line) for line in found]

    yield channel, written
    logger.removeHandler(handler)
    logger.setLevel(level)


def select(channel, message, **options):
    return selection_pb2_grpc.SelectionServiceStub(channel).Select(message, **{"timeout": 20, **options})


def refused(channel, message, **options):
    with pytest.raises(grpc.RpcError) as caught:
        select(channel, message, **options)
    return caught.value


def test_a_line_tells_who_asked_what_and_where_the_time_went(lines):
    channel, written = lines
    message = request(FAR, request_id="job-7")
    select(channel, message)
    (line,) = written(1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert (line["level"], line["logger"], line["message"]) == ("INFO", ACCESS, "Select OK")
    assert (line["request_id"], line["rpc"], line["strategy"], line["code"]) == (
        "job-7", "Select", "k_center_greedy", "OK",
    )  # fmt: skip
    assert line["sizes"] == {"N": X.shape[0], "D": X.shape[1], "k": 2}
    assert line["upload_bytes"] == message.ByteSize()
    assert line["reserved_bytes"] > 0
    seconds = line["seconds"]
    assert set(seconds) == {"receive", "queue", "decode", "transfer", "kernel", "encode", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"] + 1e-5
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert not {"reason", "phase", "trace_id", "error"} & set(line)


def test_a_stream_has_one_line_too(lines):
    channel, written = lines
    ask(channel, whole(request()))
    (line,) = written(1)
    assert (line["message"], line["strategy"]) == ("SelectStream OK", "margin")
    assert line["seconds"]["receive"] > 0


def test_what_is_refused_has_its_reason_and_nothing_of_what_was_sent(lines):
    channel, written = lines
    secret = np.full((4, 3), 0.25)
    secret[3] = (-7.125, 4.0625, 4.0625)
    error = refused(channel, request(probabilities=tensor(secret)))
    assert "-7.125" in error.details(), "the caller is told"
    refused(channel, request(labeled=tensor(np.array([77]))))
    refused(channel, request(strategy_pb2.Strategy(custom={"name": "private-name"})))
    refused(channel, sleepy(private_parameter=1))
    found = written(4)
    assert [line["reason"] for line in found] == ["INVALID_INPUT", "INVALID_INPUT", "UNSUPPORTED", "INVALID_INPUT"]
    text = json.dumps(found)
    assert not re.search(r"7\.125|\b77\b|private", text)


def test_who_leaves_is_logged_with_the_phase(lines):
    channel, written = lines
    refused(channel, sleepy(seconds=20), timeout=0.3)
    (line,) = written(1)
    assert (line["code"], line["phase"]) == ("DEADLINE_EXCEEDED", "kernel")


def test_tokens_and_other_metadata_are_not_logged(lines):
    channel, written = lines
    select(channel, request(), metadata=(("authorization", "Bearer very-secret"), ("x-other", "private")))
    assert not re.search("secret|private|Bearer", json.dumps(written(1)))


def test_a_bug_is_an_object_with_its_stack(lines):
    channel, written = lines
    error = refused(channel, sleepy(fail="bug"), metadata=(("x-request-id", "job-8"),))
    bug, access = written(2)
    assert (bug["level"], bug["request_id"]) == ("ERROR", "job-8")
    assert bug["error_id"] in error.details()
    assert bug["error"]["type"] == "RuntimeError"
    assert "in sleepy" in bug["error"]["stack"]
    assert (access["code"], access["request_id"]) == ("INTERNAL", "job-8")


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()])
def test_a_line_stays_a_line_whatever_is_in_it(hostile, formatter):
    record = logging.makeLogRecord({
        "msg": "x %s", "args": (hostile,), "name": "n", "levelname": "INFO", **logs.fields(one=hostile, two={"k": 3}),
    })  # fmt: skip
    line = formatter.format(record)
    assert line.isprintable()
    if isinstance(formatter, logs.JsonFormatter):
        said = json.loads(line)
        assert (said["message"], said["one"], said["two"]) == (f"x {hostile}", hostile, {"k": 3})
    else:
        assert " two.k=3" in line
        assert line.count(" code=") == 0 or '\\" code=' in line


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_error_can_forge_no_line_either(hostile):
    trouble = (ValueError, ValueError(hostile), None)
    record = logging.makeLogRecord({"msg": "bug", "levelname": "ERROR", "name": "n", "exc_info": trouble})
    first, *rest = logs.TextFormatter().format(record).split("\n")
    assert first.rstrip().endswith("bug")
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)
    assert logs.JsonFormatter().format(record).isprintable()


@pytest.mark.parametrize("hostile", ["a" * 129, "a\tb", "é", "a\nb", "\x1b[2J"])
def test_an_id_that_is_none_is_refused_and_not_logged(lines, hostile):
    channel, written = lines
    refused(channel, request(request_id=hostile))
    (line,) = written(1)
    assert re.fullmatch("[0-9a-f]{32}", line["request_id"])
    assert hostile not in line.values()


def test_text_is_for_people():
    record = logging.makeLogRecord({
        "msg": "Select OK", "levelname": "INFO", "name": "n", "created": 0.0,
        **logs.fields(request_id="job 7", seconds={"total": 0.25}, sizes=None),
    })  # fmt: skip
    text = logs.TextFormatter().format(record)
    assert text == '1970-01-01T00:00:00.000Z INFO n Select OK request_id="job 7" seconds.total=0.25'


SERVER = """
import sys, warnings
from queryselect_service import logs
logs.begin("DEBUG", sys.argv[1])
import logging
logging.getLogger("botocore.auth").debug("CanonicalRequest: x-amz-security-token:SECRET")
logging.getLogger("urllib3").info("GET /pools/secret.npy")
logging.getLogger("queryselect_service.x").debug("said")
warnings.warn("of something")
"""


@pytest.mark.parametrize(("form", "is_json"), [("auto", True), ("json", True), ("text", False)])
def test_where_there_is_no_terminal_the_log_is_json_and_so_are_warnings(form, is_json):
    """Of libraries warnings alone, for what else they write may be secret."""
    done = subprocess.run([sys.executable, "-c", SERVER, form], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    if is_json:
        said, warned = map(json.loads, lines)
        assert (said["message"], warned["logger"], warned["level"]) == ("said", "py.warnings", "WARNING")
        assert "of something" in warned["message"]
    else:
        assert "DEBUG queryselect_service.x said" in lines[0]
        assert "of something" in lines[1]


@pytest.mark.parametrize(("level", "form", "words"), [("LOUD", "json", "log_level"), ("INFO", "xml", "log_format")])
def test_a_level_or_a_form_that_there_is_not_is_named(level, form, words):
    with pytest.raises(ValueError, match=f"{words} must be one of"):
        logs.begin(level, form)


def test_a_client_in_this_process_sets_nothing_up():
    before = (list(logging.getLogger().handlers), warnings.showwarning)
    with Client("local:") as local:
        local.select("random", 1, num_rows=3)
    assert (list(logging.getLogger().handlers), warnings.showwarning) == before
