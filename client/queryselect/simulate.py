"""Learning curves: what a query strategy would have won on a set whose labels are known.

`curves` plays the annotator. It starts from a few labelled rows, trains a model, asks the service which rows to label
next, and measures the model on held-out rows, round by round, for several strategies and seeds. Needs the [simulate]
extra (scikit-learn).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from queryselect._client import Client
from queryselect._picks import Picks
from queryselect._request import description_of, to_strategy
from queryselect.v1 import strategy_pb2

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.int64]
Description = strategy_pb2.StrategyDescription
#: From the test labels as they were given and their probabilities (M, C) to a number, at best 1.
Metric = Callable[[Any, Floats], float]

MULTICLASS, MULTILABEL = "MULTICLASS", "MULTILABEL"
NEEDED = 'simulate needs scikit-learn: pip install "queryselect[simulate]"'


class Model(Protocol):
    """What is trained in every round: a probabilistic classifier, as scikit-learn has them."""

    def fit(self, X: Any, y: Any) -> Any:  # noqa: N803  # scikit-learn's own letters
        """Learns from rows (n, D) and their labels: (n,), or (n, L) of zeros and ones in a multi-label task."""

    def predict_log_proba(self, X: Any) -> Any:  # noqa: N803
        """The natural logarithm of probabilities, (n, C): of the classes seen or of all in ascending order; or of each
        label, (n, L), in a multi-label task.
        """  # fmt: skip


class Continuing(Model, Protocol):
    """A model that can go on learning, which `curves(..., retrain=False)` needs."""

    def continue_fit(self, X: Any, y: Any) -> Any:  # noqa: N803
        """Learns on from what it has learnt; X and y are all labelled rows, those that it knows among them."""


class Sampling(Model, Protocol):
    """A model with a distribution over its parameters, such as an ensemble or Monte-Carlo dropout.

    Strategies that read samples, such as bald, are then given them; those that can do with either are given samples.
    """

    def sample_logits(self, X: Any) -> Any:  # noqa: N803
        """Logits under K samples of the parameters, (n, K, C): softmax gives the probabilities of the classes seen or
        of all, sigmoid those of each label in a multi-label task. Log-probabilities are logits too.

        The k-th sample is of the same parameters for every row: strategies that look at rows together depend on it.
        """  # fmt: skip


class Offer:
    """What a strategy is told in a round. What it does not read is not computed.

    budget: how many rows are wanted. embeddings: (N, D). labeled: rows with labels so far. task: MULTICLASS or
    MULTILABEL. seed: of this round, the same for every strategy.
    """

    def __init__(self, learner: _Learner, x: Floats, labeled: Sequence[int], budget: int, seed: int) -> None:
        self._learner = learner
        self.budget, self.embeddings, self.labeled, self.seed = budget, x, np.array(labeled), seed
        self.task = learner.task

    @cached_property
    def log_probabilities(self) -> Floats:
        """Natural logarithms, (N, C), -inf for a class without a label so far; or of each label, (N, L)."""
        return self._learner.log_probabilities(self.embeddings)

    @cached_property
    def samples(self) -> Floats:
        """Logits by a Sampling model, (N, K, C). Raises ValueError where the model has no samples."""
        return self._learner.samples(self.embeddings)

    def inputs(self, required: Sequence[set[str]]) -> dict[str, Any]:
        """What Client.select is given for a strategy that reads one of each of these names."""
        given: dict[str, Any] = {"embeddings": self.embeddings}
        for names in required:
            if "samples" in names and self._learner.samples_are_there:
                given |= {"samples": self.samples, "samples_kind": "LOGITS"}
            elif names & {"logits", "probabilities"}:
                name = "logits" if self.task == MULTICLASS else "probabilities"
                given[name] = self.log_probabilities if self.task == MULTICLASS else np.exp(self.log_probabilities)
        return given


#: Names, typed messages, names with parameters, or a function of one's own that returns the rows to label, in order.
Strategy = str | Message | tuple[str, Mapping[str, Any]] | Callable[[Offer], ArrayLike]


def linear_probe() -> Model:
    """Logistic regression on standardised features: the usual probe of frozen embeddings."""
    try:
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415  # optional
        from sklearn.pipeline import make_pipeline  # noqa: PLC0415
        from sklearn.preprocessing import StandardScaler  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(NEEDED) from error
    model: Model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=1000))
    return model


class LinearProbes:
    """A linear probe for each label of a multi-label task.

    A label that all rows have, or none, has no probe: its probability is (rows that have it + 1) / (rows + 2).
    """

    def fit(self, X: Any, y: Any) -> LinearProbes:  # noqa: N803
        """Learns from rows (n, D) and their labels (n, L)."""
        known = y.sum(axis=0)
        self._constant = (known + 1) / (len(y) + 2)
        self._probes = {at: linear_probe() for at in np.flatnonzero((known > 0) & (known < len(y)))}
        for at, probe in self._probes.items():
            probe.fit(X, y[:, at])
        return self

    def predict_log_proba(self, X: Any) -> Floats:  # noqa: N803
        """The natural logarithm of each label's probability, (n, L)."""
        found = np.tile(np.log(self._constant), (len(X), 1))
        for at, probe in self._probes.items():
            found[:, at] = probe.predict_log_proba(X)[:, 1]
        return found


