"""Writes what a comparison of strategies found as one HTML page that needs nothing else: no network, no library."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from demo import figures
from demo.figures import Array, Line, Saving

BASELINE = "random"
HUES = 8  # in the template: --s1 to --s8, and --s0 for the baseline
TABLE_COUNTS = 4


@dataclass(frozen=True)
class Report:
    """What the page shows.

    Every dict has the same keys: the strategies' names, "random" among them, which the page shows in accuracy's order.

    N: pool rows, k: rows of the first round, R: rounds. Seed s is row s of every strategy's accuracies.
    """

    title: str
    dataset: str  # one sentence
    version: str
    counts: list[int]  # (R+1,) labelled rows at each point of the curves, growing; R >= 1
    accuracy: dict[str, Array]  # (seeds, R+1) test accuracy in [0, 1]
    picks: dict[str, Array]  # (k,) rows of the pool picked in the first round of one seed, in order of choice
    scores: dict[str, Array]  # (k,) their scores; not finite: shown as none
    images: Array  # (N, H, W) greyscale, 0 black to 1 white
    labels: Array  # (N,) true classes
    projection: Array  # (N, 2) a picture of the pool in the plane
    initial: Array  # (l,) rows labelled before the first round, the same for every strategy
    seconds: dict[str, float]  # mean seconds of one select call; not finite: shown as none

    def __post_init__(self) -> None:
        """Refuses what the page cannot show."""
        names = list(self.accuracy)
        if BASELINE not in names:
            raise ValueError(f"accuracy has no strategy {BASELINE!r}, the baseline; it has {names}")
        for field in ("picks", "scores", "seconds"):
            if set(getattr(self, field)) != set(names):
                raise ValueError(
                    f"{field} has the strategies {sorted(getattr(self, field))}, accuracy has {sorted(names)}"
                )
        if len(names) > HUES + 1:
            raise ValueError(f"{len(names)} strategies; the page can tell {HUES} and {BASELINE} apart")
        if len(self.counts) < 2 or any(b <= a for a, b in zip(self.counts, self.counts[1:], strict=False)):
            raise ValueError(f"counts must grow and be 2 or more, got {self.counts}")
        shape = (len(self.accuracy[BASELINE]), len(self.counts))
        for name, values in self.accuracy.items():
            if values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"accuracy of {name!r} must be finite of shape {shape}, got shape {values.shape}")

    @property
    def seeds(self) -> int:
        """How many runs each curve is the mean of."""
        return len(self.accuracy[BASELINE])

    @property
    def slots(self) -> dict[str, str]:
        """The colour of each strategy, by its place and not by its rank, so that it keeps it from run to run."""
        others = [name for name in self.accuracy if name != BASELINE]
        return {BASELINE: "s0"} | {name: f"s{i}" for i, name in enumerate(others, start=1)}


def write(path: Path, report: Report) -> None:
    """Writes the page to `path`, whose folder is made where it is missing."""
    template = Template(Path(__file__).with_name("report.html.template").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(report.title),
        dataset=escape(report.dataset),
        headline=_headline(report),
        headline_note=_headline_note(report),
        legend="".join(_key(report, name) for name in report.accuracy),
        curves=_curves(report),
        curves_caption=escape(_curves_caption(report)),
        curves_data=json.dumps(_curves_data(report)).replace("<", "\\u003c"),
        table=_table(report),
        picks="".join(_strip(report, name) for name in report.accuracy),
        picks_caption=escape(_picks_caption(report)),
        pool=figures.pool(figures.onto_panel(report.projection), report.labels, report.initial),
        panels="".join(_panel(report, name) for name in report.accuracy),
        made=escape(_made(report)),
        version=escape(report.version),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _mean(report: Report, name: str) -> Array:
    return np.asarray(report.accuracy[name].mean(axis=0))


def _error(values: Array) -> Array | None:
    """The standard error of the mean over the seeds, (seeds, ...) -> (...); one seed has none."""
    return np.asarray(values.std(axis=0, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def _reached(report: Report, name: str) -> int | None:
    """The first count at which the strategy's mean accuracy is random's last or better.

    Of random too: where its curve falls at the end, it reached its last accuracy before.
    """
    target = _mean(report, BASELINE)[-1]
    enough = np.flatnonzero(_mean(report, name) >= target - 1e-12)
    return report.counts[enough[0]] if len(enough) else None


def _winners(report: Report) -> tuple[list[str], int, int]:
    """The strategies that reach random's last accuracy with the fewest labels, theirs and random's; none: no names."""
    reached = {name: count for name in report.accuracy if (count := _reached(report, name)) is not None}
    fewest, needed = min(reached.values()), reached[BASELINE]
    names = [name for name, count in reached.items() if count == fewest] if fewest < needed else []
    return names, fewest, needed


def _headline(report: Report) -> str:
    names, fewest, needed = _winners(report)
    if not names:
        return (
            f"No strategy reaches {BASELINE}&rsquo;s final accuracy with fewer labels than {BASELINE} needs, "
            f"<b>{needed}</b>."
        )
    slots = report.slots
    bold = [f'<b class="name" data-s="{slots[name]}">{escape(name)}</b>' for name in names]
    verb = "reaches" if len(names) == 1 else "reach"
    return f"{_and(bold)} {verb} {BASELINE}&rsquo;s final accuracy with <b>{fewest} labels</b> instead of {needed}."


def _headline_note(report: Report) -> str:
    final = _percent(_mean(report, BASELINE)[-1])
    return (
        f"{BASELINE.capitalize()}&rsquo;s final accuracy is {final}% on the test set, {_over_seeds(report)}. "
        "Counted at the first measured point at or above it; nothing is interpolated."
    )


def _over_seeds(report: Report) -> str:
    return "one seed" if report.seeds == 1 else f"mean of {report.seeds} seeds"


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _percent(value: float) -> str:
    return f"{value * 100:.1f}"


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return "&ndash;"
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1000:.0f} ms" if value >= 0.001 else "under 1 ms"


def _score(value: float) -> str:
    return f"score {value:.4g}" if math.isfinite(value) else "no score"


def _name(report: Report, name: str) -> str:
    return f'<span class="name" data-s="{report.slots[name]}"><i class="swatch"></i>{escape(name)}</span>'


def _key(report: Report, name: str) -> str:
    return (
        f'<li><button type="button" class="key" data-s="{report.slots[name]}" aria-pressed="false">'
        f'<i class="swatch"></i>{escape(name)}</button></li>'
    )


def _curves(report: Report) -> str:
    """Drawn twice, for wide and narrow windows, as text in an SVG shrinks with it; the style sheet shows one."""
    # The baseline below the others, and of those the first strategies on top.
    names = sorted(report.accuracy, key=lambda name: report.slots[name] != "s0")
    lines = [
        Line(report.slots[name], name, _mean(report, name), _error(report.accuracy[name]))
        for name in [names[0], *reversed(names[1:])]
    ]
    winners, fewer, more = _winners(report)
    saving = Saving(float(_mean(report, BASELINE)[-1]), fewer, more) if winners else None
    return "".join(
        f'<div class="plot {kind}" tabindex="0">'
        f'{figures.curves(report.counts, lines, saving, width, height)}<div class="tip" hidden></div></div>'
        for kind, width, height in (("wide", 1000, 470), ("narrow", 420, 400))
    )


def _curves_caption(report: Report) -> str:
    if report.seeds == 1:
        return "Test accuracy after each round, one seed: there is no telling how much of a difference is chance."
    return (
        f"Test accuracy after each round: mean of {report.seeds} seeds; the band is one standard error of the mean "
        "to either side."
    )


def _curves_data(report: Report) -> dict[str, object]:
    """For the tooltip of the crosshair."""
    rows = []
    for name, values in report.accuracy.items():
        mean, error = _mean(report, name), _error(values)
        texts = [_with_error(mean[i], None if error is None else error[i]) + "%" for i in range(len(mean))]
        rows.append({"s": report.slots[name], "name": name, "mean": mean.round(6).tolist(), "text": texts})
    return {"counts": report.counts, "rows": rows}


def _with_error(mean: float, error: float | None) -> str:
    return _percent(mean) + ("" if error is None else f" ± {_percent(error)}")


def _table(report: Report) -> str:
    rounds = len(report.counts) - 1
    columns = sorted({round(i * rounds / TABLE_COUNTS) for i in range(1, TABLE_COUNTS + 1)} - {0})
    best = {at: max(_mean(report, name)[at] for name in report.accuracy) for at in columns}
    head = "".join(f'<th scope="col">{report.counts[at]} labels</th>' for at in columns)
    rows = []
    for name in report.accuracy:
        mean, error = _mean(report, name), _error(report.accuracy[name])
        cells = []
        for at in columns:
            text = _cell(_percent(mean[at]), None if error is None else _percent(error[at]))
            cells.append(f'<td class="best">{text}</td>' if mean[at] == best[at] else f"<td>{text}</td>")
        reached = _reached(report, name)
        cells += [
            f"<td>{_gain(report, name)}</td>",
            f"<td>{'not reached' if reached is None else reached}</td>",
            f"<td>{_seconds(report.seconds[name])}</td>",
        ]
        rows.append(
            f'<tr data-s="{report.slots[name]}"><th scope="row"><i class="swatch"></i>{escape(name)}</th>'
            f"{''.join(cells)}</tr>"
        )
    return (
        f'<thead><tr><th scope="col" rowspan="2">Strategy</th><th scope="colgroup" colspan="{len(columns)}">'
        f'Test accuracy, %</th><th scope="col" rowspan="2">Mean gain<br>over {BASELINE}, points</th>'
        f'<th scope="col" rowspan="2">Labels to {BASELINE}&rsquo;s<br>final accuracy</th>'
        f'<th scope="col" rowspan="2">One select<br>call</th></tr>'
        f"<tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    )


def _cell(mean: str, error: str | None) -> str:
    return mean + ("" if error is None else f" <small>± {error}</small>")


def _gain(report: Report, name: str) -> str:
    """The area between the strategy's curve and random's over the plot's width, in points: per seed, then the mean."""
    if name == BASELINE:
        return "&ndash;"
    above = report.accuracy[name] - report.accuracy[BASELINE]
    widths = np.diff(report.counts)
    gains = ((above[:, 1:] + above[:, :-1]) / 2 * widths).sum(axis=1) / widths.sum()
    error = _error(gains)
    return _cell(
        f"{gains.mean() * 100:+z.1f}".replace("-", "&minus;"), None if error is None else _percent(float(error))
    )


