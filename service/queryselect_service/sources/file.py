"""file://: files of this machine, below a directory that the operator named.

What is below the directory is opened part by part, each relative to the one before and none through a symbolic link:
there is no moment between a check and its use. The directory itself may be reached through links: the operator named
it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from queryselect_service.errors import NotFound, ObjectChanged, SourceRefused, SourceUnavailable
from queryselect_service.sources.address import Address

_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO would wait for a writer
_BELOW = _OPEN | os.O_NOFOLLOW


class File:
    """An open file. Its version is its time of change and its size: the same for all servers that mount it."""

    def __init__(self, descriptor: int, check: Callable[[], None]) -> None:
        """check: called before bytes are read; may raise."""
        self._descriptor, self._check = descriptor, check
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise NotFound("it is no file")
        self.size, self.version = about.st_size, _version(about)

    def read(self, start: int, stop: int) -> bytes:
        """See Object."""
        self._check()
        data = os.pread(self._descriptor, stop - start, start)
        if _version(os.fstat(self._descriptor)) != self.version:
            raise ObjectChanged("it changed while it was read")
        if len(data) < stop - start:  # the system reads at most 2 GiB at a time; we ask for far less
            raise SourceUnavailable(f"it gave {len(data)} of {stop - start} bytes")
        return data

    def __del__(self) -> None:
        # And not before: another thread may be reading, and the number may soon be that of another file.
        os.close(self._descriptor)


def open_object(address: Address, prefix: Address, check: Callable[[], None]) -> File:
    """Opens a file within the prefix. Raises NotFound, SourceRefused."""
    below = address.segments[len(prefix.segments) :]
    try:
        at = os.open("/" + prefix.path, _OPEN)
        for segment in below:
            above = at
            try:
                at = os.open(segment, _BELOW, dir_fd=above)
            finally:
                os.close(above)
    except PermissionError:
        raise SourceRefused("this server's user may not read it") from None
    except FileNotFoundError:
        raise NotFound("there is no such file") from None
    except OSError:  # a symbolic link; a file where a directory should be; a name too long
        raise NotFound("there is no such file, or a symbolic link stands in its way") from None
    return File(at, check)


def _version(about: os.stat_result) -> str:
    return f"{about.st_mtime_ns:x}-{about.st_size:x}"
