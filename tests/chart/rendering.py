"""The chart as Helm installs it: values merged and checked against the schema, templates executed by its engine."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

from tests.slow import tools

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "helm" / "queryselect"
VALUES = Path(__file__).parent / "values"
GPU = CHART / "values-gpu.yaml"
#: Values files that tests render the chart by.
CASES = {
    "defaults": (),
    "gpu": (GPU,),
    "gpus": (GPU, VALUES / "gpus.yaml"),
    **{name: (VALUES / f"{name}.yaml",) for name in ("secure", "proxy", "hpa", "keda", "everything", "minimal")},
}

Document = dict[str, Any]


class Refused(Exception):
    """What Helm would say in the place of installing."""


class Rendered:
    """What a release consists of. values: merged."""

    def __init__(self, values: Document, files: dict[str, str]) -> None:
        self.values, self.notes = values, files.pop("templates/NOTES.txt")
        self.documents: list[Document] = [
            document for text in files.values() for document in yaml.safe_load_all(text) if document is not None
        ]

    def all(self, kind: str) -> list[Document]:
        return [each for each in self.documents if each["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> Document:
        """The document of a kind whose name is the release's with a suffix."""
        name = self.deployment["metadata"]["name"] + suffix
        (found,) = (each for each in self.all(kind) if each["metadata"]["name"] == name)
        return found

    @property
    def deployment(self) -> Document:
        (found,) = self.all("Deployment")
        return found

    @property
    def pod(self) -> Document:
        """The spec of the server's pods."""
        return self.deployment["spec"]["template"]["spec"]

    @property
    def container(self) -> Document:
        (found,) = self.pod["containers"]
        return found


def render(*files: Path, name: str = "queryselect", namespace: str = "default", numbers: bool = False) -> Rendered:
    """The chart by these values files. numbers: as versions of Helm do that keep numbers as they are written.

    Raises Refused.
    """
    command = [_program(), CHART, "-name", name, "-namespace", namespace, *(["-numbers"] if numbers else [])]
    for file in files:
        command += ["-f", file]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    wrong = [f"{each.json_path}: {each.message}" for each in schema().iter_errors(told["values"])]
    if wrong:
        raise Refused("\n".join(wrong))
    if "error" in told:
        raise Refused(told["error"])
    return Rendered(told["values"], told["files"])


def render_with(values: Document, **options: Any) -> Rendered:
    """The chart by these values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        return render(Path(file.name), **options)


@cache
def schema() -> Draft7Validator:
    return Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))


@cache
def _program() -> Path:
    """tests/chart/render, built from Debian's packages."""
    tools.install("golang-go", "golang-github-masterminds-sprig-dev", "golang-k8s-sigs-yaml-dev")
    folder = Path(tempfile.mkdtemp(prefix="render"))
    atexit.register(shutil.rmtree, folder)
    told = {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOCACHE": str(folder / "cache"), "GOFLAGS": ""}
    subprocess.run(
        ["go", "build", "-o", folder / "render", "."],
        cwd=Path(__file__).parent / "render",
        env={**os.environ, **told},
        check=True,
    )
    return folder / "render"
