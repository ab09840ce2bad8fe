"""What memory a process may have, in containers of either version of control groups and outside."""

from __future__ import annotations

import os

import pytest

from queryselect_service.host import Memory, host_memory

GB = 1 << 30
MACHINE = Memory(12 * GB, 16 * GB)
NONE = 9223372036854771712  # what version 1 says of no limit


@pytest.fixture
def machine(tmp_path):
    """Writes files as Linux shows them, below a folder."""

    def write(group: str, **files: object) -> object:
        told = {"proc/self/cgroup": group, **files}
        told["proc/meminfo"] = f"MemTotal: {16 << 20} kB\nMemFree: 1024 kB\nMemAvailable: {12 << 20} kB\n"
        for name, text in told.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return write


def two(folder: str, limit: object, used: int = 0, inactive: int = 0) -> dict[str, object]:
    files = {"max": limit, "current": used, "stat": f"anon 5\ninactive_file {inactive}\nactive_file 7"}
    return {f"sys/fs/cgroup{folder}/memory.{name}": value for name, value in files.items()}


def one(folder: str, limit: object, used: int = 0, inactive: int = 0) -> dict[str, object]:
    stat = f"inactive_file 1\ntotal_inactive_file {inactive}"
    files = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"sys/fs/cgroup/memory{folder}/memory.{name}": value for name, value in files.items()}


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    {
        "no group": ("0::/", {}, MACHINE),
        "version 2, no limit": ("0::/a", two("/a", "max", GB), MACHINE),
        "version 2": ("0::/a", two("/a", 4 * GB, 3 * GB), Memory(GB, 4 * GB)),
        "pages of files can go": ("0::/a", two("/a", 4 * GB, 3 * GB, 2 * GB), Memory(3 * GB, 4 * GB)),
        "its own is the outermost": ("0::/", two("", 4 * GB, GB), Memory(3 * GB, 4 * GB)),
        "by a path that is not seen": ("0::/../../pod/x", two("", 4 * GB, GB), Memory(3 * GB, 4 * GB)),
        "the pod has less": ("0::/pod/x", two("/pod", 2 * GB) | two("/pod/x", 4 * GB), Memory(2 * GB, 2 * GB)),
        "more than there is": ("0::/a", two("/a", 64 * GB, 10 * GB), MACHINE),
        "over the limit": ("0::/a", two("/a", 4 * GB, 5 * GB), Memory(0, 4 * GB)),
        "version 1, no limit": ("4:memory:/a\n0::/", one("/a", NONE, GB), MACHINE),
        "version 1": ("5:cpu:/b\n4:memory:/a", one("/a", 4 * GB, 3 * GB, GB), Memory(2 * GB, 4 * GB)),
        "version 1, not seen": ("4:memory:/docker/x", one("", 4 * GB, GB), Memory(3 * GB, 4 * GB)),
        "not memory": ("5:cpu:/a", one("/a", 4 * GB), MACHINE),
    }.values(),
)
def test_what_a_container_leaves(machine, group, files, expected):
    assert host_memory(machine(group, **files)) == expected


def test_elsewhere_it_is_what_the_system_says(tmp_path):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory(tmp_path) == (total, total)


def test_of_this_machine():
    free, total = host_memory()
    assert 0 < free <= total
