"""The report: that what it shows is what it was given, in every shape that is likely."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo import figures
from demo.report import Report, write

TEMPLATE = Path(figures.__file__).with_name("report.html.template")
VOID = {"br", "hr", "img", "input", "link", "meta"}
NAMES = ["random", "a<b", 'quo"te & co', "margin"]


def make(*, names: list[str] = NAMES, seeds: int = 4, points: int = 6, n: int = 60, k: int = 5) -> Report:
    rng = np.random.default_rng(3)
    rows = {name: rng.permutation(n)[:k] for name in names}
    return Report(
        title="Which <b>items</b> next?",
        dataset="Small & random.",
        version="1.2.3",
        counts=[10 + 7 * i for i in range(points)],
        accuracy={name: np.sort(rng.uniform(0.3, 1.0, (seeds, points)), axis=1) for name in names},
        picks=rows,
        scores={name: rng.normal(size=k) for name in names},
        images=rng.uniform(size=(n, 4, 3)),
        labels=rng.integers(0, 6, n),
        projection=rng.normal(size=(n, 2)) * [5, 1],
        initial=np.arange(4),
        seconds=dict.fromkeys(names, 0.01),
    )


def flat(*curves: list[float]) -> dict[str, np.ndarray]:
    """Curves for the strategies random, first, second, ... : one list each, the same for two seeds."""
    return {name: np.array([c, c]) for name, c in zip(["random", "first", "second"], curves, strict=False)}


def with_curves(*curves: list[float]) -> Report:
    report = make(names=["random", "first", "second"][: len(curves)], points=len(curves[0]))
    return replace(report, accuracy=flat(*curves), counts=[10 * (i + 1) for i in range(len(curves[0]))])


class Page(HTMLParser):
    """Every element as (tag, attributes), and a failure where tags don't balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def written(report: Report, folder: Path) -> str:
    write(folder / "new" / "report.html", report)
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


def without_images(page: str) -> str:
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def headline(page: str) -> str:
    found = re.search(r'<p class="headline">(.*?)</p>', page, re.DOTALL)
    assert found
    return unescape(re.sub("<[^>]+>", "", found[1])).replace("\u2019", "'")


