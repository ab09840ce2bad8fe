"""A real active-learning loop on real images, through a real server: what `make demo` runs.

Trains on a few of scikit-learn's handwritten digits, asks the service which to label next, labels them, trains again,
and shows what each query strategy won against drawing at random: a table here, pictures in demo/report.html.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split

from demo.report import Report, write
from queryselect import Client, __version__
from queryselect.simulate import curves

STRATEGIES = ("random", "margin", "least_confidence", "entropy", "k_center_greedy")
INITIAL, BUDGET, ROUNDS, SEEDS = 10, 10, 10, range(5)
HERE = Path(__file__).parent


@contextmanager
def server() -> Iterator[str]:
    """A server in a process of its own, on a free port. Yields its address."""
    command = [
        sys.executable,
        "-m",
        "queryselect_service",
        "--port",
        "0",
        "--metrics-port",
        "-1",
        "--log-level",
        "WARNING",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # our own words
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "serves on" not in line:
            raise RuntimeError(f"the server did not start: exit status {process.wait()}")
        yield line.split("serves on ")[1].split(",")[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


def main() -> None:
    """Runs the demo."""
    started = time.monotonic()
    digits = load_digits()
    pool, test = train_test_split(np.arange(len(digits.target)), test_size=400, random_state=0, stratify=digits.target)
    features, labels = (digits.data / 16).astype(np.float32), digits.target
    print(f"QuerySelect {__version__}: {len(pool)} unlabelled digits, {len(test)} held out. {INITIAL} labels at first,")
    print(f"then {ROUNDS} rounds of {BUDGET} for each of {len(STRATEGIES)} query strategies and {len(SEEDS)} seeds.")
    with server() as target, Client(target) as client:
        print(f"The server listens on {target}.\n", flush=True)
        found = curves(
            client,
            features[pool],
            labels[pool],
            test_features=features[test],
            test_labels=labels[test],
            strategies=STRATEGIES,
            rounds=ROUNDS,
            budget=BUDGET,
            initial=INITIAL,
            seeds=SEEDS,
        )
    print(f"\nTest accuracy in per cent by number of labels, mean ± standard error over {len(SEEDS)} seeds:\n")
    print(found.table())
    print("\nDrawing the pool in two dimensions …", flush=True)
    projection = TSNE(init="pca", perplexity=30, random_state=0).fit_transform(features[pool])
    first = {name: found.picks[name][0][0] for name in STRATEGIES}
    path = HERE / "report.html"
    write(
        path,
        Report(
            title="Which digits should people label next?",
            dataset=f"scikit-learn's handwritten digits: {len(pool)} in the pool, {len(test)} held out",
            version=__version__,
            counts=found.counts,
            accuracy=found.accuracy,
            picks={name: picks.indices for name, picks in first.items()},
            scores={name: picks.scores for name, picks in first.items()},
            images=digits.images[pool] / 16,
            labels=labels[pool],
            projection=projection,
            initial=found.initial[0],
            seconds=found.seconds,
        ),
    )
    print(f"The report: {path}  ({time.monotonic() - started:.0f} s in all)")


if __name__ == "__main__":
    main()
