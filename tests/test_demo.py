"""The demo end to end, on a handful of images in Fashion-MNIST's own format."""

import dataclasses
import gzip
import json
import re
import struct

import pytest
import torch

import foldbit as fb
from foldbit import demo
from foldbit.training import data, evaluate, loop, mnist
from foldbit.training.runs import RunError


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.numpy().tobytes()))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with the four files: scikit-learn's digits dressed up as Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("data")
    digits = data.digits()
    for part, images in (("train", digits.train), ("t10k", digits.test)):
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images.images[:, 0])
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", images.labels.to(torch.uint8))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return demo.run(folder, data=str(images))


def test_it_leaves_a_page_results_and_packed_networks(finished):
    page = finished.read_text()
    assert page.count('src="data:image/png;base64,') == 5
    assert "trained on 1 thread, timed on 1 thread" in page and "One seed: accuracies that differ by" in page
    assert "on 364 test images: 0 is perfect" in page and ".363, ternary .190, 2 bits .117" in page
    assert re.search("<td>stem.0</td><td>Conv2d</td><td>float</td>", page)
    assert re.search(r"<td>stages.0.0.conv1</td><td>\w+</td><td>bits</td>", page)
    results = json.loads((finished.parent / "results.json").read_text())
    assert list(results) == ["float", "W1A2", "W1AT", "W1A1"]
    for name, result in results.items():
        if name == "float":
            continue
        packed = finished.parent / f"{name}.safetensors"
        assert result["file_bytes"] == packed.stat().st_size
        assert result["agreement"] > 0.99 and result["compression"] > 10 and result["bits"] < 1.12
        assert all(ratio > 0 for ratio in result["against_float"].values())
        assert all(0 < share < 1 for share in result["not_bitwise"].values())
        assert f"{result['accuracy']:.2%}" in page
        # One definition: the summary's, of the same file.
        found = fb.summary(fb.load_packed(packed), (1, 1, 28, 28))
        assert result["compression"] == pytest.approx(found.compression)
        assert f"{found.compression:.1f}×" in page


def test_speed_ups_of_unsteady_times_are_doubted():
    def result(steady):
        return demo.Result(0.9, 1.0, 10, 1.0, 1.0, {}, {}, {}, steady)

    assert "TRUST" not in demo._note({"W1A2": result(True)}, "2 threads")
    said = demo._note({"float": result(True), "W1A2": result(False), "W1A1": result(False)}, "2 threads")
    assert said.startswith("DO NOT TRUST THE SPEED-UPS of W1A2, W1A1:")
    assert said.endswith("trained on 2 threads, timed on 1 thread.")


def test_the_accuracy_is_that_of_the_file(finished, images):
    results = json.loads((finished.parent / "results.json").read_text())
    found = data.fashion_mnist(images)
    packed = fb.load_packed(finished.parent / "W1A1.safetensors")
    right = evaluate.predictions(packed, found.test, (found.mean, found.std)) == found.test.labels
    assert right.double().mean().item() == pytest.approx(results["W1A1"]["accuracy"])


def test_it_takes_up_what_an_interrupted_call_trained(finished, images, monkeypatch, capsys):
    (finished.parent / "results.json").unlink()
    monkeypatch.setattr(loop._Training, "_epoch", lambda *_: pytest.fail("trained again"))
    assert demo.run(finished.parent, data=str(images)) == finished
    assert "open" in capsys.readouterr().out


def test_it_deletes_nothing_of_others(tmp_path, images):
    (tmp_path / "results.json").write_text("mine")
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "thesis.tex").write_text("mine, too")
    with pytest.raises(RunError, match="holds no run"):
        demo.run(tmp_path, data=str(images))
    assert (tmp_path / "float" / "thesis.tex").read_text() == "mine, too"


def test_without_fashion_mnist_it_says_so_loudly(tmp_path, monkeypatch):
    nowhere = dataclasses.replace(mnist.FASHION_MNIST, package=None)
    monkeypatch.setattr(mnist, "FASHION_MNIST", nowhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_train", lambda *_: pytest.fail("reached"))
    with pytest.warns(data.DataFallback, match="DIGITS INSTEAD"), pytest.raises(pytest.fail.Exception):
        demo.run(tmp_path / "demo", download=False)
