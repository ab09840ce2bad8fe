"""A server with one strategy more, `hold`, which keeps its input and does nothing: what is left is the transport."""

from __future__ import annotations

import sys
from typing import Annotated

import torch
from torch import Tensor

from queryselect_service.__main__ import main
from queryselect_service.spec import Spec
from queryselect_service.strategy import ScoreKind, Selection, strategy


@strategy(
    Spec, kind=ScoreKind.KEY, cost="O(k)", citation="none", pool_scores=False, memory=lambda *_: 0, work=lambda _: 1.0
)
def hold(embeddings: Annotated[Tensor, "N D"], *, k: int) -> Selection:
    """Takes the first rows."""
    return Selection(torch.arange(k), embeddings[:k, 0].double())


if __name__ == "__main__":
    sys.exit(main())
