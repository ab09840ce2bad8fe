"""Fast Fishing's comparison, run again: what BAIT's cheaper forms give up in accuracy, and what they save in seconds.

Huseljic, Hahn, Herde, Rauch and Sick, Fast Fishing: approximating BAIT for efficient and scalable deep active image
classification (2024), arXiv:2404.08981. Its Exp c is `bait` with top_classes=c. Here as there, features are frozen and
a linear head is trained anew in every round; sets, features and sizes are others (see README.md).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from benchmarks import machine
from benchmarks.reproductions.data import LabeledSet, MissingData, load
from benchmarks.reproductions.drawing import draw
from queryselect import Client, Picks
from queryselect.simulate import Curves, Model, curves, linear_probe

NAME = "reproduction-fast-fishing"
FULL = "full"
ABSOLUTE = {"ridge_scale": "ABSOLUTE"}
STRATEGIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "random": ("random", {}),
    "margin": ("margin", {}),
    "badge": ("badge", {}),
    "Exp c=1": ("bait", {"top_classes": 1}),
    "Exp c=2": ("bait", {"top_classes": 2}),
    "Exp c=2, absolute": ("bait", {"top_classes": 2, **ABSOLUTE}),
    "Exp c=5": ("bait", {"top_classes": 5}),
    FULL: ("bait", {}),
    "diagonal": ("bait_diagonal", {}),
    "binary": ("bait_binary", {}),
    "binary, absolute": ("bait_binary", ABSOLUTE),
}
PAIRS = (
    ("Exp c=1", FULL),
    ("Exp c=2", FULL),
    ("Exp c=5", FULL),
    ("diagonal", FULL),
    ("binary", FULL),
    ("Exp c=1", "Exp c=2"),
    ("binary", "Exp c=2"),
    ("Exp c=2", "Exp c=2, absolute"),
    ("binary", "binary, absolute"),
    ("Exp c=2", "margin"),
    ("binary", "margin"),
)


@dataclass(frozen=True)
class Setting:
    """What one comparison runs on.

    source: the set in the data folder. rows: the most of its pool, one uniform draw for every strategy and seed.
    classes: how many of its classes, drawn too; None: all. dimensions: principal components that features are reduced
    to; None: none. without: strategies that would take too long.
    """

    source: str
    rows: int
    initial: int
    budget: int
    rounds: int
    classes: int | None = None
    dimensions: int | None = None
    without: tuple[str, ...] = ()

    @property
    def quick(self) -> Setting:
        """So small that it only shows that everything runs."""
        return replace(self, rows=min(self.rows, 300), initial=20, budget=4, rounds=2, classes=self.classes and 6)


SETTINGS = {
    # Full BAIT at 77 classes of 384 dimensions takes minutes for ten picks from hundreds of rows: it is compared there
    # on a small pool, and at fewer dimensions or classes on larger ones.
    "banking77": Setting("banking77", rows=1500, initial=77, budget=40, rounds=5, without=(FULL,)),
    "banking77-400rows": Setting("banking77", rows=400, initial=77, budget=10, rounds=3),
    "banking77-32dims": Setting("banking77", rows=800, initial=77, budget=40, rounds=4, dimensions=32),
    "banking77-26classes": Setting("banking77", rows=1000, initial=26, budget=20, rounds=4, classes=26),
    "mnist": Setting("mnist", rows=3000, initial=20, budget=25, rounds=6),
    "mnist-imbalance10": Setting("mnist-imbalance10", rows=3000, initial=20, budget=25, rounds=6),
    "mnist-imbalance100": Setting("mnist-imbalance100", rows=3000, initial=20, budget=25, rounds=6),
}


class Timed(Client):
    """A client in whose process selections run, and which keeps the CPU seconds of each.

    Other work on the machine makes a selection wait, but takes no CPU seconds of its.
    """

    def __init__(self) -> None:
        super().__init__("local:")
        self.cpu: list[float] = []

    def select(self, *arguments: Any, **options: Any) -> Picks:
        """As Client.select."""
        started = time.process_time()
        picks = super().select(*arguments, **options)
        self.cpu.append(time.process_time() - started)
        return picks


@dataclass(frozen=True)
class Found:
    """What a comparison found. cpu: CPU seconds of a selection by strategy, the mean over seeds and rounds."""

    curves: Curves
    cpu: Mapping[str, float]


def plain_probe(features: NDArray[np.floating[Any]]) -> Callable[[], Model]:
    """Logistic regression on features divided by one number, so that their mean square is 1.

    No feature is standardised by itself, so that the head sees the geometry that the Fisher information is of, and the
    noise in PCA's last components stays as small as it is.
    """
    # Dividing all features by s is the same as multiplying C by 1/s².
    weight = 1.0 / float(np.mean(np.square(features, dtype=np.float64)))

    def make() -> Model:
        model: Model = LogisticRegression(C=weight, max_iter=1000)
        return model

    return make


PROBES: dict[str, Callable[[NDArray[np.floating[Any]]], Callable[[], Model]]] = {
    "standardised": lambda _: linear_probe,
    "plain": plain_probe,
}


def pool(setting: Setting, folder: Path) -> LabeledSet:
    """The set that a comparison is on."""
    found = load(folder, setting.source)
    if setting.classes is not None:
        every = np.unique(found.labels)
        some = np.random.default_rng(0).choice(every, min(setting.classes, len(every)), replace=False)
        found = found.of_classes(some)
    if setting.dimensions is not None:
        found = found.projected(setting.dimensions)
    return found.sample(setting.rows)


def wanted(client: Client, setting: Setting, classes: int) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The strategies by what they are called here: those that the server has, and of Exp c what leaves a class out."""
    served = {each.name for each in client.strategies()}
    return {
        name: (strategy, params)
        for name, (strategy, params) in STRATEGIES.items()
        if strategy in served and name not in setting.without and params.get("top_classes", 0) < classes
    }


