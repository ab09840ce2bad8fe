"""The tables, for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = dict[str, Any]
COLUMNS = {"seconds": 11, "rounds": 8, "/ ours": 10, "picks": 14, "of ceiling": 12, "peak MB": 10}


def ceilings(found: Mapping[str, float]) -> str:
    """What the machine does at best."""
    units = {"gemm f32": "Gflop/s", "gemm f64": "Gflop/s", "exp": "G/s", "log": "G/s"}
    rates = (f"{name} {rate / 1e9:.3g} {units.get(name, 'GB/s')}" for name, rate in found.items())
    return f"\nceilings: {', '.join(rates)}"


def case(row: Row) -> str:
    """A case: ours and the peers, and the goals."""
    width = max(len(way["label"]) for way in row["ways"])
    lines = [f"\n{row['title']}: {row['case']}", " " * (2 + width) + _cells(COLUMNS)]
    lines += [f"  {way['label']:{width}}{_way(way)}" for way in row["ways"]]
    lines += [f"  {way['label']}: {way['trouble']}" for way in row["ways"] if way["trouble"]]
    lines += [_goal(goal) for goal in row["goals"]]
    return "\n".join(lines)


def _way(way: Row) -> str:
    return _cells(
        (
            _number(way["seconds"], ".4g"),
            str(len(way["rounds"])),
            _number(way["of ours"], ".3g", "×"),
            way["picks"] or "",
            _number(way["of the ceiling"], ".0%"),
            _number(way["peak MB"], ".1f"),
        )
    )


def _goal(goal: Row) -> str:
    reached = f"{goal['reached']:.3g}" if isinstance(goal["reached"], float) else goal["reached"]
    verdict = {None: "not measured", True: f"{reached}, met", False: f"{reached}, NOT MET"}[goal["met"]]
    return f"  goal: {goal['goal']}: {verdict}"


def series(row: Row) -> str:
    """A doubling series: the sizes, what was measured, and its slope beside the theory's."""
    sizes = "".join(f"{size:12}" for size in row["sizes"])
    values = "".join(f"{value:12.4g}" for value in row["values"])
    return (
        f"\n{row['title']}: {row['what']} by {row['letter']}, {row['base']}\n"
        f"  {row['letter']:10}{sizes}\n  {row['what']:10}{values}\n"
        f"  slope {_number(row['slope'], '.2f') or 'unknown'}, by theory {_number(row['theory'], '.2f') or 'unknown'}"
    )


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
