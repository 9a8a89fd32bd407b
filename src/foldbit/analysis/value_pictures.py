"""Pictures of where values lie and where a scheme puts its levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from foldbit.analysis import looks
from foldbit.analysis.looks import Row
from foldbit.analysis.study import REACH, Fit, Histogram

_HISTOGRAM = "#c3ccd6"


def levels(title: str, histogram: Histogram, fits: Mapping[str, Fit]) -> Figure:
    """Two panels a scheme: the values and its levels, and which values its squared error comes from."""
    columns = min(4, len(fits))
    bands = -(-len(fits) // columns)
    figure, grid = looks.subplots(
        2 * bands, columns, figsize=(11, 0.4 + 4.9 * bands), sharex=True, sharey="row", squeeze=False
    )
    figure.suptitle(title, fontsize=13)
    top = _top(histogram.density)
    # One height for all: areas compare.
    most = max((_top(lost) for lost in histogram.lost.values()), default=1.0)
    for i, (name, fit) in enumerate(fits.items()):
        upper, lower = grid[2 * (i // columns), i % columns], grid[2 * (i // columns) + 1, i % columns]
        _draw_histogram(upper, histogram, top)
        colour, _ = looks.look(name)
        for low, middle, high in _distinct(histogram.levels[name]):
            if high - low > 0.02:
                upper.axvspan(low, high, ymax=0.8, color=colour, alpha=0.18, linewidth=0)
            upper.plot([middle, middle], [0, 0.8 * top], color=colour, linewidth=2.5)
        words, _, _ = looks.plain_name(name).rpartition(" (")
        if len(words) > 24:
            words = words.replace(", ", ",\n", 1)
        upper.set_title(f"{name}: {words}", fontsize=11, color=colour, fontweight="bold")
        lower.stairs(histogram.lost[name], _edges(histogram), fill=True, color=colour, alpha=0.75)
        lower.set_ylim(0, most)
        lower.yaxis.set_major_locator(looks.ticks(5))  # its top is the upper panel's bottom
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


def histograms(title: str, shown: Sequence[tuple[Row, Histogram]]) -> Figure:
    """A panel a layer: its values, and below them a line of levels a scheme."""
    columns = 3 if len(shown) > 2 else len(shown)
    rows = -(-len(shown) // columns)
    names = list(shown[0][0].fits)
    line = 0.22
    height = rows * (2.4 + line * len(names)) + 0.9
    figure, grid = looks.subplots(rows, columns, figsize=(11, height), sharex=True, squeeze=False)
    figure.suptitle(title, fontsize=13)
    for place, (axes, (row, histogram)) in enumerate(zip(grid.flat, shown, strict=False)):
        top = _top(histogram.density)
        below = line / 1.7 * top
        _draw_histogram(axes, histogram, top)
        axes.set_ylim(-below * (len(names) + 0.4), top)
        axes.axhline(0, color="#555555", linewidth=0.8)
        for i, name in enumerate(names):
            colour, marker = looks.look(name)
            y = -below * (i + 0.75)
            for low, middle, high in _distinct(histogram.levels[name]):
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.35)
                axes.plot(middle, y, marker=marker, color=colour, markersize=5, linestyle="none")
            if place % columns == 0:
                axes.text(-1.06 * REACH, y, name, ha="right", va="center", fontsize=9, color=colour)
        axes.set_yticks([])
        axes.set_title(looks.short(row.name, 34), fontsize=10.5)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    for column in range(columns):
        last = (len(shown) - 1 - column) // columns
        axes = grid[last, column]
        axes.set_xlabel("value / root mean square")
        axes.tick_params(labelbottom=True)
    return figure


def _draw_histogram(axes: Any, histogram: Histogram, top: float) -> None:
    edges = _edges(histogram)
    axes.stairs(histogram.density, edges, fill=True, color=_HISTOGRAM)
    axes.set_xlim(-REACH, REACH)
    axes.set_xticks([-3, -2, -1, 0, 1, 2, 3])
    axes.set_ylim(0, top)
    if max(histogram.density) > top and histogram.zeros > 0.01:
        _write(axes, 0.96, f"{histogram.zeros:.0%} of all values are 0", fontsize=9, color="#555555")


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
