"""Active learning on texts with several labels each, and the mistakes of an experiment beside the right calls.

A comparison on topics of texts had BALD worse than random drawing. It had given BALD probabilities where it takes
logarithms, had made multi-label outputs a distribution over labels, had probably left dropout off, and had asked for
the largest margins. Here the same is done to embedded texts with 28 labels and a small network.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reproductions import runs
from benchmarks.reproductions.data import LabeledSet, MissingData, load
from benchmarks.reproductions.dropout import MonteCarloDropout, Perceptron, Training
from benchmarks.reproductions.runs import Row
from queryselect import Client
from queryselect.simulate import MULTILABEL, Offer, curves

NAME = "reproduction-multilabel-text"
SET = "goemotions12k"


def mistaken_bald(probabilities: Tensor) -> Tensor:
    """BALD for logarithms of probabilities, given probabilities (N, K, C) all the same; (N,).

    It takes exp(p) for the probabilities that they are, and p for their logarithms:

        s = H(ln mean_k exp(p_k)) - mean_k H(p_k),   H(q) = -Σ_c exp(q_c) q_c

    Where samples differ little that is ½ Σ_c exp(m_c) Var_k(p_kc), with m their mean: not BALD, but disagreement too.

    >>> p = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]])
    >>> f"{mistaken_bald(p).item():.4f}, and {mistaken_bald(p.log()).item():.4f} given what it is for"
    '0.0673, and 0.1017 given what it is for'
    """

    def entropy(q: Tensor) -> Tensor:
        return -(q.exp() * q).sum(-1)

    together = probabilities.logsumexp(1) - math.log(probabilities.shape[1])
    return entropy(together) - entropy(probabilities).mean(1)


def _softmaxed(offer: Offer) -> Tensor:
    """Samples as if exactly one of the labels were right, (N, K, L)."""
    return torch.from_numpy(offer.samples).double().softmax(-1)


def _best(scores: Tensor, offer: Offer) -> NDArray[np.int64]:
    """The unlabelled rows of the highest scores (N,), ties to the lowest row, as the service has them."""
    scores[torch.from_numpy(offer.labeled)] = -math.inf
    return np.asarray(scores.argsort(descending=True, stable=True)[: offer.budget].numpy())


def _bald_softmaxed(offer: Offer) -> NDArray[np.int64]:
    p = _softmaxed(offer)
    return _best(torch.special.entr(p.mean(1)).sum(-1) - torch.special.entr(p).sum(-1).mean(1), offer)


def _bald_mistaken(offer: Offer) -> NDArray[np.int64]:
    return _best(mistaken_bald(_softmaxed(offer)), offer)


def _least_confidence_softmaxed(offer: Offer) -> NDArray[np.int64]:
    return _best(1 - _softmaxed(offer).mean(1).amax(-1), offer)


def _margin_largest(offer: Offer) -> NDArray[np.int64]:
    first, second = _softmaxed(offer).mean(1).topk(2).values.unbind(-1)
    return _best(first - second, offer)


@dataclass(frozen=True)
class Method(runs.Method):
    """A way to choose. dropout: whether it is on when samples are asked for. right: the method that it is to be."""

    dropout: bool = True
    right: str = ""


METHODS: Mapping[str, Method] = {
    "random": Method("random", "random"),
    "least-confidence": Method("least confidence", "least_confidence"),
    "margin": Method("margin", "margin"),
    "bald": Method("BALD", "bald"),
    "power": Method("PowerBALD", "power_bald"),
    # A few rows tell the parameter samples apart; two configurations of each are enough to see that.
    "batch": Method("BatchBALD", ("batch_bald", {"num_samples": 60})),
    "least-confidence-softmax": Method("softmax least conf.", _least_confidence_softmaxed, right="least-confidence"),
    "margin-largest": Method("largest margin", _margin_largest, right="margin"),
    "bald-softmax": Method("softmax BALD", _bald_softmaxed, right="bald"),
    "bald-mistaken": Method("softmax BALD of p", _bald_mistaken, right="bald"),
    "bald-off": Method("BALD, dropout off", "bald", dropout=False, right="bald"),
    "bald-all": Method("all BALD's mistakes", _bald_mistaken, dropout=False, right="bald"),
}
PAIRS = (
    *((name, "random") for name in METHODS if name != "random"),
    *((name, method.right) for name, method in METHODS.items() if method.right),
    ("bald-mistaken", "bald-softmax"),
    ("power", "bald"),
    ("batch", "bald"),
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. initial, budget: rows, or shares of the pool. retrain: or go on from the last round."""

    pool: int = 3000
    initial: float = 0.025
    budget: float = 0.025
    rounds: int = 8
    retrain: bool = True
    samples: int = 30
    hidden: int = 128
    steps: int = 500


