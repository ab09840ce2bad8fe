"""A server with one strategy more, `knobs`, a plug-in with a parameter of every type, for what `custom` may hold."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from queryselect_service.__main__ import main
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, ScoreKind, Selection, rank, strategy


class Sign(enum.StrEnum):
    """Which rows come first."""

    PLUS = "PLUS"
    MINUS = "MINUS"


@dataclass(frozen=True)
class Knobs(Spec):
    """Its parameters."""

    power: int = parameter(1, "The exponent", low=0, high=3)
    weight: float | None = parameter(None, "A factor", low=0, high=10)
    flat: bool = parameter(False, "Whether all rows are the same")
    sign: Sign = parameter(Sign.PLUS, "Which rows come first")
    label: str = parameter("", "Nothing")


@strategy(Knobs, kind=ScoreKind.GAIN, cost="O(N D)", citation="none")
def knobs(embeddings: Annotated[Tensor, "N D"], *, choice: Choice, spec: Knobs) -> Selection:
    """Rows by a power of their mean."""
    gains = embeddings.double().clamp(-1e9, 1e9).mean(1) ** spec.power
    gains *= (0.0 if spec.flat else 1.0) * (1.0 if spec.weight is None else spec.weight)
    return rank(gains if spec.sign is Sign.PLUS else -gains, choice)


if __name__ == "__main__":
    sys.exit(main())
