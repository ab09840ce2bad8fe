"""What constraints.txt pins: versions, hashes, and what asks for what."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: What the service is shipped with, and what its users install beside it.
SHIPPED = ("service", "references", "tracing", "simulate")


@dataclass
class Pin:
    name: str
    version: str
    marker: str = ""
    hashes: list[str] = field(default_factory=list)
    #: Packages that ask for it; "queryselect" among them where pyproject.toml does.
    via: set[str] = field(default_factory=set)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    return canonical(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])


def read(path: Path = ROOT / "constraints.txt") -> dict[str, Pin]:
    """The pins of a file that scripts/lock wrote, by their names."""
    pins: dict[str, Pin] = {}
    pin = Pin("", "")
    for line in path.read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^ ;\\]+)(?: ; ([^\\]+?))?(?: \\)?$", line):
            pin = pins[canonical(match[1])] = Pin(canonical(match[1]), match[2], match[3] or "")
        elif match := re.match(r" +--hash=sha256:([0-9a-f]{64})(?: \\)?$", line):
            pin.hashes.append(match[1])
        elif (match := re.match(r" +# +(?:via )?([\w.-]+)", line)) and match[1] != "via":
            pin.via.add(canonical(match[1]))
    return pins


def wanted(*extras: str) -> set[str]:
    """Names of what pyproject.toml asks for: by itself, and by these extras."""
    project = PROJECT["project"]
    asked = list(project["dependencies"])
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    names = {name_of(each) for each in asked} - {"queryselect"}
    for each in asked:
        if match := re.match(r"queryselect\[(.+)\]", each):
            names |= wanted(*match[1].split(","))
    return names


def closure(names: Iterable[str], pins: dict[str, Pin]) -> set[str]:
    """These and all that they ask for, on any platform."""
    found, rest = set[str](), set(names)
    while rest:
        found |= rest
        rest = {pin.name for pin in pins.values() if pin.via & rest} - found
    return found
