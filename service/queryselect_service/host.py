"""What of its machine a process may have: all of it, or what the limits of its container leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    """Bytes. What the kernel would give back when asked, such as pages of files that were read, counts as free."""

    free: int
    total: int


class Group(NamedTuple):
    """Where a version of Linux' control groups has its files, and how it calls them."""

    folder: str
    limit: str
    used: str
    given_back: str  # of memory.stat: pages of files that nobody has looked at lately


#: By what /proc/self/cgroup says of who is in charge: everything, in version 2, or memory, in version 1.
GROUPS = {
    "": Group("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": Group("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def host_memory(root: Path = Path("/")) -> Memory:
    """The machine's memory, or what a container's limit leaves of it. root: where /proc and /sys are."""
    found = [_machine(root), *_groups(root)]
    return Memory(max(0, min(each.free for each in found)), min(each.total for each in found))


def _machine(root: Path) -> Memory:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        told = {name: int(kib.split()[0]) << 10 for name, _, kib in (line.partition(":") for line in lines) if kib}
        return Memory(told["MemAvailable"], told["MemTotal"])
    except (OSError, KeyError):  # no Linux, or an old one
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Memory(total, total)


def _groups(root: Path) -> Iterator[Memory]:
    """What the limits leave: of this process's group and of those that it is in.

    A container often sees its own group as the outermost, by whatever path the machine knows it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for who, group in GROUPS.items():
            if who in controllers.split(","):
                top = root / group.folder
                inner = top / path.lstrip("/")
                for folder in (inner, *inner.parents):
                    if folder.is_relative_to(top):
                        yield from _left(folder, group)


def _left(folder: Path, group: Group) -> Iterator[Memory]:
    try:
        limit, used = int((folder / group.limit).read_text()), int((folder / group.used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return
    yield Memory(limit - used + int(stat.get(group.given_back, 0)), limit)
