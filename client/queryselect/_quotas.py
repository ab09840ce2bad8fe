"""Limits on groups: from what callers like to write to the fields of the proto's Quota."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from queryselect._arrays import as_numpy
from queryselect._errors import InvalidInput

#: The value of rows in no group.
NO_GROUP = -1


def to_quotas(quotas: Any, groups: Any, max_per_group: Any) -> list[Any]:
    """The quotas, and one more for `groups`. Limits given as a mapping of values become a list."""
    if quotas is not None and not isinstance(quotas, Sequence):
        raise InvalidInput(f"pool.quotas needs a list; it is a {type(quotas).__name__}", field="pool.quotas")
    found = [_with_list(each, f"pool.quotas[{at}].limits") for at, each in enumerate(quotas or ())]
    if groups is not None:
        most = 1 if max_per_group is None else max_per_group
        found.append({"name": "groups", "values": to_codes(groups, "groups"), "default_max": most})
    elif max_per_group is not None:
        raise InvalidInput("max_per_group needs groups", field="max_per_group")
    return found


def _with_list(quota: Any, path: str) -> Any:
    """A quota whose limits are a list, as in the proto."""
    if not isinstance(quota, Mapping) or not isinstance(quota.get("limits"), Mapping):
        return quota
    limits = []
    for value, bounds in quota["limits"].items():
        pair = bounds if isinstance(bounds, Sequence) else (None, bounds)
        if len(pair) != 2:
            needed = f"{path} needs for each value the most picks, or the fewest and the most"
            raise InvalidInput(f"{needed}; value {value!r} has {bounds!r}", field=path)
        limits.append({"value": value, "min": pair[0], "max": pair[1]})
    return {**quota, "limits": limits}


def to_codes(groups: Any, path: str) -> np.ndarray[Any, Any]:
    """A number (N,) for every row's group, whatever groups are called; -1 for None, NaN and the like.

    Integers are their own numbers. Raises InvalidInput for what has more dimensions, and for groups without a hash.
    """
    if isinstance(groups, (list, tuple)):  # numpy would make one text of it all, nan and None included
        whole = all(isinstance(each, Integral) and not isinstance(each, bool) for each in groups)
        return np.asarray(groups) if whole else _numbered(groups, path)
    array, _ = as_numpy(groups, path)
    if array.ndim != 1:
        shape = " ".join(map(str, array.shape))
        raise InvalidInput(f"{path} needs one group per row, (N); it has shape ({shape})", field=path)
    return array if array.dtype.kind in "iu" else _numbered(array.tolist(), path)


def _numbered(groups: Iterable[Any], path: str) -> np.ndarray[Any, Any]:
    """Numbers in the order in which the groups come."""
    numbers: dict[Any, int] = {}
    try:
        codes = [NO_GROUP if _missing(each) else numbers.setdefault(each, len(numbers)) for each in groups]
    except TypeError as error:
        raise InvalidInput(f"{path} needs groups that can be compared: {error}", field=path) from None
    return np.array(codes, np.int64)


def _missing(group: Any) -> bool:
    """Whether it stands for no group: None, NaN, NaT, or pandas' NA, which will not even say whether it is itself."""
    return group is None or type(group).__name__ == "NAType" or group != group  # noqa: PLR0124
