"""Pages are one file, need nothing else, and escape what they are given."""

import re

import numpy as np
import pytest
import torch

import foldbit as fb
from foldbit.analysis import error, report


@pytest.fixture
def page(tmp_path):
    curve = report.Curve([(1, 0.5), (2, 0.75)], [(0.5, 2.0), (1.0, 1.0), (2.0, 0.5)])
    pictures = [
        report.accuracy_against_size({"float": (1000.0, 0.9), "W1A2": (80.0, 0.88)}),
        report.training_curves({"float": curve, "W1A1": curve}),
        report.error_bars({"W1A2": {"a": 0.1, "b": 0.2}, "W1A1": {"a": 0.3, "b": 0.4}}, "error"),
        report.image_grid(np.zeros((7, 28, 28)), ["x"] * 7, {"float": ["x"] * 7, "W1A1": ["y"] * 7}),
    ]
    path = tmp_path / "page.html"
    parts = [report.Picture(picture, "a caption <b>") for picture in pictures]
    table = report.Table(["a\nb", "<c>"], [["<script>alert(1)</script>", 2]], "a & b")
    report.write_page(path, "T <1>", "lead", [report.Section("S", [report.Text("a < b"), table, *parts])])
    return path.read_text()


def test_a_page_is_self_contained(page):
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_text_is_escaped(page):
    assert "<script" not in page and "&lt;script&gt;" in page and "T &lt;1&gt;" in page


def test_names_of_networks_of_the_same_size_do_not_lie_on_each_other():
    figure = report.accuracy_against_size(
        {"float": (1000.0, 0.9), "W1AT": (80.0, 0.88), "W1A1": (80.0, 0.8799)}
    )
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["float", "W1AT", "W1A1"]
    assert not figure.axes[0].texts
    report.pyplot.close(figure)


def test_figures_are_closed_once_written(page):
    assert not report.pyplot.get_fignums()


def test_layer_errors_are_those_of_the_quantizers():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 5, 3))
    fb.quantize_(model, fb.QuantConfig("ls-1", "ls-2", clamp=1.0), skip=())
    model.train()
    x = torch.randn(6, 3, 8, 8)
    first, second = error.layer_errors(model, x)
    assert (first.name, second.name) == ("0", "2") and model.training
    expected = fb.quantize(x.clamp(-1, 1), "ls-2", (1, 2, 3)).values()
    assert first.activation == pytest.approx(
        ((x - expected) ** 2).sum().item() / (x**2).sum().item(), rel=1e-5
    )
    weight = model[0].weight.detach()
    q = fb.quantize(weight, "ls-1", (1, 2, 3)).values()
    assert first.weight == pytest.approx(
        ((weight - q) ** 2).sum().item() / (weight**2).sum().item(), rel=1e-5
    )


def test_a_float_model_has_no_layer_errors():
    with pytest.raises(ValueError, match="no quantized layers"):
        error.layer_errors(torch.nn.Linear(2, 2), torch.randn(1, 2))
