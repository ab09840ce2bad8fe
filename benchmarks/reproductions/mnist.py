"""MNIST in which half of the classes are rare, and a balanced set of it that is held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reproductions.data import MissingData, array

#: How many classes there are, and the first that is rare.
CLASSES, FIRST_RARE = 10, 5
#: What pixels are scaled by: their mean and their deviation over all training images.
PIXEL_MEAN, PIXEL_DEVIATION = 0.1307, 0.3081

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 28, 28), scaled, and their classes (n,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def of(self, rows: Integers) -> Images:
        """Some of them."""
        kept = torch.from_numpy(rows)
        return Images(self.x[kept], self.y[kept])


@dataclass(frozen=True)
class Split:
    """The unlabelled pool with its rare classes, the balanced validation set, and the test set."""

    pool: Images
    validation: Images
    test: Images


@cache
def read(folder: Path) -> tuple[Images, Integers, Images]:
    """The training images, the rows of them in which classes are rare, and the test images. Raises MissingData."""
    y, test_y, imbalanced = (array(folder, "mnist", each) for each in ("y_train", "y_test", "idx_imbalance100"))
    path = folder / "mnist" / "pixels_uint8.npz"
    if not path.is_file():
        raise MissingData(f"the set mnist has no file {path.name} in {path.parent}: X_train and X_test, (n, 784) uint8")
    with np.load(path) as pixels:
        return _images(pixels["X_train"], y), imbalanced.astype(np.int64), _images(pixels["X_test"], test_y)


def _images(pixels: NDArray[np.uint8], labels: NDArray[np.integer[Any]]) -> Images:
    x = torch.from_numpy(pixels).view(-1, 1, 28, 28).float() / 255
    return Images((x - PIXEL_MEAN) / PIXEL_DEVIATION, torch.from_numpy(labels.astype(np.int64)))


def split(train: Images, imbalanced: Integers, test: Images, validation: int, seed: int) -> Split:
    """Draws `validation` images a class, and leaves the pool as rare as it was.

    Those of a rare class are drawn from what the pool lacks; it then loses the share of that class that was drawn, as
    if they had been held out first.
    """
    rng = np.random.default_rng(seed)
    labels, held_out, pool = train.y.numpy(), [], []
    for of_class in range(CLASSES):
        rows = np.flatnonzero(labels == of_class)
        offered = np.intersect1d(rows, imbalanced)
        rare = of_class >= FIRST_RARE
        drawn = rng.choice(np.setdiff1d(rows, imbalanced) if rare else offered, validation, replace=False)
        left = round(len(offered) * (1 - validation / len(rows)))
        held_out.append(drawn)
        pool.append(rng.choice(offered, left, replace=False) if rare else np.setdiff1d(offered, drawn))
    return Split(train.of(np.sort(np.concatenate(pool))), train.of(np.concatenate(held_out)), test)
