"""Run folders side by side: who is compared, what the table says, and the page that it leaves."""

import dataclasses
import json
import os
import re
import signal

import pytest

from foldbit import QuantConfig, cli, compare
from foldbit.analysis import curves, report
from foldbit.training import data, loop, recipes
from foldbit.training.recipes import DataConfig, Distillation, Recipe

SHORT = Recipe(
    model_args={"widths": [8, 8, 8]},
    data=DataConfig(name="digits", train_images=128),
    epochs=2,
    batch_size=64,
    lr=1e-2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of a float network and of a quantized one, one that was taught, and what is no run."""
    folder = tmp_path_factory.mktemp("runs")
    images = data.digits()

    def train(name, **changes):
        loop.train(dataclasses.replace(SHORT, **changes), folder / name, images=images, threads=1)

    train("float-0")
    train("float-1", seed=1)
    train("w1a2", quant=QuantConfig("ls-1", "ls-2"), init=str(folder / "float-0"))
    train("w1a2-b", quant=QuantConfig("ls-1", "ls-2"), init=str(folder / "float-1"), seed=1)
    train("taught", distill=Distillation(str(folder / "float-1")))
    (folder / "report.html").write_text("a page")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def stopped(folder, tmp_path):
    """A run that was interrupted in its second epoch, and one in its first."""
    for name, epoch in (("second", 1), ("first", 0)):
        run = tmp_path / name
        run.mkdir()
        recipes.save(SHORT, run / "config.yaml")
        lines = [{"epoch": e + 1, "step": 2, "test_accuracy": 0.25, "seconds": 3.0} for e in range(epoch)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "losses.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (run / "warnings.jsonl").write_text('{"step": 1, "about": "x", "warning": "y"}\n')
    return tmp_path


def test_the_table(folder, tmp_path):
    out = tmp_path / "page.html"
    said = compare.run([str(path) for path in sorted(folder.iterdir())], out)
    rows = {line.split()[0]: line.split() for line in said.splitlines() if "resnet8-xnor" in line}
    assert list(rows) == ["float-0", "float-1", "taught", "w1a2", "w1a2-b"]
    last = [json.loads(line) for line in (folder / "w1a2" / "metrics.jsonl").read_text().splitlines()]
    best = max(record["test_accuracy"] for record in last)
    seconds = f"{sum(record['seconds'] for record in last):,.0f}"
    assert rows["w1a2"][1:] == [
        *["resnet8-xnor", "ls-1", "/", "ls-2", "-", "2"],
        *[f"{last[-1]['test_accuracy']:.2%}", f"{best:.2%}", seconds, "-"],
    ]
    assert rows["float-0"][2] == "float" and rows["taught"][3] == "float-1"
    assert "left out: " + str(folder / "report.html") + " (a file)" in said
    assert re.search(r"left out: .*notes \(.*it has no config\.yaml", said)
    page = out.read_text()
    assert page.count("<img") == 1 and "float-0, float-1" in page and "http" not in page


def test_a_folder_of_runs_is_its_runs(folder, tmp_path):
    found, left = compare.find([folder])
    assert [t.folder.name for t in found] == ["float-0", "float-1", "taught", "w1a2", "w1a2-b"] and not left


def test_seeds_together(folder):
    found, _ = compare.find([folder])
    together = [[t.folder.name for t in group] for group in compare.groups(found)]
    assert together == [["float-0", "float-1"], ["taught"], ["w1a2", "w1a2-b"]]


def test_mean_and_spread_over_seeds(folder, tmp_path):
    said = compare.run([str(folder)], tmp_path / "page.html")
    a, b = (
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]
        for name in ("w1a2", "w1a2-b")
    )
    mean, spread = 50 * (a + b), 100 * abs(a - b) / 2**0.5
    assert re.search(rf"w1a2, w1a2-b +2  +{mean:.2f} ± {spread:.2f} %", said)


def test_interrupted_runs(stopped):
    said = compare.run([str(stopped / "second"), str(stopped / "first")], stopped / "page.html")
    assert re.search(r"second .* 1 of 2 +25\.00% +25\.00% +3 +1", said)
    assert re.search(r"first .* 0 of 2 +- +- +0 +1", said)
    assert "0 of 2 finished" in said  # of these seeds
    assert (stopped / "page.html").read_text().count("<img") == 1
    only = compare.run([str(stopped / "first")], stopped / "none.html")
    assert "0 of 2" in only and "<img" not in (stopped / "none.html").read_text()


def test_damaged_records_are_left_out_with_the_reason(stopped, folder):
    (stopped / "second" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (stopped / "first" / "config.yaml").write_text("my: thesis\n")
    found, left = compare.find([stopped / "second", stopped / "first", folder / "w1a2"])
    assert [training.folder.name for training in found] == ["w1a2"]
    reasons = list(left.values())
    assert "lacks one of epoch, test_accuracy, seconds" in reasons[0] and "not a recipe" in reasons[1]


EPOCH = {"epoch": 1, "step": 2, "test_accuracy": 0.25, "seconds": 3.0}


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("metrics.jsonl", json.dumps(EPOCH | {"epoch": 0}), "no such number"),
        ("metrics.jsonl", json.dumps(EPOCH | {"step": 0}), "no number of steps"),
        ("metrics.jsonl", json.dumps(EPOCH | {"step": "a"}), "no number of steps"),
        ("metrics.jsonl", json.dumps(EPOCH | {"seconds": float("nan")}), "no such number"),
        ("metrics.jsonl", json.dumps(EPOCH | {"epoch": 10**400}), "no such number"),
        ("losses.jsonl", '{"step": 0, "loss": 2.0}', "no such number"),
        ("losses.jsonl", "[" * 100_000 + "\n{}\n", "line 1, is no record"),
        ("metrics.jsonl", None, "Is a directory"),
        ("losses.jsonl", b"\xff\n{}\n", "decode"),
        ("config.yaml", "model: &a [*a]", "aliases written out"),
        ("config.yaml", "lr: " + "[" * 100_000, "is not YAML"),
    ],
)
def test_one_damaged_run_stops_no_comparison(stopped, file, text, reason):
    path = stopped / "second" / file
    path.unlink()
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = compare.run([str(stopped)], stopped / "page.html")
    assert re.search(rf"left out: .*second \(.*{reason}.*\)", said) and "\nfirst" in said


@pytest.mark.parametrize("name", [b"run\xff", b"a\nb", b"$x^", b"_x", b"\x1b[31m"])
def test_folders_may_have_any_names(stopped, name):
    run = stopped / os.fsdecode(name)
    (stopped / "second").rename(run)
    (stopped / "none").mkdir()
    (stopped / "none").rename(stopped / os.fsdecode(b"none" + name))
    shown = {b"run\xff": r"run\udcff", b"a\nb": r"a\nb", b"\x1b[31m": r"\x1b[31m"}.get(
        name, name.decode("latin1")
    )
    page = stopped / "page.html"
    said = compare.run([str(run), str(stopped / os.fsdecode(b"none" + name))], page)
    assert f"\n{shown} " in said and f"none{shown} (" in said
    assert f">{shown}<" in page.read_text() and "<img" in page.read_text()
    assert said.encode() and "\x1b" not in said


def test_the_legend_has_every_name():
    line = report.Curve([(1, 0.5)], [(1, 2.0)])
    figure = curves.trainings({"_x": [line], "$y^": [line], r"\udcff": [line]})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _x", r" \$y^", r" \udcff"]
    figure.canvas.draw()


def test_names_tell_folders_apart(tmp_path):
    folders = [tmp_path / "a" / "float", tmp_path / "b" / "float", tmp_path / "b" / "w1a2"]
    assert list(compare._names(folders).values()) == ["a/float", "b/float", "b/w1a2"]
    assert list(compare._names(folders[1:]).values()) == ["float", "w1a2"]
    assert compare._names([tmp_path, tmp_path]) == {tmp_path: tmp_path.name}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no run folder among nowhere"),
        (["nowhere", "--out=page.pdf"], "ends in .html"),
        (["nowhere", "--out=no/page.html"], "there is no folder no"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", *arguments])
    assert message in str(stopped.value.code) and not list(tmp_path.iterdir())


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["compare", str(folder / "float-0"), str(folder / "w1a2"), "--out=both.html"])
    said = capsys.readouterr().out
    assert "curves: both.html" in said and (tmp_path / "both.html").is_file() and "seeds" not in said


def test_the_train_command_takes_habits_and_says_what_broke(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = [
        *["--model_args.widths=[8,8,8]", "--data.name=digits", "--data.train_images=128", "--batch_size=64"],
        *["--epochs=1", "--threads=1"],
    ]
    cli.main(["train", "--run=run", "--keep_best=true", "--watch_every=0", "--look_every=1", *tiny])
    assert (tmp_path / "run" / "best" / "checkpoint" / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "losses.jsonl").read_text().splitlines()) == 2
    cli.main(["evaluate", "run/best", "--threads=1"])
    assert "test images right" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--run=broken", "--lr=1e30", "--optimizer=sgd", "--schedule=constant", *tiny])
    assert "foldbit: the loss is" in str(stopped.value.code) and "lower learning rate" in str(
        stopped.value.code
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and os.environ.get("RANK") is None


def test_a_teacher_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = ["--data.name=digits", "--data.train_images=128", "--batch_size=64", "--epochs=1", "--threads=1"]
    distill = [f"--distill.teacher={folder / 'float-0'}", "--distill.temperature=5", "--distill.correct=true"]
    cli.main(["train", "--run=run", "--model_args.widths=[8,8,8]", *tiny, *distill])
    recipe = recipes.load(tmp_path / "run" / "config.yaml")
    assert recipe.distill == Distillation(str(folder / "float-0"), temperature=5.0, correct=True)
    assert "done: test accuracy" in capsys.readouterr().out
