"""Quotas: how many picks may, and should, share a group; and the count of those that do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.shards import Shards

#: The value of rows that count for no group of a quota.
NO_GROUP = -1
#: Bytes per row that looking values up touches.
LOOK_UP_BYTES = 48


@dataclass(frozen=True)
class QuotaLimit:
    """How many picks one value of a quota should have at least and may have at most; None: the quota's default_max."""

    value: int
    min: int = 0
    max: int | None = None


@dataclass(frozen=True)
class Quota:
    """A quota's name and rules. default_max: the most picks of every value that `limits` does not say; None: any."""

    name: str
    default_max: int | None = None
    limits: tuple[QuotaLimit, ...] = ()

    def most(self, limit: QuotaLimit) -> float:
        """The most picks of the value of one of its limits."""
        most = self.default_max if limit.max is None else limit.max
        return math.inf if most is None else most


class Tally:
    """How many picks each value of a quota has, may have and should have.

    least: the fewest picks wanted, by value. wanted: picks that the minima still want. due: whether that is as many as
    are left. binds: whether only rows of those values are free. filled: values that became full, until that is noted.
    """

    def __init__(self, quota: Quota, values: Tensor, pool: Shards) -> None:
        """values: (n,) int64."""
        self.quota, self.values, self._pool = quota, values, pool
        self._default = math.inf if quota.default_max is None else quota.default_max
        self._most = {each.value: quota.most(each) for each in quota.limits}
        self.least = {each.value: each.min for each in quota.limits if each.min}
        self._available: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self.wanted, self.due, self.binds = 0, False, False
        self.filled: list[int] = []

    def lower_minima(self, allowed: Tensor) -> None:
        """Wants no more of a value than there are allowed rows (n,) of it."""
        if not self.least:
            return
        values = self._sorted(self.least)
        counts = torch.zeros_like(values)
        for span in self._pool.spans(len(allowed), LOOK_UP_BYTES):
            at, known = _look_up(self.values[span], values)
            counts += torch.bincount(at[known & allowed[span]], minlength=len(values))
        self._available = dict(zip(values.tolist(), self._pool.sum(counts).tolist(), strict=True))
        self.least = {value: min(least, self._available[value]) for value, least in self.least.items()}
        self.wanted = sum(self.least.values())

    def among(self, some: Iterable[int]) -> Tensor:
        """Which rows (n,) have one of these values, at least one."""
        values, found = self._sorted(some), torch.empty_like(self.values, dtype=torch.bool)
        for span in self._pool.spans(len(found), LOOK_UP_BYTES):
            _, found[span] = _look_up(self.values[span], values)
        return found

    def full(self) -> Tensor:
        """Which rows (n,) have a value that is full."""
        full = [value for value in {*self._counts, *self._most} if not self._room(value)]
        if self._default > 0:
            return self.among(full) if full else torch.zeros_like(self.values, dtype=torch.bool)
        return ~self.among([NO_GROUP, *(value for value in self._most if self._room(value))])

    def add(self, value: int) -> None:
        """One more pick."""
        count = self._counts.get(value, 0)
        self._counts[value] = count + 1
        self.wanted -= count < self.least.get(value, 0)
        if not self._room(value):
            self.filled.append(value)

    def remove(self, value: int) -> None:
        """One pick less, once no more are made."""
        self._counts[value] -= 1

    def fits(self, value: int) -> bool:
        """Whether a row of that value may be chosen next."""
        if self.binds:
            return self._counts.get(value, 0) < self.least.get(value, 0)
        return self._room(value)

    def spares(self, value: int) -> bool:
        """Whether one pick less leaves the minimum of that value as it is."""
        return self._counts[value] > self.least.get(value, 0)

    @property
    def short(self) -> list[int]:
        """The values that have fewer picks than wanted."""
        return [value for value, least in self.least.items() if self._counts.get(value, 0) < least]

    def unmet(self) -> list[str]:
        """What to say of the minima that were not met."""
        texts = []
        for each in self.quota.limits:
            count, rows = self._counts.get(each.value, 0), self._available.get(each.value, 0)
            if count < each.min:
                has = f"value {each.value} wants at least {each.min}, has {count}"
                texts.append(f"quota {self.quota.name!r}: {has}: {rows} candidate{'s' * (rows != 1)}")
        return texts

    def _room(self, value: int) -> bool:
        return value == NO_GROUP or self._counts.get(value, 0) < self._most.get(value, self._default)

    def _sorted(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(sorted(values), dtype=torch.int64, device=self.values.device)


def _look_up(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of the values (n,) stands among the known ones (m,), ascending, and whether it does: (n,) each."""
    at = torch.searchsorted(known, values).clamp_(max=len(known) - 1)
    return at, known[at] == values
