"""What Kubernetes does with a pod, as far as one process on the loopback can: mounts, variables, commands, probes.

A container's /etc/queryselect is a folder of the test's: paths below it are written anew wherever they are told, and
ports are free ones. Everything else is as it is rendered.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.service.loopback import process
from tests.chart.rendering import Rendered

FOLDER = "/etc/queryselect"
#: What the entrypoint of the image runs.
ENTRYPOINT = ("-c", "import sys; from queryselect import cli; sys.exit(cli.main())")
#: Counts before variables and file. Ports of containers are their own; here they would be the machine's.
HERE = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--health-port", "0")

Secrets = Mapping[str, Mapping[str, bytes]]


@dataclass
class Serving:
    """A container that serves."""

    port: int
    metrics_port: int
    health_port: int


class Node:
    """Where pods of a release run. secrets: those of the namespace, by name and key."""

    def __init__(self, root: Path, rendered: Rendered, secrets: Secrets) -> None:
        self._root, self._secrets = root, secrets
        self._configs = {each["metadata"]["name"]: each["data"] for each in rendered.all("ConfigMap")}

    def path(self, mounted: str) -> Path:
        """What stands there in a container."""
        return Path(self._here(mounted))

    def _here(self, text: str) -> str:
        return text.replace(FOLDER, str(self._root))

    def mount(self, pod: Mapping[str, Any]) -> None:
        """Brings the files of a pod's volumes to where its container has them."""
        volumes = {each["name"]: each for each in pod["volumes"]}
        for mount in pod["containers"][0]["volumeMounts"]:
            volume = volumes[mount["name"]]
            if mount["mountPath"].startswith(FOLDER):
                assert "subPath" not in mount, "would never change"
                project(self.path(mount["mountPath"]), self._files(volume))

    def _files(self, volume: Mapping[str, Any]) -> dict[str, bytes]:
        if "configMap" in volume:
            data = self._configs[volume["configMap"]["name"]]
            return {key: self._here(text).encode() for key, text in data.items()}
        told = volume["secret"]
        data = self._secrets[told["secretName"]]
        keys = {each["key"]: each["path"] for each in told.get("items", [{"key": key, "path": key} for key in data])}
        return {path: data[key] for key, path in keys.items() if key in data or not told.get("optional")}

    def variables(self, container: Mapping[str, Any]) -> dict[str, str]:
        """The environment of a container."""
        found = {}
        for each in container.get("env", ()):
            if "value" in each:
                found[each["name"]] = self._here(each["value"])
            elif "secretKeyRef" in each["valueFrom"]:
                told = each["valueFrom"]["secretKeyRef"]
                found[each["name"]] = self._secrets[told["name"]][told["key"]].decode()
            else:
                assert each["valueFrom"] == {"resourceFieldRef": {"resource": "limits.cpu"}}
                found[each["name"]] = "1"
        return found

    @contextmanager
    def serve(self, pod: Mapping[str, Any]) -> Iterator[Serving]:
        """A pod of the Deployment, until the end of the block."""
        self.mount(pod)
        (container,) = pod["containers"]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.variables(container).items():
                patch.setenv(name, value)
            with process(*ENTRYPOINT, *container["args"], *HERE) as (_, ports):
                yield Serving(*ports)

    def run(self, pod: Mapping[str, Any], target: str) -> str:
        """Runs a pod that ends, with `target` for its TARGET. What it printed."""
        self.mount(pod)
        (container,) = pod["containers"]
        done = run(container["command"] + container["args"], **(self.variables(container) | {"TARGET": target}))
        assert done.returncode == 0, done.stderr
        return done.stdout


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the image."""
    program = {"python": (sys.executable,), "queryselect": (sys.executable, *ENTRYPOINT)}[command[0]]
    return subprocess.run(
        [*program, *command[1:]], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def project(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a volume's files, or changes them, as the kubelet does: all at once, by a link that leads elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    data = next(path for number in itertools.count() if not (path := folder / f"..{number}").exists())
    data.mkdir()
    for name, content in files.items():
        (data / name).write_bytes(content)
    (folder / "..data_tmp").symlink_to(data.name)
    (folder / "..data_tmp").replace(folder / "..data")
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)


def probe(told: Mapping[str, Any], serving: Serving) -> int:
    """The answer to a probe of a container, as the kubelet asks: in plain text, at a port by its number."""
    assert told["port"] == 50052, "the health port"
    with grpc.insecure_channel(f"127.0.0.1:{serving.health_port}") as channel:
        request = health_pb2.HealthCheckRequest(service=told["service"])
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status
