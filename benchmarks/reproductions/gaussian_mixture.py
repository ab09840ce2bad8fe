"""A picture of typical against far: the first picks of TypiClust and of core-set among points of a Gaussian mixture.

    python -m benchmarks.reproductions.gaussian_mixture

draws docs/images/gaussian-mixture.svg, and needs no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo import figures
from queryselect import Client

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "gaussian-mixture.svg"
#: Points of each component, their centres, and their standard deviations, alike in both directions.
SIZES = (260, 200, 160, 120, 90, 70, 50, 30)
CENTRES = ((0, 0), (5.5, 1.5), (1.5, 5.5), (-5, 2.5), (-3, -4.5), (3.5, -4.5), (6.5, 6.5), (-4.5, 7))
DEVIATIONS = (1.1, 0.9, 0.9, 0.8, 0.8, 0.7, 0.6, 0.6)
PICKS = 16

GAP, TOP = 24, 58
STYLE = """<style>
svg { background: #fff; font-family: system-ui, sans-serif; }
text { font-size: 15px; fill: #23272e; }
text.says { font-size: 13px; fill: #565c66; }
.frame { fill: none; stroke: #dfe2e7; }
.dots { fill: none; stroke: #b4bac4; stroke-width: 3; stroke-linecap: round; }
.class { display: none; }
.ties path { stroke-width: 1; }
.pick text { font-size: 10px; font-weight: 600; fill: #fff; text-anchor: middle; }
[data-s="typiclust"] { fill: #2f2bd0; stroke: #2f2bd0; }
[data-s="k_center_greedy"] { fill: #b3540a; stroke: #b3540a; }
.pick text, .place { stroke: none; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171c; }
  text { fill: #e6e9ee; }
  text.says { fill: #a5adba; }
  .frame { stroke: #333a45; }
  .dots { stroke: #565f6d; }
  .pick text { fill: #14171c; }
  [data-s="typiclust"] { fill: #a3a1ff; stroke: #a3a1ff; }
  [data-s="k_center_greedy"] { fill: #f2a65a; stroke: #f2a65a; }
}
</style>"""


@dataclass(frozen=True)
class Mixture:
    """Points (N, 2), and the component (N,) that each was drawn from."""

    points: NDArray[np.float64]
    components: NDArray[np.int64]


#: Both are to see the plane as it is: of points scaled to unit length only the direction is left.
STRATEGIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "typiclust": ("TypiClust", {"normalize": False}),
    "k_center_greedy": ("k-center greedy (core-set)", {"normalize": False}),
}


def mixture(seed: int = 0) -> Mixture:
    """The points, larger components first."""
    rng = np.random.default_rng(seed)
    components = np.repeat(np.arange(len(SIZES)), SIZES)
    noise = rng.normal(size=(len(components), 2)) * np.array(DEVIATIONS)[components, None]
    return Mixture(np.array(CENTRES)[components] + noise, components)


def typical(found: Mixture, rows: NDArray[np.int64]) -> int:
    """How many of these rows are within a standard deviation of their component's centre; of all points, 39 %."""
    of = found.components[rows]
    distances = np.linalg.norm(found.points[rows] - np.array(CENTRES)[of], axis=1)
    return int((distances <= np.array(DEVIATIONS)[of]).sum())


def nearest_labelled(found: Mixture, rows: NDArray[np.int64]) -> float:
    """The share of all points whose nearest of these rows is of the same component."""
    distances = np.linalg.norm(found.points[:, None] - found.points[rows], axis=2)  # (N, k)
    return float((found.components[rows[distances.argmin(axis=1)]] == found.components).mean())


def draw(found: Mixture, picks: Mapping[str, NDArray[np.int64]]) -> str:
    """SVG: a panel for each strategy, its picks numbered in the order of choice."""
    side = figures.PANEL
    width, height = len(picks) * (side + GAP) + GAP, TOP + side + GAP
    places = figures.onto_panel(found.points)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
            f' aria-label="The first {PICKS} picks of {len(picks)} strategies from a Gaussian mixture">{STYLE}'
        ),
        figures.pool(places, found.components, np.array([], dtype=np.int64)),
    ]
    for at, (name, rows) in enumerate(picks.items()):
        left, label = GAP + at * (side + GAP), STRATEGIES[name][0]
        said = f"{typical(found, rows)} of {len(rows)} picks within one deviation of a centre"
        drawn = figures.panel(name, label, places[rows], [f"pick {rank}" for rank in range(1, len(rows) + 1)])
        frame = f'x="{left:g}" y="{TOP}" width="{side:g}" height="{side:g}"'
        parts += [
            f'<text x="{left:g}" y="24">{label}</text><text class="says" x="{left:g}" y="44">{said}</text>',
            f'<rect class="frame" rx="6" {frame}/>',
            drawn.replace("<svg", f"<svg {frame}", 1),
        ]
    return "".join([*parts, "</svg>\n"])


def main(arguments: list[str] | None = None) -> int:
    """Chooses, says what was chosen, and draws it."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproductions.gaussian_mixture", description=summary)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="a file (default %(default)s)")
    chosen, found = parser.parse_args(arguments), mixture()
    with Client("local:") as client:
        picks = {
            name: client.select(name, PICKS, params=params, embeddings=found.points, seed=0).indices
            for name, (_, params) in STRATEGIES.items()
        }
    for name, rows in picks.items():
        right = 100 * nearest_labelled(found, rows)
        print(f"{name}: {typical(found, rows)} of {len(rows)} typical; {right:.0f} % right by the nearest pick")
    chosen.picture.write_text(draw(found, picks), encoding="utf-8")
    print(f"drawn in {chosen.picture}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
