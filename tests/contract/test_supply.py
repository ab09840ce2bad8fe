"""What we install: every package pinned, with hashes, under a licence that is allowed; nothing pinned for nothing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import audit, licences, pins

LOCKED = pins.read()
PROJECT = pins.PROJECT
ASKED = [
    Requirement(each)
    for part in (
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
        *PROJECT["dependency-groups"].values(),
    )
    for each in part
    if not each.startswith("queryselect[")
]


@pytest.mark.parametrize("requirement", ASKED, ids=str)
def test_what_the_project_asks_for_is_pinned_within_its_range(requirement):
    assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)].version, prereleases=True)


def installed(requirement: Requirement, found: dict[str, str], seen: set[str]) -> None:
    """Adds the versions of what is installed for a requirement, and for what that requires."""
    name = canonicalize_name(requirement.name)
    if str(requirement) in seen:
        return
    seen.add(str(requirement))
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        return  # of another extra
    for each in map(Requirement, requires(name) or []):
        if any(each.marker is None or each.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
            installed(each, found, seen)


def test_what_is_installed_is_what_is_pinned():
    found, seen = {}, set()
    for extra in (*pins.SHIPPED, "dev"):
        installed(Requirement(f"queryselect[{extra}]"), found, seen)
    del found["queryselect"]
    assert len(found) > 80
    assert {name: is_version.partition("+")[0] for name, is_version in found.items()} == {
        name: LOCKED[name].version if name in LOCKED else None for name in found
    }


@pytest.mark.parametrize("path", ["constraints.txt", "proto/generator.txt"])
def test_every_pin_has_hashes_and_nothing_else_is_in_the_file(path):
    locked = pins.read(pins.ROOT / path)
    assert all(len(pin.hashes) == len(set(pin.hashes)) >= 1 for pin in locked.values())
    lines = [line for line in (pins.ROOT / path).read_text().splitlines() if not line.lstrip().startswith("#")]
    assert len(lines) == len(locked) + sum(len(pin.hashes) for pin in locked.values())


def test_the_generator_is_pinned_as_it_is_asked_for():
    locked = pins.read(pins.ROOT / "proto" / "generator.txt")
    for line in (pins.ROOT / "proto" / "generator.in").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)].version)


def test_nothing_is_pinned_for_nothing():
    assert pins.closure({canonicalize_name(each.name) for each in ASKED}, LOCKED) == set(LOCKED)


def test_the_build_of_torch_without_cuda_is_known():
    told = re.findall(r"^([\d.]+) ([0-9a-f]{64})$", (pins.ROOT / "scripts" / "lock").read_text(), re.MULTILINE)
    assert told
    for of, digest in told:
        assert of == LOCKED["torch"].version
        assert digest in LOCKED["torch"].hashes


def test_the_list_of_licences_is_up_to_date_and_all_are_allowed():
    assert licences.PAGE.read_text() == licences.page()
    assert [row for row in licences.rows() if not licences.allowed(row[2])] == []


@pytest.mark.parametrize(
    ("expression", "is_allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 AND (BSD-3-Clause OR MIT)", True),
        ("(GPL-3.0-only OR MIT) AND GPL-2.0-only", False),
        ("GPL-2.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("LicenseRef-NVIDIA-Proprietary", False),
        ("", False),
    ],
)
def test_licences_that_are_allowed(expression, is_allowed):
    assert licences.allowed(expression) is is_allowed


WELL = {"name": "idna", "version": "3.20", "vulns": []}
SKIPPED = {"name": "six", "skip_reason": "not found"}
VULNERABLE = {"name": "six", "version": "1.17.0", "vulns": [{"id": "X-1", "fix_versions": ["2.0"]}]}


@pytest.mark.parametrize(
    ("answers", "wrong"),
    [
        ([WELL], ""),
        ([], "no advisory service"),
        ([SKIPPED], "no advisory service"),
        ([WELL, SKIPPED], "not looked up: six"),
        ([WELL, VULNERABLE], "six 1.17.0: X-1, fixed in 2.0"),
    ],
)
def test_an_audit_that_did_not_happen_is_a_failure(answers, wrong, monkeypatch, capsys):
    monkeypatch.setattr(audit, "ask", lambda service, file: answers)
    assert audit.audit("constraints.txt") is (not wrong)
    assert wrong in capsys.readouterr().out
