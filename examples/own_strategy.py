"""A query strategy of one's own, as a plug-in: a Spec and a function, and no proto.

A package announces its module with an entry point, and every server beside which it is installed serves it:

    [project.entry-points."queryselect.strategies"]
    brightest = "my_package.brightest"
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from torch import Tensor

from queryselect import Client, Custom
from queryselect_service.spec import Spec, parameter
from queryselect_service.strategy import Choice, ScoreKind, Selection, rank, strategy


@dataclass(frozen=True)
class Brightest(Spec):
    """Its parameters."""

    power: float = parameter(2.0, "The norm's order", low=1)


@strategy(Brightest, kind=ScoreKind.POINT, cost="O(N D) time, O(N) memory", citation="this file, 2026")
def brightest(embeddings: Annotated[Tensor, "N D"], *, choice: Choice, spec: Brightest) -> Selection:
    """Prefers rows with the longest embeddings."""
    return rank(embeddings.double().norm(p=spec.power, dim=1), choice)


with Client("local:") as client:
    pool = np.random.default_rng(0).normal(size=(100, 8))
    picks = client.select(Custom(name="brightest", parameters={"power": 1}), budget=3, embeddings=pool)
    print(list(picks))
    assert picks.indices[0] == np.abs(pool).sum(axis=1).argmax()
