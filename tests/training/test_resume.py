"""A training that is stopped, at any step or by kill -9, goes on as if it had not been."""

import dataclasses
import os
import shutil
import signal
import sys
import traceback

import pytest
import torch
from torch import nn

from foldbit import QuantConfig, models
from foldbit.training import checkpoints, loop, recipes, runs
from foldbit.training.loop import Habits
from foldbit.training.recipes import DataConfig, Distillation
from foldbit.training.runs import RunError

# Not registered as a test's model for nothing: dropout draws random numbers at every step.
models.register("dropping")(
    lambda num_classes=10: nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=3),
        nn.BatchNorm2d(8),
        nn.Dropout(0.3),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, momentum=None),
        nn.Flatten(),
        nn.Linear(288, num_classes),
    )
)


def six_steps(tiny, **changes):
    data = DataConfig(name="digits", train_images=192, augment=changes.pop("augment", "none"))
    return dataclasses.replace(tiny, data=data, epochs=2, **changes)


@pytest.fixture
def cases(tiny, quant, float_run):
    teacher = Distillation(str(float_run[0]), temperature=4.0, weight=0.7, correct=True)
    dynamic = QuantConfig("ls-1", "ls-2", clamp=2.0)
    return {
        "static scales, a teacher, augmentation": six_steps(
            tiny, quant=quant, distill=teacher, augment="crop-flip"
        ),
        "dynamic scales, in steps": six_steps(
            tiny, quant=dynamic, schedule="steps", milestones=[1], optimizer="sgd", weight_decay=1e-3
        ),
        "dropout": six_steps(tiny, model="dropping", model_args={}, optimizer="adadelta", lr=1.0),
        "half precision": six_steps(tiny, quant=quant, schedule="linear", precision="bf16"),
    }


def interrupt_after(monkeypatch, steps):
    """Ctrl-C in the middle of so manieth a step."""
    calls = iter(range(1, 10**6))
    genuine = loop._Training._step

    def step(*arguments):
        if next(calls) == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return genuine(*arguments)

    monkeypatch.setattr(loop._Training, "_step", step)


def what_matters(run, outcome):
    """Everything that a training leaves, but how long it took."""
    path = checkpoints.newest(run)
    training = checkpoints.read_training(path)
    del training["progress"]["seconds"]
    metrics = [{k: v for k, v in record.items() if k != "seconds"} for record in outcome.metrics]
    return [checkpoints.read_weights(path), training, metrics, outcome.losses]