def paired(found: Curves, one: str, other: str) -> tuple[float, float]:
    """By how much the one's area exceeds the other's, seed by seed: the mean, and its standard error."""
    gain = found.area(one) - found.area(other)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else float("nan")


def overlap(found: Curves, one: str, other: str) -> float:
    """The share of the first round's picks that both chose, from the same labelled rows: the mean over seeds."""
    return float(
        np.mean(
            [
                len(np.intersect1d(a[0].indices, b[0].indices)) / len(a[0].indices)
                for a, b in zip(found.picks[one], found.picks[other], strict=True)
            ]
        )
    )


def pairs(found: Found) -> list[dict[str, Any]]:
    """The comparisons that the paper makes, of the strategies that ran."""
    rows = []
    for one, other in PAIRS:
        if one in found.cpu and other in found.cpu:
            mean, error = paired(found.curves, one, other)
            row = {"one": one, "other": other, "area": mean, "standard error": error}
            row["first picks in common"] = overlap(found.curves, one, other)
            row["CPU seconds, other / one"] = found.cpu[other] / found.cpu[one]
            rows.append(row)
    return rows


def said(found: Found) -> str:
    """What was measured, as text."""
    width = max(len(name) for name in found.cpu)
    lines = [found.curves.table(), "", "a selection, mean".ljust(width) + " CPU seconds   seconds"]
    for name, seconds in found.curves.seconds.items():
        lines.append(f"{name.ljust(width)} {found.cpu[name]:11.3f} {seconds:9.3f}")
    lines += ["", "area of one less the other's, in points, paired by seed"]
    for row in pairs(found):
        title = f"{row['one']} - {row['other']}"
        error = "" if np.isnan(row["standard error"]) else f" ± {100 * row['standard error']:.2f}"
        lines.append(
            f"{title.ljust(38)} {100 * row['area']:+6.2f}{error}"
            f"   first picks in common {100 * row['first picks in common']:3.0f} %"
            f"   CPU seconds {row['CPU seconds, other / one']:.3g} times the one's"
        )
    return "\n".join(lines)


