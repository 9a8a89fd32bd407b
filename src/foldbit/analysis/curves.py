"""Curves of trainings, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from foldbit.analysis.report import Curve

# Okabe and Ito's colours and Tol's, which differ for colour-blind readers too; then lines differ besides.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#882255", "#999933"]
_LINES = ["-", "--", "-.", ":"]


def trainings(curves: Mapping[str, Sequence[Curve]]) -> Figure:
    """Test accuracy and training loss over epochs, a colour a group, a line a training.

    Args:
        curves: the trainings of each group, such as those that differ in their seed alone.
    """
    columns = 2 if len(curves) < 15 else 3
    below = 0.24 * -(-len(curves) // columns)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2 + below), layout="constrained")
    for i, (name, group) in enumerate(curves.items()):
        # Matplotlib would read formulas between dollars, and leave out names that begin with an underscore.
        label = f" {name}".replace("$", r"\$")
        colour, line = _COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)]
        for j, curve in enumerate(group):
            look = {"color": colour, "linestyle": line, "label": None if j else label, "alpha": 0.9}
            few = len(curve.accuracy) <= 25
            if curve.accuracy:
                left.plot(
                    *zip(*curve.accuracy, strict=True), marker="o" if few else None, markersize=4, **look
                )
            if curve.loss:
                right.plot(*zip(*curve.loss, strict=True), linewidth=1.1, **look)
    left.set_ylabel("test accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_ylabel("training loss")
    if right.lines:
        right.set_yscale("log")
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        right.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels() if right.lines else left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=10)
    return figure