@dataclass(frozen=True)
class Curves:
    """Learning curves.

    counts: (R + 1,) labelled rows at each point. metric: what was measured on the held-out rows. values: by strategy,
    (seeds, R + 1), the metric. initial: (seeds, n) rows labelled before the first round. rows: by strategy, (seeds, R,
    budget), the rows labelled in each round, in the order of choice. picks: by strategy, the Picks of each seed and
    round; none of a function. seconds: by strategy, the mean time of one selection as its caller waits for it.
    """

    counts: list[int]
    metric: str
    values: dict[str, Floats]
    initial: Integers
    rows: dict[str, Integers]
    picks: dict[str, list[list[Picks]]]
    seconds: dict[str, float]

    @property
    def accuracy(self) -> dict[str, Floats]:
        """`values`, where these are accuracies. Raises AttributeError where they are not."""
        if self.metric != "accuracy":
            raise AttributeError(f"these are curves of {self.metric}, not of accuracy; they are in `values`")
        return self.values

    def mean(self, name: str) -> Floats:
        """The mean value over seeds, (R + 1,)."""
        return np.asarray(self.values[name].mean(axis=0))

    def standard_error(self, name: str) -> Floats:
        """The standard error of that mean, (R + 1,); NaN for a single seed."""
        seeds = len(self.values[name])
        if seeds < 2:
            return np.full(len(self.counts), np.nan)
        return np.asarray(self.values[name].std(axis=0, ddof=1) / np.sqrt(seeds))

    def area(self, name: str) -> Floats:
        """The mean height of each seed's curve over the labels spent, (seeds,), by the trapezoidal rule."""
        counts = np.asarray(self.counts, dtype=float)
        if len(counts) == 1:
            return self.values[name][:, 0]
        heights = (self.values[name][:, 1:] + self.values[name][:, :-1]) / 2
        return np.asarray(heights @ np.diff(counts) / (counts[-1] - counts[0]))

    def table(self, against: str = "random", columns: int = 6) -> str:
        """Text: the metric in per cent by strategy and labels, and the area gained over `against`, paired by seed."""
        shown = sorted({round(each) for each in np.linspace(0, len(self.counts) - 1, columns)})
        width = max(len(name) for name in (*self.values, "labels"))
        gains = against in self.values
        title = "labels".ljust(width) + "".join(f"{self.counts[at]:>14}" for at in shown)
        lines = [title + (f"   area over {against}" if gains else "")]
        for name in self.values:
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


