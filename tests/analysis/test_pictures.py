"""Pictures have titles, units and legends, and no two words on them overlap."""

from itertools import combinations

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from foldbit.analysis import error_pictures, looks, pages, sources, study, value_pictures
from foldbit.analysis.pages import Layer, Study
from foldbit.core import schemes

NAMES = ["ls-1", "ls-T", "gf-2", "ls-2"]


def layer(name, matrix, names=NAMES, kind="linear", sample=False):
    tally = study.Tally(names)
    tally.add(matrix.reshape(1, -1) if sample else matrix)
    points = study.points(matrix, study.row_fits(matrix, names))
    return Layer(name, kind, tuple(matrix.shape), tally.fits(), tally.histogram(), points)


def sample(name, names=NAMES):
    found = layer(name, sources.distribution(name).weights[0].load()[:600], names, sample=True)
    return Study(name, "a sample", [found], [], "", [], True)


def network(count, names=NAMES):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i in range(count):
        x = torch.randn(8, 24, generator=generator) ** (1 if i % 3 else 3)
        layers.append(
            layer(f"stage{i}.{'block.' * (i % 9)}convolution", x, names, ["linear", "convolution"][i % 2])
        )
    return Study(f"network of {count}", "a network", layers, layers[:2], "noise", ["a note"], False)


STUDIES = {
    **{name: lambda name=name: sample(name) for name in ("normal", "student-t", "relu-normal", "log-normal")},
    "many layers": lambda: network(24),
    "many schemes": lambda: network(2, [*NAMES, "alt-2", "rg-2", "lsf-3"]),
    "one scheme": lambda: network(2, ["ls-1"]),
}


def pictures_of(found):
    return [p for s in pages.sections(found) for p in s.parts if isinstance(p, pages.report.Picture)]


def words(figure):
    """Every visible text of a figure and where it stands."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and (text.axes is None or text.axes.axison):
            box = text.get_window_extent(canvas.get_renderer())
            if isinstance(text, Annotation):
                box = Text.get_window_extent(text, canvas.get_renderer())
            found.append((text, box))
    # Ticks outside of what an axis shows are found, too, but not drawn.
    return [(text.get_text(), box) for text, box in found if not _is_hidden_tick(text, box)]


def _is_hidden_tick(text, box):
    axes = text.axes
    if axes is None:
        return False
    frame = axes.get_window_extent()
    for axis, low, high, middle in (
        (axes.xaxis, frame.x0, frame.x1, (box.x0 + box.x1) / 2),
        (axes.yaxis, frame.y0, frame.y1, (box.y0 + box.y1) / 2),
    ):
        ticks = [label for tick in axis.get_major_ticks() for label in (tick.label1, tick.label2)]
        if text in ticks and not low - 1 <= middle <= high + 1:
            return True
    return False


@pytest.mark.parametrize("which", STUDIES)
def test_no_words_overlap_and_all_axes_are_named(which):
    found = STUDIES[which]()
    for picture in pictures_of([found]):
        drawn = words(picture.figure)
        for (one, box), (other, at) in combinations(drawn, 2):
            width = min(box.x1, at.x1) - max(box.x0, at.x0)
            height = min(box.y1, at.y1) - max(box.y0, at.y0)
            assert width < 2 or height < 2, f"{one!r} and {other!r} overlap in {picture.caption[:60]}"
        said = {text for text, _ in drawn}
        assert any(found.name in text for text in said), "a title says what is shown"
        assert any("‖x − x̂‖² / ‖x‖²" in t or "squared error" in t or "root mean square" in t for t in said)


def test_layers_are_all_there_and_long_lists_are_split():
    many = [looks.Row(f"l{i}", {"ls-2": study.Fit(0.1, 18.0)}) for i in range(200)]
    figures = error_pictures.layers("title", many)
    assert len(figures) == 3
    labels = [label.get_text() for f in figures for label in f.axes[0].get_yticklabels()]
    assert labels == [row.name for row in many]


def test_schemes_differ_by_colour_and_marker():
    all_looks = [looks.look(name) for name in schemes.names()[1:]]
    assert len({colour for colour, _ in all_looks}) == len(all_looks)
    few = [looks.look(name) for name in [*NAMES, "gf-3", "gf-4"]]
    assert len({marker for _, marker in few}) == len(few)
    for name in schemes.names()[1:]:
        assert looks.plain_name(name).endswith(f"({name})")


def test_what_nothing_beats():
    assert error_pictures._front([(2, 0.1), (1, 0.4), (2, 0.3), (3, 0.1), (3, 0.05)]) == [
        (1, 0.4),
        (2, 0.1),
        (3, 0.05),
    ]


def test_coinciding_levels_are_one():
    zero = (0.0, 0.0, 0.0)
    assert value_pictures._distinct([(-1.0, -1.0, -1.0), zero, zero, (1.0, 1.0, 1.0)])[1:2] == [zero]
