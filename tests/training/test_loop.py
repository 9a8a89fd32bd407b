"""The loop learns, stops at any step, goes on as if nothing had happened, and refuses what does not fit."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from foldbit import QuantConfig, models
from foldbit.training import data, loop, recipes
from foldbit.training.recipes import DataConfig, Recipe

TINY = Recipe(
    model_args={"widths": [8, 8, 16]}, data=DataConfig(name="digits"), epochs=2, batch_size=64, lr=1e-2
)
QUANT = QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0)


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def float_run(tmp_path_factory, digits):
    run = tmp_path_factory.mktemp("runs") / "float"
    return run, loop.train(TINY, run, images=digits)


def interrupt_after(steps, monkeypatch):
    """Ctrl-C in the middle of a training step."""
    calls = iter(range(1, 10**6))
    genuine = loop.F.cross_entropy

    def cross_entropy(*arguments):
        if next(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(*arguments)

    monkeypatch.setattr(loop.F, "cross_entropy", cross_entropy)


def without_time(metrics):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics]


def test_it_learns_and_leaves_what_it_promises(float_run):
    run, outcome = float_run
    assert outcome.finished
    assert outcome.metrics[-1]["test_accuracy"] > 0.7
    assert without_time(outcome.metrics) == without_time(
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    )
    assert recipes.load(run / "config.yaml") == TINY
    assert list((run / "tensorboard").iterdir())
    model, recipe = loop.load_run(run)
    assert recipe == TINY
    for key, value in outcome.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_finished_run_is_not_trained_again(float_run, digits):
    run, outcome = float_run
    again = loop.train(TINY, run, images=digits)
    assert again.finished and without_time(again.metrics) == without_time(outcome.metrics)
    assert (outcome.steps, again.steps) == (44, 0)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == TINY.epochs


@pytest.mark.parametrize("quant", [None, QUANT])
@pytest.mark.parametrize("step", [5, 30])  # in the first epoch of 22 steps, and in the second
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, digits, quant, step):
    recipe = dataclasses.replace(TINY, quant=quant)
    whole = loop.train(recipe, tmp_path / "whole", images=digits)
    with monkeypatch.context() as patch:
        interrupt_after(step, patch)
        first = loop.train(recipe, tmp_path / "halves", images=digits)
    assert not first.finished
    assert loop.load_run(tmp_path / "halves")[0]  # the checkpoint can be used
    second = loop.train(recipe, tmp_path / "halves", images=digits)
    assert second.finished and first.steps + second.steps == whole.steps == 44
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key
    for a, b in zip(without_time(whole.metrics), without_time(second.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    for a, b in zip(whole.losses, second.losses, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    assert [loss["step"] for loss in whole.losses] == [
        20,
        22,
        42,
        44,
    ]  # every 20 steps, and at an epoch's end


def test_a_second_interruption_acts_at_once(tmp_path, monkeypatch, digits):
    def cross_entropy(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was swallowed")

    monkeypatch.setattr(loop.F, "cross_entropy", cross_entropy)
    with pytest.raises(KeyboardInterrupt):
        loop.train(TINY, tmp_path / "run", images=digits)


def test_signals_are_as_before_afterwards(float_run, digits):
    loop.train(TINY, float_run[0], images=digits)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_records_after_the_checkpoint_are_dropped(float_run, tmp_path, digits):
    run, _ = float_run
    records = (run / "metrics.jsonl").read_text()
    kept = loop._records_until(run / "metrics.jsonl", "epoch", 1)
    assert [record["epoch"] for record in kept] == [1]
    (run / "metrics.jsonl").write_text(records)


def test_a_kill_while_checkpoints_change_places_loses_none(float_run, digits):
    run, outcome = float_run
    (run / "checkpoint").rename(run / "checkpoint.old")
    again = loop.train(TINY, run, images=digits)
    assert again.finished and without_time(again.metrics) == without_time(outcome.metrics)


def test_quantized_training_starts_from_float_weights(float_run, tmp_path, digits):
    run, _ = float_run
    recipe = dataclasses.replace(TINY, quant=QUANT, init=str(run), epochs=1, lr=1e-6)
    outcome = loop.train(recipe, tmp_path / "quantized", images=digits)
    start = loop.load_run(run)[0].stages[0][0].conv1.weight
    assert torch.allclose(outcome.model.stages[0][0].conv1.weight, start, atol=1e-3)
    assert outcome.model.stages[0][0].conv1.input_quantizer.seen
    loaded, _ = loop.load_run(tmp_path / "quantized")
    assert loaded.stages[0][0].conv1.input_quantizer.seen  # static scales come back with the weights
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(x), outcome.model(x))


def test_folders_of_others_are_refused(float_run, tmp_path, digits):
    run, _ = float_run
    with pytest.raises(loop.RunError, match="another recipe"):
        loop.train(dataclasses.replace(TINY, lr=1.0), run, images=digits)
    (tmp_path / "mine").write_text("not a run")
    with pytest.raises(loop.RunError, match="holds no run"):
        loop.train(TINY, tmp_path, images=digits)
    assert (tmp_path / "mine").read_text() == "not a run"
    with pytest.raises(loop.RunError, match=r"config\.yaml"):
        loop.load_run(tmp_path)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"init": "typo"}, "there is no folder typo"),
        ({"model": "nope"}, "unknown model 'nope'"),
        ({"model_args": {"widths": [1]}}, "one width a stage"),
        ({"data": DataConfig(name="fashion-mnist", folder="nowhere")}, "nowhere is not a folder"),
        ({"batch_size": 10**6}, "drop_last leaves nothing"),
    ],
)
def test_a_start_that_fails_leaves_nothing_behind(tmp_path, mistake, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(TINY, **mistake), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_a_checkpoint_is_taken_over(tmp_path, digits):
    recipes.save(dataclasses.replace(TINY, init="typo", lr=7.0), tmp_path / "config.yaml")
    recipe = dataclasses.replace(TINY, epochs=1)
    assert loop.train(recipe, tmp_path, images=digits).finished
    assert recipes.load(tmp_path / "config.yaml") == recipe
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # one there is, though it lies aside
    with pytest.raises(loop.RunError, match="another recipe"):
        loop.train(TINY, tmp_path, images=digits)


def test_a_config_of_something_else_is_not_overwritten(tmp_path, digits):
    (tmp_path / "config.yaml").write_text("my: thesis\n")
    with pytest.raises(ValueError, match="not a recipe"):
        loop.train(TINY, tmp_path, images=digits)
    assert (tmp_path / "config.yaml").read_text() == "my: thesis\n"


def test_a_refusal_names_what_differs(float_run, digits):
    other = dataclasses.replace(TINY, lr=1.0, quant=QUANT, data=DataConfig(name="digits", train_images=99))
    with pytest.raises(loop.RunError) as caught:
        loop.train(other, float_run[0], images=digits)
    said = str(caught.value)
    assert "lr 0.01 -> 1.0" in said and "quant None -> W1A2" in said
    assert "data.train_images None -> 99" in said and "epochs" not in said
    changed = dataclasses.replace(QUANT, clamp=2.0)
    assert list(loop._differences(QUANT, changed, "quant")) == ["quant.clamp 3.0 -> 2.0"]


def test_a_resumed_run_needs_its_init_no_more(float_run, tmp_path, monkeypatch, digits):
    start = tmp_path / "start"
    shutil.copytree(float_run[0], start)
    recipe = dataclasses.replace(TINY, init=str(start))
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert not loop.train(recipe, tmp_path / "run", images=digits).finished
    shutil.rmtree(start)
    assert loop.train(recipe, tmp_path / "run", images=digits).finished


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoints_are_refused_in_a_sentence(float_run, tmp_path, digits):
    for damaged in ("model.safetensors", "optimizer.bin"):
        run = tmp_path / damaged
        shutil.copytree(float_run[0], run)
        cut(run / "checkpoint" / damaged)
        with pytest.raises(loop.RunError, match=r"checkpoint is damaged \(.*delete it"):
            loop.train(TINY, run, images=digits)
    with pytest.raises(loop.RunError, match=r"model\.safetensors is damaged"):
        loop.load_run(tmp_path / "model.safetensors")
    with pytest.raises(loop.RunError, match="is damaged"):
        loop.train(
            dataclasses.replace(TINY, init=str(tmp_path / "model.safetensors")), tmp_path / "x", images=digits
        )


def test_threads_are_those_asked_for_and_are_recorded(tmp_path, digits, capsys):
    before = torch.get_num_threads()
    short = dataclasses.replace(TINY, epochs=1, data=DataConfig(name="digits", train_images=64))
    outcome = loop.train(short, tmp_path / "a", images=digits, threads=2)
    assert [record["threads"] for record in outcome.metrics] == [2]
    assert "on 2 threads: as asked" in capsys.readouterr().out
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least 1; got 0"):
        loop.train(TINY, tmp_path / "b", images=digits, threads=0)


def test_choosing_threads_changes_nothing_in_training(tmp_path, monkeypatch, digits):
    asked = loop.train(dataclasses.replace(TINY, epochs=1), tmp_path / "a", images=digits, threads=1)
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(loop.timing, "sensible_threads", lambda step: step() or step() or 1)
        chosen = loop.train(dataclasses.replace(TINY, epochs=1), tmp_path / "b", images=digits)
    finally:
        torch.set_num_threads(1)
    for key, value in asked.model.state_dict().items():
        assert torch.equal(chosen.model.state_dict()[key], value), key


def test_weights_of_another_model_are_refused(float_run, tmp_path, digits):
    other = dataclasses.replace(TINY, model_args={"widths": [8, 8, 8]}, init=str(float_run[0]))
    with pytest.raises(loop.RunError, match="do not fit"):
        loop.train(other, tmp_path / "run", images=digits)
    with pytest.raises(loop.RunError, match="no checkpoint"):
        loop.train(dataclasses.replace(TINY, init=str(tmp_path)), tmp_path / "run2", images=digits)


def test_a_loss_that_is_not_finite_stops(tmp_path, monkeypatch, digits):
    monkeypatch.setattr(loop.F, "cross_entropy", lambda logits, labels: logits.sum() * torch.nan)
    with pytest.raises(FloatingPointError, match="epoch 1, by step 20"):
        loop.train(TINY, tmp_path / "run", images=digits)


@pytest.mark.parametrize("schedule", ["one-cycle", "linear", "constant"])
def test_schedules_take_a_step_a_batch(schedule):
    recipe = dataclasses.replace(TINY, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.lr)
    steps = loop._schedule(recipe, optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        steps.step()
    assert max(rates) == pytest.approx(recipe.lr, rel=0.05)  # ten steps may straddle the peak
    assert steps.get_last_lr()[0] == pytest.approx(
        {"one-cycle": 4e-8, "linear": 1e-5, "constant": 1e-2}[schedule]
    )


def test_predictions_count_every_image_once(digits):
    model = models.create("resnet8-xnor", widths=[8, 8, 8])
    guesses = loop.predictions(model, digits.test, (digits.mean, digits.std))
    assert guesses.shape == digits.test.labels.shape and guesses.dtype == torch.int64


class TestRecipes:
    def test_later_files_and_options_win(self, tmp_path):
        (tmp_path / "a.yaml").write_text("epochs: 5\nlr: 0.5\n")
        (tmp_path / "b.yaml").write_text("lr: 0.25\nquant: {weight: gf-3}\n")
        recipe = recipes.load(tmp_path / "a.yaml", tmp_path / "b.yaml", overrides=["--data.name=digits"])
        assert recipe == Recipe(
            epochs=5, lr=0.25, quant=QuantConfig(weight="gf-3"), data=DataConfig(name="digits")
        )

    def test_round_trip(self, tmp_path):
        recipe = dataclasses.replace(TINY, quant=QUANT, init="runs/x")
        recipes.save(recipe, tmp_path / "r.yaml")
        assert recipes.load(tmp_path / "r.yaml") == recipe

    @pytest.mark.parametrize(
        "text",
        ["epoch: 3", "epochs: many", "quant: {weight: ls-9}", "- 1", "epochs: -1", "data: {name: cifar}"],
    )
    def test_what_does_not_fit_is_said(self, tmp_path, text):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError):
            recipes.load(tmp_path / "bad.yaml")

    @pytest.mark.parametrize("name", recipes.names())
    def test_packaged_recipes_build(self, name):
        recipe = recipes.load(recipes.path_of(name))
        model = recipes.build(recipe)
        assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)

    def test_unknown_names_list_the_known(self):
        with pytest.raises(ValueError, match="fashion-mnist-w1a2"):
            recipes.path_of("nope")