class _Learner:
    """A model through the rounds of one run, which speaks of all C classes, whichever of them it has seen."""

    def __init__(self, make: Callable[..., Any], task: str, classes: Any, *, retrain: bool) -> None:
        self.task = task
        self._make, self._classes, self._retrain = make, classes, retrain
        self._seeded = _takes_seed(make)
        self._model: Any = None
        self._fitted = False
        self._seen: Integers = np.arange(len(classes))

    def learn(self, x: Floats, y: Any, seed: int) -> None:
        """Trains on all labelled rows. One class alone teaches nothing."""
        if self._model is None or self._retrain:
            self._model, self._fitted = self._make(seed=seed) if self._seeded else self._make(), False
        if not self._retrain and not hasattr(self._model, "continue_fit"):
            raise ValueError(f"retrain=False needs a model with continue_fit; {type(self._model).__name__} has none")
        if self.task == MULTICLASS:
            self._seen = np.flatnonzero(np.isin(self._classes, y))
            if len(self._seen) < 2:
                return
        (self._model.continue_fit if self._fitted else self._model.fit)(x, y)
        self._fitted = True

    def log_probabilities(self, x: Floats) -> Floats:
        """(n, C); -inf for a class without a label so far."""
        if not self._fitted:
            return self._placed(np.zeros((len(x), 1)))
        return self._placed(np.asarray(self._model.predict_log_proba(x)))

    @property
    def samples_are_there(self) -> bool:
        """Whether the model has learnt anything, and has samples."""
        return self._fitted and hasattr(self._model, "sample_logits")

    def samples(self, x: Floats) -> Floats:
        """(n, K, C); -inf for a class without a label so far."""
        if not self.samples_are_there:
            raise ValueError(f"samples need a trained model with sample_logits, not this {type(self._model).__name__}")
        return self._placed(np.asarray(self._model.sample_logits(x)))

    def _placed(self, found: Floats) -> Floats:
        """(..., classes seen), or (..., C) already -> (..., C)."""
        known = found.shape[-1]
        if known == len(self._classes):
            return found
        if known != len(self._seen):
            raise ValueError(
                f"the model speaks of {known} classes; it has seen {len(self._seen)} of {len(self._classes)}"
            )
        placed = np.full((*found.shape[:-1], len(self._classes)), -np.inf)
        placed[..., self._seen] = found
        return placed


def _takes_seed(make: Callable[..., Any]) -> bool:
    try:
        return "seed" in inspect.signature(make).parameters
    except ValueError:  # some that are not written in Python do not tell
        return False


def _accuracy(classes: Any) -> Metric:
    """The share of rows whose most likely class is theirs; multi-label, of labels that are told right."""

    def measure(y: Any, probabilities: Floats) -> float:
        if y.ndim == 2:
            return float(((probabilities > 0.5) == y).mean())
        return float((classes[probabilities.argmax(axis=1)] == y).mean())

    return measure


def _auroc(classes: Any, test_y: Any) -> Metric:
    """The mean area under the ROC curve of each class or label against the rest.

    Raises ValueError where no class or label has rows of both kinds among the test rows.
    """
    try:
        from sklearn.metrics import roc_auc_score  # noqa: PLC0415  # optional
    except ImportError as error:
        raise ImportError(NEEDED) from error
    theirs = test_y if test_y.ndim == 2 else test_y[:, None] == classes
    told = np.flatnonzero(theirs.any(axis=0) & ~theirs.all(axis=0))
    if not len(told):
        raise ValueError("auroc needs a class or label that some test rows have and others have not; there is none")

    def measure(_: Any, probabilities: Floats) -> float:
        return float(np.mean([roc_auc_score(theirs[:, at], probabilities[:, at]) for at in told]))

    return measure


