"""Pieces of work side by side on a processor, each by one thread.

torch would split every single operation among its threads, and have them wait for each other after each: scores of a
block of rows take a dozen operations of 50 µs, and where others want the cores too, `bald` took up to forty times as
long as with one thread. Here a thread has a piece to itself, and a result does not depend on how many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from queryselect_service.threads import started

Piece = TypeVar("Piece")

#: The most threads: between two operations they wait for Python's lock, more of them for longer.
MOST = 8

_pools: dict[int, ThreadPoolExecutor] = {}
_making = threading.Lock()


def count() -> int:
    """How many pieces are worked on at a time: as many threads as torch may use here, within reason."""
    return min(MOST, torch.get_num_threads())


def each(work: Callable[[Piece], None], pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Does the work on all pieces, and yields every piece in turn once it is done.

    What the work raises is raised here, when no other piece is being worked on any more.
    """
    inference = torch.is_inference_mode_enabled()  # of this thread alone

    def run(piece: Piece) -> None:
        with torch.inference_mode(inference):
            work(piece)

    pool = _pool(count())
    running = [pool.submit(run, piece) for piece in pieces]
    try:
        for piece, done in zip(pieces, running, strict=True):
            done.result()
            yield piece
    finally:
        for left in running:
            left.cancel()
        wait(running)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _making:
        if threads not in _pools:
            _pools[threads] = started(threads, "piece")
        return _pools[threads]
