"""Pictures of what quantization loses. A scheme has one colour and one marker on all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from foldbit.analysis.study import REACH, Fit, Histogram, Point
from foldbit.core import schemes

#: The most layers that a picture holds; longer lists are split.
MOST_LAYERS = 90

# Colours that differ for colour-blind readers, too (Okabe and Ito's, then Tol's); markers differ besides.
_LOOKS = {
    "ls-1": ("#d55e00", "s"),
    "ls-T": ("#009e73", "^"),
    "gf-2": ("#cc79a7", "D"),
    "ls-2": ("#0072b2", "o"),
    "alt-2": ("#e69f00", "v"),
    "rg-2": ("#7f7f7f", "X"),
    "gf-3": ("#aa4499", "d"),
    "ls-3": ("#56b4e9", "h"),
    "lsf-3": ("#44aa99", "p"),
    "alt-3": ("#b8860b", "<"),
    "rg-3": ("#444444", "*"),
    "gf-4": ("#882255", "8"),
    "ls-4": ("#332288", "H"),
    "lsf-4": ("#117733", "P"),
    "alt-4": ("#7a5c00", ">"),
}
_MORE_LOOKS = [
    *[("#999933", "v"), ("#000000", "X"), ("#661100", "<"), ("#6699cc", ">")],
    *[("#cc6677", "*"), ("#3f3fff", "8"), ("#88ccee", "P"), ("#ddcc77", "p")],
]
_FAMILIES = {
    "ls": "least squares",
    "gf": "greedy",
    "lsf": "least squares, foldable",
    "alt": "alternating",
    "rg": "refined greedy",
}
_HISTOGRAM = "#c3ccd6"
_ERROR = "relative squared error ‖x − x̂‖² / ‖x‖²"
_ANGLE = "angle between x and x̂, degrees"


@dataclass(frozen=True)
class Row:
    """A layer on a picture: its name, and each scheme's fit."""

    name: str
    fits: Mapping[str, Fit]


def plain_name(scheme: str) -> str:
    """A scheme in words: ``2 bits, least squares (ls-2)``."""
    family, _, size = scheme.partition("-")
    bits = "ternary" if size == "T" else "1 bit" if size == "1" else f"{size} bits"
    return f"{bits}, {_FAMILIES.get(family, family)} ({scheme})"


