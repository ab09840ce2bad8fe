"""What a request asks of its picks together: quotas, costs, a least gain. The rules, and the tensors as they come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.checks import FLOATS, INTEGERS, Array, check_type
from queryselect_service.choice import WALK_PART, Limits
from queryselect_service.errors import InvalidInput, OverLimit, Unsupported
from queryselect_service.quotas import LOOK_UP_BYTES, NO_GROUP, Quota
from queryselect_service.settings import Settings
from queryselect_service.shards import SPAN_BYTES
from queryselect_service.strategy import PICK_BYTES, ScoreKind, Strategy


@dataclass(frozen=True)
class Terms:
    """The limits of a request; `values` and `costs` may be still to come."""

    quotas: tuple[Quota, ...] = ()
    values: tuple[Array, ...] = ()  # per quota, (N) integers
    costs: Array | None = None  # (N)
    max_cost: float | None = None
    min_gain: float | None = None

    @property
    def arrays(self) -> Iterator[Array]:
        """Their tensors."""
        yield from self.values
        if self.costs is not None:
            yield self.costs

    @property
    def _binding(self) -> list[str]:
        """The paths of what may end a selection early."""
        paths = {"pool.quotas": self.quotas or None, "stop.max_cost": self.max_cost, "stop.min_gain": self.min_gain}
        return [path for path, value in paths.items() if value is not None]

    def check(self, strategy: Strategy, max_items: int | None) -> None:
        """Raises InvalidInput for what is wrong by itself, Unsupported where the strategy can't keep to them."""
        for path in self._binding:
            if not strategy.limitable:
                raise Unsupported(f"{strategy.name} does not keep to {path}", field=path)
        self._check_stop(strategy)
        for at, quota in enumerate(self.quotas):
            _check_quota(f"pool.quotas[{at}]", quota, max_items)

    def _check_stop(self, strategy: Strategy) -> None:
        if self.max_cost is not None:
            if not self.max_cost >= 0:  # so that NaN fails too
                raise InvalidInput(f"stop.max_cost must be at least 0; it is {self.max_cost:g}", field="stop.max_cost")
            if self.costs is None:
                message = "stop.max_cost needs pool.costs of shape (N); the request has none"
                raise InvalidInput(message, field="pool.costs")
        if self.min_gain is not None:
            if strategy.score_kind is not ScoreKind.GAIN:
                message = f"{strategy.name} has no gains, which stop.min_gain compares; its scores are of another kind"
                raise InvalidInput(f"{message}, {strategy.score_kind}", field="stop.min_gain")
            if math.isnan(self.min_gain):
                raise InvalidInput("stop.min_gain must be a number; it is nan", field="stop.min_gain")

    def check_types(self) -> None:
        """Raises InvalidInput for a tensor of a type that it can't have."""
        for array in self.values:
            check_type(array, (*INTEGERS, torch.uint8))
        if self.costs is not None:
            check_type(self.costs, (*FLOATS, *INTEGERS))

    def check_sizes(self, settings: Settings) -> None:
        """Raises OverLimit for a quota whose name is too long to stand in warnings."""
        for at, quota in enumerate(self.quotas):
            size = len(quota.name.encode())
            if size > settings.max_id_bytes:
                path = f"pool.quotas[{at}].name"
                raise OverLimit("bytes of a name", size, settings.max_id_bytes, name="max_id_bytes", field=path)

    def nbytes(self, rows: int) -> int:
        """The bytes of their tensors for a pool of so many rows, in the types that selections use."""
        return 8 * rows * len(list(self.arrays))

    def memory(self, rows: int, picks: int) -> int:
        """The most bytes that keeping to them takes beside their tensors: masks, a walk's batch, what is noted."""
        if not self._binding:
            return 0
        columns = len(self.values) + 3  # and row, score, cost
        batch, looked_up = max(picks, rows // WALK_PART), min(rows, SPAN_BYTES // LOOK_UP_BYTES)
        noted = 400 * picks  # objects of Python
        return (4 + len(self.values)) * rows + batch * (PICK_BYTES + 16 * columns) + 16 * looked_up + noted

    def limits(self, kept: Callable[[Tensor], Tensor]) -> Limits:
        """The limits themselves, once their tensors are here. kept: drops rows that count as deleted."""
        values = tuple(array.data.long() for array in self.values if array.data is not None)
        costs = None if self.costs is None or self.costs.data is None else self.costs.data.double()
        return Limits(self.quotas, values, costs, self.max_cost, self.min_gain).mapped(kept)


def _check_quota(path: str, quota: Quota, max_items: int | None) -> None:
    """Raises InvalidInput for rules that can't be kept, whatever the rows."""
    if quota.default_max is not None and quota.default_max < 0:
        message = f"{path}.default_max must be at least 0; it is {quota.default_max}"
        raise InvalidInput(message, field=f"{path}.default_max")
    seen: set[int] = set()
    for at, limit in enumerate(quota.limits):
        where = f"{path}.limits[{at}]"
        if limit.value == NO_GROUP:
            message = f"{where}.value is {NO_GROUP}, which is the value of rows in no group"
            raise InvalidInput(message, field=f"{where}.value")
        if limit.value in seen:
            raise InvalidInput(f"{path}.limits lists value {limit.value} twice", field=f"{where}.value")
        seen.add(limit.value)
        for name, value in (("min", limit.min), ("max", limit.max)):
            if value is not None and value < 0:
                raise InvalidInput(f"{where}.{name} must be at least 0; it is {value}", field=f"{where}.{name}")
        most = quota.most(limit)
        if limit.min > most:
            message = f"{where}.min must be at most the value's max, {most:g}; it is {limit.min}"
            raise InvalidInput(message, field=f"{where}.min")
    fewest = sum(limit.min for limit in quota.limits)
    if max_items is not None and fewest > max_items:
        message = f"{path}.limits want at least {fewest} picks; stop.max_items is {max_items}"
        raise InvalidInput(message, field=f"{path}.limits")
