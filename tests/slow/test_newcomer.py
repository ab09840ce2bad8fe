"""What somebody meets who has just cloned or installed the project: nothing but Python, and only what is committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_wheel_installs_as_a_thin_client(wheel, tmp_path, version):
    python = shutil.which(f"python{version}")
    works = python and subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0
    if not works:
        pytest.skip(f"there is no Python {version} on this machine")
    run(python, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    own = tmp_path / "venv" / "bin"
    run(str(own / "pip"), "install", "-q", "-c", str(ROOT / "constraints.txt"), str(wheel), cwd=tmp_path)
    code = """
import importlib.util, queryselect
assert importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("pandas") is None
print(queryselect.__version__, queryselect.Client("localhost:1"), queryselect.Margin(top_k=2))
"""
    assert "top_k: 2" in run(str(own / "python"), "-W", "error", "-c", code, cwd=tmp_path)
    health = subprocess.run([own / "queryselect", "health", "127.0.0.1:1"], capture_output=True, check=False, env=CLEAN)
    assert health.returncode == 2
    serve = subprocess.run([own / "queryselect", "serve"], capture_output=True, text=True, check=False, env=CLEAN)
    assert serve.returncode == 2
    assert "queryselect[service]" in serve.stderr
