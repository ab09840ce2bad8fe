"""Learning curves: what a query strategy would have won on a set whose labels are known.

`curves` plays the annotator. It starts from a few labelled rows, trains a model, asks the service which rows to label
next, and measures the accuracy on held-out rows, round by round, for several strategies and seeds. Needs the [simulate]
extra (scikit-learn).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from queryselect._client import Client
from queryselect._picks import Picks
from queryselect._request import to_strategy

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]


class Model(Protocol):
    """What is trained in every round: a probabilistic classifier, as scikit-learn has them."""

    def fit(self, X: Any, y: Any) -> Any:  # noqa: N803  # scikit-learn's own letters
        """Learns from rows (n, D) and their labels (n,)."""

    def predict_log_proba(self, X: Any) -> Any:  # noqa: N803
        """The natural logarithm of each class's probability, (n, classes seen)."""


def linear_probe() -> Model:
    """Logistic regression on standardised features: the usual probe of frozen embeddings."""
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # optional
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    except ImportError as error:
        raise ImportError('simulate needs scikit-learn: pip install "queryselect[simulate]"') from error
    model: Model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    return model


@dataclass(frozen=True)
class Curves:
    """Learning curves.

    counts: (R + 1,) labelled rows at each point. accuracy: by strategy, (seeds, R + 1), on the held-out rows. initial:
    (seeds, n) rows labelled before the first round. picks: by strategy, the Picks of each seed and round. seconds: by
    strategy, the mean time of one selection as its caller waits for it.
    """

    counts: list[int]
    accuracy: dict[str, Floats]
    initial: Integers
    picks: dict[str, list[list[Picks]]]
    seconds: dict[str, float]

    def mean(self, name: str) -> Floats:
        """The mean accuracy over seeds, (R + 1,)."""
        return np.asarray(self.accuracy[name].mean(axis=0))

    def standard_error(self, name: str) -> Floats:
        """The standard error of that mean, (R + 1,); NaN for a single seed."""
        seeds = len(self.accuracy[name])
        if seeds < 2:
            return np.full(len(self.counts), np.nan)
        return np.asarray(self.accuracy[name].std(axis=0, ddof=1) / np.sqrt(seeds))

    def area(self, name: str) -> Floats:
        """The mean height of each seed's curve over the labels spent, (seeds,), by the trapezoidal rule."""
        counts = np.asarray(self.counts, dtype=float)
        if len(counts) == 1:
            return self.accuracy[name][:, 0]
        heights = (self.accuracy[name][:, 1:] + self.accuracy[name][:, :-1]) / 2
        return np.asarray(heights @ np.diff(counts) / (counts[-1] - counts[0]))

    def table(self, against: str = "random", columns: int = 6) -> str:
        """Text: accuracy in percent by strategy and labels, and the area gained over `against`, paired by seed."""
        shown = sorted({round(each) for each in np.linspace(0, len(self.counts) - 1, columns)})
        width = max(len(name) for name in (*self.accuracy, "labels"))
        gains = against in self.accuracy
        title = "labels".ljust(width) + "".join(f"{self.counts[at]:>14}" for at in shown)
        lines = [title + (f"   area over {against}" if gains else "")]
        for name in self.accuracy:
            cells = [_plus_minus(self.mean(name)[at], self.standard_error(name)[at]) for at in shown]
            line = name.ljust(width) + "".join(cell.rjust(14) for cell in cells)
            if gains and name != against:
                gain = self.area(name) - self.area(against)
                error = gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
                line += _plus_minus(gain.mean(), error, sign="+").rjust(13)
            lines.append(line)
        return "\n".join(lines)


def _plus_minus(mean: float, error: float, sign: str = "") -> str:
    """Per cent with its standard error, where there is one."""
    return f"{100 * mean:{sign}.1f}" + ("" if np.isnan(error) else f" ± {100 * error:.1f}")


class _Probe:
    """A trained model that speaks of all C classes, whichever of them it has seen."""

    def __init__(self, model: Model, x: Floats, y: Any, classes: Any) -> None:
        self._model, self._classes = model, classes
        self._seen = np.flatnonzero(np.isin(classes, y))
        if len(self._seen) > 1:
            model.fit(x, y)

    def log_probabilities(self, x: Floats) -> Floats:
        """(n, C); -inf for a class without a label so far."""
        found = np.full((len(x), len(self._classes)), -np.inf)
        found[:, self._seen] = self._model.predict_log_proba(x) if len(self._seen) > 1 else 0.0
        return found

    def accuracy(self, x: Floats, y: Any) -> float:
        """The share of rows whose most likely class is theirs."""
        return float((self._classes[self.log_probabilities(x).argmax(axis=1)] == y).mean())


