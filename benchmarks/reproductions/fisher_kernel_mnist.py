"""The Fisher kernel on MNIST with five rare classes: labels spent and accuracy gained, beside the paper's figures.

Gudovskiy, Hodgkinson, Yamaguchi and Tsukizawa, Deep active learning for biased datasets via Fisher kernel
self-supervision (CVPR 2020). A network is trained on what was asked for so far; what to ask for next is what is most
like the images of a balanced, labelled validation set that it gets wrong. Those are never trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import machine
from benchmarks.reproductions import lenet
from benchmarks.reproductions.data import MissingData
from benchmarks.reproductions.drawing import draw
from benchmarks.reproductions.mnist import FIRST_RARE, Images, Split, read, split
from benchmarks.reproductions.runs import plus_minus
from queryselect import Client

NAME = "reproduction-fisher-kernel-mnist"
#: Of how many unlabelled images the variation ratio is computed, and by how many samples.
CANDIDATES, SAMPLES = 10_000, 16

Integers = NDArray[np.int64]
#: The name of a method and a seed, with accuracy and share of rare classes by round.
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A way to choose: what it is called, what fisher_kernel is told, and the paper's curve in per cent by round.

    The curve is read off plots, of what stands in `paper_of`; None where neither text nor plot tells a round.
    """

    label: str
    kernel: str = ""
    pseudo_label: str = ""
    paper_of: str = ""
    paper: tuple[float | None, ...] = ()


def _curve(first: tuple[float, ...], last: float) -> tuple[float | None, ...]:
    """The first rounds, and the tenth."""
    return (*first, *[None] * (9 - len(first)), last)


