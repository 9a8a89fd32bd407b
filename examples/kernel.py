"""Draw how the bitwise kernels lay out their operands, and what one step of the inner loop does.

python examples/kernel.py docs/kernel.png
"""

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"
PIXELS, WORDS, LANES = 8, 4, 16


def grid(axes: Axes, left: float, top: float, rows: int, columns: int, size: float, colour: str) -> None:
    """Cells of that size, downwards and to the right."""
    for row in range(rows):
        for column in range(columns):
            place = (left + column * size, top - (row + 1) * size)
            axes.add_patch(Rectangle(place, size, size, facecolor="white", edgecolor=colour, linewidth=0.8))


def fill(axes: Axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    """What the step at hand touches."""
    axes.add_patch(Rectangle((left, top - height), width, height, facecolor=colour, alpha=0.75))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """From operand to result."""
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "connectionstyle": "arc3,rad=0.12"}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=1.3, **style))


def main(path: str = "docs/kernel.png") -> None:
    """Draw the picture."""
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    size = 0.42

    axes.text(0, 4.35, "packed activations", color=BLUE, fontsize=12, fontweight="bold")
    axes.text(
        0, 4.02, "a row a pixel, a cell a word:\nthe signs of 32 channels at a tap", fontsize=9, va="top"
    )
    grid(axes, 0, 3.3, PIXELS, WORDS, size, BLUE)
    fill(axes, size, 3.3 - 2 * size, size, size, BLUE)

    left = 3.6
    axes.text(
        left, 4.35, "packed weights of 16 output channels", color=ORANGE, fontsize=12, fontweight="bold"
    )
    axes.text(
        left, 4.02, "a row a word, a column an output channel:\none vector load a row", fontsize=9, va="top"
    )
    grid(axes, left, 3.3, WORDS, LANES, size / 1.6, ORANGE)
    fill(axes, left, 3.3 - size / 1.6, LANES * size / 1.6, size / 1.6, ORANGE)

    right = 9.2
    axes.text(right, 4.35, "counts, in registers", color=GREEN, fontsize=12, fontweight="bold")
    axes.text(
        right,
        4.02,
        "a row a pixel, a column an output channel:\nhow many bits differed so far",
        fontsize=9,
        va="top",
    )
    grid(axes, right, 3.3, PIXELS, LANES, size / 1.6, GREEN)
    fill(axes, right, 3.3 - 2 * size / 1.6, LANES * size / 1.6, size / 1.6, GREEN)

    row = 3.3 - 2.5 * size / 1.6
    arrow(axes, (2 * size, 3.3 - 2.5 * size), (right - 0.05, row), BLUE)
    arrow(axes, (left + LANES * size / 1.6, 3.3 - 1.5 * size / 1.6), (right - 0.05, row + 0.04), ORANGE)
    axes.text(
        left + 0.1, 1.28,
        "one step, three instructions:\n"
        "counts[pixel] += popcount(broadcast(activation word) xor weight words)\n\n"
        "16 output channels at once, no sum across lanes; the weight words serve all pixels of the tile,\n"
        "and both planes of 2-bit activations. At the end: dot product = taps · channels − 2 · count.",
        fontsize=9.5, va="top", color="#222222",
    )  # fmt: skip
    axes.set_xlim(-0.1, 13.7)
    axes.set_ylim(-0.35, 4.7)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
