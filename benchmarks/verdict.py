"""What was measured of a case, judged: ratios, picks, the fraction of the machine's ceiling, goals met or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from benchmarks.case import OURS, Benchmark, Case
from benchmarks.measure import Way
from benchmarks.report import Row


def judge(benchmark: Benchmark, case: Case, found: list[Way], ceilings: Mapping[str, float]) -> Row:
    """The case as it is kept: sizes, one row for ours and for every peer, and the goals."""
    least = benchmark.least(case, ceilings)
    rows = [_row(way, found[0], least, comparable=way.exact or not benchmark.seeded) for way in found]
    return {
        "title": benchmark.title,
        "case": str(case),
        "sizes": {letter: size for letter, size in asdict(case.known).items() if size},
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor": {name: float(amount) for name, amount in benchmark.floor(case.known).items()},
        "seconds at the ceiling": least,
        "ways": rows,
        "goals": list(_goals(case, rows)),
    }


def _row(way: Way, ours: Way, least: float, *, comparable: bool) -> Row:
    picked = comparable and way is not ours and way.picks is not None and ours.picks is not None
    return {
        "name": way.name,
        "label": ", ".join(each for each in (way.label, way.part) if each),
        "seconds": way.median,
        "rounds": way.seconds,
        "of ours": way.median / ours.median if way.median and ours.median else None,
        "of the ceiling": least / way.median if way.median else None,
        "picks": alike(ours.picks or [], way.picks or []) if picked else None,
        "exact": way.exact,
        "peak MB": way.peak,
        "trouble": way.trouble,
    }


def alike(ours: list[int], theirs: list[int]) -> str:
    """How many of their picks, the first ones where they ran a part, are ours."""
    same, asked = len(set(ours[: len(theirs)]) & set(theirs)), len(theirs)
    if ours[:asked] == theirs:
        return "same"
    return "same set" if same == asked else f"{same} of {asked}"


def _goals(case: Case, rows: list[Row]) -> Iterable[Row]:
    """Every goal of the case, with what was reached; where that is nothing, nobody knows whether it is met."""
    by_name = {row["name"]: row for row in rows}
    ours = by_name[OURS]
    for name, ratio in case.ratios.items():
        reached = by_name[name]["of ours"]
        yield _goal(f"{ratio:g} times faster than {by_name[name]['label']}", reached, reached and reached >= ratio)
    if case.ceiling is not None:
        reached = ours["of the ceiling"]
        yield _goal(f"{case.ceiling:.0%} of the ceiling", reached, reached and reached >= case.ceiling)
    if case.peak is not None:
        reached = ours["peak MB"]
        yield _goal(f"at most {1e3 * case.peak:g} MB", reached, reached and reached <= 1e3 * case.peak)
    for row in rows:
        if row["exact"] and (row["picks"] or row["trouble"]):
            yield _goal(f"the picks of {row['label']}", row["picks"], row["picks"] and row["picks"] == "same")


def _goal(said: str, reached: Any, met: Any) -> Row:
    return {"goal": said, "reached": reached, "met": None if reached is None else bool(met)}