METHODS: Mapping[str, Method] = {
    "random": Method("random", paper_of="random", paper=_curve((50.5,), 67)),
    "varR": Method(
        "varR, 16 samples", paper_of="varR, 4 networks × 32 samples", paper=_curve((51, 67.5, 79, 87.2, 90.5), 93)
    ),
    "PCC": Method("PCC", "PCC", paper_of="PCC, L=20", paper=_curve((60.5, 71.3, 78.5, 82, 85), 89)),
    "predicted": Method("PFK ŷ, SUM", "SUM", "PREDICTED", "PFK ŷ, L=20", _curve((59, 72.7, 80, 84.3, 86.1), 90.8)),
    "nearest": Method(
        "PFK p̂(y,z), SUM", "SUM", "NEAREST", "PFK p̂(y,z), L=80", _curve((71.5, 84, 90, 91.3, 92.4), 93.5)
    ),
    "nearest-product": Method("PFK p̂(y,z), PRODUCT", "PRODUCT", "NEAREST"),
    "true": Method("PFK true labels, SUM", "SUM", "PROVIDED", "PFK true labels, L=20", _curve((84.5, 92.5, 94.3), 95)),
}
#: What all labels are worth: those of the pool, where the paper has about 92.5 %, and those of the validation set.
WHOLE = {
    "pool": "Trained on the whole imbalanced pool (paper: ~92.5)",
    "validation": "Trained on the validation set alone",
}
#: Whose gains over what are shown.
PAIRS = (
    ("varR", "random"),
    ("PCC", "random"),
    ("PCC", "varR"),
    ("predicted", "PCC"),
    ("nearest", "PCC"),
    ("nearest", "predicted"),
    ("nearest", "varR"),
    ("nearest-product", "nearest"),
    ("true", "nearest"),
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. validation: labelled images a class, of which none is trained on."""

    budget: int = 125
    rounds: int = 10
    validation: int = 1000
    steps: int = 500
    epochs_of_all: int = 20


QUICK = Sizes(budget=20, rounds=2, validation=50, steps=50, epochs_of_all=1)


class Run:
    """One method with one seed: asks, labels, trains, measures, round by round.

    The network goes on from where the last round left it, as the authors' does: hundreds of steps are then enough.
    """

    def __init__(self, client: Client, method: Method, data: Split, sizes: Sizes, seed: int) -> None:
        self._client, self._method, self._data, self._sizes, self._seed = client, method, data, sizes, seed
        self._net = _new(seed)
        self.labeled = np.empty(0, np.int64)

    def rounds(self) -> Iterator[tuple[float, float]]:
        """The accuracy on the test set, and the share of rare classes in all that was asked for, after each round."""
        for at in range(self._sizes.rounds):
            seed = 1000 * self._seed + at
            self.labeled = np.concatenate([self.labeled, self._choose(seed)])
            known = self._data.pool.of(self.labeled)
            lenet.train(self._net, known.x, known.y, self._sizes.steps, seed)
            rare = float((known.y >= FIRST_RARE).double().mean())
            yield lenet.accuracy(self._net, self._data.test.x, self._data.test.y), rare

    def _choose(self, seed: int) -> Integers:
        """The next rows of the pool. A network that has learnt nothing has no say in uncertainty, as in the paper."""
        if self._method.kernel:
            return self._by_kernel(seed)
        if self._method is METHODS["varR"] and len(self.labeled):
            return self._by_variation_ratio(seed)
        picks = self._client.select(
            "random", self._sizes.budget, num_rows=len(self._data.pool), labeled=self.labeled, seed=seed
        )
        return picks.indices

    def _by_variation_ratio(self, seed: int) -> Integers:
        """Of some unlabelled rows, those whose dropout samples disagree most; the order of the draw decides ties."""
        unlabeled = np.setdiff1d(np.arange(len(self._data.pool)), self.labeled)
        rng = np.random.default_rng(seed)
        rows = rng.choice(unlabeled, min(CANDIDATES, len(unlabeled)), replace=False)
        ratios = lenet.variation_ratio(self._net, self._data.pool.of(rows).x, SAMPLES, seed)
        return rows[np.argsort(-ratios, kind="stable")[: self._sizes.budget]]

    def _by_kernel(self, seed: int) -> Integers:
        """What the server's fisher_kernel says; it is asked for labels first where it is to guess them."""
        pool, reference = _Described(self._net, self._data.pool), _Described(self._net, self._data.validation)

        def ask(**options: Any) -> Any:
            return self._client.select(
                "fisher_kernel",
                self._sizes.budget,
                scales=pool.scales,
                probabilities=pool.probabilities,
                labeled=self.labeled,
                reference={
                    "scales": reference.scales,
                    "probabilities": reference.probabilities,
                    "labels": self._data.validation.y.numpy(),
                },
                seed=seed,
                **options,
            )

        kernel, guess = self._method.kernel, self._method.pseudo_label
        if not guess:
            return np.asarray(ask(params={"kernel": kernel}).indices)
        given = {}
        if guess == "PREDICTED":  # the reference's gradients are of predictions too: the authors' choice
            pool.differentiate(pool.predicted)
            reference.differentiate(reference.predicted)
        else:
            if guess == "NEAREST":
                told = ask(params={"kernel": "PCC", "pseudo_label": guess}, returns=["PSEUDO_LABELS"])
                labels = told.pseudo_labels
            else:
                labels = given["pseudo_labels"] = self._data.pool.y.numpy()
            pool.differentiate(labels)
            reference.differentiate(self._data.validation.y.numpy())
        return np.asarray(ask(params={"kernel": kernel, "pseudo_label": guess}, **given).indices)


class _Described:
    """What a network makes of images, as the service takes it."""

    def __init__(self, net: lenet.LeNet, images: Images) -> None:
        self._net, self._x = net, images.x
        self.probabilities, embeddings = lenet.describe(net, images.x)
        self.scales = [{"embeddings": each} for each in embeddings]

    @property
    def predicted(self) -> Integers:
        """The likeliest classes, (n,)."""
        return np.asarray(self.probabilities.argmax(axis=1))

    def differentiate(self, labels: Integers) -> None:
        """Adds the gradients of the loss of these labels, (n,)."""
        found = lenet.gradients(self._net, self._x, torch.from_numpy(labels))
        for scale, each in zip(self.scales, found, strict=True):
            scale["gradients"] = each


def _new(seed: int) -> lenet.LeNet:
    """A network that has learnt nothing, the same for every method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return lenet.LeNet()


def trained_on(images: Images, test: Images, sizes: Sizes, seed: int) -> float:
    """The accuracy of a network that had the labels of all these images."""
    net = _new(seed)
    lenet.train(net, images.x, images.y, sizes.epochs_of_all * len(images) // lenet.MINIBATCH, seed)
    return lenet.accuracy(net, test.x, test.y)


def play(folder: Path, name: str, seed: int, sizes: Sizes) -> Row:
    """What is kept of one method or one of WHOLE, with one seed."""
    data = split(*read(folder), sizes.validation, seed)
    if name in WHOLE:
        images = data.pool if name == "pool" else data.validation
        rare = float((images.y >= FIRST_RARE).double().mean())
        return {"name": name, "seed": seed, "accuracy": [trained_on(images, data.test, sizes, seed)], "rare": [rare]}
    with Client("local:") as client:
        accuracies, rares = zip(*Run(client, METHODS[name], data, sizes, seed).rounds(), strict=True)
    return {"name": name, "seed": seed, "accuracy": list(accuracies), "rare": list(rares)}


def played(folder: Path, tasks: list[tuple[str, int]], sizes: Sizes, jobs: int) -> Iterator[Row]:
    """Every task's row, as soon as it is there: one after another, or in processes that share the cores."""
    if jobs == 1:
        for name, seed in tasks:
            yield play(folder, name, seed, sizes)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as workers:
        for done in as_completed([workers.submit(play, folder, name, seed, sizes) for name, seed in tasks]):
            yield done.result()


def report(rows: list[Row]) -> str:
    """What was measured, in Markdown: accuracy by round beside the paper's, area, rare classes, and paired gains."""
    found = {name: _by_seed(rows, name) for name in METHODS}
    found = {name: each for name, each in found.items() if each}
    lines = _accuracy_table(found) if found else []
    for name, of in WHOLE.items():
        if each := _by_seed(rows, name):
            percents = 100 * np.array([row["accuracy"][0] for row in each.values()])
            lines.append(f"{of}: {plus_minus(percents)} % of the test set right.\n")
    lines += _paired_table(found)
    return "\n".join(lines)


def drawing(rows: list[Row], sizes: Sizes) -> str:
    """The mean curves of what ran in two rounds or more; empty where nothing did."""
    found = {METHODS[name].label: list(_by_seed(rows, name).values()) for name in METHODS}
    counts = [sizes.budget * (at + 1) for at in range(sizes.rounds)]
    means = {label: np.mean([row["accuracy"] for row in each], axis=0) for label, each in found.items() if each}
    return draw(counts, means) if means and len(counts) > 1 else ""


def _by_seed(rows: list[Row], name: str) -> dict[int, Row]:
    return {row["seed"]: row for row in sorted(rows, key=lambda row: row["seed"]) if row["name"] == name}


def _accuracy_table(found: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """A line for each method, and one for the paper's."""
    rounds = len(next(row["accuracy"] for each in found.values() for row in each.values()))
    lines = [
        "| method | seeds |" + "".join(f" b={at + 1} |" for at in range(rounds)) + " area | rare % |",
        "|---|---|" + "---|" * rounds + "---|---|",
    ]
    for name, each in found.items():
        percents = 100 * np.array([row["accuracy"] for row in each.values()])  # (seeds, rounds)
        rare = 100 * np.mean([row["rare"][-1] for row in each.values()])
        cells = [plus_minus(its) for its in (*percents.T, percents.mean(axis=1))]
        lines.append(f"| {METHODS[name].label} | {len(each)} | {' | '.join(cells)} | {rare:.1f} |")
        if paper := METHODS[name].paper:
            told = ["" if its is None else f"~{its:g}" for its in paper[:rounds]]
            lines.append(f"| *paper: {METHODS[name].paper_of}* | 10 | {' | '.join(told)} | | |")
    return [*lines, ""]


def _paired_table(found: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """The gain in area of one method over another, seed by seed."""
    lines = []
    for name, against in PAIRS:
        seeds = [seed for seed in found.get(name, ()) if seed in found.get(against, ())]
        if seeds:
            ours, theirs = (np.array([found[each][seed]["accuracy"] for seed in seeds]) for each in (name, against))
            gains = 100 * (ours.mean(axis=1) - theirs.mean(axis=1))
            each = ", ".join(f"{gain:+.1f}" for gain in gains)
            lines.append(f"| {METHODS[name].label} − {METHODS[against].label} | {plus_minus(gains, '+')} | {each} |")
    return [*(["| area | difference | by seed |", "|---|---|---|"] if lines else []), *lines]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproductions.fisher_kernel_mnist", description=summary)
    parser.add_argument("--data", type=Path, required=True, help="a folder that holds mnist/")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    parser.add_argument("--rounds", type=int, help=f"of {Sizes.budget} labels each (default {Sizes.rounds})")
    every = [*METHODS, *WHOLE]
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="METHOD", help=", ".join(every))
    parser.add_argument("--quick", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cores (default %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep what was measured before with the same sizes")
    parser.add_argument("--results", type=Path, default=machine.RESULTS, help="a folder (default %(default)s)")
    chosen = parser.parse_args(arguments)
    if min(chosen.seeds, chosen.jobs, chosen.rounds or 1) < 1:
        parser.error("there must be a seed, a round and a process")
    return chosen


def measured(path: Path, sizes: Sizes) -> list[Row]:
    """What an earlier run with the same sizes kept."""
    kept = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[Row] = kept["rows"] if kept.get("sizes") == asdict(sizes) else []
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for. Every row is kept as soon as it is there: a whole run takes an hour."""
    chosen = parse(arguments)
    sizes = QUICK if chosen.quick else Sizes()
    if chosen.rounds:
        sizes = replace(sizes, rounds=chosen.rounds)
    kind = NAME + ("-quick" if chosen.quick else "")
    rows = measured(chosen.results / f"{kind}-{machine.name()}.json", sizes) if chosen.resume else []
    done = {(row["name"], row["seed"]) for row in rows}
    tasks = [(name, seed) for seed in range(chosen.seeds) for name in chosen.methods if (name, seed) not in done]
    try:
        read(chosen.data)
    except MissingData as error:
        print(error, file=sys.stderr)
        return 2
    about = {"machine": machine.describe(), "sizes": asdict(sizes)}
    for row in tqdm(played(chosen.data, tasks, sizes, chosen.jobs), total=len(tasks), unit="run"):
        rows.append(row)
        machine.keep(kind, machine.name(), {**about, "rows": rows}, chosen.results)
    print(report(rows))
    if drawn := drawing(rows, sizes):
        path = chosen.results / f"{kind}-{machine.name()}.svg"
        path.write_text(drawn, encoding="utf-8")
        print(f"drawn in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
