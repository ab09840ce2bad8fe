"""The client: one object per server, safe to share between threads."""

from __future__ import annotations

import math
import numbers
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
from google.protobuf.message import Message
from tqdm import tqdm

from queryselect._errors import Cancelled, DataLoss, DeadlineExceeded, QuerySelectError
from queryselect._picks import Picks, from_response
from queryselect._request import Prepared, prepare
from queryselect._transport import Cancel, InProcess, Remote, Transport
from queryselect.v1 import server_pb2, strategy_pb2

#: Called with the phase, the work done and the work in all (None where unknown).
ProgressCallback = Callable[[str, int, int | None], Any]

#: The first wait before trying again and the longest, in seconds; it doubles in between.
BACKOFF, LONGEST_BACKOFF = 0.1, 5.0
#: The longest wait for the description of strategies before a selection, in seconds.
DESCRIBE_SECONDS = 5.0


class Inputs(TypedDict, total=False):
    """What a selection may be given, by the names and shapes of the proto's Pool.

    N rows of the pool, D embedding dimensions, C classes, K parameter samples, P gradient entries. Arrays may be numpy,
    torch, pandas, or anything with __array__ or __dlpack__. Lists of rows are boolean masks (N) or integer row numbers.
    An array may also be a TensorRef, which the server reads from where it says, if its operator allows it.

    With item_rows, lists, costs, quotas, groups and ids are those of items, and N stands for their number there.
    """

    embeddings: Any  # (N, D)
    probabilities: Any  # (N, C)
    logits: Any  # (N, C), preferred over probabilities
    samples: Any  # (N, K, C)
    samples_kind: str  # PROBABILITIES, LOG_PROBABILITIES or LOGITS
    gradients: Any  # (N, P)
    scales: Sequence[Mapping[str, Any]]
    head_weights: Any  # (C, D)
    head_bias: Any  # (C,)
    utilities: Any  # (N,)
    weights: Any  # (N,)
    clusters: Any  # (N,)
    pseudo_labels: Any  # (N,)
    labeled: Any  # rows with labels: context, not chosen
    labels: Any  # (L,), in the order of labeled
    pending: Any  # rows out with annotators: context, not chosen
    excluded: Any  # rows treated as deleted
    candidates: Any  # the only rows that may be chosen
    costs: Any  # (N,), what labelling a row costs, at least 0
    quotas: Sequence[Mapping[str, Any]]  # {"name", "values" (N,) integers, "default_max", "limits"}, see Client.select
    groups: Any  # (N,), anything that tells groups apart; None and NaN: in no group
    max_per_group: int  # the most picks that share a group, by default 1
    item_rows: Any  # (N,) integers, the item of each row, where items of several rows are chosen, see Client.select
    item_aggregation: str  # how rows' scores become their item's: MEAN (default), MAX, SUM or TOP_K_MEAN
    item_top_k: int  # the number of highest rows that TOP_K_MEAN averages
    num_items: int  # where the last items have no rows, and nothing else with an entry per item is given
    ids: Any  # (N,), the caller's names for the rows; they stay here
    num_rows: int
    model: str
    inputs: Mapping[str, Any]
    reference: Mapping[str, Any]  # rows beside the pool, see Client.select
    references: Sequence[Mapping[str, Any]]  # several such sets


class Options(Inputs, total=False):
    """What a selection may be told, beside its inputs."""

    cost_budget: float  # the most that the picks may cost together
    min_gain: float  # nothing of less gain is chosen; for strategies whose score is a gain
    params: Mapping[str, Any]  # parameters of a strategy given by name
    task: str  # MULTICLASS (default) or MULTILABEL
    seed: int
    return_pool_scores: bool
    returns: Sequence[str]  # POOL_SCORES, PSEUDO_LABELS, MODEL_OUTPUTS
    validate_only: bool
    request_id: str
    timeout: float  # seconds, over all tries
    progress: bool | ProgressCallback


class Job:
    """A selection that runs in the background."""

    def __init__(self, work: Callable[[Cancel], Picks], cancel: Cancel) -> None:
        self._cancel, self._done = cancel, threading.Event()
        self._picks: Picks | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(work,), name="queryselect-job", daemon=True).start()

    def _run(self, work: Callable[[Cancel], Picks]) -> None:
        try:
            self._picks = work(self._cancel)
        except BaseException as error:  # noqa: BLE001  # handed to whoever asks for the result
            self._error = error
        finally:
            self._done.set()

    def cancel(self) -> None:
        """Stops the selection, here and on the server; result() then raises Cancelled."""
        self._cancel.cancel()

    def done(self) -> bool:
        """Whether result() would return at once."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> Picks:
        """The picks. Raises what the selection raised, or TimeoutError after `timeout` seconds of waiting."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no picks within {timeout} s; the selection goes on")
        if self._error is not None:
            raise self._error
        assert self._picks is not None  # one of the two is set
        return self._picks