def levels(title: str, histogram: Histogram, fits: Mapping[str, Fit]) -> Figure:
    """Two panels a scheme: the values and its levels, and which values its squared error comes from."""
    columns = min(4, len(fits))
    bands = -(-len(fits) // columns)
    figure, grid = _subplots(
        2 * bands, columns, figsize=(11, 0.4 + 4.9 * bands), sharex=True, sharey="row", squeeze=False
    )
    figure.suptitle(title, fontsize=13)
    top = _top(histogram.density)
    # One height for all: areas compare.
    most = max((_top(lost) for lost in histogram.lost.values()), default=1.0)
    for i, (name, fit) in enumerate(fits.items()):
        upper, lower = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
        _draw_histogram(upper, histogram, top)
        colour, _ = _look(name)
        for low, middle, high in _distinct(histogram.levels[name]):
            if high - low > 0.02:
                upper.axvspan(low, high, ymax=0.8, color=colour, alpha=0.18, linewidth=0)
            upper.plot([middle, middle], [0, 0.8 * top], color=colour, linewidth=2.5)
        words, _, _ = plain_name(name).rpartition(" (")
        if len(words) > 24:
            words = words.replace(", ", ",\n", 1)
        upper.set_title(f"{name}: {words}", fontsize=11, color=colour, fontweight="bold")
        lower.stairs(histogram.lost[name], _edges(histogram), fill=True, color=colour, alpha=0.75)
        lower.set_ylim(0, most)
        lower.yaxis.set_major_locator(_ticks(5))  # its top is the upper panel's bottom
        _write(lower, 0.96, f"error {fit.error:.3f},  angle {fit.angle:.1f}°", fontsize=10, fontweight="bold")
        far = histogram.lost_outside[name]
        if far > 0.01:
            _write(lower, 0.86, f"{far:.0%} of the error lies beyond ±{REACH:g}", fontsize=9)
        lower.set_xlabel("value / root mean square")
        lower.tick_params(labelbottom=True)
        lower.grid(alpha=0.3)
    for i in range(len(fits), bands * columns):
        grid[2 * (i // columns), i % columns].axis("off")
        grid[2 * (i // columns) + 1, i % columns].axis("off")
    for band in range(bands):
        grid[2 * band, 0].set_ylabel("how often\n(density)")
        grid[2 * band + 1, 0].set_ylabel("what is lost there\n(density of squared error)")
    return figure


def groups(title: str, fits: Mapping[str, Mapping[str, Fit]]) -> Figure:
    """Bars of error and of angle, a bar a scheme. ``fits[group][scheme]``."""
    names = list(next(iter(fits.values())))
    height = 0.27 * len(names) * len(fits) + 0.28 * len(fits) + 1.5
    figure, sides = _subplots(1, 2, figsize=(11, height), sharey=True)
    figure.suptitle(title, fontsize=13)
    width = 0.84 / len(names)
    for axes, what, label, form in (
        (sides[0], "error", _ERROR, "{:.3f}"),
        (sides[1], "angle", _ANGLE, "{:.1f}°"),
    ):
        for i, name in enumerate(names):
            values = [getattr(of_group[name], what) for of_group in fits.values()]
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(fits))]
            bars = axes.barh(places, values, width * 0.9, color=_look(name)[0], label=plain_name(name))
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.14 * max(max(getattr(f, what) for f in g.values()) for g in fits.values()) or 1)
        axes.xaxis.set_major_locator(_ticks(7))  # where the other side begins
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    sides[0].set_yticks(range(len(fits)), list(fits))
    sides[0].invert_yaxis()
    _legend_below(figure, sides[0], min(len(names), 4))
    return figure


def layers(title: str, rows: Sequence[Row]) -> list[Figure]:
    """Errors and angles, a line a layer, a dot a scheme; several figures for long lists."""
    parts = _split(rows)
    return [_layers(_part_title(title, i, len(parts)), part) for i, part in enumerate(parts)]


def excess(title: str, rows: Sequence[Row], greedy: str, best: str) -> list[Figure]:
    """How much more than the optimum a greedy scheme loses, a bar a layer; several figures for long lists."""
    parts = _split(rows)
    most = max((_excess(row, greedy, best) for row in rows), default=0.0)
    return [
        _excess_part(_part_title(title, i, len(parts)), part, greedy, best, most)
        for i, part in enumerate(parts)
    ]


def pareto(title: str, points: Sequence[Point]) -> Figure:
    """Error against bits stored, and against XNOR operations: more scales for one plane, or more planes."""
    figure, sides = _subplots(1, 2, figsize=(11, 4.9), sharey=True)
    figure.suptitle(title, fontsize=13)
    one_bit = [p for p in points if p.scheme == "ls-1"]
    for axes, what, label in (
        (sides[0], "bits", "bits stored per value, scales (32 bits each) included"),
        (sides[1], "xnor", "XNOR operations per multiply-accumulate"),
    ):
        line = sorted((getattr(p, what), -p.error, p.error) for p in one_bit)
        axes.plot([x for x, _, _ in line], [y for _, _, y in line], color=_look("ls-1")[0], alpha=0.5)
        front = _front([(getattr(p, what), p.error) for p in points])
        axes.step(*zip(*front, strict=True), where="post", color="#555555", linewidth=1.4, linestyle=":")
        for point in points:
            colour, marker = _look_of_point(point)
            axes.plot(
                getattr(point, what),
                point.error,
                marker=marker,
                color=colour,
                markersize=10 if point.scheme == "ls-2" else 9,
                markerfacecolor=colour if point.scheme != "ls-1" else "none",
                markeredgewidth=1.8,
                linestyle="none",
                label=_point_name(point),
                zorder=4 if point.scheme == "ls-2" else 3,
            )
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.08 * max(getattr(p, what) for p in points))
        axes.set_ylim(0, 1.22 * max(p.error for p in points) or 1)
        axes.xaxis.set_major_locator(_ticks(9))
        axes.grid(alpha=0.3)
        many = max(one_bit, key=lambda p: getattr(p, what))
        axes.annotate(
            "1 bit, more and more scales →",
            (getattr(many, what), max(p.error for p in one_bit)),
            xytext=(0, 14),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            color=_look("ls-1")[0],
        )
        best = [p for p in points if p.scheme == "ls-2" and p.scaling == "row"] or [
            p for p in points if p.scheme == "ls-2"
        ]
        if best:
            place = getattr(best[0], what) / axes.get_xlim()[1]
            axes.annotate(
                "2 bits, least squares",
                (getattr(best[0], what), best[0].error),
                xytext=(0, -20) if place > 0.65 else (12, 4),
                textcoords="offset points",
                ha="right" if place > 0.65 else "left",
                fontsize=10,
                fontweight="bold",
                color=_look("ls-2")[0],
            )
    sides[0].set_ylabel(_ERROR)
    _legend_below(figure, sides[0], 3)
    return figure


def histograms(title: str, shown: Sequence[tuple[Row, Histogram]]) -> Figure:
    """A panel a layer: its values, and below them a line of levels a scheme."""
    columns = 3 if len(shown) > 2 else len(shown)
    rows = -(-len(shown) // columns)
    names = list(shown[0][0].fits)
    line = 0.22
    height = rows * (2.4 + line * len(names)) + 0.9
    figure, grid = _subplots(rows, columns, figsize=(11, height), sharex=True, squeeze=False)
    figure.suptitle(title, fontsize=13)
    for place, (axes, (row, histogram)) in enumerate(zip(grid.flat, shown, strict=False)):
        top = _top(histogram.density)
        below = line / 1.7 * top
        _draw_histogram(axes, histogram, top)
        axes.set_ylim(-below * (len(names) + 0.4), top)
        axes.axhline(0, color="#555555", linewidth=0.8)
        for i, name in enumerate(names):
            colour, marker = _look(name)
            y = -below * (i + 0.75)
            for low, middle, high in _distinct(histogram.levels[name]):
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.35)
                axes.plot(middle, y, marker=marker, color=colour, markersize=5, linestyle="none")
            if place % columns == 0:
                axes.text(-1.06 * REACH, y, name, ha="right", va="center", fontsize=9, color=colour)
        axes.set_yticks([])
        axes.set_title(_short(row.name, 34), fontsize=10.5)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    for column in range(columns):
        last = (len(shown) - 1 - column) // columns
        axes = grid[last, column]
        axes.set_xlabel("value / root mean square")
        axes.tick_params(labelbottom=True)
    return figure


def _layers(title: str, rows: Sequence[Row]) -> Figure:
    names = list(rows[0].fits)
    figure, sides = _subplots(1, 2, figsize=(11, 0.225 * len(rows) + 1.9), sharey=True)
    places = range(len(rows))
    for axes, what, label in ((sides[0], "error", _ERROR), (sides[1], "angle", _ANGLE)):
        spans = [[getattr(row.fits[name], what) for name in names] for row in rows]
        axes.hlines(places, [min(s) for s in spans], [max(s) for s in spans], color="#dddddd", linewidth=1.5)
        for i, name in enumerate(names):
            colour, marker = _look(name)
            axes.plot(
                [span[i] for span in spans],
                places,
                marker,
                color=colour,
                markersize=6.5,
                label=plain_name(name),
                zorder=4 if name == "ls-2" else 3,
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(_ticks(7))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        if len(rows) > 20:
            axes.tick_params(top=True, labeltop=True)
    sides[0].set_yticks(places, [_short(row.name, 44) for row in rows], fontsize=9)
    sides[0].set_ylim(len(rows) - 0.4, -0.6)
    handles, labels = sides[0].get_legend_handles_labels()
    # Above, where a reader of a long picture starts; title and legend in one, lest they overlap.
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(names), 4),
        fontsize=9.5,
        frameon=False,
        title=title,
        title_fontsize=13,
    )
    return figure


