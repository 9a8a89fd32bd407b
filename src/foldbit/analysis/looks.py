"""What the pictures of an analysis share. A scheme has one name, one colour and one marker on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from foldbit.analysis.study import Fit
from foldbit.core import schemes

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


def look(scheme: str) -> tuple[str, str]:
    """A scheme's colour and marker."""
    if scheme in _LOOKS:
        return _LOOKS[scheme]
    # The same for a scheme on every picture, whatever the others are; its neighbours look different.
    others = [name for name in schemes.names() if name not in _LOOKS]
    return _MORE_LOOKS[others.index(scheme) % len(_MORE_LOOKS)]


def subplots(rows: int, columns: int, figsize: tuple[float, float], **sharing: Any) -> tuple[Figure, Any]:
    """A figure that pyplot does not know of, and so does not keep."""
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **sharing)


def ticks(most: int) -> MaxNLocator:
    """Round numbers, none at the upper end, where the next panel's begin."""
    return MaxNLocator(most, steps=[1, 2, 5, 10], prune="upper")


def legend_below(figure: Figure, axes: Any, columns: int) -> None:
    """One legend for a figure: that of these axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9.5, frameon=False)


def short(name: str, most: int) -> str:
    """A name without its middle where it has more characters than fit."""
    if len(name) <= most:
        return name
    return f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"