@dataclass
class _Run:
    """One strategy with one seed, as far as it is."""

    labeled: list[int]
    values: list[float] = field(default_factory=list)
    rows: list[Integers] = field(default_factory=list)
    picks: list[Picks] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def curves(
    client: Client,
    features: ArrayLike,
    labels: ArrayLike,
    *,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    strategies: Sequence[Strategy] | Mapping[str, Strategy],
    rounds: int = 10,
    budget: float = 10,
    initial: float | ArrayLike = 10,
    seeds: Sequence[int] = range(5),
    model: Callable[..., Model] | None = None,
    retrain: bool = True,
    task: str = MULTICLASS,
    metric: str | Metric = "accuracy",
    progress: bool = True,
) -> Curves:
    """Learning curves of several strategies on a set with known labels.

    features: (N, D), the pool; test_features: the rows that are measured on. labels, test_labels: classes (N,), or in
    a MULTILABEL task zeros and ones (N, L). strategies: a sequence, or a mapping from the name in the result, of names,
    typed messages, (name, params), or functions that are given an Offer and return the rows to label.

    Each seed has its own `initial` rows, drawn uniformly and the same for every strategy, or given, (seeds, n); then
    `rounds` times `budget` rows are selected and labelled. `initial` and `budget` are numbers of rows, or, between 0
    and 1, shares of the pool. A strategy is offered embeddings and the labelled rows, and as it reads them: logits (log
    probabilities; -inf for classes without a label so far; probabilities in a MULTILABEL task) or a model's samples.

    model: makes an untrained model, by default linear probes; it is given seed= where it has a parameter of that name,
    1000 times the run's seed plus the round. retrain: whether a new one is trained in every round; False: that of the
    last round goes on learning (see Continuing).

    metric: "accuracy" (multi-label: the share of labels told right), "auroc" (of each class or label against the rest,
    the mean over those that test rows have of both kinds), or a function of test_labels and probabilities (M, C).
    Raises ValueError for arguments that do not fit, and what Client.select raises.
    """
    x, y, test_x, test_y, classes = _data(features, labels, test_features, test_labels, task)
    budget = _rows("budget", budget, len(x))
    starts = _starts(initial, len(x), seeds)
    needed = starts.shape[1] + rounds * budget
    if rounds < 1 or budget < 1 or not len(seeds):
        raise ValueError(f"there must be a round, a budget and a seed; there are {rounds}, {budget} and {len(seeds)}")
    if needed > len(x):
        raise ValueError(
            f"{starts.shape[1]} initial rows and {rounds} rounds of {budget} need {needed} rows; there are {len(x)}"
        )
    named = strategies if isinstance(strategies, Mapping) else {_name(each): each for each in strategies}
    if len(named) < len(strategies):
        raise ValueError("two strategies have the same name; give a mapping from names of your own to strategies")
    measured, measure = _metric(metric, classes, test_y)
    make = model or (linear_probe if task == MULTICLASS else LinearProbes)
    descriptions = {each.name: each for each in client.strategies()}
    runs: dict[str, list[_Run]] = {name: [] for name in named}
    with tqdm(total=len(named) * len(seeds) * (rounds + 1), unit="round", disable=not progress) as bar:
        for name, strategy in named.items():
            bar.set_description(name)
            for seed, start in zip(seeds, starts, strict=True):
                run, learner = _Run(start.tolist()), _Learner(make, task, classes, retrain=retrain)
                runs[name].append(run)
                for at in range(rounds + 1):
                    each = 1000 * seed + at
                    learner.learn(x[run.labeled], y[run.labeled], each)
                    run.values.append(float(measure(test_y, np.exp(learner.log_probabilities(test_x)))))
                    if at < rounds:
                        _select(client, strategy, descriptions, run, Offer(learner, x, run.labeled, budget, each))
                    bar.update()
    return Curves(
        counts=[starts.shape[1] + at * budget for at in range(rounds + 1)],
        metric=measured,
        values={name: np.array([run.values for run in each]) for name, each in runs.items()},
        initial=starts,
        rows={name: np.array([run.rows for run in each]) for name, each in runs.items()},
        picks={name: [run.picks for run in each] for name, each in runs.items()},
        seconds={name: float(np.mean([run.seconds for run in each])) for name, each in runs.items()},
    )


def _data(
    features: ArrayLike, labels: ArrayLike, test_features: ArrayLike, test_labels: ArrayLike, task: str
) -> tuple[Any, Any, Any, Any, Any]:
    """The pool, the test rows, and the classes, or the numbers of the labels; ValueError where they do not fit."""
    x, y, test_x, test_y = (np.asarray(each) for each in (features, labels, test_features, test_labels))
    if task not in {MULTICLASS, MULTILABEL}:
        raise ValueError(f"task must be {MULTICLASS} or {MULTILABEL}; it is {task!r}")
    for each, its in ((x, y), (test_x, test_y)):
        if len(each) != len(its):
            raise ValueError(f"there are {len(each)} rows of features and {len(its)} labels")
    if task == MULTICLASS:
        if y.ndim != 1 or test_y.ndim != 1:
            raise ValueError(f"labels of a {task} task have the shape (N); they have {y.shape} and {test_y.shape}")
        return x, y, test_x, test_y, np.unique(y)
    if y.ndim != 2 or test_y.ndim != 2 or y.shape[1] != test_y.shape[1]:
        raise ValueError(f"labels of a {task} task have the shape (N, L); they have {y.shape} and {test_y.shape}")
    if not (np.isin(y, (0, 1)).all() and np.isin(test_y, (0, 1)).all()):
        raise ValueError(f"labels of a {task} task are zeros and ones")
    return x, y.astype(np.int64), test_x, test_y.astype(np.int64), np.arange(y.shape[1])


