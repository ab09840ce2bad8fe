"""Where every thread is."""

from __future__ import annotations

import gc
import sys
from types import FrameType


def frames() -> dict[int, FrameType]:
    """Every thread's frame, by the thread's identity.

    Without the garbage collector, as CPython does by itself from 3.13 (gh-106883): it makes the frames under a lock
    that a thread needs to end, and a collection there may let go of the interpreter (gRPC's objects do when they die):
    both then wait for each other, and the process stands still.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if enabled:
            gc.enable()
