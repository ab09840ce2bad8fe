"""What somebody meets who has just cloned or installed the project: nothing but Python, and only what is committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import pins

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
#: The environment of a fresh login: no PYTHONPATH, no virtual environment, but what package clients are told by it.
CLEAN = {
    key: value
    for key, value in os.environ.items()
    if key in ("PATH", "HOME", "LANG") or key.startswith(("PIP_", "SSL_", "REQUESTS_"))
}


def run(*command: str, cwd: Path, **options) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_make_demo_works_in_a_clean_clone_and_leaves_it_clean(tmp_path):
    run("git", "clone", "-q", str(ROOT), str(tmp_path / "clone"), cwd=tmp_path)
    clone = tmp_path / "clone"
    printed = run("make", "demo", cwd=clone)
    assert "area over random" in printed
    assert "100%" in printed
    assert (clone / "demo" / "report.html").stat().st_size > 20_000
    assert run("git", "status", "--porcelain", cwd=clone) == ""


def test_what_has_another_hash_or_none_is_not_installed(tmp_path):
    run("git", "clone", "-q", str(ROOT), str(tmp_path / "clone"), cwd=tmp_path)
    clone = tmp_path / "clone"
    run("make", ".venv/.python", cwd=clone)
    constraints = clone / "constraints.txt"
    install = [str(clone / ".venv" / "bin" / "pip"), "install", "-c", str(constraints)]
    run(*install, "idna", cwd=clone)
    right = pins.read(constraints)["idna"].hashes
    text = constraints.read_text()
    for each in right:
        text = text.replace(each, each[::-1])
    constraints.write_text(text)
    for package, told in (("idna", "DO NOT MATCH THE HASHES"), ("wheel", "must have their versions pinned")):
        done = subprocess.run(
            [*install, "--force-reinstall", package], cwd=clone, env=CLEAN, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert told in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def interpreter(version: str) -> str:
    """A Python of that version, on the path or pyenv's; says so loudly where there is none."""
    for found in (shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")):
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            return str(found)
    pytest.skip(f"there is no Python {version} on this machine")


#: The oldest versions that pyproject.toml allows.
FLOORS = [
    each.replace(">=", "==") for each in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]


@pytest.mark.parametrize(("version", "floors"), [("3.11", True), ("3.11", False), ("3.12", False), ("3.13", False)])
def test_the_wheel_installs_as_a_thin_client(wheel, tmp_path, version, floors, target):
    python = interpreter(version)
    run(python, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    own = tmp_path / "venv" / "bin"
    pip = (str(own / "python"), "-m", "pip", "install", "-q")
    if floors:
        run(*pip, *FLOORS, str(wheel), cwd=tmp_path)
    else:
        run(*pip, f"pip=={pins.read()['pip'].version}", cwd=tmp_path)
        run(*pip, "--no-deps", str(wheel), cwd=tmp_path)
        run(*pip, "--require-hashes", "-c", str(ROOT / "constraints.txt"), "queryselect", cwd=tmp_path)
    code = f"""
import importlib.util, numpy, queryselect
assert importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("pandas") is None
with queryselect.Client("{target}") as client:
    print(client.select(queryselect.KCenterGreedy(), 2, embeddings=numpy.eye(3), labeled=[1]).indices)
    print(client.select("margin", 1, logits=numpy.eye(3), params={{"top_k": 2}}).strategy)
    far = numpy.zeros((200_000, 6), numpy.float32)  # more than goes in one message
    far[123_456] = 1
    print(client.select("k_center_greedy", 1, embeddings=far, labeled=[0]).indices)
    try:
        client.select("margin", 4, logits=numpy.eye(3))
    except queryselect.InvalidInput as error:
        print(error.code, error.field)
"""
    printed = run(str(own / "python"), "-W", "error", "-c", code, cwd=tmp_path)
    assert "[0 2]" in printed
    assert "top_k: 2" in printed
    assert "[123456]" in printed
    assert "INVALID_ARGUMENT stop.max_items" in printed
    health = subprocess.run([own / "queryselect", "health", "127.0.0.1:1"], capture_output=True, check=False, env=CLEAN)
    assert health.returncode == 2
    serve = subprocess.run([own / "queryselect", "serve"], capture_output=True, text=True, check=False, env=CLEAN)
    assert serve.returncode == 2
    assert "queryselect[service]" in serve.stderr
