"""Pages that people choose by: what they name exists, and nothing that exists is left out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from queryselect._client import Options
from queryselect.v1 import server_pb2
from queryselect_service import auth
from queryselect_service import strategy as strategies
from queryselect_service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    "README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")),
    "benchmarks/reproductions/README.md",
    "examples/README.md",
    "helm/queryselect/README.md",
)
strategies.load()
NAMES = set(strategies.STRATEGIES)
NAMED = re.compile(r"`([a-z][a-z0-9_]*)`")


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_every_strategy_is_told_of(page):
    assert set(NAMED.findall((ROOT / page).read_text())) >= NAMES


def test_what_choosing_names_exists():
    """A name in backticks is a strategy, a parameter of one, or what Client.select takes."""
    parameters = {field.name for each in strategies.STRATEGIES.values() for field in dataclasses.fields(each.spec)}
    named = set(NAMED.findall((ROOT / "docs" / "choosing.md").read_text()))
    assert named <= NAMES | parameters | set(get_type_hints(Options))


def test_the_threat_model_tells_of_every_limit_and_of_nothing_else():
    """A name in backticks is a setting or a key of a token's entry."""
    named = set(NAMED.findall((ROOT / "docs" / "security.md").read_text()))
    settings = {field.name for field in dataclasses.fields(Settings)}
    limits = {each.name for each in server_pb2.Limits.DESCRIPTOR.fields}
    assert {each if each in settings else f"max_{each}" for each in limits} <= named
    assert {each for each in settings if each.startswith(("tls_", "token_", "allow_"))} <= named
    assert {each for each in named if "_" in each} <= settings | set(auth.LIMITS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text)
    for link in (one or other for one, other in links):
        path, _, part = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if part:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert part in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link
