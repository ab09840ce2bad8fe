"""Three processes, kept for the whole session, each with its slice of a pool: where `Slices` is tested.

They are spawned, since threads of torch and gRPC don't survive a fork, and talk over the loopback. Every wait is
bounded: processes that hang are ended, the test fails, and the next one gets new processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from queryselect_service import strategy as strategies
from queryselect_service.shards import Slices

PROCESSES = 3
#: Seconds that a piece of work may take; starting is one.
PATIENCE = 60.0
#: Seconds that the others get when one has failed: most likely they wait for it.
GRACE = 3.0


class Failed(AssertionError):
    """Processes raised, died or hang. errors: by rank, the type of what was raised and its text."""

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__("\n".join([message, *(f"rank {rank}: {text}" for rank, (_, text) in errors.items())]))
        self.errors = errors


class Processes:
    """They run functions of the test suite, all at the same time, as members of one group."""

    def __init__(self) -> None:
        self._running: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: tuple[Any, ...], patience: float = PATIENCE) -> list[Any]:
        """function(group, *arguments[rank]) in as many processes as there are arguments: what each returned, by rank.

        The function is found by its name, so it stands in a module; it runs in inference mode, as in the service.
        Raises Failed.
        """
        if not self._running:
            self._start()
        until = time.monotonic() + patience
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._running[: len(arguments)])}
        answers: dict[int, Any] = {}
        errors: dict[int, tuple[str, str]] = {}
        try:
            for pipe, rank in waiting.items():
                pipe.send_bytes(pickle.dumps((function, len(arguments), arguments[rank])))
            while waiting:
                ready = wait(list(waiting), max(0.0, until - time.monotonic()))
                if not ready:
                    raise Failed(f"ranks {sorted(waiting.values())} hang and were ended", errors)
                for pipe in ready:
                    good, answer = pickle.loads(pipe.recv_bytes())
                    rank = waiting.pop(pipe)
                    (answers if good else errors)[rank] = answer
                    if not good:
                        until = min(until, time.monotonic() + GRACE)
        except (EOFError, ConnectionError):
            raise Failed("a process has died", errors) from None
        finally:
            if waiting:  # whatever the reason: a late answer must not pass for that of the next run
                self.close()
        if errors:
            raise Failed(f"{len(errors)} of {len(arguments)} processes failed", errors)
        return [answers[rank] for rank in range(len(arguments))]

    def select(self, name: str, inputs: dict[str, Tensor], cuts: Sequence[int], **options: Any) -> Selected:
        """strategies.select on slices of the rows, [cuts[i], cuts[i + 1]) each; all must return the same.

        options: those of strategies.select, `context`, `candidates` and `limits` in terms of all rows.
        """
        strategy = strategies.STRATEGIES.get(name) or strategies.PLUGINS[name]
        spec = options.get("spec") or strategy.spec()
        rowwise = strategies.per_row(strategy.bound(spec, inputs), inputs)
        context, candidates = options.pop("context"), options.pop("candidates")
        limits = options.pop("limits", None) or strategies.Limits()
        found: list[Selected] = self.run(
            _select,
            *(
                (
                    name,
                    {name: x[start:stop].clone() if name in rowwise else x for name, x in inputs.items()},
                    {
                        "context": context[(start <= context) & (context < stop)] - start,
                        "candidates": candidates[start:stop].clone(),
                        "limits": limits.mapped(lambda x, start=start, stop=stop: x[start:stop].clone()),
                        **options,
                    },
                )
                for start, stop in pairwise(cuts)
            ),
        )
        first = found[0]
        if first.pool_scores is not None:
            first = replace(first, pool_scores=np.concatenate([each.pool_scores for each in found]))
        for other in found[1:]:
            assert replace(other, pool_scores=None) == replace(first, pool_scores=None)
        return first

    def close(self) -> None:
        """Ends the processes; the next run starts new ones."""
        for process, pipe in self._running:
            process.kill()
            process.join()
            process.close()
            pipe.close()
        self._running = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory() as folder:  # where they find each other; not needed afterwards
            for rank in range(PROCESSES):
                pipe, theirs = context.Pipe()
                process = context.Process(target=_work, args=(rank, theirs, Path(folder) / "store"), daemon=True)
                process.start()
                theirs.close()  # so that the pipe ends when the process does
                self._running.append((process, pipe))
            self.run(_nothing, *[()] * PROCESSES)


@dataclass(frozen=True)
class Selected:
    """A Selection as plain values."""

    indices: list[int]
    scores: list[float]
    pool_scores: np.ndarray | None
    notices: list[tuple[str, str, list[int] | None]]
    stop_reason: str = "MAX_ITEMS"
    cost_spent: float | None = None


def selected(selection: strategies.Selection) -> Selected:
    """What came out."""
    return Selected(
        selection.indices.tolist(),
        selection.scores.tolist(),
        None if selection.pool_scores is None else selection.pool_scores().numpy(),
        [(each.code, each.message, None if each.rows is None else each.rows.tolist()) for each in selection.notices],
        selection.stop_reason,
        selection.cost_spent,
    )


def _select(group: dist.ProcessGroup, name: str, inputs: dict[str, Tensor], options: dict[str, Any]) -> Selected:
    strategy = strategies.STRATEGIES.get(name) or strategies.PLUGINS[name]
    pool = Slices(len(options["candidates"]), group)
    return selected(strategies.select(strategy, inputs, pool=pool, **options))


def _nothing(_group: dist.ProcessGroup) -> None:
    pass


def _work(rank: int, pipe: Connection, store: Path) -> None:
    """The life of one process: joins the groups, then does what comes through the pipe until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store.as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=PATIENCE),
    )
    groups = {size: dist.new_group(range(size)) for size in range(1, PROCESSES + 1)}
    strategies.load()
    import tests.plugins  # noqa: F401  # registers them

    warnings.simplefilter("error")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, size, arguments = pickle.loads(message)
            with torch.inference_mode():
                answer = True, function(groups[size], *arguments)
        except Exception as error:  # noqa: BLE001
            answer = False, (type(error).__name__, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