def _excess_part(title: str, rows: Sequence[Row], greedy: str, best: str, most: float) -> Figure:
    figure, axes = _subplots(1, 1, figsize=(11, 0.225 * len(rows) + 1.6))
    figure.suptitle(title, fontsize=13)
    values = [_excess(row, greedy, best) for row in rows]
    bars = axes.barh(range(len(rows)), values, 0.72, color=_look(greedy)[0])
    axes.bar_label(bars, [f"+{value:.0%}" for value in values], padding=3, fontsize=9)
    axes.axvline(0, color=_look(best)[0], linewidth=3)
    axes.set_yticks(range(len(rows)), [_short(row.name, 44) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * most or 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"squared error of {plain_name(greedy)} above that of {plain_name(best)}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _excess(row: Row, greedy: str, best: str) -> float:
    least = row.fits[best].error
    return row.fits[greedy].error / least - 1 if least > 0 else 0.0


def _draw_histogram(axes: Any, histogram: Histogram, top: float) -> None:
    edges = _edges(histogram)
    axes.stairs(histogram.density, edges, fill=True, color=_HISTOGRAM)
    axes.set_xlim(-REACH, REACH)
    axes.set_xticks([-3, -2, -1, 0, 1, 2, 3])
    axes.set_ylim(0, top)
    if max(histogram.density) > top and histogram.zeros > 0.01:
        _write(axes, 0.96, f"{histogram.zeros:.0%} of all values are 0", fontsize=9, color="#555555")


def _subplots(rows: int, columns: int, figsize: tuple[float, float], **sharing: Any) -> tuple[Figure, Any]:
    """A figure that pyplot does not know of, and so does not keep."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **sharing)


def _ticks(most: int) -> MaxNLocator:
    """Round numbers, none at the upper end, where the next panel's begin."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], prune="upper")


def _write(axes: Any, height: float, text: str, **style: Any) -> None:
    axes.text(0.5, height, text, transform=axes.transAxes, ha="center", va="top", **style)


def _edges(histogram: Histogram) -> list[float]:
    width = 2 * REACH / len(histogram.density)
    return [-REACH + i * width for i in range(len(histogram.density) + 1)]


def _top(density: Sequence[float]) -> float:
    """The height of a panel: a spike, such as a ReLU's zeros, must not press the rest flat."""
    heights = sorted(density)
    tall, next_tall = heights[-1], heights[-3]
    return 1.45 * (next_tall if next_tall > 0 and tall > 3 * next_tall else tall) or 1.0


def _distinct(found: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Levels without those that coincide, as ternary's two zeros do."""
    kept: list[tuple[float, float, float]] = []
    for level in found:
        if not kept or any(abs(a - b) > 1e-6 for a, b in zip(level, kept[-1], strict=True)):
            kept.append(level)
    return kept


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both cost and error, by cost."""
    front: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


_SCALING_MARKERS = {"tensor": "s", "row": "d", "rank-1": "o", "rank-4": "^", "rank-8": "*"}


def _look_of_point(point: Point) -> tuple[str, str]:
    colour, marker = _look(point.scheme)
    if point.scheme == "ls-1":
        return colour, _SCALING_MARKERS.get(point.scaling, "p")
    return colour, "p" if point.scheme == "ls-2" and point.scaling == "tensor" else marker


def _point_name(point: Point) -> str:
    scales = {"tensor": "one for the tensor", "row": "a row"}.get(point.scaling, f"{point.scaling} matrix")
    return f"{plain_name(point.scheme)}, scales: {scales}"


def _look(scheme: str) -> tuple[str, str]:
    if scheme in _LOOKS:
        return _LOOKS[scheme]
    # The same for a scheme on every picture, whatever the others are; its neighbours look different.
    others = [name for name in schemes.names() if name not in _LOOKS]
    return _MORE_LOOKS[others.index(scheme) % len(_MORE_LOOKS)]


def _legend_below(figure: Figure, axes: Any, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False)


def _split(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Parts of about equal length, none above ``MOST_LAYERS``."""
    parts = math.ceil(len(rows) / MOST_LAYERS)
    ends = [round(i * len(rows) / parts) for i in range(parts + 1)] if parts else [0]
    return [rows[a:b] for a, b in pairwise(ends)]


def _part_title(title: str, part: int, parts: int) -> str:
    return title if parts == 1 else f"{title} ({part + 1} of {parts})"


def _short(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"