def decoded(uri: str) -> np.ndarray:
    """The pixels of a greyscale PNG whose lines have no filter, its checksums checked."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(body)
        chunks[body[:4]] = body[4:]
        at += 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (lines[:, 0] == 0).all()
    return lines[:, 1:]


SHAPES = [
    pytest.param({}, id="usual"),
    pytest.param({"seeds": 1}, id="one seed"),
    pytest.param({"k": 1}, id="one pick"),
    pytest.param({"seeds": 1, "k": 1, "points": 2}, id="least"),
    pytest.param({"names": ["random"]}, id="random alone"),
    pytest.param({"names": ["random", *(f"strategy_of_a_long_name_{i}" for i in range(8))], "k": 20}, id="most"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_page_is_whole_and_says_nothing_undefined(shape: dict[str, Any], tmp_path: Path) -> None:
    page = written(make(**shape), tmp_path)
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.all("html", lang="en")
    assert not re.search(r"(?i:nan)|\binf\b|\bNone\b|\bnp\.", without_images(page))
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids))
    for _, attributes in parsed.elements:
        for pointer in ("href", "aria-labelledby"):
            if attributes.get(pointer) and not attributes[pointer].startswith("data:"):
                assert attributes[pointer].removeprefix("#") in ids


@pytest.mark.parametrize("shape", SHAPES)
def test_drawings_stay_in_their_view(shape: dict[str, Any], tmp_path: Path) -> None:
    page = written(make(**shape), tmp_path)
    shared = re.search(r'<svg class="shared".*?</svg>', page, re.DOTALL)
    assert shared
    found = re.finditer(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', page, re.DOTALL)
    views = [(float(drawing[1]), float(drawing[2]), drawing[0]) for drawing in found]
    assert len(views) == 2 + len(shape.get("names", NAMES))
    for width, height, text in [*views, (figures.PANEL, figures.PANEL, shared[0])]:
        xs, ys = coordinates(text)
        assert len(xs) > 0
        assert min(xs) >= 0
        assert max(xs) <= width
        assert min(ys) >= 0
        assert max(ys) <= height


def test_bands_beyond_the_possible_are_cut_off(tmp_path: Path) -> None:
    values = np.array([[0.0, 1.0], [0.0, 1.0], [0.3, 0.7]])
    page = written(replace(make(names=["random"], points=2), accuracy={"random": values}), tmp_path)
    for width, height, text in re.findall(
        r'<svg viewBox="0 0 (\d+) (\d+)" role="img" data-x(.*?)</svg>', page, re.DOTALL
    ):
        xs, ys = coordinates(text)
        assert 0 <= min(xs) <= max(xs) <= float(width)
        assert min(ys) >= 14  # the top of the plot: 100 %
        assert max(ys) <= float(height)
        band = re.search(r'class="band" d="M([^Z]+)Z"', text)
        assert band
        heights = [float(point.split()[1]) for point in band[1].split("L")]
        assert heights[1] == min(heights) == 14.0
        assert heights[3] == max(heights) == float(height) - 48


def test_panel_marks_the_picks_in_order() -> None:
    places = np.array([[20.0, 30.0], [300.0, 30.0], [150.0, 200.0]])
    drawn = figures.panel("s2", "label", places, ["one", "two", "three"])
    number = r"([\d.]+)"
    found = re.findall(rf'class="place" cx="{number}" cy="{number}"', drawn)
    np.testing.assert_allclose(np.array(found, dtype=float), places)
    discs = re.findall(rf'<title>(\w+)</title><circle cx="{number}" cy="{number}" r="[\d.]+"/><text[^>]*>(\d)', drawn)
    assert [(title, rank) for title, _, _, rank in discs] == [("three", "3"), ("two", "2"), ("one", "1")]
    np.testing.assert_allclose([[float(x), float(y)] for _, x, y, _ in discs], places[::-1], atol=0.1)


@pytest.mark.parametrize("corner", [14.0, figures.PANEL - 14.0])
def test_panel_keeps_whole_discs_inside(corner: float) -> None:
    drawn = figures.panel("s1", "label", np.full((20, 2), corner), ["title"] * 20)
    discs = np.array(re.findall(r'<circle cx="(-?[\d.]+)" cy="(-?[\d.]+)" r="([\d.]+)"', drawn), dtype=float)
    centres, radii = discs[:, :2], discs[:, 2:]
    assert len(discs) == 20
    assert (centres >= radii).all()
    assert (centres <= figures.PANEL - radii).all()
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)[np.triu_indices(20, 1)]
    assert distance.min() > 16  # their numbers can be read


def coordinates(svg: str) -> tuple[list[float], list[float]]:
    number = r"(-?[\d.]+)"
    xs = [float(v) for v in re.findall(rf'\s(?:x|x1|x2|cx)="{number}"', svg)]
    ys = [float(v) for v in re.findall(rf'\s(?:y|y1|y2|cy)="{number}"', svg)]
    for path in re.findall(r'\sd="([^"]+)"', svg):
        assert re.fullmatch(r"[MLHVZh\d. -]+", path), path
        for x, y in re.findall(rf"[ML]{number} {number}", path):
            xs.append(float(x))
            ys.append(float(y))
        xs += [float(v) for v in re.findall(rf"H{number}", path)]
        ys += [float(v) for v in re.findall(rf"V{number}", path)]
    return xs, ys


def test_needs_no_network(tmp_path: Path) -> None:
    page = written(make(), tmp_path)
    assert "//" not in without_images(page)
    assert "@import" not in page
    assert all(found["src"].startswith("data:") for _, found in Page(page).elements if "src" in found)


def test_names_are_escaped_and_in_every_section(tmp_path: Path) -> None:
    page = written(make(), tmp_path)
    assert "a<b" not in page
    assert "<b>items</b>" not in page
    sections = re.findall(r"<section.*?</section>", page, re.DOTALL)
    assert len(sections) == 4
    for part in [*sections, page.split("</nav>")[0], page.split("<footer>")[1]]:
        for name in NAMES:
            assert name in "".join(Page(part).text if part in sections else unescape(part))
    data = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page)
    assert data
    assert [row["name"] for row in json.loads(data[1])["rows"]] == NAMES


def test_thumbnails_are_the_picks_in_order(tmp_path: Path) -> None:
    report = make()
    page = Page(written(report, tmp_path))
    images = page.all("img")
    expected = [
        (rank, row, score)
        for name in NAMES
        for rank, (row, score) in enumerate(zip(report.picks[name], report.scores[name], strict=True), start=1)
    ]
    assert len(images) == len(expected)
    for image, (rank, row, score) in zip(images, expected, strict=True):
        np.testing.assert_array_equal(decoded(image["src"]), np.rint(report.images[row] * 255))
        assert image["alt"] == f"{rank}. row {row}, class {report.labels[row]}, score {score:.4g}"


def test_pick_without_a_score(tmp_path: Path) -> None:
    report = make()
    page = written(replace(report, scores={name: np.full(5, np.nan) for name in NAMES}), tmp_path)
    assert page.count("no score") == len(NAMES) * 5 * 3  # the image's alt and tooltip, the disc's tooltip
    assert "nan" not in without_images(page).lower()


def test_classes_found(tmp_path: Path) -> None:
    report = make(names=["random", "first"], n=8, k=3)
    report = replace(
        report,
        labels=np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        initial=np.array([0, 2]),
        picks={"random": np.array([1, 3, 4]), "first": np.array([4, 6, 7])},
    )
    page = written(report, tmp_path)
    assert "<p>3 of 4 classes, 1 of the 2 that had no label</p>" in page
    assert "<p>2 of 4 classes, 2 of the 2 that had no label</p>" in page
    page = written(replace(report, initial=np.array([0, 2, 4, 6])), tmp_path)
    assert "<p>3 of 4 classes</p>" in page


@pytest.mark.parametrize(
    ("curves", "sentence"),
    [
        pytest.param(
            ([0.5, 0.6, 0.7, 0.8], [0.5, 0.7, 0.8, 0.9], [0.5, 0.6, 0.9, 0.7]),
            "first and second reach random's final accuracy with 30 labels instead of 40.",
            id="two as good",
        ),
        pytest.param(
            ([0.5, 0.6, 0.7, 0.8], [0.5, 0.7, 0.79, 0.9], [0.5, 0.85, 0.9, 0.95]),
            "second reaches random's final accuracy with 20 labels instead of 40.",
            id="one best",
        ),
        pytest.param(
            ([0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.7, 0.79]),
            "No strategy reaches random's final accuracy with fewer labels than random needs, 40.",
            id="none",
        ),
        pytest.param(
            ([0.5, 0.8, 0.9, 0.8], [0.5, 0.79, 0.9, 0.9]),
            "No strategy reaches random's final accuracy with fewer labels than random needs, 20.",
            id="random reached it before its end",
        ),
    ],
)
def test_headline(curves: tuple[list[float], ...], sentence: str, tmp_path: Path) -> None:
    page = written(with_curves(*curves), tmp_path)
    assert headline(page) == sentence
    assert ('class="saving"' in page) == (not sentence.startswith("No"))


def test_table(tmp_path: Path) -> None:
    page = written(with_curves([0.5, 0.6, 0.7], [0.6, 0.7, 0.8], [0.5, 0.5, 0.66]), tmp_path)
    body = re.search(r"<tbody>(.*?)</tbody>", page)
    assert body
    rows = [re.findall(r"<td.*?>(.*?)</td>", row) for row in body[1].split("</tr>")[:-1]]
    plain = [[unescape(re.sub(r" <small>.*?</small>", "", cell)) for cell in row] for row in rows]
    assert plain == [
        ["60.0", "70.0", "\u2013", "30", "10 ms"],
        ["70.0", "80.0", "+10.0", "20", "10 ms"],
        ["50.0", "66.0", "\u22126.0", "not reached", "10 ms"],
    ]
    assert re.findall(r'<td class="best">([\d.]+)', page) == ["70.0", "80.0"]


def test_errors_are_of_the_mean(tmp_path: Path) -> None:
    values = np.array([[0.5, 0.6], [0.5, 0.7], [0.5, 0.8], [0.5, 0.9]])
    report = replace(make(names=["random"], points=2), accuracy={"random": values})
    assert "75.0 <small>± 6.5</small>" in written(report, tmp_path)  # 12.91 / sqrt(4)


@pytest.mark.parametrize("seeds", [1, 2])
def test_band_needs_two_seeds(seeds: int, tmp_path: Path) -> None:
    page = written(make(seeds=seeds), tmp_path)
    assert page.count('class="band"') == (0 if seeds == 1 else 2 * len(NAMES))
    assert ("±" in page.split("<tbody>")[1]) == (seeds > 1)


def test_colours_follow_the_order_and_not_the_results(tmp_path: Path) -> None:
    report = make(names=["x", "random", "y"])
    other = replace(report, accuracy=dict(zip(report.accuracy, reversed(report.accuracy.values()), strict=True)))
    assert report.slots == other.slots == {"random": "s0", "x": "s1", "y": "s2"}
    rows = re.findall(r'<tr data-s="(s\d)"><th scope="row"><i class="swatch"></i>(\w+)', written(other, tmp_path))
    assert rows == [("s1", "x"), ("s0", "random"), ("s2", "y")]


def test_size(tmp_path: Path) -> None:
    report = make(names=["random", "b", "c", "d", "e"], seeds=5, points=11, n=1400, k=16)
    report = replace(report, images=np.random.default_rng(0).uniform(size=(1400, 8, 8)))
    assert len(written(report, tmp_path)) < 300_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": {"margin": np.ones((1, 6))}}, "no strategy 'random'"),
        ({"picks": {}}, "picks has the strategies"),
        ({"counts": [1, 2, 2, 3, 4, 5]}, "counts must grow"),
        ({"counts": [1]}, "counts must grow"),
        ({"counts": [1, 2, 3]}, "of shape"),
        ({"accuracy": {name: np.full((2, 6), np.nan) for name in NAMES}}, "must be finite"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(make(), **changes)


def test_refuses_more_strategies_than_hues() -> None:
    with pytest.raises(ValueError, match="10 strategies"):
        make(names=["random", *"abcdefghi"])


def test_spread() -> None:
    assert figures.spread([30.0, 10.0, 50.0], 5, 0, 100) == [30.0, 10.0, 50.0]
    assert figures.spread([20.0, 20.0], 10, 0, 100) == [15.0, 25.0]
    assert figures.spread([99.0, 100.0, 98.0], 10, 0, 100) == [90.0, 100.0, 80.0]
    assert figures.spread([0.0, 0.0, 0.0], 10, 0, 100) == [0.0, 10.0, 20.0]
    wanted = np.random.default_rng(1).uniform(0, 100, 9)
    placed = np.array(figures.spread(wanted.tolist(), 11, 0, 100))
    assert np.diff(placed[np.argsort(wanted)]).min() >= 11 - 1e-9
    assert placed.min() >= 0
    assert placed.max() <= 100


def test_apart() -> None:
    far = np.array([[10.0, 10.0], [50.0, 50.0], [10.0, 90.0]])
    np.testing.assert_allclose(figures.apart(far, 15, 0, 100), far, atol=0.02)
    close = np.concatenate([np.full((8, 2), 40.0), [[0.0, 0.0], [0.0, 1.0]]])
    placed = figures.apart(close, 15, 0, 100)
    distance = np.linalg.norm(placed[:, None] - placed[None], axis=2)[np.triu_indices(len(close), 1)]
    assert distance.min() > 14
    assert placed.min() >= 0
    assert np.linalg.norm(placed - close, axis=1).max() < 40


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.62, 0.97), (0.9, 0.91), (16, 176)])
def test_ticks_cover(low: float, high: float) -> None:
    found = figures.ticks(low, high, 6)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 9


def test_pool_keeps_one_scale_and_order() -> None:
    places = figures.onto_panel(np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 5.0]]))
    right, up = places[1] - places[0], places[2] - places[0]
    assert right[0] == pytest.approx(-2 * up[1])  # SVG's y points down
    assert np.isfinite(figures.onto_panel(np.ones((3, 2)))).all()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", blocks[["light", "dark"].index(scheme)]))
    for text in ("ink", "soft", "class"):
        assert contrast(colours[text], colours["page"]) >= 4.5
    for slot in (f"s{i}" for i in range(9)):
        assert contrast(colours[slot], colours["page"]) >= 3  # a line or a disc
        assert contrast(colours[slot], colours[f"on-{slot}"]) >= 4.5  # the rank in a disc


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    a, b = sorted((luminance(one), luminance(other)))
    return (b + 0.05) / (a + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
