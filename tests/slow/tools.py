"""What slow tests need beyond Python: packages of Debian, installed where they are missing."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path


def install(*packages: str) -> None:
    """Installs what is missing of these packages of Debian."""
    missing = [each for each in packages if not _installed(each)]
    if missing:
        _update()
        _apt("install", "-y", "--no-install-recommends", *missing)


@cache
def unpacked(package: str) -> Path:
    """The folder of a package's files, without installing it: some packages start a server when they are."""
    folder = Path(tempfile.mkdtemp(prefix=package))
    atexit.register(shutil.rmtree, folder)
    _update()
    _apt("download", package, cwd=folder)
    (archive,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    archive.unlink()
    return folder


def _installed(package: str) -> bool:
    told = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package], capture_output=True, text=True, check=False
    )
    return told.stdout == "installed"


@cache
def _update() -> None:
    _apt("update")


def _apt(*arguments: str, cwd: Path | None = None) -> None:
    done = subprocess.run(
        ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", *arguments],
        cwd=cwd,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
