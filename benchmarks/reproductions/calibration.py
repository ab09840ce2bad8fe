"""What a badly calibrated model costs: the same series with the model's logits multiplied before strategies see them.

The model that is measured, and the labels that it learns from at first, are the same; only what strategies are told of
its certainty differs. A factor changes no predicted class.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproductions import runs
from benchmarks.reproductions.data import LabeledSet
from benchmarks.reproductions.fast_fishing import plain_probe
from benchmarks.reproductions.runs import Method, Row
from queryselect import Client
from queryselect.simulate import Offer, Strategy, curves

NAME = "reproduction-calibration"
STRATEGIES = {
    "margin": "margin",
    "entropy": "entropy",
    "badge": "BADGE",
    "bait_binary": "BAIT-Binary",
    "uncertainty_herding": "u. herding",
}
#: What logits are multiplied by: too unsure, as it is, too sure.
FACTORS = (0.2, 1.0, 5.0)


def told(name: str, factor: float) -> Strategy:
    """A strategy that is told of logits `factor` times as large."""

    def choose(offer: Offer) -> NDArray[np.int64]:
        with Client("local:") as client:
            return client.select(
                name,
                offer.budget,
                embeddings=offer.embeddings,
                logits=factor * offer.log_probabilities,
                labeled=offer.labeled,
                seed=offer.seed,
            ).indices

    return choose


METHODS: Mapping[str, Method] = {
    "random": Method("random", "random"),
    **{
        f"{name}-{factor:g}": Method(f"{label} × {factor:g}", told(name, factor))
        for name, label in STRATEGIES.items()
        for factor in FACTORS
    },
}
PAIRS = (
    *((name, "random") for name in METHODS if name != "random"),
    *((f"{name}-{factor:g}", f"{name}-1") for name in STRATEGIES for factor in FACTORS if factor != 1),
)


@dataclass(frozen=True)
class Setting:
    """What a series runs on. rows: of the pool, drawn by each seed; initial: rows labelled first, drawn too."""

    source: str
    rows: int
    initial: int
    budget: int
    rounds: int

    @property
    def quick(self) -> Setting:
        """So small that it only shows that everything runs."""
        return replace(self, rows=200, initial=min(self.initial, 20), budget=10, rounds=2)


SETTINGS = {
    "banking77": Setting("banking77", rows=5000, initial=154, budget=77, rounds=8),
    "mnist": Setting("mnist", rows=10_000, initial=20, budget=20, rounds=9),
}


def play(data: LabeledSet, name: str, seed: int, setting: Setting) -> Row:
    """What is kept of one method with one seed, which draws the pool too."""
    pool = data.sample(setting.rows, seed)
    with Client("local:") as client, warnings.catch_warnings():
        # What scikit-learn says of many classes with few rows each.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        found = curves(
            client,
            pool.features,
            pool.labels,
            test_features=pool.test_features,
            test_labels=pool.test_labels,
            strategies={name: METHODS[name].strategy},
            rounds=setting.rounds,
            budget=setting.budget,
            initial=setting.initial,
            seeds=[seed],
            model=plain_probe(pool.features),
            progress=False,
        )
    return runs.row(found, name, seed)


def report(rows: list[Row]) -> str:
    """What was measured, in Markdown."""
    return "\n".join([*runs.table(rows, METHODS, {}, columns=4), *runs.paired(rows, METHODS, PAIRS)])


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for and was not kept before, and tells it."""
    parser = runs.parser("calibration", __doc__, METHODS, "a folder that holds banking77/ and mnist/")
    return runs.each_set(parser, SETTINGS, arguments, series)


def series(of_set: str, data: LabeledSet, chosen: argparse.Namespace) -> None:
    """One set: what is asked for and was not kept before, told."""
    setting = SETTINGS[of_set].quick if chosen.quick else SETTINGS[of_set]
    kind = "-".join([NAME, of_set, *(["quick"] if chosen.quick else [])])
    tasks = [(name, seed) for seed in range(chosen.seeds) for name in chosen.methods]
    rows = runs.play(kind, asdict(setting), tasks, lambda name, seed: play(data, name, seed, setting), chosen.results)
    print(report(rows))


if __name__ == "__main__":
    sys.exit(main())
