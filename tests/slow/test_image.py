"""The image for processors: really built, on a base of Debian's packages, and run as an engine would run it.

Not by a container engine, of which none may be here: namespaces, mounts and capabilities are set as one would set them,
and what runs is what the image says. The image for GPUs is gigabytes of wheels: of that one, what pip would fetch is
looked at.
"""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch

from queryselect import Client, __version__
from scripts import pins
from tests.slow import tools
from tests.slow.servers import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parent.parent.parent
EXTRAS = ("references", "service", "tracing")
BASE, IMAGE = "localhost/base", "localhost/queryselect:tested"
#: What an engine does before it starts the first process: $1 is the root, $2 a file for /etc/hosts.
ENTER = """
ip link set lo up
mount --bind "$1" "$1"
mount --bind "$2" "$1/etc/hosts"
mount -o remount,bind,ro "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$1/tmp"
mount -t tmpfs -o mode=755,nosuid tmpfs "$1/dev"
for each in null zero random urandom; do touch "$1/dev/$each"; mount --bind "/dev/$each" "$1/dev/$each"; done
root=$1; shift 2
exec chroot "$root" "$@"
"""


def run(*command: object, **options) -> str:
    done = subprocess.run(
        [str(each) for each in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


class Storage:
    """Containers and images in a folder of their own. as_here: options that set up a build's pip as ours is."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.as_here = folder, list[str]()
        settings = {"driver": "vfs", "graphroot": str(folder / "graph"), "runroot": str(folder / "run")}
        lines = ["[storage]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        (folder / "storage.conf").write_text("\n".join(lines))
        self.variables = {
            **os.environ,
            "BUILDAH_ISOLATION": "chroot",
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "STORAGE_DRIVER": "vfs",
        }

    def buildah(self, *arguments: object) -> str:
        return run("buildah", *arguments, env=self.variables).strip()

    def mount(self, image: str) -> Path:
        """Where the files of an image lie."""
        return Path(self.buildah("mount", self.buildah("from", "--pull-never", image)))


def base(storage: Storage) -> None:
    """A base of Debian's packages, from wherever this machine has its own."""
    container = storage.buildah("from", "scratch")
    told = run("apt-get", "indextargets", "--format", "deb $(REPO_URI) $(CODENAME) $(COMPONENT)",
               "Created-By: Packages", "Origin: Debian")  # fmt: skip
    (storage.folder / "sources.list").write_text(told)
    packages = "--include=ca-certificates,python3,python3-venv"
    mounted = storage.buildah("mount", container)
    run("mmdebstrap", "--variant=minbase", packages, "bookworm", mounted, storage.folder / "sources.list")
    storage.buildah("config", "--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    storage.buildah("commit", "--rm", container, BASE)


def as_pip_is_set_up(folder: Path) -> Iterator[str]:
    """Options that have a build's pip find what this machine's finds: its settings, and the files that they name."""
    told = configparser.RawConfigParser()
    lines = run(sys.executable, "-m", "pip", "config", "list").splitlines()
    for line in sorted(lines, key=lambda each: each.startswith(":env:")):  # the environment counts more than files
        name, _, value = line.partition("=")
        section, _, key = name.removeprefix(":env:").rpartition(".")
        told.setdefault(section or "global", {})
        told[section or "global"][key] = " ".join(ast.literal_eval(value).split())
    with (folder / "pip.conf").open("w") as file:
        told.write(file)
    yield from ("--secret", f"id=pip,src={folder / 'pip.conf'}")
    words = {word for section in told.values() for value in section.values() for word in value.split()}
    # An index that is a folder leads to files beside it.
    paths = {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://")}
    paths |= {Path(word) for word in (*words, "/etc/ssl/certs/ca-certificates.crt") if word.startswith("/")}
    for path in filter(Path.exists, paths):
        yield from ("--volume", f"{path}:{path}:ro")


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    """Where the image is, once `make image` has made it."""
    tools.install("buildah", "iproute2", "mmdebstrap")
    folder = Path(tempfile.mkdtemp(prefix="image"))
    try:
        storage = Storage(folder)
        base(storage)
        storage.as_here = list(as_pip_is_set_up(folder))
        options = ["--build-arg", f"BASE_IMAGE={BASE}", *storage.as_here]
        if torch.__version__.endswith("+cpu"):  # this machine's pip has found it
            options += ["--build-arg", "TORCH_INDEX="]
        run("make", "-C", ROOT, "image", f"ARGS={shlex.join(options)}",
            env={**storage.variables, "ENGINE": "buildah", "IMAGE": IMAGE})  # fmt: skip
        yield storage
        storage.buildah("rm", "--all")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def told(storage) -> dict:
    """What the image says of itself."""
    return json.loads(storage.buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]


@pytest.fixture(scope="module")
def root(storage) -> Path:
    return storage.mount(IMAGE)


class Container:
    """What runs: the image's entry point as its user, with its variables."""

    def __init__(self, root: Path, told: dict, log: IO[str], hosts: Path) -> None:
        self._root, self._told, self._log = root, told, log
        command = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-euc", ENTER, "sh"]
        command += [str(root), str(hosts), *self._as_user(*told["Entrypoint"], *told["Cmd"])]
        self._outer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)

    def _as_user(self, *command: str) -> list[str]:
        user, group = self._told["User"].split(":")
        return [
            *("setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"),
            *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
            *("env", "-i", *self._told["Env"], *command),
        ]

    @property
    def _children(self) -> str:
        return Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text()

    @property
    def pid(self) -> int:
        """The first process's, seen from outside."""
        wait_for(lambda: self._children)
        return int(self._children)

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def beside(self, *command: str, **options) -> subprocess.CompletedProcess[str]:
        """Another process in the container."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "chroot", str(self._root)]
        return subprocess.run(
            [*enter, *self._as_user(*command)], capture_output=True, text=True, check=False, timeout=60, **options
        )

    def on_its_network(self, *command: str) -> str:
        """A process of this machine that reaches the container's ports."""
        return run("nsenter", "--target", self.pid, "--net", *command, cwd=ROOT, timeout=120)

    def stop(self, seconds: float) -> int:
        """Asks it to end; its exit status."""
        os.kill(self.pid, signal.Signals[self._told["StopSignal"]])
        return self._outer.wait(seconds)

    def kill(self) -> None:
        self._outer.kill()
        self._outer.wait()


@contextmanager
def started(root: Path, told: dict, folder: Path) -> Iterator[Container]:
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    with (folder / "log").open("w+") as log:
        container = Container(root, told, log, folder / "hosts")
        try:
            yield container
        finally:
            container.kill()
            sys.stderr.write(container.log)


def picks(target: str) -> list[int]:
    rng = np.random.default_rng(0)
    with Client(target) as client:
        small = client.select("margin", 5, logits=rng.normal(size=(1000, 10)))
        streamed = client.select("k_center_greedy", 5, embeddings=rng.normal(size=(20_000, 64)))
    return [*map(int, small.indices), *map(int, streamed.indices)]


def test_it_serves_as_nobody_on_a_root_that_cannot_be_written_and_ends_when_told(root, told, tmp_path):
    with started(root, told, tmp_path) as container:
        kind, *check = told["Healthcheck"]["Test"]
        assert kind == "CMD"
        wait_for(lambda: container.beside(*check).stdout == "SERVING\n", 240)

        status = Path(f"/proc/{container.pid}/status").read_text()
        assert re.findall(r"^[UG]id:\s+(.*)", status, re.MULTILINE) == ["\t".join(["65532"] * 4)] * 2
        assert re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)", status, re.MULTILINE) == ["0" * 16] * 3
        for path in ("/opt/queryselect/x", "/var/tmp/x"):
            assert "Read-only file system" in container.beside("touch", path).stderr
        assert container.beside("ls", "-A", "/tmp").stdout == ""
        for module in ("ensurepip", "pip"):
            assert f"No module named '{module}'" in container.beside("python3", "-c", f"import {module}").stderr

        ask = "from tests.slow.test_image import picks; print(picks('127.0.0.1:50051'))"
        assert ast.literal_eval(container.on_its_network(sys.executable, "-c", ask)) == picks("local:")
        page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
        assert "\nqueryselect_ready 1.0\n" in container.on_its_network(sys.executable, "-c", page)

        assert container.stop(75) == 0
        lines = [json.loads(line) for line in container.log.splitlines()]
        assert {line["level"] for line in lines} == {"INFO"}


def test_nothing_in_it_compiles_or_installs(root, told):
    (path,) = (each.removeprefix("PATH=") for each in told["Env"] if each.startswith("PATH="))
    found = {each.name for folder in path.split(":") for each in (root / folder[1:]).iterdir()}
    assert {"python3", "queryselect"} <= found
    assert not {each for each in found if re.fullmatch(r"(as|cc|clang|cpp|gcc|[gc]\+\+|ld|make|pip)[\d.-]*", each)}


def entries(root: Path) -> dict[str, os.stat_result]:
    """Everything in a root, by path, but for what buildah makes of the network."""
    paths = (Path(folder, name) for folder, folders, files in os.walk(root) for name in (*folders, *files))
    found = {str(path.relative_to(root)): path.lstat() for path in paths}
    return {name: each for name, each in found.items() if name not in ("etc/hosts", "etc/resolv.conf")}


def test_it_is_its_base_and_the_server_and_nothing_else(storage, root):
    before, now = entries(storage.mount(BASE)), entries(root)
    ours = ("opt/queryselect", "usr/share/doc/queryselect")
    new = {name for name in set(now) - set(before) if not name.startswith(ours)}
    assert {name for name in new if f"/{name}:/{name}:ro" not in storage.as_here} == set()  # left empty
    assert not any(stat.S_ISREG(now[name].st_mode) for name in new)
    gone = {name for name in set(before) - set(now) if not re.search(r"/(ensurepip|python-wheels)(/|$)", name)}
    assert gone == set()
    for name in set(now) & set(before):
        one, other = now[name], before[name]
        assert (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid), name
        assert stat.S_ISDIR(one.st_mode) or one.st_size == other.st_size, name
    for name in set(now) - set(before):
        assert (now[name].st_uid, now[name].st_gid) == (0, 0), name
        if not stat.S_ISLNK(now[name].st_mode):
            assert now[name].st_mode & 0o7022 == 0, name
            assert now[name].st_mode & 0o044 == 0o044, name


def test_its_code_is_compiled_whatever_becomes_of_times(root):
    (site,) = (root / "opt/queryselect/lib").glob("python3*/site-packages")
    for package in ("queryselect", "queryselect_service", "grpc", "numpy"):
        for path in (site / package).rglob("*.py"):
            (compiled,) = path.parent.glob(f"__pycache__/{path.stem}.cpython-*.pyc")
            assert compiled.read_bytes()[4] == 0b11, path  # by a hash of its source, which is looked at


def test_its_bill_of_materials_is_what_is_in_it_and_what_is_pinned(root):
    documents = root / "usr/share/doc/queryselect"
    assert {each.name for each in documents.iterdir()} == {"LICENSE", "licences.md", "sbom.cdx.json"}
    text = (documents / "sbom.cdx.json").read_text()
    assert (ROOT / "dist" / "sbom-cpu.cdx.json").read_text() == text
    told = {pins.canonical(each["name"]): each["version"] for each in json.loads(text)["components"]}
    assert json.loads(text)["metadata"]["component"]["version"] == __version__
    (site,) = (root / "opt/queryselect/lib").glob("python3*/site-packages")
    found = {each.name.removesuffix(".dist-info") for each in site.glob("*.dist-info")}
    assert {pins.canonical(each.rpartition("-")[0]) for each in found} - {"queryselect"} == set(told)
    assert {f"{__version__}"} == {each.rpartition("-")[2] for each in found if each.startswith("queryselect-")}
    locked = pins.read()
    assert {name: version.partition("+")[0] for name, version in told.items()} == {
        name: locked[name].version for name in told
    }
    assert told["torch"].endswith("+cpu")
    assert not [name for name in told if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_whatever_the_image_for_gpus_installs_is_pinned_by_hash(tmp_path):
    """What pip would fetch, found out from metadata alone: it looks at no hash then, so that is done here."""
    locked = pins.read()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{each.name}=={each.version}\n" for each in locked.values()))
    wanted = [*sorted(pins.wanted(*EXTRAS)), f"torch==={locked['torch'].version}"]
    run(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary", ":all:",
        "--report", tmp_path / "report.json", "-c", constraints, *wanted)  # fmt: skip
    found = {
        pins.canonical(each["metadata"]["name"]): each["download_info"]["archive_info"]["hashes"]["sha256"]
        for each in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert {name for name, digest in found.items() if digest not in locked[name].hashes} == set()
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton"} <= set(found)
