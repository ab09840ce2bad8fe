"""Sets of rows beside the pool: what a request gives, and what becomes of it for a kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from queryselect_service.checks import Array, unify
from queryselect_service.errors import InvalidInput
from queryselect_service.strategy import Input, ReferenceRole, Strategy, base

#: The one input that a set may lack: its rows then count 1 each.
WEIGHTS = "weights"
#: The inputs of a reference set and their dimensions, M rows of its own.
REFERENCE_INPUTS = {
    "embeddings": "M D",
    "probabilities": "M C",
    "logits": "M C",
    "labels": "M",
    "samples": "M K C",
    "gradients": "M P",
    "weights": "M",
    "misclassified": "M",
}


@dataclass
class Reference:
    """One set: where it stands in the request, its role, and its inputs by field. size: M, once checked."""

    path: str
    role: ReferenceRole
    inputs: dict[str, Array]
    size: int = 0

    @property
    def given(self) -> set[str]:
        """The fields that are set."""
        return {base(name) for name in self.inputs}

    def named(self) -> Iterator[tuple[str, Array]]:
        """Its inputs, each with the name that a kernel would have for it."""
        for field, array in self.inputs.items():
            yield self.role.prefix + field, array


def check_names(strategy: Strategy, references: Sequence[Reference]) -> None:
    """Raises InvalidInput where a set lacks what the strategy reads of its role, or a set is missing."""
    for wanted in strategy.inputs:
        if wanted.role is None:
            continue
        sets = [each for each in references if each.role is wanted.role]
        if not sets and wanted.required:
            words = f"of role {wanted.role} with {wanted.field} of shape ({wanted.shape}); the request has none"
            raise InvalidInput(f"{strategy.name} needs references {words}", field="references")
        given = [next((field for field in wanted.fields if field in each.given), None) for each in sets]
        for each, field in zip(sets, given, strict=True):
            if "probabilities" in each.inputs and "logits" in each.inputs:
                words = f"{each.path} needs exactly one of probabilities and logits; it has both"
                raise InvalidInput(words, field=f"{each.path}.logits")
            may_lack = not wanted.required and strategy.optional_in(wanted.role)
            if field is None and wanted.field != WEIGHTS and not may_lack:
                _refuse_missing(strategy, wanted, each)
            kind, first = (one.inputs[field].kind if field in one.inputs else "" for one in (each, sets[0]))
            if field == given[0] and kind != first:
                words = f"{each.path} has samples_kind {kind} where {sets[0].path}, of the same role, has {first}"
                raise InvalidInput(words, field=f"{each.path}.samples_kind")
            if field != given[0] and wanted.field != WEIGHTS:
                words = f"{each.path} has {field or 'no ' + wanted.field} where {sets[0].path}, of the same role, has "
                words += given[0] or "none"
                raise InvalidInput(words, field=f"{each.path}.{field or wanted.field}")
            if field == given[0]:
                _refuse_other_parts(field, each, sets[0])


def _refuse_other_parts(field: str | None, reference: Reference, first: Reference) -> None:
    """Raises InvalidInput where two sets of one role have a field of several tensors, and not the same ones."""
    mine, theirs = ({name for name in each.inputs if base(name) == field} for each in (reference, first))
    for name in sorted(mine ^ theirs):
        here, there = ("has", "has not") if name in mine else ("lacks", "has")
        words = f"{reference.path} {here} {name}, which {first.path}, of the same role, {there}"
        raise InvalidInput(words, field=f"{reference.path}.{name}")


def _refuse_missing(strategy: Strategy, wanted: Input, reference: Reference) -> None:
    names = " or ".join(f"{reference.path}.{field}" for field in wanted.fields)
    given = ", ".join(array.described for array in reference.inputs.values()) or "no inputs"
    raise InvalidInput(
        f"{strategy.name} needs {names} of shape ({wanted.shape}); the set has {given}",
        field=f"{reference.path}.{wanted.field}",
    )


def check_shapes(references: Sequence[Reference], sizes: dict[str, tuple[int, str]]) -> None:
    """Holds every shape against its letters, M being each set's own. sizes: as in checks.unify."""
    for each in references:
        for array in each.inputs.values():
            unify(array, sizes)
        each.size, _ = sizes.pop("M", (0, ""))


def join(strategy: Strategy, references: Sequence[Reference]) -> dict[str, Tensor]:
    """What the strategy reads of the sets, by its names, those of one role as one tensor. Every element is here."""
    inputs = {}
    for wanted in strategy.inputs:
        if wanted.role is None:
            continue
        sets = [each for each in references if each.role is wanted.role]
        for field in wanted.fields:
            parts = dict.fromkeys(name for each in sets for name in each.inputs if base(name) == field)
            if sets and wanted.required and field == WEIGHTS:
                parts[WEIGHTS] = None
            for part in parts:
                inputs[f"{wanted.role.prefix}{part}"] = _cat(_part(each, part) for each in sets)
    return inputs


def _part(reference: Reference, field: str) -> Tensor:
    """A set's own tensor, or weights of 1."""
    data = reference.inputs[field].data if field in reference.inputs else torch.ones(reference.size)
    assert data is not None  # joined when every element is here
    return data


def _cat(parts: Iterable[Tensor]) -> Tensor:
    """The rows of all parts; those of a single one without a copy."""
    first, *others = parts
    return torch.cat([first, *others]) if others else first
