"""buf: the commands of docs/clients.md reach a server by reflection, and what would break clients is refused."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator

import pytest
from google.protobuf.json_format import Parse
from google.rpc import error_details_pb2

from queryselect.v1 import selection_pb2, server_pb2, strategy_pb2
from queryselect_service import strategy as strategies
from scripts import testdata
from tests.slow.servers import Served, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = testdata.FOLDER.parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
(BUF,) = re.findall(r"^BUF := (.*)$", MAKEFILE, re.MULTILINE)
COMMANDS = re.findall(r"```sh\n((?:[^`]*\| )?buf curl [^`]*)```", (ROOT / "docs" / "clients.md").read_text())


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    """A PATH with a `buf`, which is as the Makefile has it."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "buf").write_text(f'#!/bin/sh\nexec {BUF} "$@"\n')
    (folder / "buf").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def says(server, path):
    """What the one command of the page that has those words says of this server; code: what it ends with."""

    def says(words: str, code: int = 0) -> str:
        (command,) = (each for each in COMMANDS if words in each)
        command = command.replace("localhost:50051", server.target)
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return says


def stored(name: str, kind: type):
    return kind.FromString((testdata.FOLDER / f"{name}.binpb").read_bytes())


def test_every_command_of_the_page_is_tried_below():
    assert len(COMMANDS) == 6


def test_methods_are_listed(says):
    services = ("SelectionService", "StrategyService", "ServerService")
    described = (selection_pb2, strategy_pb2, server_pb2)
    ours = {
        f"queryselect.v1.{service}/{method.name}"
        for service, module in zip(services, described, strict=True)
        for method in module.DESCRIPTOR.services_by_name[service].methods
    }
    assert set(says("--list-methods").split()) >= ours | {"grpc.health.v1.Health/Check"}


def test_the_server_and_its_strategies_are_described(says):
    strategies.load()
    assert Parse(says("GetServerInfo"), server_pb2.GetServerInfoResponse()).devices[0].name
    listed = Parse(says("ListStrategies"), strategy_pb2.ListStrategiesResponse()).strategies
    assert {each.name for each in listed} >= set(strategies.STRATEGIES)


def test_a_request_in_json_is_answered(says):
    answer = testdata.comparable(Parse(says("--data '{"), selection_pb2.SelectResponse()))
    wanted = stored("two_rows.response", selection_pb2.SelectResponse)
    assert answer.request_id  # made up by the server
    answer.request_id = wanted.request_id
    assert answer == wanted


def test_a_stream_in_json_is_answered(says):
    texts = re.split(r"(?<=^})\n", says("SelectStream").strip(), flags=re.MULTILINE)
    answers = [testdata.comparable(Parse(each, selection_pb2.SelectStreamResponse())) for each in texts]
    assert [each for each in answers if not each.HasField("progress")] == [
        stored(f"stream.response.{number}", selection_pb2.SelectStreamResponse) for number in range(2)
    ]


def test_an_error_tells_its_details(says):
    invalid_argument = 3
    told = says("missing_input", code=8 * invalid_argument)
    error = json.loads(told[told.index("{") :])
    assert error["code"] == "invalid_argument"
    (bad,) = (each["value"] for each in error["details"] if each["type"] == "google.rpc.BadRequest")
    (violation,) = error_details_pb2.BadRequest.FromString(b64decode(f"{bad}==")).field_violations
    assert violation.field == "pool.embeddings"


#: Changes of the proto that buf refuses: the file, what stands there, what is put in its place, the rule.
BREAKS = {
    "a field is gone": ("v1/selection", r"  optional bool validate_only = 8;\n", "", "was deleted"),
    "another number": ("v1/selection", "optional Task task = 5;", "optional Task task = 20;", "was deleted"),
    "another type": ("v1/selection", "optional uint64 seed = 6;", "optional string seed = 6;", "changed type"),
    "another name": ("v1/selection", "Stop stop = 4;", "Stop until = 4;", "changed name"),
    "no presence": ("v1/tensor", "optional DataType dtype = 1;", "DataType dtype = 1;", "changed"),
    "an enum value is gone": ("v1/tensor", r"  DATA_TYPE_BOOL = 8;\n", "", "was deleted"),
    "a method is gone": ("v1/server", r"  rpc GetServerInfo\(.*\n", "", "was deleted"),
    "a strategy is gone": ("v1/strategy", r"    queryselect.strategies.v1.Margin margin = 3;\n", "", "was deleted"),
    "a parameter is gone": (
        "strategies/v1/representation",
        r"(message KCenterGreedy {\n(?:  //.*\n)*)  optional bool normalize = 1;\n",
        r"\1",
        "was deleted",
    ),
}


@pytest.mark.parametrize("change", [None, *BREAKS])
def test_what_breaks_clients_is_refused(tmp_path, change):
    """By the very command of make check; what is not changed is not refused."""
    (command,) = re.findall(r"^\t\$\(BUF\) (breaking .*)$", MAKEFILE, re.MULTILINE)
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    if change:
        file, old, new, _ = BREAKS[change]
        path = tmp_path / "proto" / "queryselect" / f"{file}.proto"
        text, changes = re.subn(old, new, path.read_text())
        assert changes == 1
        path.write_text(text)
    done = subprocess.run(
        [*shlex.split(BUF), *shlex.split(command)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if change is None:
        assert done.returncode == 0, done.stdout + done.stderr
        return
    assert done.returncode == 100, done.stdout + done.stderr  # its own, for what it found
    assert BREAKS[change][3] in done.stdout