@dataclass
class _Run:
    """One strategy with one seed, as far as it is."""

    labeled: list[int]
    accuracy: list[float] = field(default_factory=list)
    picks: list[Picks] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def curves(
    client: Client,
    features: ArrayLike,
    labels: ArrayLike,
    *,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    strategies: Sequence[str | Message] | Mapping[str, str | Message | tuple[str, Mapping[str, Any]]],
    rounds: int = 10,
    budget: int = 10,
    initial: int = 10,
    seeds: Sequence[int] = range(5),
    model: Callable[[], Model] = linear_probe,
    progress: bool = True,
) -> Curves:
    """Learning curves of several strategies on a set with known labels.

    features: (N, D), labels: (N,), the pool; test_features, test_labels: the rows that accuracy is measured on.
    strategies: names, typed messages, or a mapping from the name in the result to either, or to (name, params). Each
    seed has its own `initial` rows, drawn uniformly and the same for every strategy; then `rounds` times `budget` rows
    are selected, labelled, and the model is trained anew. Every strategy is offered embeddings, logits (log
    probabilities; -inf for classes without a label so far) and the labelled rows.
    Raises ValueError where the pool is too small, and what Client.select raises.
    """
    x, y = np.asarray(features), np.asarray(labels)
    test_x, test_y = np.asarray(test_features), np.asarray(test_labels)
    for each, its in ((x, y), (test_x, test_y)):
        if len(each) != len(its):
            raise ValueError(f"there are {len(each)} rows of features and {len(its)} labels")
    needed = initial + rounds * budget
    if rounds < 1 or budget < 1 or not len(seeds):
        raise ValueError(f"there must be a round, a budget and a seed; there are {rounds}, {budget} and {len(seeds)}")
    if initial < 1 or needed > len(x):
        raise ValueError(
            f"{initial} initial rows and {rounds} rounds of {budget} need {needed} rows; there are {len(x)}"
        )
    named = strategies if isinstance(strategies, Mapping) else {_name(each): each for each in strategies}
    if len(named) < len(strategies):
        raise ValueError("two strategies have the same name; give a mapping from names of your own to strategies")
    classes = np.unique(y)
    starts = np.stack([np.random.default_rng(seed).choice(len(x), initial, replace=False) for seed in seeds])
    runs: dict[str, list[_Run]] = {name: [] for name in named}
    with tqdm(total=len(named) * len(seeds) * (rounds + 1), unit="round", disable=not progress) as bar:
        for name, strategy in named.items():
            bar.set_description(name)
            for seed, start in zip(seeds, starts, strict=True):
                run = _Run(start.tolist())
                runs[name].append(run)
                for at in range(rounds + 1):
                    probe = _Probe(model(), x[run.labeled], y[run.labeled], classes)
                    run.accuracy.append(probe.accuracy(test_x, test_y))
                    if at < rounds:
                        _select(client, strategy, budget, run, x, probe, seed=1000 * seed + at)
                    bar.update()
    return Curves(
        counts=[initial + at * budget for at in range(rounds + 1)],
        accuracy={name: np.array([run.accuracy for run in each]) for name, each in runs.items()},
        initial=starts,
        picks={name: [run.picks for run in each] for name, each in runs.items()},
        seconds={name: float(np.mean([run.seconds for run in each])) for name, each in runs.items()},
    )


def _select(
    client: Client,
    strategy: str | Message | tuple[str, Mapping[str, Any]],
    budget: int,
    run: _Run,
    x: Floats,
    probe: _Probe,
    seed: int,
) -> None:
    """One round: asks the service, and labels what it says."""
    name, params = strategy if isinstance(strategy, tuple) else (strategy, {})
    logits = probe.log_probabilities(x)
    started = time.monotonic()
    picks = client.select(name, budget, params=params, embeddings=x, logits=logits, labeled=run.labeled, seed=seed)
    run.seconds.append(time.monotonic() - started)
    run.picks.append(picks)
    run.labeled += picks.indices.tolist()


def _name(strategy: str | Message) -> str:
    """The canonical name."""
    return strategy if isinstance(strategy, str) else str(to_strategy(strategy).WhichOneof("kind"))