class Client:
    """A QuerySelect server, or with target "local:" the same service in this process.

    token: a bearer token. tls: True for the public CAs that gRPC knows, or grpc.ChannelCredentials. timeout: the
    default for every call, in seconds. retries: how often a call that failed for a passing reason is tried again.

    >>> import numpy as np
    >>> with Client("local:") as client:
    ...     client.select("k_center_greedy", budget=2, embeddings=np.eye(3), labeled=[0]).indices
    array([1, 2])
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: bool | grpc.ChannelCredentials | None = None,
        timeout: float | None = None,
        retries: int = 3,
    ) -> None:
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries needs a whole number of at least 0; it is {retries!r}")
        self._transport: Transport = InProcess() if target == "local:" else Remote(target, token=token, tls=tls)
        self._timeout, self._retries = _seconds(timeout), retries
        self._lock, self._closed = threading.Lock(), False
        self._jobs: weakref.WeakSet[Job] = weakref.WeakSet()
        self._described: dict[str, strategy_pb2.StrategyDescription] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; running calls are cancelled, and later ones raise ValueError."""
        with self._lock:
            self._closed, running = True, list(self._jobs)
        for job in running:
            job.cancel()
        self._transport.close()

    def select(self, strategy: str | Message, budget: int | None = None, **options: Unpack[Options]) -> Picks:
        """The `budget` rows that people should label next, in the order of choice.

        strategy: a message such as Margin(), or its canonical name such as "margin" with `params`. The other arguments
        are those of Inputs and Options. Ctrl-C cancels the selection on the server.
        Raises QuerySelectError (InvalidInput, a ValueError, for what is wrong with the call).

        Fewer than `budget` rows come back where limits end the selection; `stop_reason` and a warning CONSTRAINED say
        so. With `groups`, at most `max_per_group` picks share a group. `quotas` say more, any number of them at a time:
        {"name": "class", "values": classes, "default_max": 20, "limits": {3: 5, 7: (2, 10)}} wants at most 5 picks of
        class 3, 2 to 10 of class 7, and at most 20 of every other; class -1 is none. With `costs`, `cost_spent` tells
        what the picks cost together, and `cost_budget` bounds it: rows dearer than what is left are passed over.

        `reference` is a set of rows beside the pool that the strategy compares with: {"role": "LABELED", "embeddings":
        (M, D), "probabilities" or "logits": (M, C), "weights": (M,), 1 by default, …}. Roles are VALIDATION, TARGET,
        AVOID and LABELED; without one it is the role that the strategy reads, if that is one. `references` are several.
        `scales`, here and there, are the layers of a network: [{"embeddings": (N, L), "gradients": (N, L)}, …].

        `item_rows` is for rows that are parts of what is labelled: tokens of sentences, boxes or pixels of images. It
        holds the item of each row; for sentences one after the other that is `np.repeat(np.arange(len(sentences)),
        [len(words) for words in sentences])`. An item's score is made of those of its rows by `item_aggregation`.
        Picks, `pool_scores`, lists of rows, `costs`, `groups`, `quotas` and `ids` are then of items. Items without rows
        are never picked. For strategies that score every row by itself, and `random`: `items` in strategies().

        `returns` asks for more than picks: "POOL_SCORES", the score of every row, or "PSEUDO_LABELS", the labels that
        the strategy assumes of them, for strategies that have these.

        >>> import numpy as np
        >>> with Client("local:") as client:
        ...     client.select("margin", budget=2, logits=np.eye(4), groups=["a", "a", "b", None]).indices
        array([0, 2])
        """
        cancel = Cancel()  # made first, so that Ctrl-C finds it however early it comes
        try:
            return self._submit(cancel, strategy, budget, options).result()
        except KeyboardInterrupt:
            cancel.cancel()
            raise

    def submit(self, strategy: str | Message, budget: int | None = None, **options: Unpack[Options]) -> Job:
        """The same in the background. Raises InvalidInput at once for what can be seen from here."""
        return self._submit(Cancel(), strategy, budget, options)

    def _submit(self, cancel: Cancel, strategy: str | Message, budget: int | None, options: Options) -> Job:
        given: dict[str, Any] = dict(options)
        timeout = _seconds(given.pop("timeout", self._timeout))
        deadline = None if timeout is None else time.monotonic() + timeout
        progress = given.pop("progress", False)
        returns = given.pop("returns", ())
        returns = [returns] if isinstance(returns, str) else list(returns)
        if given.pop("return_pool_scores", False) and "POOL_SCORES" not in returns:
            returns.append("POOL_SCORES")
        prepared = prepare(
            strategy,
            params=given.pop("params", None),
            stop={
                "max_items": budget,
                "max_cost": given.pop("cost_budget", None),
                "min_gain": given.pop("min_gain", None),
            },
            task=given.pop("task", None),
            seed=given.pop("seed", 0),
            returns=returns,
            validate_only=given.pop("validate_only", False),
            request_id=given.pop("request_id", None) or uuid.uuid4().hex,
            descriptions=self._descriptions(timeout),
            inputs=given,
        )
        job = Job(lambda cancel: self._run(prepared, deadline, cancel, _show(progress, budget)), cancel)
        with self._lock:
            self._jobs.add(job)
            closed = self._closed
        if closed:  # just now, by another thread
            job.cancel()
        return job

    def strategies(self) -> list[strategy_pb2.StrategyDescription]:
        """What the server can run: each strategy with its inputs, parameters, cost and paper."""
        listed = list(self._open().list_strategies(self._timeout).strategies)
        self._described = {each.name: each for each in listed}
        return listed

    def server_info(self) -> server_pb2.GetServerInfoResponse:
        """The server's version, devices and limits."""
        return self._open().server_info(self._timeout)

    def _open(self) -> Transport:
        if self._closed:
            raise ValueError("the client is closed")
        return self._transport

    def _descriptions(self, timeout: float | None) -> dict[str, strategy_pb2.StrategyDescription]:
        """What each strategy reads; asked at first. Empty, and asked again, while the server is not there.

        A silent server costs a bounded wait here: without an answer everything is sent.
        """
        transport = self._open()
        if self._described is None:  # two threads may both ask: better than one waiting for the other's timeout
            try:
                wait = DESCRIBE_SECONDS if timeout is None else min(timeout, DESCRIBE_SECONDS)
                listed = transport.list_strategies(wait).strategies
            except QuerySelectError:
                return {}  # the selection itself will tell what is wrong, and retries
            self._described = {each.name: each for each in listed}
        return self._described

    def _run(
        self, prepared: Prepared, deadline: float | None, cancel: Cancel, show: AbstractContextManager[ProgressCallback]
    ) -> Picks:
        """Tries until it works, retrying what may pass."""
        with show as report:
            budget, request_id = prepared.message.stop.max_items, prepared.message.request_id
            lost = 0
            for tried in range(self._retries + 1):
                if cancel.event.is_set():
                    raise Cancelled("the call was cancelled", request_id=request_id)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DeadlineExceeded("the timeout passed before the answer came", request_id=request_id)
                try:
                    message, apart = self._transport.select(prepared, left, cancel, report)
                    break
                except QuerySelectError as error:
                    wait = _wait(error, tried)
                    lost += isinstance(error, DataLoss)
                    late = deadline is not None and time.monotonic() + wait > deadline
                    if not error.retryable or lost > 1 or late or tried == self._retries:
                        raise
                cancel.event.wait(wait)
            report("selecting", budget, budget)
            return from_response(message, prepared.ids, apart)