def play(data: LabeledSet, name: str, seed: int, sizes: Sizes) -> Row:
    """What is kept of one method with one seed, which draws the pool too.

    first: the rows picked in the first round, from the same labels by every method. labels: how many labels a picked
    row has. most: the share of picked rows that have the commonest label.
    """
    pool, method = data.sample(sizes.pool, seed), METHODS[name]
    scale = np.float32(np.sqrt(1 / np.mean(np.square(pool.features))))  # to a mean square of 1
    training = Training((0.1, 0.5), steps=sizes.steps, rate=3e-3, samples=sizes.samples, sampled=method.dropout)
    features, labels = pool.features.shape[1], pool.labels.shape[1]

    def make(seed: int) -> MonteCarloDropout:
        return MonteCarloDropout(lambda: Perceptron(features, sizes.hidden, labels), training, seed, multilabel=True)

    with Client("local:") as client:
        found = curves(
            client,
            pool.features * scale,
            pool.labels,
            test_features=pool.test_features * scale,
            test_labels=pool.test_labels,
            strategies={name: method.strategy},
            rounds=sizes.rounds,
            budget=sizes.budget,
            initial=sizes.initial,
            seeds=[seed],
            model=make,
            retrain=sizes.retrain,
            task=MULTILABEL,
            metric="auroc",
        )
    rows = found.rows[name][0]  # (rounds, budget)
    picked = pool.labels[rows.ravel()]
    return runs.row(
        found,
        name,
        seed,
        first=rows[0].tolist(),
        labels=float(picked.sum(axis=1).mean()),
        most=float(100 * picked[:, pool.labels.sum(axis=0).argmax()].mean()),
    )


def report(rows: list[Row]) -> str:
    """What was measured, in Markdown."""
    more = {
        "labels a row": runs.mean("labels", 2),
        "commonest label %": runs.mean("most", 0),
        "saturated": runs.saturated,
    }
    pairs = runs.paired(rows, METHODS, PAIRS, {"first picks in common %": _in_common})
    return "\n".join([*runs.table(rows, METHODS, more, columns=5), *pairs])


def _in_common(one: Row, other: Row) -> float:
    """The share of the first round's picks, in per cent."""
    return float(100 * np.isin(one["first"], other["first"]).mean())


def _rows(text: str) -> float:
    """A number of rows, or a share of the pool."""
    return int(text) if text.isdigit() else float(text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = runs.parser("multilabel_text", __doc__, METHODS, f"a folder that holds {SET}/")
    usual = Sizes()
    for name, what in (("initial", "labelled at first"), ("budget", "asked for in each round")):
        said = f"rows {what}, or their share of the pool (default %(default)s)"
        parser.add_argument(f"--{name}", type=_rows, default=getattr(usual, name), help=said)
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="default %(default)s")
    said = "train on from the last round's network, not a new one"
    parser.add_argument("--continue", dest="retrain", action="store_false", help=said)
    chosen = parser.parse_args(arguments)
    if min(chosen.seeds, chosen.rounds) < 1:
        parser.error("there must be a seed and a round")
    return chosen


def main(arguments: list[str] | None = None) -> int:
    """Runs what is asked for and was not kept before."""
    chosen = parse(arguments)
    asked = {name: getattr(chosen, name) for name in ("initial", "budget", "rounds", "retrain")}
    sizes = Sizes(**asked)
    if chosen.quick:
        sizes = replace(sizes, pool=200, rounds=2, samples=3, hidden=8, steps=5)
    usual = Sizes()
    other = [f"{name}{asked[name]}" for name in ("initial", "budget", "rounds") if asked[name] != getattr(usual, name)]
    kind = "-".join([NAME, *other, *([] if sizes.retrain else ["continue"]), *(["quick"] if chosen.quick else [])])
    try:
        data = load(chosen.data, SET)
    except (MissingData, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    tasks = [(name, seed) for seed in range(chosen.seeds) for name in chosen.methods]
    rows = runs.play(kind, asdict(sizes), tasks, lambda name, seed: play(data, name, seed, sizes), chosen.results)
    runs.show(kind, rows, METHODS, report(rows), chosen.results, "macro AUROC")
    return 0


if __name__ == "__main__":
    sys.exit(main())
