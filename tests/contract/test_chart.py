"""The chart beside what it is a chart of: its settings, its version, its documentation. What it renders: tests/slow."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any, get_type_hints

import pytest
import yaml
from jsonschema import Draft7Validator

import queryselect
from queryselect_service.settings import Settings
from tests.chart.rendering import CHART, ROOT, schema

METADATA, VALUES = (yaml.safe_load((CHART / name).read_text()) for name in ("Chart.yaml", "values.yaml"))
#: Default by value, as the README has them.
ROWS = dict(re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`)? \| .+ \|$", (CHART / "README.md").read_text(), re.MULTILINE))
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def wrong(values: dict[str, Any]) -> list[str]:
    return [f"{each.json_path}: {each.message}" for each in schema().iter_errors(values)]


def at(path: str) -> Any:
    """The value that the chart has there."""
    return reduce(dict.__getitem__, path.split("."), VALUES)


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of what is no table, and of tables that are empty."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_the_chart_has_the_version_of_what_it_installs():
    assert METADATA["version"] == METADATA["appVersion"] == queryselect.__version__


def test_the_schema_knows_every_setting_as_the_server_does():
    kinds = get_type_hints(Settings)
    expected = {}
    for each in dataclasses.fields(Settings):
        bounds = {"minimum": each.metadata["low"], "maximum": each.metadata["high"]}
        expected[each.name] = {"type": TYPES[kinds[each.name]]} | {k: v for k, v in bounds.items() if v is not None}
    settings = schema().schema["properties"]["settings"]
    assert settings["properties"] == expected
    assert settings["additionalProperties"] is False
    assert VALUES["settings"].keys() <= expected.keys()


def test_the_schema_is_one_and_knows_every_value():
    Draft7Validator.check_schema(schema().schema)
    assert wrong(VALUES) == []
    assert set(schema().schema["properties"]) == {*VALUES, "global", "enabled"}
    for name, told in schema().schema["properties"].items():
        if "properties" in told and name != "settings":
            assert told["additionalProperties"] is False, name
            assert {*VALUES[name]} <= set(told["properties"]), name
    assert wrong({**VALUES, "global": {"domain": "example.org"}, "enabled": True}) == [], "as part of another chart"


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("replica", 2, "$: Additional properties are not allowed ('replica' was unexpected)"),
        ("replicas", "2", "$.replicas: '2' is not of type 'integer'"),
        ("replicas", 1.5, "$.replicas: 1.5 is not of type 'integer'"),
        ("settings.max_row", 5, "$.settings: Additional properties are not allowed ('max_row' was unexpected)"),
        ("settings.max_rows", "5M", "$.settings.max_rows: '5M' is not of type 'integer'"),
        ("settings.max_rows", 0, "$.settings.max_rows: 0 is less than the minimum of 1"),
        ("settings", {"host": "::"}, "$.settings: 'drain_grace' is a required property"),
        ("image.tag", 1.1, "$.image.tag: 1.1 is not of type 'string'"),
        ("tls.existingSecrets", "x", "$.tls: Additional properties are not allowed ('existingSecrets' was unexpected)"),
        ("gpu.count", -1, "$.gpu.count: -1 is less than the minimum of 0"),
        ("autoscaling.by", "cpu", "$.autoscaling.by: 'cpu' is not one of ['none', 'hpa', 'keda']"),
        ("autoscaling.minReplicas", 0, "$.autoscaling.minReplicas: 0 is less than the minimum of 1"),
        ("tmp.size", "1Gi", "$.tmp: Additional properties are not allowed ('size' was unexpected)"),
        ("podLabels.a", True, "$.podLabels.a: True is not of type 'string'"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_in_words(path, value, told):
    values = copy.deepcopy(VALUES)
    *folders, name = path.split(".")
    reduce(dict.__getitem__, folders, values)[name] = value
    assert wrong(values) == [told]


def test_the_readme_tells_every_value_its_default_and_nothing_else():
    """A row may be of a whole table."""
    for path, default in ROWS.items():
        assert (yaml.safe_load(default) if default else "") == at(path), path
    for leaf in leaves(VALUES):
        assert len([path for path in ROWS if f"{leaf}.".startswith(f"{path}.")]) == 1, leaf


def test_the_image_is_what_the_chart_takes_it_for():
    user = "{runAsUser}:{runAsGroup}".format(**VALUES["podSecurityContext"])
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert {'ENTRYPOINT ["queryselect"]', f"USER {user}"} <= set(lines)


def test_what_helm_test_runs_is_left_as_it_is_by_kubernetes():
    """$(NAME) in a command would be a variable's value."""
    text = (CHART / "files" / "select.py").read_text()
    assert "$(" not in text