def _pick_titles(report: Report, name: str) -> list[str]:
    """What there is to say of each pick, in order of choice."""
    rows = zip(report.picks[name], report.scores[name], strict=True)
    return [
        f"{rank}. row {int(row)}, class {int(report.labels[row])}, {_score(float(score))}"
        for rank, (row, score) in enumerate(rows, start=1)
    ]


def _found(report: Report, name: str) -> str:
    classes, before = np.unique(report.labels), np.unique(report.labels[report.initial])
    found = np.unique(report.labels[report.picks[name]])
    text = f"{len(found)} of {len(classes)} classes"
    unseen = len(classes) - len(before)
    return text + (f", {len(np.setdiff1d(found, before))} of the {unseen} that had no label" if unseen else "")


def _strip(report: Report, name: str) -> str:
    thumbs = [
        f'<li title="{title}"><img src="{figures.png(report.images[row])}" alt="{title}">'
        f'<span aria-hidden="true">{rank}</span></li>'
        for rank, (row, title) in enumerate(zip(report.picks[name], _pick_titles(report, name), strict=True), start=1)
    ]
    return (
        f'<div class="strip" data-s="{report.slots[name]}"><h3><i class="swatch"></i>{escape(name)}</h3>'
        f'<p>{_found(report, name)}</p><ol class="thumbs">{"".join(thumbs)}</ol></div>'
    )


def _picks_caption(report: Report) -> str:
    k = len(report.picks[BASELINE])
    return (
        f"The first {k} {'row' if k == 1 else 'rows'} each strategy asks people to label, in order of choice, all from "
        f"the same {len(report.initial)} labelled rows. Point at an image for its true class, which no strategy saw, "
        "and for its score."
    )


def _panel(report: Report, name: str) -> str:
    places = figures.onto_panel(report.projection)[report.picks[name]]
    label = f"Picture of the pool with the first picks of {name}: {_found(report, name)}"
    drawing = figures.panel(report.slots[name], label, places, _pick_titles(report, name))
    return f'<figure class="panel"><figcaption>{_name(report, name)}</figcaption>{drawing}</figure>'


def _made(report: Report) -> str:
    steps = sorted(set(np.diff(report.counts).tolist()))
    step = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    seeds = "one seed" if report.seeds == 1 else f"{report.seeds} seeds"
    return (
        f"Strategies: {', '.join(report.accuracy)}. Each ran with {seeds} from {report.counts[0]} labelled rows to "
        f"{report.counts[-1]}, {step} more in each of {len(report.counts) - 1} rounds, over a pool of "
        f"{len(report.labels)} rows. The picks and pictures are of the first round of one seed."
    )
