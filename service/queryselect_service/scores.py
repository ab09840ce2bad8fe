"""Rows of a stream are scored as they come, where a row's score depends on that row alone."""

from __future__ import annotations

from collections import deque

import torch

from queryselect_service.call import Call
from queryselect_service.engine import POLL, Place
from queryselect_service.queue import Job
from queryselect_service.request import Request
from queryselect_service.strategy import each_block, per_row, score_block
from queryselect_service.upload import WINDOW, Block, Upload


class Scores:
    """The scores of rows that are scored one by one, as their blocks become ready. values: (N,), once all are."""

    def __init__(self, request: Request, place: Place, upload: Upload) -> None:
        self._request, self._place, self._upload = request, place, upload
        self._row_work = request.strategy.work(request.sizes) / request.size
        self._job: Job[list[Block]] | None = None
        self.values: torch.Tensor | None = None

    def advance(self, call: Call) -> None:
        """Has ready blocks scored; waits only where too many of them are ready."""
        ready = self._upload.blocks.ready
        if self._request.validate_only:  # nothing to do on the device
            while ready:
                self._upload.blocks.give_back(ready.popleft())
            return
        if self._job is not None and (self._job.outcome.done() or len(ready) >= WINDOW // 2):
            self._collect(call)
        if ready and self._job is None:
            blocks = [ready.popleft() for _ in range(len(ready))]
            rows = sum(block.rows.stop - block.rows.start for block in blocks)
            self._job = self._place.start(lambda: self._score(blocks, call), self._row_work * rows)

    def ahead(self) -> int | None:
        """How many jobs of others stand before the blocks that are ready; None where their turn has come."""
        return None if self._job is None or self._job.begun else self._place.ahead(self._job)

    def finish(self, call: Call, seconds: float) -> bool:
        """Waits for at most so long until every row is scored; whether all are."""
        self.advance(call)
        if self._job is not None and self._place.wait(self._job, seconds):
            self._collect(call)
        return self._job is None and not self._upload.blocks.ready

    def _collect(self, call: Call) -> None:
        assert self._job is not None  # only asked then
        while not self._place.wait(self._job, POLL):
            pass
        call.check()
        for block in self._place.result(self._job):
            self._upload.blocks.give_back(block)
        self._job = None

    def _score(self, blocks: list[Block], call: Call) -> list[Block]:
        """In the device's thread."""
        request, device = self._request, self._place.device.where
        if self.values is None:
            self.values = torch.empty(request.size, dtype=torch.float64, device=device)
        here = request.tensors()
        rowwise = per_row(request.strategy, here)
        values = self.values

        def work(block: Block) -> None:
            call.check()
            parts = {name: x[block.rows] if name in rowwise else x for name, x in here.items()}
            inputs = {name: self._place.move(x) for name, x in {**block.tensors, **parts}.items()}
            values[block.rows] = score_block(
                request.strategy, inputs, request.spec, request.task, request.kinds, call.check
            )

        with self._place.times.phase("kernel"):
            deque(each_block(request.strategy, work, blocks, device), maxlen=0)
        return blocks
