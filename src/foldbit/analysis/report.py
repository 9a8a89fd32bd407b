"""Pages and pictures: self-contained HTML of text, tables and plots, readable offline and forever."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from foldbit.packed import files

#: One colour per scheme, the same on every plot; chosen to differ for colour-blind readers too.
COLOURS = {"float": "#444444", "W1A2": "#0072b2", "W1AT": "#009e73", "W1A1": "#d55e00"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.7rem } h2 { font-size: 1.25rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .35rem .8rem }
th { border-bottom: 2px solid #444; text-align: right; vertical-align: bottom }
td { border-bottom: 1px solid #ddd; text-align: right } td:first-child, th:first-child { text-align: left }
td { white-space: nowrap }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 }
figcaption, .note { color: #555; font-size: .92rem }
.scroll { overflow-x: auto }
"""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table with a note below it; with a summary, folded away under it until the reader opens it."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    note: str = ""
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure with a caption that says what to see."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: Sequence[Text | Table | Picture]


def write_page(path: str | os.PathLike[str], title: str, lead: str, sections: Sequence[Section]) -> None:
    """Write a page that needs nothing but itself; its figures are closed."""
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(lead)}</p>"]
    for section in sections:
        body.append(f"<h2>{html.escape(section.title)}</h2>")
        body += [_render(part) for part in section.parts]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )
    files.write(path, page.encode())


def accuracy_against_size(points: Mapping[str, tuple[float, float]]) -> Figure:
    """Test accuracy (0 to 1) over KiB on disk, a point a network."""
    figure, axes = _plot()
    for i, (name, (size, accuracy)) in enumerate(points.items()):
        look = {"color": COLOURS.get(name), "marker": "osD^v"[i % 5]}
        axes.scatter(size, accuracy, s=90, label=name, zorder=3, **look)
    axes.legend()  # names beside the points would lie on each other where sizes are the same
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.margins(x=0.25, y=0.2)
    axes.set_xlabel("size on disk, KiB (logarithmic)")
    axes.set_ylabel("test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    return figure


@dataclass(frozen=True)
class Curve:
    """A training: test accuracy at some epochs, mean training loss at some more (both may start late)."""

    accuracy: Sequence[tuple[float, float]]
    loss: Sequence[tuple[float, float]]


def training_curves(curves: Mapping[str, Curve]) -> Figure:
    """Test accuracy and training loss over epochs, a line a network."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for name, curve in curves.items():
        colour = COLOURS.get(name)
        left.plot(*zip(*curve.accuracy, strict=True), marker="o", color=colour, label=name)
        right.plot(*zip(*curve.loss, strict=True), color=colour, label=name, linewidth=1.2)
    right.set_yscale("log")
    left.set_ylabel("test accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    right.set_ylabel("training loss (cross-entropy)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def error_bars(errors: Mapping[str, Mapping[str, float]], ylabel: str) -> Figure:
    """Bars of relative squared error, a group a layer, a bar a network. ``errors[network][layer]``."""
    figure, axes = _plot(width=9.5)
    layers = list(next(iter(errors.values())))
    width = 0.8 / len(errors)
    for i, (name, per_layer) in enumerate(errors.items()):
        places = [j + (i - (len(errors) - 1) / 2) * width for j in range(len(layers))]
        axes.bar(
            places, [per_layer[layer] for layer in layers], width * 0.92, label=name, color=COLOURS.get(name)
        )
    axes.set_xticks(range(len(layers)), layers, rotation=20, ha="right")
    axes.set_ylabel(ylabel)
    axes.set_ylim(top=1.25 * max(max(per_layer.values()) for per_layer in errors.values()))
    axes.legend(ncols=len(errors), loc="upper right")
    return figure


def image_grid(images: Sequence[Any], truths: Sequence[str], guesses: Mapping[str, Sequence[str]]) -> Figure:
    """Images under their true class, each network's guess below, wrong ones in red."""
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(1.6 * columns, rows * (1.9 + 0.22 * len(guesses))))
    figure.set_layout_engine("constrained", hspace=0.06)
    for axes in grid.flat:
        axes.axis("off")
    for i, (axes, image) in enumerate(zip(grid.flat, images, strict=False)):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(truths[i], fontsize=10, fontweight="bold")
        for j, (name, guess) in enumerate(guesses.items()):
            axes.text(
                0.5,
                -0.04 - 0.13 * j,
                f"{name}: {guess[i]}",
                transform=axes.transAxes,
                ha="center",
                va="top",
                fontsize=8.5,
                color="#222222" if guess[i] == truths[i] else "#c00000",
            )
    return figure


def _plot(width: float = 6.5) -> tuple[Figure, Any]:
    figure, axes = pyplot.subplots(figsize=(width, 4.2), layout="constrained")
    axes.grid(alpha=0.3, zorder=0)
    axes.set_axisbelow(True)
    return figure, axes


def _render(part: Text | Table | Picture) -> str:
    if isinstance(part, Text):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Table):
        head = "".join(f"<th>{html.escape(title).replace(chr(10), '<br>')}</th>" for title in part.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in part.rows
        )
        note = f'<p class="note">{html.escape(part.note)}</p>' if part.note else ""
        drawn = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>{note}'
        if part.summary:
            return f"<details><summary>{html.escape(part.summary)}</summary>{drawn}</details>"
        return drawn
    image = io.BytesIO()
    part.figure.savefig(image, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(part.figure)
    data = base64.b64encode(image.getvalue()).decode()
    caption = html.escape(part.caption)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
