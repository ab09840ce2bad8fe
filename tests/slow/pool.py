"""The pool of the examples in other languages (examples/node/data.js), and what a client of ours picks of it."""

from __future__ import annotations

import numpy as np

from queryselect import Client

DIMENSIONS, CLASSES = 8, 4


def numbers(rows: int, columns: int, factor: int) -> np.ndarray:
    at = np.arange(rows * columns)
    return (at * factor % 1000003 / 500001.5 - 1).astype(np.float32).reshape(rows, columns)


def embeddings(rows: int) -> np.ndarray:
    return numbers(rows, DIMENSIONS, 7919)


def logits(rows: int) -> np.ndarray:
    return numbers(rows, CLASSES, 104729)


def picks(client: Client, strategy: str, budget: int, **options) -> list[dict[str, float]]:
    """Rows and scores, as the examples print them."""
    return [{"row": row, "score": score} for row, score in client.select(strategy, budget, **options)]
