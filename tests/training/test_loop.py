"""The loop learns, leaves what it promises, and refuses before it writes."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from foldbit import models
from foldbit.core import fused
from foldbit.training import checkpoints, loop, recipes, runs
from foldbit.training.loop import Habits
from foldbit.training.recipes import DataConfig
from foldbit.training.runs import RunError


def without_time(metrics):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics]


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def short(recipe, **changes):
    """Six steps."""
    few = dataclasses.replace(recipe.data, train_images=192)
    return dataclasses.replace(recipe, data=few, batch_size=64, **changes)


def test_it_learns_and_leaves_what_it_promises(float_run, tiny):
    run, outcome = float_run
    assert outcome.finished
    assert outcome.metrics[-1]["test_accuracy"] > 0.7
    for name, kept in (("metrics", outcome.metrics), ("losses", outcome.losses)):
        assert kept == [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    assert [record["step"] for record in outcome.losses] == [20, 22, 42, 44]  # and at an epoch's end
    assert recipes.load(run / "config.yaml") == recipes.fit(tiny, classes=10, channels=1)
    assert list((run / "tensorboard").iterdir())
    model, _ = runs.load_run(run)
    assert same(model, outcome.model) and not model.training


def test_a_finished_run_is_not_trained_again(float_run, tiny, digits):
    run, outcome = float_run
    again = loop.train(tiny, run, images=digits)
    assert again.finished and again.metrics == outcome.metrics and same(again.model, outcome.model)
    assert (outcome.steps, again.steps) == (44, 0)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == tiny.epochs


def test_a_second_interruption_acts_at_once(tmp_path, monkeypatch, tiny, digits):
    def cross_entropy(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was swallowed")

    monkeypatch.setattr(loop.F, "cross_entropy", cross_entropy)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny, tmp_path / "run", images=digits, threads=1)


def test_signals_are_as_before_afterwards(tmp_path, tiny, digits):
    loop.train(short(tiny, epochs=1), tmp_path / "run", images=digits)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_quantized_training_starts_from_float_weights(float_run, tmp_path, tiny, quant, digits):
    run, _ = float_run
    recipe = dataclasses.replace(tiny, quant=quant, init=str(run), epochs=1, lr=1e-6)
    outcome = loop.train(recipe, tmp_path / "quantized", images=digits)
    start = runs.load_run(run)[0].stages[0][0].conv1.weight
    assert torch.allclose(outcome.model.stages[0][0].conv1.weight, start, atol=1e-3)
    assert outcome.model.stages[0][0].conv1.input_quantizer.seen
    loaded, _ = runs.load_run(tmp_path / "quantized")
    assert loaded.stages[0][0].conv1.input_quantizer.seen  # static scales come back with the weights
    x = torch.randn(2, 1, 28, 28)
    assert torch.equal(loaded(x), outcome.model(x))


def test_training_starts_from_a_state_dict_in_a_file(float_run, tmp_path, tiny, digits):
    file = float_run[0] / "checkpoint" / checkpoints.WEIGHTS
    recipe = short(tiny, init=str(file), epochs=1, lr=1e-9)
    outcome = loop.train(recipe, tmp_path / "run", images=digits)
    start = runs.load_run(float_run[0])[0].classifier.weight
    assert torch.allclose(outcome.model.classifier.weight, start, atol=1e-6)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"init": "typo"}, "there is no folder typo"),
        ({"init": "typo.safetensors"}, "there is no file typo"),
        ({"model": "nope"}, "unknown model 'nope'"),
        ({"model_args": {"widths": [1]}}, "one width a stage"),
        ({"model_args": {"num_classes": 7}}, "num_classes is 7, and the images"),
        ({"data": DataConfig(name="fashion-mnist", folder="nowhere")}, "nowhere is not a folder"),
        ({"batch_size": 10**6}, "drop_last leaves nothing"),
    ],
)
def test_a_start_that_fails_leaves_nothing_behind(tmp_path, tiny, mistake, message):
    with pytest.raises(ValueError, match=message):
        loop.train(dataclasses.replace(tiny, **mistake), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("threads", [0, -1, 10**8])
def test_threads_out_of_range_are_refused_before_anything_is_made(tmp_path, tiny, digits, threads):
    with pytest.raises(ValueError, match=f"from 1 to 1024; got {threads}"):
        loop.train(tiny, tmp_path / "run", images=digits, threads=threads)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("habits", "message"),
    [
        ({"look_every": 0}, "look_every is a number of steps, at least 1; got 0"),
        ({"watch_every": -1}, "or 0 for never; got -1"),
        ({"checkpoint_minutes": -0.5}, "checkpoint_minutes is at least 0; got -0.5"),
    ],
)
def test_habits_in_range(habits, message):
    with pytest.raises(ValueError, match=message):
        Habits(**habits)


def test_threads_are_those_asked_for_and_are_recorded(tmp_path, tiny, digits, capsys):
    before = torch.get_num_threads()
    outcome = loop.train(short(tiny, epochs=1), tmp_path / "a", images=digits, threads=2)
    assert [record["threads"] for record in outcome.metrics] == [2]
    assert "on 2 threads: as asked" in capsys.readouterr().out
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="from 1 to 1024; got 0"):
        loop.train(tiny, tmp_path / "b", images=digits, threads=0)


def test_choosing_threads_changes_nothing_in_training(tmp_path, monkeypatch, tiny, digits):
    recipe = short(tiny, epochs=1)
    asked = loop.train(recipe, tmp_path / "a", images=digits, threads=1)
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(loop.timing, "sensible_threads", lambda step: step() or step() or 1)
        chosen = loop.train(recipe, tmp_path / "b", images=digits)
    finally:
        torch.set_num_threads(1)
    assert same(asked.model, chosen.model)


def test_half_precision_learns(tmp_path, tiny, quant, digits, monkeypatch):
    """Convolutions compute in bfloat16, parameters stay float32, and what is learnt is as good."""
    seen = set()
    genuine = nn.Conv2d._conv_forward

    def spy(self, x, weight, bias):
        out = genuine(self, x, weight, bias)
        seen.add((out.dtype, torch.is_grad_enabled()))
        return out

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", spy)
    losses = {}
    few = dataclasses.replace(tiny.data, train_images=384)
    for precision in ("no", "bf16"):
        seen.clear()
        recipe = dataclasses.replace(tiny, data=few, quant=quant, precision=precision, epochs=3)
        outcome = loop.train(recipe, tmp_path / precision, images=digits, threads=1)
        losses[precision] = [record["train_loss"] for record in outcome.metrics]
        half = torch.bfloat16 if precision == "bf16" else torch.float32
        assert seen == {
            (half, True),
            (torch.float32, False),
        }  # evaluation is what others will see: in float32
        assert {t.dtype for t in outcome.model.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.1)
    assert losses["bf16"][-1] < 0.8 * losses["bf16"][0]


def test_the_best_epoch_is_kept_as_a_run_of_its_own(tmp_path, monkeypatch, tiny, digits):
    accuracies = iter([0.3, 0.6, 0.5])
    seen = []

    def accuracy(model, *_):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr(loop.evaluate, "accuracy", accuracy)
    run = tmp_path / "run"
    outcome = loop.train(short(tiny, epochs=3), run, images=digits, habits=Habits(keep_best=True))
    best, recipe = runs.load_run(run / "best")
    assert recipe == runs.recipe_of(run)
    assert all(torch.equal(best.state_dict()[k], v) for k, v in seen[1].items())
    assert not same(best, outcome.model) and same(runs.load_run(run)[0], outcome.model)
    with pytest.raises(RunError, match="holds weights alone"):
        loop.train(short(tiny, epochs=3), run / "best", images=digits)


def test_no_best_unless_asked_for(float_run):
    assert not (float_run[0] / "best").exists()


def test_checkpoints_within_an_epoch(tmp_path, monkeypatch, tiny, digits):
    written = []
    genuine = loop.State.save

    def save(self, run):
        written.append((self.progress.epoch, self.progress.step))
        genuine(self, run)

    monkeypatch.setattr(loop.State, "save", save)
    habits = Habits(checkpoint_minutes=0, look_every=2)
    loop.train(short(tiny), tmp_path / "run", images=digits, habits=habits)
    assert written == [(0, 2), (1, 0), (1, 2), (2, 0)]


#: What makes Python wait for a device, for it asks for values, or makes a tensor whose size depends on them.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2")


class Waits(TorchDispatchMode):
    """Counts operators that make Python wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += function.name().removeprefix("aten::").split(".")[0] in WAITING
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("teacher", [False, True])
def test_a_step_waits_for_nothing(tmp_path, monkeypatch, float_run, tiny, quant, digits, teacher):
    """As on a GPU: quantizers keep to torch's operators, and looking at the loss is left to the looks."""
    monkeypatch.setattr(fused, "runs", lambda x: False)
    waits = []
    genuine = loop._Training._step

    def step(self, x, labels, looks):
        with Waits() as mode:
            genuine(self, x, labels, looks)
        waits.append((looks, mode.count))

    monkeypatch.setattr(loop._Training, "_step", step)
    monkeypatch.setattr(loop._Training, "_must_check", lambda self, looks: looks)
    distill = recipes.Distillation(str(float_run[0]), correct=True) if teacher else None
    # SGD, for Adam counts its steps in tensors on the CPU, which this would take for others.
    recipe = short(tiny, quant=quant, epochs=1, optimizer="sgd", distill=distill)
    loop.train(recipe, tmp_path / "run", images=digits, threads=1, habits=Habits(look_every=2, watch_every=0))
    assert [looks for looks, _ in waits] == [False, True, True]
    assert waits[0][1] == 0 and waits[1][1] > 0


def test_models_of_the_users_own(tmp_path, tiny, digits):
    models.register("flat")(lambda num_classes=10: nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes)))
    outcome = loop.train(short(tiny, model="flat", model_args={}), tmp_path / "run", images=digits)
    assert outcome.finished and same(runs.load_run(tmp_path / "run")[0], outcome.model)
