"""The report's drawings: SVG and PNG written from arrays, without a plotting library.

A strategy's colour is not written here: its marks carry `data-s`, the strategy's slot, and the page's style sheet
gives the slot a colour for light and for dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CHARACTER = 7.6  # a generous mean width of the 13 px labels; fonts differ from reader to reader
LINE = 17.0  # between the baselines of two labels
PANEL = 340.0
MOST_CLASS_NAMES = 20


@dataclass(frozen=True)
class Line:
    """A learning curve. mean: (R+1,) in [0, 1]; error: (R+1,) its standard error, None where there is one seed."""

    slot: str
    name: str
    mean: Array
    error: Array | None


@dataclass(frozen=True)
class Saving:
    """What the headline says, for the drawing: `accuracy` is reached with `fewer` labels and not only with `more`."""

    accuracy: float
    fewer: int
    more: int


def png(image: Array) -> str:
    """A greyscale image (H, W), 0 black to 1 white, as a data URI."""
    grey = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
    height, width = grey.shape
    rows = b"".join(b"\0" + row.tobytes() for row in grey)  # each line starts with its filter: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


def ticks(low: float, high: float, most: int) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten that cover [low, high] in at most about `most` steps."""
    raw = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions in [low, high] at least `gap` apart, ordered as the `wanted` ones and nearest to them in squares."""
    order = np.argsort(wanted, kind="stable")
    blocks: list[tuple[float, int]] = []  # mean and size of the runs that isotonic regression pools
    for i, at in enumerate(order):
        mean, size = wanted[at] - i * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, n = blocks.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        blocks.append((mean, size))
    slack = max(high - (len(wanted) - 1) * gap, low)
    placed = [min(max(mean, low), slack) for mean, size in blocks for _ in range(size)]
    result = [0.0] * len(wanted)
    for i, at in enumerate(order):
        result[at] = placed[i] + i * gap
    return result


def apart(wanted: Array, gap: float, low: float, high: float) -> Array:
    """Places (k, 2) near the `wanted` ones, about `gap` apart where there is room, in the square [low, high]."""
    places = np.array(wanted, dtype=np.float64)
    # Twins have no direction to leave in: each counts as a hair off its place, on its own side.
    angles = 2.4 * np.arange(len(places))
    hair = 0.01 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(300):
        between = (places + hair)[:, None] - (places + hair)[None]
        distance = np.maximum(np.linalg.norm(between, axis=2), 1e-6)
        push = np.maximum(gap - distance, 0.0) / distance
        crowd = np.count_nonzero(push, axis=1)[:, None]  # itself too; many neighbours must not add up to a leap
        places = np.clip(places + (push[:, :, None] * between).sum(axis=1) / crowd, low, high)
    return places


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (min(max(value, low), high) - low) / (high - low) * (end - start)


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def short(name: str, most: int = 20) -> str:
    """The name as it is written into a drawing, where there is no room for a long one."""
    return name if len(name) <= most else name[: most - 1] + "…"


def curves(counts: Sequence[int], lines: Sequence[Line], saving: Saving | None, width: int, height: int) -> str:
    """Learning curves over label counts (R+1,), labelled at their ends; later lines are drawn on top."""
    left, top, bottom = 48.0, 14.0, height - 48.0
    right = width - 26.0 - CHARACTER * max(len(short(line.name)) for line in lines)
    extent = [line.mean + sign * (0.0 if line.error is None else line.error) for line in lines for sign in (-1, 1)]
    lowest, highest = max(float(np.min(extent)), 0.0), min(float(np.max(extent)), 1.0)
    levels = ticks(lowest, max(highest, lowest + 0.01), 6)
    x = _scale(counts[0], counts[-1], left, right)
    y = _scale(levels[0], levels[-1], bottom, top)
    xs = [x(count) for count in counts]
    places = spread([y(line.mean[-1]) for line in lines], LINE, top + 4, bottom - 4)
    parts = [
        (
            f'<svg viewBox="0 0 {width} {height}" role="img" data-x="{" ".join(f"{v:.1f}" for v in xs)}"'
            f' aria-label="Test accuracy of {len(lines)} strategies over the number of labelled rows">'
        ),
        _grid(_thinned(counts, x, 48.0), levels, x, y, (left, right, bottom)),
        f'<line class="cross" x1="{left}" x2="{left}" y1="{top}" y2="{bottom}"/>',
        *(_curve(line, xs, y) for line in lines),
        "" if saving is None else _saving(saving, x, y, (left, right, bottom)),
        *(_end(line, right, y(line.mean[-1]), place) for line, place in zip(lines, places, strict=True)),
    ]
    return "".join(parts) + "</svg>"


def _thinned(counts: Sequence[int], x: Callable[[float], float], gap: float) -> list[int]:
    """The measured counts that have room for a label, from the last one down."""
    kept: list[int] = []
    for count in reversed(counts):
        if not kept or x(kept[-1]) - x(count) >= gap:
            kept.append(count)
    return kept[::-1]


def _grid(
    steps: Sequence[int],
    levels: Sequence[float],
    x: Callable[[float], float],
    y: Callable[[float], float],
    box: tuple[float, float, float],
) -> str:
    left, right, bottom = box
    parts = ['<g class="grid">']
    digits = 0 if all(abs(level * 100 - round(level * 100)) < 1e-6 for level in levels) else 1
    for level in levels:
        parts.append(f'<line x1="{left}" x2="{right:.1f}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(level) + 4:.1f}" text-anchor="end">{level * 100:.{digits}f}%</text>')
    for step in steps:
        parts.append(f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 19}" text-anchor="middle">{step}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{bottom + 40}" text-anchor="middle">labelled rows</text></g>')
    return "".join(parts)


def _curve(line: Line, xs: Sequence[float], y: Callable[[float], float]) -> str:
    path = _path(xs, [y(v) for v in line.mean])
    band = ""
    if line.error is not None:
        above = [y(v) for v in line.mean + line.error]
        below = [y(v) for v in line.mean - line.error]
        band = f'<path class="band" d="M{_path([*xs, *xs[::-1]], [*above, *below[::-1]])}Z"/>'
    return (
        f'<g class="curve" data-s="{line.slot}"><title>{escape(line.name)}</title>{band}'
        f'<path class="mean" d="M{path}"/><path class="reach" d="M{path}"/></g>'
    )


def _end(line: Line, right: float, at: float, place: float) -> str:
    return (
        f'<g class="end" data-s="{line.slot}"><circle cx="{right:.1f}" cy="{at:.1f}" r="3.5"/>'
        f'<path d="M{right + 5:.1f} {at:.1f}L{right + 14:.1f} {place:.1f}"/>'
        f'<text x="{right + 18:.1f}" y="{place + 4.5:.1f}">{escape(short(line.name))}</text></g>'
    )


def _saving(
    saving: Saving, x: Callable[[float], float], y: Callable[[float], float], box: tuple[float, float, float]
) -> str:
    """The headline as a dimension line: down from both crossings, and the distance between them."""
    left, right, bottom = box
    a, b, at, foot = x(saving.fewer), x(saving.more), y(saving.accuracy), bottom - 16
    text = f"{saving.more - saving.fewer} fewer labels"
    half = len(text) * CHARACTER / 2
    middle = min(max((a + b) / 2, left + half), right - half)
    return (
        f'<g class="saving"><path d="M{a:.1f} {at:.1f}V{bottom}M{b:.1f} {at:.1f}V{bottom}M{a:.1f} {at:.1f}H{b:.1f}"/>'
        f'<path class="arrow" d="M{a:.1f} {foot}H{b:.1f}"/>'
        f'<circle cx="{a:.1f}" cy="{at:.1f}" r="4.5"/><circle cx="{b:.1f}" cy="{at:.1f}" r="4.5"/>'
        f'<text x="{middle:.1f}" y="{foot - 7}" text-anchor="middle">{text}</text></g>'
    )


def onto_panel(projection: Array) -> Array:
    """(N, 2) points -> (N, 2) panel coordinates; one scale for both axes, as it is distances that the picture shows."""
    low, high = projection.min(axis=0), projection.max(axis=0)
    margin = 14.0
    scale = (PANEL - 2 * margin) / max(float((high - low).max()), 1e-12)
    centred = (projection - (low + high) / 2) * scale
    return np.asarray(centred * [1, -1] + PANEL / 2)


def pool(places: Array, labels: Array, initial: Array) -> str:
    """What all panels share, drawn once and referred to: every point, the classes' names, the rows labelled first.

    places: (N, 2) in panel coordinates; labels: (N,); initial: (l,) rows.
    """
    # Round ends of strokes without length: a tenth of the text that 1,400 circles would be.
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    rings = "".join(f'<circle class="initial" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in places[initial])
    classes = np.unique(labels)
    names = ""
    if len(classes) <= MOST_CLASS_NAMES:
        for c in classes:
            x, y = np.median(places[labels == c], axis=0)
            names += f'<text class="class" x="{x:.1f}" y="{min(y + 10, PANEL):.1f}">{int(c)}</text>'
    return (
        '<svg class="shared" width="0" height="0" aria-hidden="true"><defs><g id="pool">'
        f'<path class="dots" d="{dots}"/>{names}{rings}</g></defs></svg>'
    )


def panel(slot: str, label: str, places: Array, titles: Sequence[str]) -> str:
    """One strategy's picks, (k, 2) in panel coordinates and in order of choice, over the shared picture of the pool.

    Discs that would hide each other move aside, each tied to its point by a line.
    """
    radius = 8.5
    moved = apart(places, 2 * radius + 1, radius + 2, PANEL - radius - 2)
    ties, discs = [], []
    for rank, ((x, y), (u, v), title) in enumerate(zip(moved, places, titles, strict=True), start=1):
        ties.append(
            f'<path d="M{u:.1f} {v:.1f}L{x:.1f} {y:.1f}"/><circle class="place" cx="{u:.1f}" cy="{v:.1f}" r="2.2"/>'
        )
        discs.append(
            f'<g class="pick"><title>{escape(title)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>'
            f'<text x="{x:.1f}" y="{y + 3.4:.1f}">{rank}</text></g>'
        )
    # The first choice is drawn last, on top.
    return (
        f'<svg viewBox="0 0 {PANEL:g} {PANEL:g}" role="img" aria-label="{escape(label)}"><use href="#pool"/>'
        f'<g data-s="{slot}"><g class="ties">{"".join(ties)}</g>{"".join(reversed(discs))}</g></svg>'
    )
