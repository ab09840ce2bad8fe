"""The Dockerfile, what it reads, and what builds it: as hadolint has it, and in step with what else tells the same."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from queryselect import __version__
from queryselect.cli import COMMANDS
from queryselect_service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "Dockerfile"
#: Instructions, each with its stage: "" before the first.
INSTRUCTIONS: list[tuple[str, str, str]] = []
for line in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)).splitlines():
    if line:
        word, _, rest = line.partition(" ")
        stage = rest.partition(" AS ")[2] if word == "FROM" else INSTRUCTIONS[-1][0] if INSTRUCTIONS else ""
        INSTRUCTIONS.append((stage, word, rest))


def said(instruction: str, *stages: str) -> list[str]:
    return [rest for stage, word, rest in INSTRUCTIONS if word == instruction and stage in (stages or (stage,))]


def variables(*stages: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(said("ENV", *stages))))


def test_hadolint_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "hadolint ignore" not in DOCKERFILE.read_text()


def test_what_is_not_a_stage_is_pinned_by_its_digest():
    (base,) = said("ARG", "")
    assert re.fullmatch(r"BASE_IMAGE=docker\.io/library/python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)
    stages = {each.partition(" AS ")[2] for each in said("FROM")}
    assert {each.partition(" AS ")[0] for each in said("FROM")} - stages == {"${BASE_IMAGE}"}
    assert {re.match(r"--from=(\S+)", each)[1] for each in said("COPY") if each.startswith("--from")} <= stages
    assert {"cpu", "cuda"} <= stages
    assert said("FROM")[-1] == "runtime AS cpu"  # what is built where no target is named


def test_nothing_is_installed_but_by_its_hash():
    for each in said("RUN"):
        for command in re.findall(r"pip (?:--python \S+ )?install (.*?)(?:&&|$)", each):
            assert command.startswith(("--require-hashes ", "--no-deps --root /package .")), command
        assert not re.search(r"\b(apt|apt-get|apk|curl|wget|conda)\b", each)
    assert variables("tools")["PIP_NO_CACHE_DIR"] == "1"


def test_what_it_installs_is_what_the_makefile_installs():
    (extras,) = re.findall(r"pins\.wanted\((.*?)\)", " ".join(said("RUN")))
    (made,) = re.findall(r"-q 'queryselect\[(.*?)\]'", (ROOT / "Makefile").read_text())
    assert sorted(re.findall(r'"(\w+)"', extras)) == sorted(made.split(","))


def test_it_runs_as_nobody_and_says_what_it_is():
    final = ("runtime", "cpu", "cuda")
    assert said("USER", *final) == ["65532:65532"]
    (labels,) = said("LABEL", *final)
    told = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', labels))
    assert told["licenses"] in (ROOT / "pyproject.toml").read_text()
    assert told["description"] in (ROOT / "pyproject.toml").read_text()
    assert told == told | {"title": "QuerySelect", "version": "${VERSION}", "revision": "${REVISION}"}
    assert {each.partition("=")[0] for each in said("ARG", *final)} == {"VERSION", "REVISION"}


def test_its_commands_variables_and_ports_are_ours():
    told = {
        key.removeprefix("QUERYSELECT_").lower(): value for key, value in variables("runtime").items() if "QUERY" in key
    }
    assert set(told) <= {each.name for each in fields(Settings)}
    ports = {str(Settings.port), told["health_port"], str(Settings.metrics_port)}
    assert set(said("EXPOSE")[0].split()) == ports
    (entry,), (command,), (health,) = said("ENTRYPOINT"), said("CMD"), said("HEALTHCHECK")
    assert json.loads(entry) == ["queryselect"]
    assert json.loads(command)[0] in COMMANDS
    name, subcommand, target = json.loads(health.partition("CMD ")[2])
    assert (name, target) == ("queryselect", f"localhost:{told['health_port']}")
    assert subcommand in COMMANDS


def test_the_driver_is_found_where_nodes_put_it():
    """NVIDIA's container toolkit writes it into the linker's cache; GKE only mounts it, as NVIDIA's images expect."""
    assert variables("cuda")["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib:/usr/local/nvidia/lib64"
    assert "LD_LIBRARY_PATH" not in variables("runtime") | variables("cpu")


def test_a_build_reads_what_it_copies_and_nothing_else():
    copied = [each.split()[:-1] for each in said("COPY") if not each.startswith("--from")]
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    allowed = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert [line for line in ignored if not line.startswith("!")] == ["*", "**/__pycache__"]
    assert ignored[-1] == "**/__pycache__"  # the last that matches counts
    assert all((ROOT / path).exists() for path in allowed)
    within = {
        next((each for each in allowed if Path(path).is_relative_to(each)), path) for line in copied for path in line
    }
    assert sorted(within) == sorted(allowed)


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """A PATH of little more than an engine that writes down what it is told."""
    for name in ("bash", "dirname", "git", "mkdir", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def build(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / "image", *arguments], capture_output=True, text=True, check=False)


def test_without_an_engine_it_is_said_in_a_sentence(tools):
    done = build("cpu")
    assert done.returncode == 1
    assert done.stderr == "make image needs docker, with its daemon running, or buildah\n"


@pytest.mark.parametrize(("target", "image"), [("cpu", __version__), ("cuda", f"{__version__}-cuda")])
def test_docker_is_asked_first_where_its_daemon_answers(tools, target, image):
    for name in ("docker", "buildah"):
        (tools / name).write_text(f'#!{tools}/bash\necho "{name} $*" >> {tools}/told\n[ $1 != create ] || echo made\n')
        (tools / name).chmod(0o755)
    done = build(target, "--secret", "id=pip")
    assert done.returncode == 0, done.stderr
    info, made, *rest = (tools / "told").read_text().splitlines()
    assert info == "docker info"
    assert made.startswith(
        f"docker build --target {target} --tag queryselect:{image} --build-arg VERSION={__version__} "
    )
    assert re.search(r" --build-arg REVISION=[0-9a-f]{40}\S* --secret id=pip \.$", made)
    assert rest == [
        f"docker create queryselect:{image}",
        f"docker cp made:/usr/share/doc/queryselect/sbom.cdx.json dist/sbom-{target}.cdx.json",
        "docker rm made",
    ]
