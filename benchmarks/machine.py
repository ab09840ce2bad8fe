"""What a benchmark ran on, and what a process used. Linux only: it reads /proc."""

from __future__ import annotations

import json
import os
import platform
import urllib.request
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MB = 1e6
RESULTS = Path(__file__).parent / "results"
NOT_INSTALLED = "not installed"


def describe() -> dict[str, str]:
    """The machine and the versions that a result depends on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": unknown")
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("queryselect", "grpcio", "protobuf", "torch", "numpy")},
    }


def installed(distribution: str) -> str:
    """The version of a distribution, or that it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return NOT_INSTALLED


def name() -> str:
    """What the machine's results are called by, unless a GPU is what they are of."""
    return f"{os.uname().machine}-{os.cpu_count()}-cores"


def kept_at(kind: str, machine: str, folder: Path = RESULTS) -> Path:
    """Where `keep` writes."""
    return folder / f"{kind}-{machine}.json"


def keep(kind: str, machine: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes what a run of one kind found, dated, for one machine; gives the path, short where it can be."""
    folder.mkdir(parents=True, exist_ok=True)
    path = kept_at(kind, machine, folder)
    path.write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(), **result}, indent=2) + "\n")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def free_memory() -> int:
    """The bytes that a process can still have without the machine swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def metrics(port: int) -> dict[str, float]:
    """What a server's /metrics says now, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def in_flight(port: int) -> int:
    """The selections that a server holds something for: a kernel that runs is one."""
    return int(metrics(port)["queryselect_in_flight"])


class Usage:
    """What a process uses from now on: CPU seconds, and the most memory beyond what it has now, in MB."""

    def __init__(self, pid: int, before: float | None = None) -> None:
        """before: the resident memory, in MB, that counts as nothing; what there is now unless told."""
        self._path = Path(f"/proc/{pid}")
        (self._path / "clear_refs").write_text("5")  # the peak starts anew
        self.before = self._status("VmRSS") if before is None else before
        self._own = self._status("RssAnon")
        self._cpu = self._seconds()

    @property
    def cpu(self) -> float:
        """CPU seconds of all threads, in user and in system mode."""
        return self._seconds() - self._cpu

    @property
    def now(self) -> float:
        """The resident memory now, less what there was, in MB.

        Its own: pages of libraries come and go as they are used and as the system likes.
        """
        return self._status("RssAnon") - self._own

    @property
    def peak(self) -> float:
        """The most resident memory since, less what there was, in MB."""
        return self._status("VmHWM") - self.before

    def _seconds(self) -> float:
        fields = (self._path / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _status(self, name: str) -> float:
        for line in (self._path / "status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024 / MB
        raise KeyError(name)
