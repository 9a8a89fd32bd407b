"""The benchmark of accuracies: its commands are valid, it trains, goes on, and reports what it found."""

import dataclasses
import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from foldbit.training import recipes

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def accuracy():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("accuracy")
    sys.path.remove(str(FOLDER))


def test_every_command_is_a_recipe_and_no_folder_is_used_twice(accuracy, tmp_path):
    folders = set()
    for setting in accuracy.SETTINGS:
        weight, activation = setting.schemes
        options = setting.arguments(tmp_path, 1)
        path = recipes.path_of(setting.recipe)
        recipe = recipes.load(path, overrides=options, weight=weight, activation=activation)
        assert recipe.seed == 1
        assert (recipe.quant is None) == (setting.schemes == accuracy.FLOAT)
        sources = [source for source in (recipe.init, recipe.distill and recipe.distill.teacher) if source]
        taken = {str(source.folder(tmp_path, 1)) for source in accuracy.SOURCES}
        assert set(sources) <= taken, "starts from or learns from something that nothing trains"
        command = shlex.split(setting.command(tmp_path, 1))
        assert command[:2] == ["foldbit", "train"] and all(option in command for option in options)
        folders.add(setting.folder(tmp_path, 1))
    assert len(folders) == len(accuracy.SETTINGS)


def test_a_setting_trains_and_is_found_finished(accuracy, tmp_path, monkeypatch):
    options = ("--data.name=digits", "--data.train_images=128", "--model_args.widths=[4,4,4]", "--epochs=1")
    start = accuracy.Setting("resnet8", "float2", "fashion-mnist/resnet8-float", options)
    monkeypatch.setattr(accuracy, "SOURCES", (start,))
    taught = ("--init={resnet8/float2}", "--distill.teacher={resnet8/float2}")
    after = accuracy.Setting(
        "resnet8", "ls-1 ls-2", "fashion-mnist/resnet8", (*options, *taught), ("ls-1", "ls-2")
    )
    monkeypatch.setattr(accuracy, "SETTINGS", (start, after))
    for setting in (start, after):
        assert not accuracy.finished(setting, tmp_path, 0)
        accuracy.train(setting, tmp_path, 0)
        assert accuracy.finished(setting, tmp_path, 0)
    assert accuracy.results(tmp_path) == {}, "results are those of all seeds"


def test_the_report_has_means_spreads_and_paired_differences(accuracy, tmp_path):
    def result(group, name, *accuracies):
        return accuracy.Result(accuracy.Setting(group, name, "fashion-mnist/resnet8"), accuracies, (1.0,) * 3)

    found = {
        "resnet8/float": result("resnet8", "float", 90.0, 91.0, 92.0),
        "resnet8/ls-1 ls-2": result("resnet8", "ls-1 ls-2", 80.0, 81.0, 82.0),
        "resnet8/ls-1 ls-2-taught": result("resnet8", "ls-1 ls-2-taught", 81.0, 82.0, 83.5),
        "settings/dynamic scales": result("settings", "dynamic scales", 79.0, 80.5, 82.0),
    }
    text = accuracy.tables(found)
    assert "91.00 ± 1.00" in text and "81.00 ± 1.00" in text
    assert "+1.17 ± 0.29" in text, "taught against labels alone, seed by seed"
    assert "-0.50 ± 0.50" in text, "another setting against the one above"
    for kept in found.values():
        for seed in accuracy.SEEDS:
            folder = kept.setting.folder(tmp_path, seed)
            folder.mkdir(parents=True)
            points = [{"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.5}]
            (folder / "losses.jsonl").write_text("\n".join(map(json.dumps, points)))
    accuracy.draw(tmp_path, found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_that_was_stopped_is_not_finished(accuracy, tmp_path):
    setting = accuracy.SOURCES[0]
    folder = setting.folder(tmp_path, 0)
    folder.mkdir(parents=True)
    recipes.save(dataclasses.replace(recipes.Recipe(), epochs=2), folder / "config.yaml")
    record = {"epoch": 1, "test_accuracy": 0.5, "seconds": 1.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert not accuracy.finished(setting, tmp_path, 0)
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record) + "\n")
    assert accuracy.finished(setting, tmp_path, 0)