def _seconds(timeout: Any) -> float | None:
    """A timeout, or ValueError. One that is over already is a timeout too."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real) or math.isnan(timeout):
        raise ValueError(f"timeout needs a number of seconds; it is {timeout!r}")
    return float(timeout)


def _wait(error: QuerySelectError, tried: int) -> float:
    """Seconds until the next try: what the server asked for, or a doubling wait; jitter keeps clients apart."""
    if error.retry_after:
        return error.retry_after * random.uniform(1.0, 1.2)  # noqa: S311  # no secret
    return float(min(LONGEST_BACKOFF, BACKOFF * 2**tried) * random.uniform(0.5, 1.0))  # noqa: S311


def _show(progress: bool | ProgressCallback, budget: int | None) -> AbstractContextManager[ProgressCallback]:
    """What is told how far a selection is: nobody, the caller's function, or a bar."""
    if callable(progress):
        return nullcontext(progress)
    return _Bar(budget) if progress else nullcontext(lambda *_: None)


class _Bar:
    """A tqdm bar over the work of one selection."""

    def __init__(self, budget: int | None) -> None:
        self._budget = budget

    def __enter__(self) -> ProgressCallback:
        self._bar, self._phase = tqdm(total=self._budget, unit="", miniters=1), ""
        return self._update

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _update(self, phase: str, done: int, total: int | None) -> None:
        if phase != self._phase:  # what follows is counted in another unit, and its speed starts anew
            self._phase = phase
            self._bar.unit, self._bar.unit_scale = ("B", True) if phase == "receiving" else ("", False)
            self._bar.set_description(phase, refresh=False)
            self._bar.total = total  # reset draws, and keeps the old one for None
            self._bar.reset(total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
