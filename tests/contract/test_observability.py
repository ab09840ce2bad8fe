"""What is measured, what is told of it, and what uses it: each covers the others, both ways."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from queryselect_service import logs
from queryselect_service.engine import Engine
from queryselect_service.errors import BUSY, ServiceError
from queryselect_service.metrics import REASONS, Metrics
from queryselect_service.settings import Settings
from queryselect_service.status import BUG
from queryselect_service.times import PHASES

ROOT = Path(__file__).parent.parent.parent
FILES = ROOT / "helm" / "queryselect" / "files"
DOCUMENTED = (ROOT / "docs" / "operations.md").read_text()
ALERTS, RECORDED = (
    [rule for group in yaml.safe_load((FILES / name).read_text())["groups"] for rule in group["rules"]]
    for name in ("alerts.yaml", "recording.yaml")
)
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
BENCHMARKS = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("**/*.py"))
#: What a name in an expression may have behind the metric's own.
SUFFIXES = r"(_bucket|_sum|_count)?\b"
#: A metric in an expression, or what a rule has recorded of one.
NAME = r"(?<![\w:])(?:[a-z_]+:)?(?:queryselect|process)_[\w:]+"


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    engine = Engine(Settings())
    engine.probe()
    return Metrics(engine).registry


@pytest.fixture(scope="module")
def measured(registry) -> dict[str, tuple[str, set[str]]]:
    """Type and labels of every metric, by its full name."""
    ours = [each for each in registry._collector_to_names if hasattr(each, "_labelnames")]
    labels = {each._name: set(each._labelnames) for each in ours}
    found = {}
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        told = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels.get(family.name, set()) | told)
    return found


def panels() -> list[dict]:
    return [each for each in DASHBOARD["panels"] if each["type"] != "row"]


def expressions() -> list[str]:
    rules = [rule["expr"] for rule in (*ALERTS, *RECORDED)]
    return [*rules, *(target["expr"] for panel in panels() for target in panel["targets"])]


def labels_of(name: str, measured: dict[str, tuple[str, set[str]]]) -> set[str]:
    """What a metric, a part of a histogram or a recorded series has, but for what all have."""
    level, colon, _ = name.partition(":")
    if colon:
        of_rules = {label for rule in RECORDED if rule["record"] == name for label in rule.get("labels", ())}
        return {label for label in ("code", "reason", "strategy") if f"_{label}" in level} | of_rules
    return (measured.get(name) or measured[re.sub("_(bucket|sum|count)$", "", name)])[1]


def documented() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `((?:queryselect|process)_\w+)` \| (\w+) \| (.*?) \|", DOCUMENTED, re.MULTILINE)
    return {name: (kind, labels) for name, kind, labels in rows}


def test_every_metric_is_documented_as_it_is_and_nothing_else_is(measured):
    assert set(documented()) == set(measured)
    for name, (kind, labels) in measured.items():
        told_kind, told_labels = documented()[name]
        assert told_kind == kind, name
        assert set(re.findall(r"`(\w+)`", told_labels.split(":")[0].strip())) | labels == labels, name
        assert all(f"`{label}`" in told_labels for label in labels), name


def test_every_metric_of_ours_is_used_by_an_alert_a_panel_or_a_benchmark(measured):
    used = " ".join(expressions()) + BENCHMARKS
    idle = [name for name in measured if name.startswith("queryselect_") and not re.search(name + SUFFIXES, used)]
    assert not idle


def test_no_expression_names_what_does_not_exist(measured):
    parts = {
        name + suffix
        for name, (kind, _) in measured.items()
        if kind == "histogram"
        for suffix in ("_bucket", "_sum", "_count")
    }
    known = {name for name, (kind, _) in measured.items() if kind != "histogram"} | parts
    for expression in expressions():
        named = set(re.findall(NAME, expression))
        assert named or expression.startswith("up{"), expression
        assert named <= known | {rule["record"] for rule in RECORDED}, expression
    assert set(re.findall(r"\"(queryselect_\w+)\"", BENCHMARKS)) - {"queryselect_service"} <= known | set(measured)


def test_no_expression_asks_for_a_label_that_its_metric_has_not(measured):
    of_all = {"job", "instance", "le"}
    for expression in expressions():
        for name, matchers in re.findall(rf"({NAME})\{{([^}}]*)\}}", expression):
            assert set(re.findall(r"(\w+)(?:=|!)", matchers)) <= labels_of(name, measured) | of_all, expression
        grouped = [label for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(", ")]
        labels = set().union(*(labels_of(name, measured) for name in re.findall(NAME, expression)))
        assert set(grouped) <= labels | of_all, expression


def test_what_is_recorded_is_named_by_what_it_is_by():
    """level:metric:operations, where the level is the labels that are left."""
    for rule in RECORDED:
        level, metric, operations = rule["record"].split(":")
        assert metric.startswith("queryselect_")
        assert operations
        by = re.match(r"\w+ by \(([^)]*)\)", rule["expr"])
        asked = re.search(NAME, rule["expr"])
        assert by or asked, rule
        left = by[1].replace(", ", "_") if by else asked[0].partition(":")[0]
        assert level == (left.removesuffix("_le") if "histogram_quantile" in rule["expr"] else left), rule


def reasons() -> set[str]:
    kinds, found = [ServiceError], {BUG}
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if "reason" in vars(kind):
            found.add(kind.reason)
    return found - {"CANCELLED", "DEADLINE_EXCEEDED"}


def test_every_reason_is_documented_and_alerts_ask_for_such_as_are_there_from_the_start():
    section = DOCUMENTED.split("### Reasons")[1].split("### Phases")[0]
    told = set(re.findall(r"`([A-Z_]+)(?::\w+)?`", section))
    assert told - {"ErrorInfo"} == reasons()
    assert set(re.findall(r"`BUSY:(\w+)`", section)) == set(BUSY)
    for rule in ALERTS:
        for expression in re.findall(r'reason=~?"([^"]+)"', rule["expr"]):
            assert any(re.fullmatch(expression, reason) for reason in REASONS), expression


def test_every_phase_every_alert_and_all_that_is_recorded_is_documented():
    section = DOCUMENTED.split("### Phases")[1].split("## Alerts")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(PHASES)
    section = DOCUMENTED.split("## Alerts")[1].split("## Traces")[0]
    assert re.findall(r"^\| (QuerySelect\w+)", section, re.MULTILINE) == [rule["alert"] for rule in ALERTS]
    told = re.findall(r"^\| `([\w:]+)`", section, re.MULTILINE)
    assert told == list(dict.fromkeys(rule["record"] for rule in RECORDED))
    assert set(logs.FORMATS) <= set(re.findall(r"`(\w+)`", DOCUMENTED.split("## Logs")[1]))


def test_the_dashboard_is_one(measured):
    numbers = [each["id"] for each in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    rows = [each["title"] for each in DASHBOARD["panels"] if each["type"] == "row"]
    assert len(rows) == len(set(rows)) >= 6
    (source,) = (each for each in DASHBOARD["templating"]["list"] if each["type"] == "datasource")
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == f"${{{source['name']}}}"
            assert 'job=~"$job",instance=~"$instance"' in target["expr"]
