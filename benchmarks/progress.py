"""How far a benchmark is: a bar where tqdm is installed, else a line now and then."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

try:
    from tqdm import tqdm
except ModuleNotFoundError:  # a machine lent for a while has torch and numpy
    tqdm = None  # type: ignore[assignment,misc]


class Progress:
    """So many steps, each told by what it does before it is done. A context manager."""

    def __init__(self, total: int, title: str) -> None:
        self._bar = tqdm(total=total, desc=title, unit="", leave=False, mininterval=0.5) if tqdm is not None else None
        self._done, self._total, self._title = 0, total, title

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def now(self, what: str) -> None:
        """Tells what is being done."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)
        else:
            print(f"{self._title}: {self._done} of {self._total}, {what}", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
