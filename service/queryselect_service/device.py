"""A device: its memory, whether it works, and the thread that has it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from queryselect_service.host import host_memory
from queryselect_service.queue import Job, Queue

#: The part of a GPU's memory that requests may fill; the rest is for its libraries.
PART = 0.9
#: Bytes that travel to a GPU at once.
STAGE_BYTES = 32 << 20


def find(names: str) -> list[torch.device]:
    """The devices of the setting: `auto`, or names separated by commas, of which `cuda` stands for every GPU.

    Raises ValueError for a name that torch does not know, a GPU that is named twice, or GPUs beside the CPU; of `cpu`
    each is one more selection at a time.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if names == "auto":
        names = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in names.split(","):
        try:
            found += [torch.device(each) for each in (gpus or ["cuda"] if name.strip() == "cuda" else [name.strip()])]
        except RuntimeError as error:
            raise ValueError(f"device must be auto or names of torch; it is {names!r}: {error}") from None
    twice = {str(each) for each in found if each.type != "cpu" and found.count(each) > 1}
    if twice:
        raise ValueError(f"device names {', '.join(sorted(twice))} twice")
    if len({each.type for each in found}) > 1:  # memory is counted in one way or the other
        raise ValueError(f"device names GPUs or the CPU, not both; it is {names!r}")
    return found


class Device:
    """A device of torch that has one job at a time. `others` are all of a server's, this one too."""

    def __init__(self, where: torch.device, queue: Queue, others: Sequence[Device]) -> None:
        """Raises RuntimeError for a GPU that does not work."""
        self.where, self._queue, self._others = where, queue, others
        #: Set when a selection or a probe found the device lost, until a probe finds it at work again.
        self.lost = threading.Event()
        #: When a probe found the device at work last (time.monotonic), and the bytes of its memory then, by kind.
        self.seen: tuple[float, dict[str, int]] = (-math.inf, {})
        #: The bytes of its own memory that requests may fill; None where it has none but the host's.
        self.capacity: int | None = None
        #: The bytes of it that are set aside for those whose work has begun here and will go on here, by whom.
        self._held: dict[object, int] = {}
        self._thread: threading.Thread | None = None
        if self.is_gpu:
            self.probe()  # a device that is not there is told of as such
            _, total = self.memory()
            self.capacity = int(PART * total)

    def __str__(self) -> str:
        return str(self.where)

    @property
    def is_gpu(self) -> bool:
        """Whether it has memory of its own."""
        return self.where.type == "cuda"

    @property
    def model(self) -> str | None:
        """The maker's name of the device, None for a CPU."""
        return torch.cuda.get_device_name(self.where) if self.is_gpu else None

    def memory(self) -> tuple[int, int]:
        """The free and the total bytes of the device's memory."""
        return torch.cuda.mem_get_info(self.where) if self.is_gpu else host_memory()

    def probe(self) -> None:
        """One tiny operation on the device. Raises RuntimeError where it does not work."""
        try:
            torch.zeros(2, device=self.where).sum().item()
            free, total = self.memory()
            memory = {"total": total, "free": free}
            if self.is_gpu:
                memory["allocated"] = torch.cuda.memory_allocated(self.where)
                memory["reserved"] = torch.cuda.memory_reserved(self.where)
        except Exception as error:  # torch asserts where it was built without CUDA
            self.lose()
            raise RuntimeError(f"device {self} does not work: {error}") from error
        self.seen = (time.monotonic(), memory)
        if self.lost.is_set():
            self.lost.clear()
            self._queue.stir()

    def lose(self) -> None:
        """The device does not work: others have its work until a probe finds that it does."""
        self.lost.set()
        self._queue.stir()

    def serve(self) -> None:
        """Begins to take jobs, in a thread of its own, until the queue is closed."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=str(self), daemon=True)
            self._thread.start()

    def may_take(self, job: Job[Any]) -> bool:
        """Whether a job is for this device: begun here, or such as it has room for, while it works.

        What waits where no device works that has room for it fails at the first that takes it.
        """
        if job.device is not None:
            return job.device is self
        if not self.takes(job.needs + sum(list(self._held.values()))):
            return False
        return not self.lost.is_set() or all(each.lost.is_set() for each in self._others if each.takes(job.needs))

    def hold(self, who: object, nbytes: int) -> None:
        """Has so many bytes be theirs, whose work has begun here, until they are released."""
        self._held[who] = nbytes

    def release(self, who: object) -> None:
        """Nothing is theirs any more."""
        self._held.pop(who, None)
        self._queue.stir()

    def takes(self, nbytes: int) -> bool:
        """Whether it has room for so many bytes while it is empty."""
        return self.capacity is None or nbytes <= self.capacity

    def move(self, x: Tensor, check: Callable[[], None]) -> Tensor:
        """`x` on the device.

        To a GPU by two pieces of page-locked memory in turn: one is filled while the other travels, little memory is
        locked, and `check` may stop it in between.
        """
        if not self.is_gpu:
            return x
        source = x.contiguous().reshape(-1).view(torch.uint8)
        moved = torch.empty(x.shape, dtype=x.dtype, device=self.where)
        target, size = moved.reshape(-1).view(torch.uint8), min(STAGE_BYTES, len(source))
        with torch.cuda.device(self.where):
            stages = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            sent = [torch.cuda.Event() for _ in stages]  # type: ignore[no-untyped-call]
            try:
                for number, start in enumerate(range(0, len(source), STAGE_BYTES)):
                    check()
                    at, piece = number % 2, source[start : start + STAGE_BYTES]
                    sent[at].synchronize()  # returns at once where nothing was recorded
                    staged = stages[at][: len(piece)].copy_(piece)
                    target[start : start + STAGE_BYTES].copy_(staged, non_blocking=True)
                    sent[at].record()
            finally:
                torch.cuda.synchronize(self.where)  # what is locked may be used again, and times are what they say
        return moved

    def _serve(self) -> None:
        if self.is_gpu:
            torch.cuda.set_device(self.where)  # what kernels make without naming a device is made here
        while (job := self._queue.take(self.may_take)) is not None:
            started = time.monotonic()
            job.run(self)
            self._queue.done(job, time.monotonic() - started)
            del job  # or its outcome would live until the next one comes
