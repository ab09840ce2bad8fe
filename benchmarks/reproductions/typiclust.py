"""TypiClust's claim, run again on frozen features: typical rows are worth more than a random draw while labels are few.

Hacohen, Dekel and Weinshall, Active learning on a budget: opposite strategies suit high and low budgets (ICML 2022),
arXiv:2202.02794. Here as in one of its frameworks, features are frozen and a linear head is trained anew in every
round. Nothing has a label at first: what needs no model chooses its own first batch.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproductions import runs
from benchmarks.reproductions.data import LabeledSet
from benchmarks.reproductions.fast_fishing import plain_probe
from benchmarks.reproductions.runs import Row
from queryselect import Client
from queryselect.simulate import Model, Offer, Strategy, curves

NAME = "reproduction-typiclust"
DROP_QUERY = "drop_query"

#: A strategy by its name, with its parameters.
Named = tuple[str, Mapping[str, Any]]
RANDOM: Named = ("random", {})
TYPICLUST: Named = ("typiclust", {})


@dataclass(frozen=True)
class Method(runs.Method):
    """A way to choose.

    first: what chooses its first batch, without labels and without a model. drawn: whether it is in the picture, which
    has no room for all.
    """

    strategy: Named
    first: Named = RANDOM
    drawn: bool = True


def cold(label: str, name: str, *, drawn: bool = True, **params: Any) -> Method:
    """A strategy that chooses its first batch itself."""
    return Method(label, (name, params), (name, params), drawn)


METHODS: Mapping[str, Method] = {
    "random": Method("random", RANDOM),
    "typiclust": cold("TypiClust", "typiclust"),
    "typiclust_uncapped": cold("TypiClust, no cap", "typiclust", drawn=False, max_clusters=100_000),
    "typiclust_to_margin": cold("TypiClust to margin", "typiclust_to_margin", drawn=False),
    "prob_cover": cold("ProbCover", "prob_cover"),
    # Radii at which as many balls as classes cover about half of banking77, and of MNIST.
    "prob_cover_0.7": cold("ProbCover, δ 0.7", "prob_cover", drawn=False, delta=0.7),
    "prob_cover_1": cold("ProbCover, δ 1", "prob_cover", drawn=False, delta=1.0),
    "max_herding": cold("MaxHerding", "max_herding"),
    "uncertainty_herding": cold("uncertainty herding", "uncertainty_herding"),
    "k_means": cold("k-means", "k_means"),
    "k_center_greedy": cold("k-center (core-set)", "k_center_greedy"),
    "discriminative": Method("discriminative", ("discriminative", {}), drawn=False),
    "margin": Method("margin", ("margin", {})),
    "entropy": Method("entropy", ("entropy", {})),
    "badge": Method("BADGE", ("badge", {})),
    "bait_binary": Method("BAIT-Binary", ("bait_binary", {})),
    DROP_QUERY: Method("DropQuery", (DROP_QUERY, {})),
    "margin_after": Method("TypiClust, margin", ("margin", {}), TYPICLUST, drawn=False),
    "bait_binary_after": Method("TypiClust, BAIT-B.", ("bait_binary", {}), TYPICLUST, drawn=False),
    "drop_query_after": Method("TypiClust, DropQ.", (DROP_QUERY, {}), TYPICLUST, drawn=False),
}


@dataclass(frozen=True)
class Setting:
    """What a series runs on.

    source: the set in the data folder. rows: of its pool, drawn by each seed. budget: rows of the first batch, which is
    chosen without labels, and of each of `rounds` more.
    """

    source: str
    rows: int
    budget: int
    rounds: int = 9

    @property
    def quick(self) -> Setting:
        """So small that it only shows that everything runs."""
        return replace(self, rows=min(self.rows, 200), budget=min(self.budget, 20), rounds=2)


SETTINGS = {
    # From 1 label per class to 10.
    "banking77": Setting("banking77", rows=5000, budget=77),
    "mnist": Setting("mnist", rows=10_000, budget=10),
    # From 5 to 50: where the advantage is to end.
    "mnist-long": Setting("mnist", rows=10_000, budget=50),
    # From 20 to 200.
    "mnist-late": Setting("mnist", rows=10_000, budget=200),
    "mnist-imbalanced": Setting("mnist-imbalance100", rows=10_000, budget=50),
}


def play(data: LabeledSet, name: str, seed: int, setting: Setting) -> Row:
    """What is kept of one method with one seed, which draws the pool too.

    classes: by round, how many of the pool's have a label. rare: the share of labels, in per cent, that went to the
    rarer half of the classes.
    """
    pool, method = data.sample(setting.rows, seed), METHODS[name]
    probe, heads = plain_probe(pool.features), []

    def make() -> Model:
        heads.append(probe())
        return heads[-1]

    with Client("local:") as client, warnings.catch_warnings():
        # What scikit-learn says of many classes with few rows each, which is what is measured here.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater")
        start = first_batch(client, method, pool, setting.budget, seed)
        strategy: Strategy = with_classes(method.strategy, data.classes)
        if method.strategy[0] == DROP_QUERY:
            strategy = lambda offer: drop_query(client, heads[-1], offer)  # noqa: E731  # mypy knows a lambda's type
        found = curves(
            client,
            pool.features,
            pool.labels,
            test_features=pool.test_features,
            test_labels=pool.test_labels,
            strategies={name: strategy},
            rounds=setting.rounds,
            budget=setting.budget,
            initial=start[None],
            seeds=[seed],
            model=make,
            progress=False,
        )
    batches = [start, *found.rows[name][0]]
    labels = pool.labels[np.concatenate(batches)]
    counted = np.cumsum([len(batch) for batch in batches])
    classes, sizes = np.unique(pool.labels, return_counts=True)
    rare = classes[np.argsort(sizes, kind="stable")][: len(classes) // 2]
    return runs.row(
        found,
        name,
        seed,
        classes=[len(np.unique(labels[:count])) for count in counted],
        rare=float(100 * np.isin(labels, rare).mean()),
    )


def with_classes(strategy: Named, classes: int) -> Named:
    """ProbCover, to find its radius by, is told how many classes there are; the others do not ask."""
    return (strategy[0], {"num_classes": classes}) if strategy == ("prob_cover", {}) else strategy


def first_batch(client: Client, method: Method, pool: LabeledSet, budget: int, seed: int) -> NDArray[np.int64]:
    """The rows (budget,) labelled first; a random draw is the same for all methods of a seed.

    What reads a model's predictions is given equal ones: there is no model yet, and uncertainty_herding and
    typiclust_to_margin then do not look at them.
    """
    if method.first == RANDOM:
        return np.random.default_rng(seed).choice(len(pool.labels), budget, replace=False)
    name, params = with_classes(method.first, pool.classes)
    (description,) = (each for each in client.strategies() if each.name == name)
    reads_predictions = any(each.name == "probabilities" and each.required for each in description.inputs)
    equal = np.zeros((len(pool.labels), pool.classes)) if reads_predictions else None
    picks = client.select(name, budget, params=params, embeddings=pool.features, logits=equal, seed=1000 * seed)
    return picks.indices


def drop_query(client: Client, head: Any, offer: Offer) -> NDArray[np.int64]:
    """DropQuery's picks by the linear head itself, which `curves` does not hand on: scikit-learn's, trained."""
    weights, bias = head.coef_, head.intercept_
    if len(weights) == 1:  # of two classes it has one row
        weights, bias = np.concatenate([-weights, weights]), np.concatenate([-bias, bias])
    picks = client.select(
        DROP_QUERY,
        offer.budget,
        embeddings=offer.embeddings,
        head_weights=weights,
        head_bias=bias,
        labeled=offer.labeled,
        seed=offer.seed,
    )
    return picks.indices


def report(rows: list[Row]) -> str:
    """What was measured, in Markdown."""
    pairs = [(name, "random") for name in METHODS if name != "random"]
    return "\n".join([*gains(rows), *runs.paired(rows, METHODS, pairs)])


def gains(rows: list[Row]) -> list[str]:
    """Markdown: the accuracy of random, per cent; of each other method, the points that it gains, paired by seed."""
    found, counts = runs.by_name(rows, METHODS), rows[0]["counts"]
    shown = sorted({at for at in (0, 1, 2, 4, len(counts) - 1) if at < len(counts)})
    drawn = {row["seed"]: row for row in found.get("random", [])}
    titles = ["gain over random", "seeds", *(f"{counts[at]} labels" for at in shown), "area", "classes", "rare %", "s"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name, each in found.items():
        told = [row for row in each if name == "random" or row["seed"] in drawn]
        cells = [_gain(told, drawn if name != "random" else {}, at) for at in (*shown, None)]
        more = [f"{np.mean([row['classes'][0] for row in told]):.1f}", runs.mean("rare")(told)]
        label, seconds = METHODS[name].label, runs.mean("seconds", 2)(told)
        lines.append(f"| {' | '.join([label, str(len(told)), *cells, *more, seconds])} |")
    return [*lines, ""]


def _gain(rows: list[Row], drawn: Mapping[int, Row], at: int | None) -> str:
    """The mean with its standard error at a point, or over the area; less what random has with the same seeds."""

    def measured(row: Row) -> float:
        return float(row["area"] if at is None else row["values"][at])

    less = [measured(drawn[row["seed"]]) if drawn else 0.0 for row in rows]
    numbers = 100 * (np.array([measured(row) for row in rows]) - less)
    return runs.plus_minus(numbers, "+" if drawn else "")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for and was not kept before."""
    parser = runs.parser("typiclust", __doc__, METHODS, "a folder that holds banking77/ and mnist/", seeds=5)
    return runs.each_set(parser, SETTINGS, arguments, series)


def series(of_set: str, data: LabeledSet, chosen: argparse.Namespace) -> None:
    """One set: what is asked for and was not kept before, told and drawn."""
    setting = SETTINGS[of_set].quick if chosen.quick else SETTINGS[of_set]
    kind = "-".join([NAME, of_set, *(["quick"] if chosen.quick else [])])
    tasks = [(name, seed) for seed in range(chosen.seeds) for name in differing(chosen.methods, setting, data)]
    rows = runs.play(kind, asdict(setting), tasks, lambda name, seed: play(data, name, seed, setting), chosen.results)
    drawn = {name: method for name, method in METHODS.items() if method.drawn}
    runs.show(kind, rows, drawn, report(rows), chosen.results)


def differing(methods: Sequence[str], setting: Setting, data: LabeledSet) -> list[str]:
    """The methods that do not end before they differ from TypiClust: at 20 labels a class, or at 500 clusters."""
    first_differ = {"typiclust_to_margin": 20 * data.classes, "typiclust_uncapped": 501 - setting.budget}
    last = setting.budget * setting.rounds  # the labels that the last batch is chosen with
    return [name for name in methods if first_differ.get(name, 0) <= last]


if __name__ == "__main__":
    sys.exit(main())
