"""What reproductions by `queryselect.simulate` share: methods played seed by seed, kept, told and drawn."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine
from benchmarks.reproductions.data import LabeledSet, MissingData, load
from benchmarks.reproductions.drawing import draw
from queryselect.simulate import Curves, Strategy

#: One method with one seed: "name", "seed", "counts" and "values" (rounds + 1,), "area", "seconds" of a selection,
#: "saturated" (rounds,), the picks that the service warned of as SATURATED, if any, and what else is measured.
Row = dict[str, Any]
#: What a column of a table says of a method's rows.
Column = Callable[[list[Row]], str]


class Setting(Protocol):
    """What a series is played with. source: the set of real data."""

    @property
    def source(self) -> str:
        """Its name in the folder."""


@dataclass(frozen=True)
class Method:
    """A way to choose, and what it is called."""

    label: str
    strategy: Strategy


def row(found: Curves, name: str, seed: int, **more: Any) -> Row:
    """What is kept of curves of one strategy and one seed."""
    (values,), (area,), (picks,) = found.values[name], found.area(name), found.picks[name]
    saturated = [sum(len(each.rows) for each in its.warnings if each.code == "SATURATED") for its in picks]
    return {
        "name": name,
        "seed": seed,
        "counts": found.counts,
        "values": values.tolist(),
        "area": float(area),
        "seconds": found.seconds[name],
        **({"saturated": saturated} if any(saturated) else {}),
        **more,
    }


def play(
    kind: str, about: Mapping[str, Any], tasks: Sequence[tuple[str, int]], one: Callable[[str, int], Row], results: Path
) -> list[Row]:
    """Plays each task, a method and a seed, unless it was kept before with the same `about`; keeps each as it comes."""
    path = results / f"{kind}-{machine.name()}.json"
    rows = earlier(path, about)
    for name, seed in tqdm([task for task in tasks if task not in {(row["name"], row["seed"]) for row in rows}]):
        rows.append(one(name, seed))
        on = {**machine.describe(), "threads": str(torch.get_num_threads())}
        machine.keep(kind, machine.name(), {"machine": on, "about": about, "rows": rows}, results)
    return [row for row in rows if (row["name"], row["seed"]) in set(tasks)]


def earlier(path: Path, about: Mapping[str, Any]) -> list[Row]:
    """What was kept of the same."""
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[Row] = kept["rows"] if kept.get("about") == json.loads(json.dumps(about)) else []
    return rows


def show(
    kind: str, rows: list[Row], methods: Mapping[str, Method], report: str, results: Path, measured: str = "accuracy"
) -> None:
    """Prints the report, and draws the mean curves."""
    print(report)
    means = {methods[name].label: values(each).mean(axis=0) for name, each in by_name(rows, methods).items()}
    path = results / f"{kind}-{machine.name()}.svg"
    path.write_text(draw(rows[0]["counts"], means, measured=measured), encoding="utf-8")
    print(f"drawn in {path}", file=sys.stderr)


def by_name(rows: list[Row], methods: Mapping[str, Method]) -> dict[str, list[Row]]:
    """The rows of each method that has any, by seed."""
    found = {
        name: sorted((row for row in rows if row["name"] == name), key=lambda row: row["seed"]) for name in methods
    }
    return {name: each for name, each in found.items() if each}


def values(rows: list[Row]) -> NDArray[np.float64]:
    """(seeds, rounds + 1)."""
    return np.array([row["values"] for row in rows])


def table(rows: list[Row], methods: Mapping[str, Method], more: Mapping[str, Column], columns: int = 6) -> list[str]:
    """Markdown: the metric in per cent at some numbers of labels, its area, and what `more` says of each method."""
    counts = rows[0]["counts"]
    shown = sorted({round(each) for each in np.linspace(0, len(counts) - 1, columns)})
    titles = ["method", "seeds", *(f"{counts[at]} labels" for at in shown), "area", *more]
    lines = [_line(titles), "|" + "---|" * len(titles)]
    for name, each in by_name(rows, methods).items():
        percents = [plus_minus(100 * values(each)[:, at]) for at in shown]
        area = plus_minus(100 * np.array([row["area"] for row in each]))
        cells = [column(each) for column in more.values()]
        lines.append(_line([methods[name].label, str(len(each)), *percents, area, *cells]))
    return [*lines, ""]


def paired(
    rows: list[Row],
    methods: Mapping[str, Method],
    pairs: Sequence[tuple[str, str]],
    more: Mapping[str, Callable[[Row, Row], float]] | None = None,
) -> list[str]:
    """Markdown: by how many points one method's area is larger than another's, with the same seeds.

    more: what else is told of a pair of rows, the mean over seeds.
    """
    found, lines = by_name(rows, methods), []
    for name, against in pairs:
        both = [
            (one, its) for one in found.get(name, []) for its in found.get(against, []) if one["seed"] == its["seed"]
        ]
        if both:
            gains = 100 * np.array([one["area"] - its["area"] for one, its in both])
            title = f"{methods[name].label} − {methods[against].label}"
            cells = [f"{np.mean([each(*pair) for pair in both]):.0f}" for each in (more or {}).values()]
            lines.append(_line([title, plus_minus(gains, "+"), ", ".join(f"{gain:+.1f}" for gain in gains), *cells]))
    titles = ["area", "difference", "by seed", *(more or {})]
    return [*([_line(titles), "|" + "---|" * len(titles)] if lines else []), *lines, ""]


def mean(key: str, digits: int = 1) -> Column:
    """A column: the mean of what the rows keep by this key, numbers or lists of them."""
    return lambda rows: f"{np.mean([np.mean(row[key]) for row in rows]):.{digits}f}"


def saturated(rows: list[Row]) -> str:
    """A column: how many picks of a batch were warned of as SATURATED, where there are any."""
    counts = [each for row in rows for each in row.get("saturated", ())]
    return f"{np.mean(counts):.1f}" if counts else ""


def plus_minus(numbers: NDArray[np.floating[Any]], sign: str = "") -> str:
    """The mean with its standard error, where there are several."""
    error = f" ± {numbers.std(ddof=1) / np.sqrt(len(numbers)):.1f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():{sign}.1f}{error}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parser(
    module: str, doc: str | None, methods: Mapping[str, Method], folder: str, seeds: int = 3
) -> argparse.ArgumentParser:
    """The command line of a reproduction, with what can be chosen of every one. folder: what `--data` is."""
    summary = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.reproductions.{module}", description=summary)
    parser.add_argument("--data", type=Path, required=True, help=folder)
    parser.add_argument("--seeds", type=int, default=seeds, help="how many (default %(default)s)")
    every = ", ".join(methods)
    parser.add_argument(
        "--methods", nargs="+", choices=methods, default=list(methods), metavar="METHOD", help=f"of {every}"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """What was chosen; ends the process where that is no seed."""
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 1:
        parser.error("there must be a seed")
    return chosen


def each_set(
    parser: argparse.ArgumentParser,
    settings: Mapping[str, Setting],
    arguments: list[str] | None,
    series: Callable[[str, LabeledSet, argparse.Namespace], None],
) -> int:
    """Lets `--set` choose among the settings, loads what they are of, and runs a series on each; the exit status."""
    parser.add_argument("--set", nargs="+", choices=settings, default=list(settings), help="default: all")
    chosen = parsed(parser, arguments)
    try:
        sets = {name: load(chosen.data, settings[name].source) for name in chosen.set}
    except (MissingData, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for name, data in sets.items():
        series(name, data, chosen)
    return 0
