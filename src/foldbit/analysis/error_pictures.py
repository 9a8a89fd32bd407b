"""Pictures of how much schemes lose: by group, layer by layer, and against what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from foldbit.analysis import looks
from foldbit.analysis.looks import Row
from foldbit.analysis.study import Fit, Point

#: The most layers that a picture holds; longer lists are split.
MOST_LAYERS = 90

_ERROR = "relative squared error ‖x − x̂‖² / ‖x‖²"
_ANGLE = "angle between x and x̂, degrees"


def groups(title: str, fits: Mapping[str, Mapping[str, Fit]]) -> Figure:
    """Bars of error and of angle, a bar a scheme. ``fits[group][scheme]``."""
    names = list(next(iter(fits.values())))
    height = 0.27 * len(names) * len(fits) + 0.28 * len(fits) + 1.5
    figure, sides = looks.subplots(1, 2, figsize=(11, height), sharey=True)
    figure.suptitle(title, fontsize=13)
    width = 0.84 / len(names)
    for axes, what, label, form in (
        (sides[0], "error", _ERROR, "{:.3f}"),
        (sides[1], "angle", _ANGLE, "{:.1f}°"),
    ):
        for i, name in enumerate(names):
            values = [getattr(of_group[name], what) for of_group in fits.values()]
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(fits))]
            bars = axes.barh(
                places, values, width * 0.9, color=looks.look(name)[0], label=looks.plain_name(name)
            )
            axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=9)
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.14 * max(max(getattr(f, what) for f in g.values()) for g in fits.values()) or 1)
        axes.xaxis.set_major_locator(looks.ticks(7))  # where the other side begins
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    sides[0].set_yticks(range(len(fits)), list(fits))
    sides[0].invert_yaxis()
    looks.legend_below(figure, sides[0], min(len(names), 4))
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
    figure, sides = looks.subplots(1, 2, figsize=(11, 4.9), sharey=True)
    figure.suptitle(title, fontsize=13)
    one_bit = [p for p in points if p.scheme == "ls-1"]
    for axes, what, label in (
        (sides[0], "bits", "bits stored per value, scales (32 bits each) included"),
        (sides[1], "xnor", "XNOR operations per multiply-accumulate"),
    ):
        line = sorted((getattr(p, what), -p.error, p.error) for p in one_bit)
        axes.plot([x for x, _, _ in line], [y for _, _, y in line], color=looks.look("ls-1")[0], alpha=0.5)
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
        axes.xaxis.set_major_locator(looks.ticks(9))
        axes.grid(alpha=0.3)
        many = max(one_bit, key=lambda p: getattr(p, what))
        axes.annotate(
            "1 bit, more and more scales →",
            (getattr(many, what), max(p.error for p in one_bit)),
            xytext=(0, 14),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            color=looks.look("ls-1")[0],
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
                color=looks.look("ls-2")[0],
            )
    sides[0].set_ylabel(_ERROR)
    looks.legend_below(figure, sides[0], 3)
    return figure


def _layers(title: str, rows: Sequence[Row]) -> Figure:
    names = list(rows[0].fits)
    figure, sides = looks.subplots(1, 2, figsize=(11, 0.225 * len(rows) + 1.9), sharey=True)
    places = range(len(rows))
    for axes, what, label in ((sides[0], "error", _ERROR), (sides[1], "angle", _ANGLE)):
        spans = [[getattr(row.fits[name], what) for name in names] for row in rows]
        axes.hlines(places, [min(s) for s in spans], [max(s) for s in spans], color="#dddddd", linewidth=1.5)
        for i, name in enumerate(names):
            colour, marker = looks.look(name)
            axes.plot(
                [span[i] for span in spans],
                places,
                marker,
                color=colour,
                markersize=6.5,
                label=looks.plain_name(name),
                zorder=4 if name == "ls-2" else 3,
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(looks.ticks(7))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        if len(rows) > 20:
            axes.tick_params(top=True, labeltop=True)
    sides[0].set_yticks(places, [looks.short(row.name, 44) for row in rows], fontsize=9)
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
    figure, axes = looks.subplots(1, 1, figsize=(11, 0.225 * len(rows) + 1.6))
    figure.suptitle(title, fontsize=13)
    values = [_excess(row, greedy, best) for row in rows]
    bars = axes.barh(range(len(rows)), values, 0.72, color=looks.look(greedy)[0])
    axes.bar_label(bars, [f"+{value:.0%}" for value in values], padding=3, fontsize=9)
    axes.axvline(0, color=looks.look(best)[0], linewidth=3)
    axes.set_yticks(range(len(rows)), [looks.short(row.name, 44) for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * most or 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"squared error of {looks.plain_name(greedy)} above that of {looks.plain_name(best)}")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _excess(row: Row, greedy: str, best: str) -> float:
    least = row.fits[best].error
    return row.fits[greedy].error / least - 1 if least > 0 else 0.0


def _split(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Parts of about equal length, none above ``MOST_LAYERS``."""
    parts = math.ceil(len(rows) / MOST_LAYERS)
    ends = [round(i * len(rows) / parts) for i in range(parts + 1)] if parts else [0]
    return [rows[a:b] for a, b in pairwise(ends)]


def _part_title(title: str, part: int, parts: int) -> str:
    return title if parts == 1 else f"{title} ({part + 1} of {parts})"


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both cost and error, by cost."""
    front: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not front or error < front[-1][1]:
            front.append((cost, error))
    return front


_SCALING_MARKERS = {"tensor": "s", "row": "d", "rank-1": "o", "rank-4": "^", "rank-8": "*"}


def _look_of_point(point: Point) -> tuple[str, str]:
    colour, marker = looks.look(point.scheme)
    if point.scheme == "ls-1":
        return colour, _SCALING_MARKERS.get(point.scaling, "p")
    return colour, "p" if point.scheme == "ls-2" and point.scaling == "tensor" else marker


def _point_name(point: Point) -> str:
    scales = {"tensor": "one for the tensor", "row": "a row"}.get(point.scaling, f"{point.scaling} matrix")
    return f"{looks.plain_name(point.scheme)}, scales: {scales}"
