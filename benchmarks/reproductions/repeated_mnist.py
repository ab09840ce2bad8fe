"""BatchBALD on repeated MNIST: what a batch of the ten best rows is worth where every image comes three times.

Kirsch, van Amersfoort and Gal, BatchBALD: efficient and diverse batch acquisition for deep Bayesian active learning
(NeurIPS 2019), section 4.1. A small convolutional network with Monte-Carlo dropout is trained anew in every round.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.reproductions import runs
from benchmarks.reproductions.data import MissingData
from benchmarks.reproductions.dropout import ConvNet, MonteCarloDropout, Training
from benchmarks.reproductions.mnist import CLASSES, read
from benchmarks.reproductions.runs import Method, Row
from queryselect import Client
from queryselect.simulate import curves

NAME = "reproduction-repeated-mnist"
METHODS: Mapping[str, Method] = {
    "random": Method("random", "random"),
    "entropy": Method("predictive entropy", "predictive_entropy"),
    "bald": Method("BALD", "bald"),
    "power": Method("PowerBALD", "power_bald"),
    "batch": Method("BatchBALD", ("batch_bald", {"num_samples": 2000})),
}
PAIRS = (
    ("bald", "random"),
    ("batch", "random"),
    ("batch", "bald"),
    ("power", "random"),
    ("power", "bald"),
    ("batch", "power"),
    ("entropy", "random"),
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. initial: labelled images of each class at first. samples: of the network's parameters."""

    unique: int = 1500
    copies: int = 3
    noise: float = 0.1
    initial: int = 2
    budget: int = 10
    rounds: int = 10
    test: int = 2000
    samples: int = 50
    channels: tuple[int, int] = (8, 16)
    hidden: int = 64
    steps: int = 400


QUICK = Sizes(unique=150, rounds=2, test=100, samples=4, channels=(2, 2), hidden=8, steps=5)


@dataclass(frozen=True)
class Repeated:
    """A pool (N, 784) with its classes, in which row r is image r modulo `unique`; test images; rows labelled first."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]
    start: NDArray[np.int64]


def repeated(folder: Path, sizes: Sizes, seed: int) -> Repeated:
    """Draws the images, repeats them with noise, and draws as many of each class to begin with. Raises MissingData."""
    rng = np.random.default_rng(seed)
    train, _, test = read(folder)
    drawn = rng.choice(len(train), min(sizes.unique, len(train)), replace=False)
    x, y = (np.tile(each.numpy()[drawn].reshape(len(drawn), -1), (sizes.copies, 1)) for each in (train.x, train.y))
    y = y[:, 0]
    x += rng.normal(scale=sizes.noise, size=x.shape).astype(x.dtype)
    start = [
        rng.choice(np.flatnonzero(y[: len(drawn)] == each), sizes.initial, replace=False) for each in range(CLASSES)
    ]
    test_x, test_y = test.x[: sizes.test].flatten(1).numpy(), test.y[: sizes.test].numpy()
    return Repeated(x, y, test_x, test_y, np.concatenate(start))


def play(folder: Path, name: str, seed: int, sizes: Sizes) -> Row:
    """What is kept of one method with one seed.

    repeats: by round, the picks whose image was picked in the same batch already. known: those whose image had a label.
    """
    data = repeated(folder, sizes, seed)
    training = Training((0.5, 0.5, 0.5), steps=sizes.steps, samples=sizes.samples)

    def make(seed: int) -> MonteCarloDropout:
        return MonteCarloDropout(lambda: ConvNet(sizes.channels, sizes.hidden, CLASSES), training, seed)

    with Client("local:") as client:
        found = curves(
            client,
            data.x,
            data.y,
            test_features=data.test_x,
            test_labels=data.test_y,
            strategies={name: METHODS[name].strategy},
            rounds=sizes.rounds,
            budget=sizes.budget,
            initial=data.start[None],
            seeds=[seed],
            model=make,
        )
    images = found.rows[name][0] % (len(data.x) // sizes.copies)  # (rounds, budget)
    return runs.row(found, name, seed, **repetitions(images, data.start))


def repetitions(images: NDArray[np.int64], start: NDArray[np.int64]) -> dict[str, list[int]]:
    """By round, how many of these images (rounds, budget) repeat one of their batch, and how many one of before."""
    repeats, known, before = [], [], start
    for batch in images:
        repeats.append(len(batch) - len(np.unique(batch)))
        known.append(int(np.isin(batch, before).sum()))
        before = np.concatenate([before, batch])
    return {"repeats": repeats, "known": known}


def report(rows: list[Row]) -> str:
    """What was measured, in Markdown."""
    more = {
        "repeats in a batch": runs.mean("repeats"),
        "of images with a label": runs.mean("known"),
        "saturated": runs.saturated,
        "seconds": runs.mean("seconds", 2),
    }
    return "\n".join([*runs.table(rows, METHODS, more), *runs.paired(rows, METHODS, PAIRS)])


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for and was not kept before."""
    chosen = runs.parsed(runs.parser("repeated_mnist", __doc__, METHODS, "a folder that holds mnist/"), arguments)
    sizes = QUICK if chosen.quick else Sizes()
    kind = NAME + ("-quick" if chosen.quick else "")
    try:
        read(chosen.data)
    except MissingData as error:
        print(error, file=sys.stderr)
        return 2
    about: dict[str, Any] = asdict(sizes)
    tasks = [(name, seed) for seed in range(chosen.seeds) for name in chosen.methods]
    rows = runs.play(kind, about, tasks, lambda name, seed: play(chosen.data, name, seed, sizes), chosen.results)
    runs.show(kind, rows, METHODS, report(rows), chosen.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
