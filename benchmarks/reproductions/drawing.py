"""Learning curves as a picture that stands alone: the demo's drawing, with the colours that its page would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo import figures

HEIGHT = 520
COLOURS = (
    *("#767b83", "#2f2bd0", "#d17613", "#1a7958", "#a0359c", "#8a1f08", "#238dc2", "#8a48f5", "#666410", "#d0417e"),
    *("#3c4a5e", "#9a8600", "#12a594"),
)
STYLE = """<style>
svg { background: #fff; font-family: system-ui, sans-serif; }
text { font-size: 13px; fill: #565c66; }
.grid line { stroke: #dfe2e7; }
.curve path, .end path { fill: none; stroke-linejoin: round; }
.curve .mean { stroke-width: 2; }
.reach, .cross { visibility: hidden; }
%s
</style>"""


def draw(
    counts: Sequence[int],
    means: Mapping[str, NDArray[np.floating[Any]]],
    width: int = 900,
    measured: str = "accuracy",
) -> str:
    """SVG: what was measured by name (points,), over the number of labelled rows (points,)."""
    lines = [figures.Line(f"s{at}", name, mean, None) for at, (name, mean) in enumerate(means.items())]
    colours = "\n".join(
        f'[data-s="s{at}"] .mean, .end[data-s="s{at}"] path {{ stroke: {colour}; }}\n'
        f'.end[data-s="s{at}"] circle, .end[data-s="s{at}"] text {{ fill: {colour}; }}'
        for at, colour in zip(range(len(lines)), COLOURS, strict=False)
    )
    head, _, rest = figures.curves(counts, lines, None, width, HEIGHT).partition(">")
    head = head.replace("Test accuracy", f"Test {measured}")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{STYLE % colours}{rest}\n'
