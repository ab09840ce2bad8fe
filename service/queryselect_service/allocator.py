"""What the server asks of glibc's allocator, so that the memory of a request goes back to the system after it.

glibc gives most threads a heap of their own, keeps in every one what was freed, and can give back only whole pages; the
end of a heap only of the first, the others' end at 64 MB. With a heap each for the threads of gRPC, of torch and of the
server, ten cancelled pools of 1.5 GB left 85 MB more resident than before them, and every further one a little more;
with two heaps for all, up to 70 MB by what had run before; with one, 32 MB at most. Small requests by 1 to 64 clients
take as long with one as with two.

What is larger than a threshold glibc asks the system for, page by page, and gives back at once; the end of a heap, too.
The thresholds grow with what is freed, to 32 and 64 MB. Until they are large enough for the blocks of a kernel, every
step of its formula waits for new pages: scores of samples took up to three times as long, by what had run before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

#: Heaps for all threads together.
ARENAS = 1
#: What the thresholds would grow to, in bytes.
MMAP_THRESHOLD, TRIM_THRESHOLD = 32 << 20, 64 << 20
#: By the variable of the environment that sets it as well: its number in glibc's malloc.h, and what is asked for.
OPTIONS = {
    "MALLOC_ARENA_MAX": (-8, ARENAS),
    "MALLOC_MMAP_THRESHOLD_": (-3, MMAP_THRESHOLD),
    "MALLOC_TRIM_THRESHOLD_": (-1, TRIM_THRESHOLD),
}


def prepare() -> None:
    """Asks for all of it but what the environment sets. Before there are threads."""
    for variable, (option, value) in OPTIONS.items():
        if variable not in os.environ:
            _call("mallopt", option, value)


def give_back() -> None:
    """Gives freed memory back to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)  # other C libraries have none
    if function is not None:
        function(*arguments)