def _rows(name: str, wanted: float, rows: int) -> int:
    """A number of rows, or at least one where it is a share of them."""
    if isinstance(wanted, (int, np.integer)):
        return int(wanted)
    if not 0 < wanted < 1:
        raise ValueError(f"{name} is a whole number of rows or a share of the pool between 0 and 1; it is {wanted}")
    return max(1, round(wanted * rows))


def _starts(initial: float | ArrayLike, rows: int, seeds: Sequence[int]) -> Integers:
    """(seeds, n): the rows labelled before the first round."""
    if np.ndim(initial):
        given = np.asarray(initial)
        if given.ndim != 2 or len(given) != len(seeds) or not np.issubdtype(given.dtype, np.integer):
            raise ValueError(
                f"initial rows are whole numbers (seeds, n) for {len(seeds)} seeds; they are {given.shape}"
            )
        if given.size and (
            given.min() < 0 or given.max() >= rows or np.diff(np.sort(given, axis=1)).min(initial=1) < 1
        ):
            raise ValueError(f"initial rows of a seed are different rows of the pool, from 0 to {rows - 1}")
        return given.astype(np.int64)
    number = _rows("initial", initial, rows)  # type: ignore[arg-type]  # it has no dimensions
    if not 1 <= number <= rows:
        raise ValueError(f"there must be an initial row, and no more than there are: {number} of {rows}")
    return np.array([np.random.default_rng(seed).choice(rows, number, replace=False) for seed in seeds]).reshape(
        len(seeds), number
    )


def _metric(metric: str | Metric, classes: Any, test_y: Any) -> tuple[str, Metric]:
    """What it is called, and what measures it."""
    if not isinstance(metric, str):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric == "accuracy":
        return metric, _accuracy(classes)
    if metric == "auroc":
        return metric, _auroc(classes, test_y)
    raise ValueError(f"metric must be accuracy, auroc or a function; it is {metric!r}")


def _required(strategy: strategy_pb2.Strategy, descriptions: Mapping[str, Description]) -> list[set[str]]:
    """The inputs that a strategy can't do without: of each, the names that may stand for it."""
    found = description_of(strategy, descriptions)
    if found is None:  # the server does not know it, and will say so
        return []
    return [{wanted.name, *wanted.alternatives} for wanted in found.inputs if wanted.required]


def _select(
    client: Client, strategy: Strategy, descriptions: Mapping[str, Description], run: _Run, offer: Offer
) -> None:
    """One round: asks the service or the function, and labels what it says."""
    if isinstance(strategy, (str, Message, tuple)):
        name, params = strategy if isinstance(strategy, tuple) else (strategy, {})
        inputs = offer.inputs(_required(to_strategy(name, params), descriptions))
        started = time.monotonic()
        picks = client.select(
            name, offer.budget, params=params, labeled=offer.labeled, task=offer.task, seed=offer.seed, **inputs
        )
        run.picks.append(picks)
        rows = picks.indices
    else:
        started = time.monotonic()
        rows = np.asarray(strategy(offer))
    run.seconds.append(time.monotonic() - started)
    if not _are_new(rows, offer):
        raise ValueError(f"{_name(strategy)} is to choose {offer.budget} different unlabelled rows; it chose {rows}")
    run.rows.append(rows.astype(np.int64))
    run.labeled += rows.tolist()


def _are_new(rows: Any, offer: Offer) -> bool:
    """Whether these are `budget` different rows of the pool, none of which has a label."""
    if rows.shape != (offer.budget,) or not np.issubdtype(rows.dtype, np.integer):
        return False
    within = ((rows >= 0) & (rows < len(offer.embeddings))).all()
    return bool(within and len(np.union1d(rows, offer.labeled)) == len(rows) + len(offer.labeled))


def _name(strategy: Strategy) -> str:
    """The canonical name, or a function's own."""
    if isinstance(strategy, tuple):
        return strategy[0]
    if isinstance(strategy, Message):
        return str(to_strategy(strategy).WhichOneof("kind"))
    return strategy if isinstance(strategy, str) else getattr(strategy, "__name__", type(strategy).__name__)
