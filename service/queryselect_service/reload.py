"""What files say, as they are now: certificates and tokens change while a server serves."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

Value = TypeVar("Value")

#: When what could not be read is tried again though it has not changed, in seconds: the fault may be elsewhere, such as
#: too many open files.
AGAIN = 1.0

log = logging.getLogger(__name__)


class Reloaded(Generic[Value]):
    """What `read` makes of some files, made again when they have changed. Thread-safe.

    A file has changed where its inode, its size or one of its times has: written anew, renamed into place, or reached
    by a link that leads elsewhere now, as Kubernetes swaps those of mounted secrets. What can't be read, because it is
    gone, half-written or wrong, is logged once, leaves what was there, and is tried again.
    """

    def __init__(self, what: str, paths: Sequence[Path], read: Callable[[], Value], every: float = 0.0) -> None:
        """what: its name in the log and in metrics. every: the least time between two looks, in seconds.

        Raises what `read` raises: OSError or ValueError, whose words hold nothing of what the files say.
        """
        self.what, self._paths, self._read, self._every = what, paths, read, every
        self._looking, self._looked, self._seen = threading.Lock(), time.monotonic(), self._marks()
        self._value, self._tried, self._wrong = read(), time.monotonic(), ""

    def get(self) -> Value:
        """The latest that could be read. Raises nothing; only one caller at a time looks, and nobody waits for it."""
        if time.monotonic() - self._looked >= self._every and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._value

    @property
    def current(self) -> bool:
        """Whether what the files say now is in use. Looks at them as `get` does."""
        self.get()
        return not self._wrong

    def _look(self) -> None:
        marks, self._looked = self._marks(), time.monotonic()
        if marks == self._seen and not (self._wrong and self._looked >= self._tried + AGAIN):
            return
        self._seen, self._tried = marks, self._looked  # what is half-written now has other marks once it is whole
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            before, self._wrong = self._wrong, str(error) or type(error).__name__
            if self._wrong != before:
                log.error("%s: the new one is not used: %s", self.what, error)  # noqa: TRY400  # no bug of ours
        else:
            self._wrong = ""
            log.info("%s: read anew", self.what)

    def _marks(self) -> list[tuple[int, ...] | None]:
        marks: list[tuple[int, ...] | None] = []
        for path in self._paths:
            try:
                found = os.stat(path)  # noqa: PTH116  # follows links
            except OSError:
                marks.append(None)
            else:
                marks.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))
        return marks
