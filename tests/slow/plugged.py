"""A server with the plug-ins of tests/plugins.py, among them one that takes exactly so long.

On SIGUSR1 it prints what lives in its memory: bytes in glibc's heaps, and blocks in Python's own.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import sys

from queryselect_service.__main__ import main
from tests import plugins  # noqa: F401  # registers them


class Heaps(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def tell(*_: object) -> None:
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Heaps
    heaps = mallinfo()
    print(heaps.uordblks + heaps.hblkhd, sys.getallocatedblocks(), flush=True)  # noqa: T201  # to whoever sent the signal


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main())