def result(found: Found, setting: Setting, data: LabeledSet, seeds: int, probe: str) -> dict[str, Any]:
    """What is kept."""
    curve = found.curves
    return {
        "machine": {**machine.describe(), "threads": str(torch.get_num_threads())},
        "set": {
            "name": setting.source,
            "pool rows": len(data.labels),
            "test rows": len(data.test_labels),
            "dimensions": data.features.shape[1],
            "classes": data.classes,
        },
        "probe": probe,
        "initial": setting.initial,
        "budget": setting.budget,
        "rounds": setting.rounds,
        "seeds": seeds,
        "counts": curve.counts,
        "strategies": {
            name: {
                "accuracy": curve.mean(name).tolist(),
                "standard error": _numbers(curve.standard_error(name)),
                "area": curve.area(name).tolist(),
                "CPU seconds": found.cpu[name],
                "seconds": curve.seconds[name],
                "warned": _warned(curve, name),
            }
            for name in curve.accuracy
        },
        "pairs": [{**row, "standard error": _number(row["standard error"])} for row in pairs(found)],
    }


def _warned(found: Curves, name: str) -> dict[str, float]:
    """The share of the selections that warned of each code."""
    picks = [each for run in found.picks[name] for each in run]
    codes = sorted({warning.code for each in picks for warning in each.warnings})
    return {code: float(np.mean([any(w.code == code for w in each.warnings) for each in picks])) for code in codes}


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(x) else x


def _numbers(x: NDArray[np.floating[Any]]) -> list[float | None]:
    return [_number(each) for each in x.tolist()]


def compare(name: str, chosen: argparse.Namespace, client: Timed) -> None:
    """Runs one comparison; prints and keeps what was found."""
    setting = SETTINGS[name].quick if chosen.quick else SETTINGS[name]
    data = pool(setting, chosen.data)
    strategies = wanted(client, setting, data.classes)
    print(
        f"\n{name}: {len(data.labels)} rows of the pool, drawn once for all strategies and seeds; {data.classes}"
        f" classes, {data.features.shape[1]} dimensions; {len(data.test_labels)} held out; {chosen.probe} probe;"
        f" {setting.initial} labels at first, {setting.rounds} rounds of {setting.budget}, {chosen.seeds} seeds;"
        f" not run: {', '.join(sorted(set(STRATEGIES) - set(strategies))) or 'none'}",
        flush=True,
    )
    before = len(client.cpu)
    curve = curves(
        client,
        data.features,
        data.labels,
        test_features=data.test_features,
        test_labels=data.test_labels,
        strategies=strategies,
        rounds=setting.rounds,
        budget=setting.budget,
        initial=setting.initial,
        seeds=range(chosen.seeds),
        model=PROBES[chosen.probe](data.features),
    )
    # The selections come strategy by strategy.
    cpu = np.reshape(client.cpu[before:], (len(strategies), -1)).mean(axis=1).tolist()
    found = Found(curve, dict(zip(strategies, cpu, strict=True)))
    print(said(found), flush=True)
    suffix = [*(["plain"] if chosen.probe == "plain" else []), *(["quick"] if chosen.quick else [])]
    kind = "-".join([NAME, name, *suffix])
    path = machine.keep(kind, machine.name(), result(found, setting, data, chosen.seeds, chosen.probe), chosen.results)
    path.with_suffix(".svg").write_text(
        draw(curve.counts, {name: curve.mean(name) for name in curve.accuracy}), encoding="utf-8"
    )
    print(f"kept in {path}, drawn in {path.with_suffix('.svg')}", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproductions.fast_fishing", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER", help="see benchmarks/reproductions/data.py"
    )
    parser.add_argument("--set", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    parser.add_argument("--seeds", type=int, default=5, help="default %(default)s")
    parser.add_argument(
        "--probe", choices=PROBES, default="standardised", help="the model trained (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.seeds < 1:
        parser.error(f"there must be a seed; there are {chosen.seeds}")
    try:
        for name in chosen.set:
            load(chosen.data, SETTINGS[name].source)
    except (MissingData, ValueError) as error:
        parser.error(str(error))
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for; every comparison is kept as soon as it is there."""
    chosen = parse(arguments)
    with Timed() as client:
        for name in chosen.set:
            compare(name, chosen, client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
