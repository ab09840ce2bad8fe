"""What one labelling project remembers between rounds: the service itself remembers nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from queryselect._arrays import to_wire
from queryselect._client import Client
from queryselect._errors import InvalidInput
from queryselect._picks import Picks
from queryselect._request import to_strategy
from queryselect.v1 import tensor_pb2

STATE_VERSION = 1


class Session:
    """Rounds of labelling with one strategy.

    Picks are pending until they are labelled or released, and neither pending nor labelled rows are picked again. Each
    round draws with its own seed, derived from `seed`. Inputs given here are sent in every round; those given to `next`
    win over them. `labeled`: the rows that have labels at first. With `item_rows` all rows here are items.

    >>> import numpy as np
    >>> with Client("local:") as client:
    ...     session = Session(client, "k_center_greedy", embeddings=np.array([[0.0], [1.0], [5.0]]))
    ...     first = session.next(1).indices
    ...     session.label(first)
    ...     first, session.next(1).indices
    (array([1]), array([2]))
    """

    def __init__(
        self,
        client: Client | None,
        strategy: str | Message,
        *,
        params: Mapping[str, Any] | None = None,
        seed: int = 0,
        labeled: Any = (),
        **inputs: Any,
    ) -> None:
        self.client, self._inputs, self._seed, self._rounds = client, inputs, seed, 0
        message = to_strategy(strategy, params)
        self.strategy: Message = getattr(message, message.WhichOneof("kind") or "custom")
        self._labeled: set[int] = _rows(labeled, "pool.labeled")
        self._pending: set[int] = set()

    @property
    def labeled(self) -> list[int]:
        """The rows that have labels, ascending."""
        return sorted(self._labeled)

    @property
    def pending(self) -> list[int]:
        """The rows that were picked and have neither label nor release, ascending."""
        return sorted(self._pending)

    def next(self, budget: int, **inputs: Any) -> Picks:
        """The next rows to label; they are pending from now on. inputs: what has changed, such as probabilities."""
        if self.client is None:
            raise ValueError("this session has no client; set session.client")
        known = {"labeled", "pending"} & {*self._inputs, *inputs}
        if known:
            raise TypeError(f"a session knows {' and '.join(sorted(known))} by itself; see label() and release()")
        arguments = {**self._inputs, **inputs, "labeled": self.labeled, "pending": self.pending}
        if arguments.get("candidates") is not None:  # rows named there could be picked again
            free = _rows(arguments["candidates"], "pool.candidates") - self._labeled - self._pending
            arguments["candidates"] = sorted(free)
        picks = self.client.select(self.strategy, budget, seed=(self._seed + self._rounds) % 2**64, **arguments)
        self._rounds += 1
        self._pending.update(picks.indices.tolist())
        return picks

    def label(self, rows: Any) -> None:
        """Marks rows (a number, numbers, or a mask) as labelled, whether they were pending or not."""
        done = _rows(rows, "rows")
        self._labeled |= done
        self._pending -= done

    def release(self, rows: Any) -> None:
        """Gives pending rows back: they may be picked again. Raises InvalidInput for a row that is not pending."""
        back = _rows(rows, "rows")
        strange = sorted(back - self._pending)
        if strange:
            raise InvalidInput(f"row {strange[0]} is not pending", field="rows")
        self._pending -= back

    def state(self) -> dict[str, Any]:
        """Everything but the client and the inputs, as values that json takes."""
        return {
            "version": STATE_VERSION,
            "strategy": to_strategy(self.strategy).WhichOneof("kind"),
            "params": json_format.MessageToDict(self.strategy, preserving_proto_field_name=True),
            "seed": self._seed,
            "rounds": self._rounds,
            "labeled": self.labeled,
            "pending": self.pending,
        }

    @classmethod
    def load(cls, state: Mapping[str, Any], client: Client | None = None, **inputs: Any) -> Session:
        """The session that `state` tells of, on a client and inputs given anew."""
        if state["version"] != STATE_VERSION:
            raise ValueError(f"the state has version {state['version']}; this client reads {STATE_VERSION}")
        message = to_strategy(state["strategy"])
        strategy = getattr(message, state["strategy"])
        json_format.ParseDict(state["params"], strategy)
        session = cls(client, strategy, seed=state["seed"], labeled=state["labeled"], **inputs)
        session._pending, session._rounds = set(state["pending"]), state["rounds"]
        return session


def _rows(value: Any, path: str) -> set[int]:
    """The rows that a number, a list of numbers, or a mask names. Raises InvalidInput."""
    array = to_wire(value, path, rows=True)
    if array.dtype == tensor_pb2.DATA_TYPE_BOOL and array.data.ndim == 1:
        return set(array.data.nonzero()[0].tolist())
    if array.dtype not in (tensor_pb2.DATA_TYPE_I64, tensor_pb2.DATA_TYPE_I32) or array.data.ndim > 1:
        raise InvalidInput(f"{path} needs row numbers or a mask; it is {value!r}", field=path)
    rows: set[int] = set(array.data.reshape(-1).tolist())
    if rows and min(rows) < 0:
        raise InvalidInput(f"{path} lists row {min(rows)}; rows are 0 and up", field=path)
    return rows