def check_same(a, b, where=""):
    """To the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            check_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            check_same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    "name",
    [
        "static scales, a teacher, augmentation",
        "dynamic scales, in steps",
        "dropout",
        "half precision",
    ],
)
def test_stopped_after_every_step_is_as_never_stopped(tmp_path, monkeypatch, digits, cases, name):
    recipe = cases[name]
    whole = loop.train(recipe, tmp_path / "whole", images=digits, threads=1)
    assert whole.steps == 6
    for _ in range(6):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 1)
            part = loop.train(recipe, tmp_path / "parts", images=digits, threads=1)
        assert not part.finished and part.steps == 1
        assert runs.load_run(tmp_path / "parts")[0]  # the checkpoint can be used
    last = loop.train(recipe, tmp_path / "parts", images=digits, threads=1)
    assert last.finished and last.steps == 0 and [record["step"] for record in last.losses] == [3, 6]
    check_same(what_matters(tmp_path / "parts", last), what_matters(tmp_path / "whole", whole))


@pytest.mark.parametrize("step", [4, 10, 16])  # at a look, in the second epoch of 8 steps, at the very last
def test_stopped_once(tmp_path, monkeypatch, tiny, quant, digits, step):
    data, habits = DataConfig(name="digits", train_images=256), Habits(look_every=4)
    recipe = dataclasses.replace(tiny, quant=quant, data=data, batch_size=32)
    whole = loop.train(recipe, tmp_path / "whole", images=digits, threads=1, habits=habits)
    with monkeypatch.context() as patch:
        interrupt_after(patch, step)
        first = loop.train(recipe, tmp_path / "parts", images=digits, threads=1, habits=habits)
    assert not first.finished and first.steps == step
    second = loop.train(recipe, tmp_path / "parts", images=digits, threads=1, habits=habits)
    assert second.finished and second.steps == 16 - step
    assert [record["step"] for record in second.losses] == [4, 8, 12, 16]
    check_same(what_matters(tmp_path / "parts", second), what_matters(tmp_path / "whole", whole))


def test_what_looks_and_measures_changes_nothing(tmp_path, tiny, quant, digits):
    """Neither the hooks on the layers, nor how often the loss is looked at, nor more checkpoints."""
    recipe = six_steps(tiny, quant=quant)
    plain = loop.train(recipe, tmp_path / "a", images=digits, habits=Habits(watch_every=0), threads=1)
    habits = Habits(watch_every=1, look_every=1, checkpoint_minutes=0, keep_best=True)
    watched = loop.train(recipe, tmp_path / "b", images=digits, habits=habits, threads=1)
    a, b = what_matters(tmp_path / "a", plain), what_matters(tmp_path / "b", watched)
    check_same(a[0], b[0])
    check_same(a[1]["optimizer"], b[1]["optimizer"])
    assert [m["test_accuracy"] for m in a[2]] == [m["test_accuracy"] for m in b[2]]


EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def killed_at(event, folder, work):
    """Do the work in another process, killed just before so manieth a change to the folder's files.

    Returns:
        Whether it came to that.
    """
    child = os.fork()
    if child == 0:
        count = iter(range(10**6))

        def hook(name, arguments):
            path = str(arguments[0]) if arguments else ""
            changes = name in EVENTS and str(folder) in path and "tensorboard" not in path
            if changes and not (name == "open" and arguments[1] == "r") and next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the work failed"
    return status == signal.SIGKILL


def test_a_kill_while_a_checkpoint_is_written_loses_nothing_older(tmp_path):
    def state(value):
        return {"w": torch.full((1000,), float(value))}, {"n": value, "t": torch.full((1000,), value)}

    seen = []
    checkpoints.write(tmp_path, *state(0))
    for event in range(100):
        if not killed_at(event, tmp_path, lambda: checkpoints.write(tmp_path, *state(1))):
            break
        path = checkpoints.newest(tmp_path)
        n = checkpoints.read_training(path)["n"]
        seen.append(n)
        check_same((checkpoints.read_weights(path), checkpoints.read_training(path)), state(n))
        checkpoints.settle(tmp_path)
        assert [child.name for child in tmp_path.iterdir()] == ["checkpoint"]
        check_same((checkpoints.read_weights(path.parent / "checkpoint")), state(n)[0])
        checkpoints.write(tmp_path, *state(0))
    assert len(seen) > 10 and seen == sorted(seen) and {*seen} == {0, 1}


def test_a_killed_training_goes_on_from_the_checkpoint_before(tmp_path, tiny, quant, digits):
    """Killed again and again: at its first file, in its records, in its checkpoints, between them."""
    recipe, habits = six_steps(tiny, quant=quant), Habits(checkpoint_minutes=0, look_every=2)
    whole = loop.train(recipe, tmp_path / "whole", images=digits, threads=1, habits=habits)
    run = tmp_path / "killed"
    stood_at = []
    for event in (0, 5, 12, 17, 22, 27, 32):
        assert killed_at(event, run, lambda: loop.train(recipe, run, images=digits, threads=1, habits=habits))
        path = checkpoints.newest(run)
        progress = checkpoints.read_training(path)["progress"] if path else {"epoch": 0, "step": 0}
        stood_at.append((progress["epoch"], progress["step"]))
    assert stood_at == sorted(stood_at) and {(0, 0), (0, 2), (1, 0)} <= {*stood_at}
    last = loop.train(recipe, run, images=digits, threads=1, habits=habits)
    assert last.finished and [record["epoch"] for record in last.metrics] == [1, 2]
    check_same(what_matters(run, last), what_matters(tmp_path / "whole", whole))


def test_a_resumed_run_needs_its_init_no_more(float_run, tmp_path, monkeypatch, tiny, digits):
    start = tmp_path / "start"
    shutil.copytree(float_run[0], start)
    recipe = six_steps(tiny, init=str(start))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert not loop.train(recipe, tmp_path / "run", images=digits).finished
    shutil.rmtree(start)
    assert loop.train(recipe, tmp_path / "run", images=digits).finished


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoints_are_refused_in_a_sentence(float_run, tmp_path, tiny, digits):
    for damaged in (checkpoints.WEIGHTS, checkpoints.TRAINING):
        run = tmp_path / damaged
        shutil.copytree(float_run[0], run)
        cut(run / "checkpoint" / damaged)
        with pytest.raises(RunError, match=r"the checkpoint .* is damaged \(.*delete it"):
            loop.train(tiny, run, images=digits)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged .*train that run again"):
        runs.load_run(tmp_path / checkpoints.WEIGHTS)
    with pytest.raises(RunError, match="is damaged"):
        init = str(tmp_path / checkpoints.WEIGHTS)
        loop.train(dataclasses.replace(tiny, init=init), tmp_path / "x", images=digits)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_a_checkpoint_of_somebody_else_runs_no_code(float_run, tmp_path, monkeypatch, tiny, digits):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(float_run[0], "run")
    torch.save({"progress": Bomb()}, tmp_path / "run" / "checkpoint" / checkpoints.TRAINING)
    with pytest.raises(RunError, match="is damaged"):
        loop.train(tiny, "run", images=digits)
    torch.save([1, 2], tmp_path / "run" / "checkpoint" / checkpoints.TRAINING)
    with pytest.raises(RunError, match="holds a list, not the state of a training"):
        loop.train(tiny, "run", images=digits)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_optimizer_is_damage(float_run, tmp_path, tiny, digits):
    """The recipe says what the checkpoint holds; here somebody has changed it."""
    shutil.copytree(float_run[0], tmp_path / "run")
    changed = dataclasses.replace(recipes.load(tmp_path / "run" / "config.yaml"), schedule="constant")
    recipes.save(changed, tmp_path / "run" / "config.yaml")
    path = tmp_path / "run" / "checkpoint"
    training = checkpoints.read_training(path)
    training["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(training, path / checkpoints.TRAINING)
    with pytest.raises(RunError, match="is damaged"):
        loop.train(changed, tmp_path / "run", images=digits)
