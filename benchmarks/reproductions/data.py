"""The data that reproductions run on: a folder of .npy files, given by whoever runs them.

    FOLDER/banking77/X_train.npy          (N, D) frozen features of the pool
    FOLDER/banking77/y_train.npy          (N,) its classes; (N, L) zeros and ones where a row has several labels
    FOLDER/banking77/X_test.npy           (M, D), y_test.npy (M,): held out
    FOLDER/banking77/idx_imbalance10.npy  rows of the pool in which some classes are 10 times as rare as others

and the same for every other set; mnist/pixels_uint8.npz has its images too: X_train and X_test, (n, 784) uint8.
"mnist-imbalance10" is the set mnist with those rows of its pool alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT16 = np.dtype(np.float16)


class MissingData(FileNotFoundError):
    """The folder of data, a set in it or a file of it is not there; says which, and what is needed."""


@dataclass(frozen=True)
class LabeledSet:
    """A pool (N, D) with its classes (N,) or labels (N, L), and held-out rows with theirs."""

    name: str
    features: NDArray[np.floating[Any]]
    labels: NDArray[np.integer[Any]]
    test_features: NDArray[np.floating[Any]]
    test_labels: NDArray[np.integer[Any]]

    @property
    def classes(self) -> int:
        """How many there are in the pool."""
        return len(np.unique(self.labels))

    def of_classes(self, some: NDArray[Any]) -> LabeledSet:
        """Itself with the rows of some classes alone, held-out rows too."""
        kept, tested = np.isin(self.labels, some), np.isin(self.test_labels, some)
        return replace(
            self,
            features=self.features[kept],
            labels=self.labels[kept],
            test_features=self.test_features[tested],
            test_labels=self.test_labels[tested],
        )

    def projected(self, dimensions: int) -> LabeledSet:
        """Itself in so many principal components of its pool, held-out rows too; as it is where it has no more."""
        if dimensions >= self.features.shape[1]:
            return self
        mean = self.features.mean(axis=0)
        _, _, components = np.linalg.svd(self.features - mean, full_matrices=False)
        axes = components[:dimensions].T
        return replace(self, features=(self.features - mean) @ axes, test_features=(self.test_features - mean) @ axes)

    def sample(self, rows: int, seed: int = 0) -> LabeledSet:
        """Itself with `rows` rows of its pool, drawn uniformly, in their order; all of them where there are no more."""
        if rows >= len(self.labels):
            return self
        kept = np.sort(np.random.default_rng(seed).choice(len(self.labels), rows, replace=False))
        return replace(self, features=self.features[kept], labels=self.labels[kept])


def array(folder: Path, of_set: str, file: str) -> NDArray[Any]:
    """An array of a set, by the name of its file without .npy; float16 becomes float32.

    Raises MissingData where there is no such folder, set or file.
    """
    if not folder.is_dir():
        raise MissingData(f"there is no data folder {folder}; it is to hold a folder for each set, such as {of_set}/")
    if not (folder / of_set).is_dir():
        found = sorted(each.name for each in folder.iterdir() if each.is_dir())
        raise MissingData(f"the data folder {folder} has no set {of_set}; it has: {', '.join(found) or 'none'}")
    path = folder / of_set / f"{file}.npy"
    if not path.is_file():
        raise MissingData(f"the set {of_set} has no file {path.name} in {path.parent}")
    x: NDArray[Any] = np.load(path, allow_pickle=False)
    return x.astype(np.float32) if x.dtype == FLOAT16 else x


def load(folder: Path, name: str) -> LabeledSet:
    """A set, or one "-imbalance" of it. Raises MissingData as `array` does, and ValueError where rows do not fit."""
    of_set, _, imbalance = name.partition("-")
    x, y, test_x, test_y = (array(folder, of_set, each) for each in ("X_train", "y_train", "X_test", "y_test"))
    for each, its in ((x, y), (test_x, test_y)):
        if len(each) != len(its):
            raise ValueError(f"the set {of_set} has {len(each)} rows of features and {len(its)} classes for them")
    if imbalance:
        rows = array(folder, of_set, f"idx_{imbalance}")
        x, y = x[rows], y[rows]
    return LabeledSet(name, x, y, test_x, test_y)
