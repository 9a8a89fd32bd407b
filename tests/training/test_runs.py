"""Run folders: whose they are, and what is had from them."""

import dataclasses
import errno
import os
import shutil
import signal
import sys
import time

import pytest
import torch

from foldbit import QuantConfig, models
from foldbit.training import checkpoints, evaluate, loop, recipes, runs
from foldbit.training.recipes import DataConfig
from foldbit.training.runs import RunError


def test_folders_of_others_are_refused(float_run, tmp_path, tiny, digits):
    run, _ = float_run
    with pytest.raises(RunError, match="another recipe"):
        loop.train(dataclasses.replace(tiny, lr=1.0), run, images=digits)
    (tmp_path / "mine").write_text("not a run")
    with pytest.raises(RunError, match="holds no run"):
        loop.train(tiny, tmp_path, images=digits)
    assert (tmp_path / "mine").read_text() == "not a run"
    with pytest.raises(RunError, match=r"config\.yaml"):
        runs.load_run(tmp_path)
    with pytest.raises(RunError, match="there is no folder"):
        runs.load_run(tmp_path / "typo")


def test_a_folder_without_a_checkpoint_is_taken_over(tmp_path, tiny, digits):
    recipes.save(dataclasses.replace(tiny, init="typo", lr=7.0), tmp_path / "config.yaml")
    recipe = dataclasses.replace(tiny, epochs=1)
    assert loop.train(recipe, tmp_path, images=digits).finished
    assert recipes.load(tmp_path / "config.yaml").lr == tiny.lr
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")  # one there is, though it lies aside
    with pytest.raises(RunError, match="another recipe"):
        loop.train(tiny, tmp_path, images=digits)


def test_a_config_of_something_else_is_not_overwritten(tmp_path, tiny, digits):
    (tmp_path / "config.yaml").write_text("my: thesis\n")
    with pytest.raises(ValueError, match="not a recipe"):
        loop.train(tiny, tmp_path, images=digits)
    assert (tmp_path / "config.yaml").read_text() == "my: thesis\n"


def test_a_refusal_names_what_differs(float_run, tiny, quant, digits):
    other = dataclasses.replace(tiny, lr=1.0, quant=quant, data=DataConfig(name="digits", train_images=99))
    with pytest.raises(RunError) as caught:
        loop.train(other, float_run[0], images=digits)
    said = str(caught.value)
    assert "lr 0.01 -> 1.0" in said and "quant None -> W1A2" in said
    assert "data.train_images None -> 99" in said and "epochs" not in said
    changed = dataclasses.replace(quant, clamp=2.0)
    assert list(runs.differences(quant, changed, "quant")) == ["quant.clamp 3.0 -> 2.0"]


def test_weights_of_another_model_are_refused(float_run, tmp_path, tiny, digits):
    other = dataclasses.replace(tiny, model_args={"widths": [8, 8, 8]}, init=str(float_run[0]))
    with pytest.raises(RunError, match="do not fit"):
        loop.train(other, tmp_path / "run", images=digits)
    with pytest.raises(RunError, match="no checkpoint"):
        loop.train(dataclasses.replace(tiny, init=str(tmp_path)), tmp_path / "run2", images=digits)


def test_a_checkpoint_that_stands_aside_is_found_and_put_back(float_run, tmp_path, tiny, digits):
    """As after a kill between the two renames."""
    run = tmp_path / "run"
    shutil.copytree(float_run[0], run)
    (run / "checkpoint").rename(run / "checkpoint.old")
    (run / "checkpoint.new").mkdir()
    assert runs.load_run(run)
    assert loop.train(tiny, run, images=digits).steps == 0
    assert (run / "checkpoint").is_dir()
    assert not (run / "checkpoint.old").exists() and not (run / "checkpoint.new").exists()


def test_tied_weights_are_written_once_for_each_name(tmp_path):
    tied = torch.nn.Linear(4, 4)
    weights = {"a": tied.weight, "b": tied.weight.t(), "c": tied.bias.expand(3, 4)}
    checkpoints.write_weights(tmp_path / "w.safetensors", weights)
    (tmp_path / "w.safetensors").rename(tmp_path / checkpoints.WEIGHTS)
    read = checkpoints.read_weights(tmp_path)
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    with pytest.raises(TypeError, match="tensors only; this model's state has extra besides"):
        checkpoints.write_weights(tmp_path / "x", {"extra": 3})


def test_random_numbers_come_again():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(2).tolist()  # noqa: NPY002

    cpu = torch.device("cpu")
    state = checkpoints.random_numbers(cpu)
    first = draw()
    assert draw() != first
    checkpoints.restore_random_numbers(state, cpu)
    assert draw() == first


def test_predictions_count_every_image_once(digits):
    model = models.create("resnet8-xnor", widths=[8, 8, 8])
    guesses = evaluate.predictions(model, digits.test, (digits.mean, digits.std))
    assert guesses.shape == digits.test.labels.shape and guesses.dtype == torch.int64


@pytest.mark.parametrize(
    ("shape", "processes", "images"),
    [((1, 28, 28), 1, 1000), ((1, 28, 28), 3, 999), ((3, 224, 224), 1, 132), ((3, 9000, 9000), 4, 4)],
)
def test_evaluation_takes_as_many_as_fit(shape, processes, images):
    assert evaluate.batch_size(shape, processes) == images


def in_another_process(work, *arguments):
    """Do the work in a child, and stop it when it says that it is in the middle; the child, to be ended."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        work(lambda: (os.write(writes, b"."), time.sleep(600)), *arguments)
        os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"."
    os.close(reads)
    return child


def train_until_first_step(in_the_middle, recipe, run, images):
    loop._Training._step = lambda *_: in_the_middle()
    loop.train(recipe, run, images=images, threads=1)


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_second_training_in_one_folder_is_refused_until_the_first_is_killed(tmp_path, tiny, digits):
    """Before the first checkpoint too, when nothing else tells them apart."""
    run = tmp_path / "run"
    child = in_another_process(train_until_first_step, tiny, run, digits)
    try:
        before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
        for recipe in (tiny, dataclasses.replace(tiny, lr=0.5)):
            with pytest.raises(RunError, match=f"another training is going on in {run}; wait until it ends"):
                loop.train(recipe, run, images=digits, threads=1)
        assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert loop.train(tiny, run, images=digits, threads=1).finished
    assert loop.train(tiny, run, images=digits, threads=1).steps == 0


def claim_and_fork(in_the_middle, run, recipe):
    with runs.claimed(run, recipe, [], resuming=False):
        if os.fork() == 0:  # a process that reads images, and outlives a kill
            time.sleep(3)
            os._exit(0)
        in_the_middle()


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_children_that_outlive_a_kill_do_not_keep_the_folder(tmp_path, tiny):
    child = in_another_process(claim_and_fork, tmp_path, tiny)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with runs.claimed(tmp_path, tiny, [], resuming=False):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks there")
def test_a_folder_is_claimed_once_in_one_process_and_while_it_is_copied(tmp_path, tiny):
    def again():
        with runs.claimed(tmp_path / "run", tiny, [], resuming=False):
            pass

    with runs.claimed(tmp_path / "run", tiny, [], resuming=False):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        for _ in range(2):  # the first leaves the lock in place
            with pytest.raises(RunError, match="another training is going on"):
                again()
        child = os.fork()
        if child == 0:  # of another process, too
            try:
                again()
            except RunError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    again()


def test_a_folder_that_changed_between_look_and_lock_is_refused(tmp_path, tiny, digits, monkeypatch):
    shorter = dataclasses.replace(tiny, epochs=1)
    genuine = runs.start_from

    def slowly(model, init):  # meanwhile another process trains from beginning to end
        monkeypatch.setattr(runs, "start_from", genuine)
        loop.train(shorter, tmp_path / "run", images=digits, threads=1)
        return ()

    monkeypatch.setattr(runs, "start_from", slowly)
    with pytest.raises(RunError, match=r"another recipe: init None -> x|just now"):
        loop.train(dataclasses.replace(shorter, init="x"), tmp_path / "run", images=digits, threads=1)
    assert recipes.load(tmp_path / "run" / "config.yaml").init is None


def test_what_a_kill_leaves_of_a_start_can_be_used(tmp_path, tiny, digits):
    for left in ("lock", "config.yaml.new"):
        (tmp_path / left).touch()
    assert not runs.may_use(tmp_path, tiny)
    assert loop.train(dataclasses.replace(tiny, epochs=1), tmp_path, images=digits, threads=1).finished


def test_a_start_that_was_killed_is_known_again_whatever_its_numbers_and_fields(tmp_path, tiny):
    whole = QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=2)
    recipe = dataclasses.replace(tiny, lr=1, weight_decay=0, quant=whole, model_args={"widths": (8, 8)})
    recipes.save(recipe, tmp_path / "config.yaml")
    assert not runs.may_use(tmp_path, tiny)
    written = (tmp_path / "config.yaml").read_text()
    assert "lr: 1\n" in written and "clamp: 2\n" in written
    (tmp_path / "config.yaml").write_text(written.replace("seed: 0\n", ""))  # as before there was a seed
    assert not runs.may_use(tmp_path, tiny)


@pytest.mark.parametrize("changes", [{}, {"lr": 0.5}])
@pytest.mark.parametrize(
    "remark",
    [
        lambda dump: "# learned the hard way\n" + dump,
        lambda dump: dump + "# learned the hard way\n",
        lambda dump: dump.replace("lr: 0.01\n", "lr: 0.01  # the hard way\n"),
        lambda dump: dump.partition("\n")[2],
        lambda dump: "lr: 0.01\n",
    ],
)
def test_a_config_that_a_person_wrote_is_never_replaced(tmp_path, tiny, digits, changes, remark):
    written = remark(recipes.dump(tiny))
    assert written != recipes.dump(tiny)
    (tmp_path / "config.yaml").write_text(written)
    with pytest.raises(
        RunError, match=r"config\.yaml was not written by foldbit train.*pick another run folder"
    ):
        loop.train(dataclasses.replace(tiny, **changes), tmp_path, images=digits)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == written


def test_going_on_leaves_a_config_with_remarks_as_it_is(float_run, tmp_path, tiny, digits):
    shutil.copytree(float_run[0], tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text("# my best\n" + config.read_text())
    assert loop.train(tiny, tmp_path / "run", images=digits).steps == 0
    assert config.read_text().startswith("# my best\n")


def test_a_run_may_lie_under_a_name_of_any_bytes_but_not_begin_there(float_run, tmp_path, tiny, digits):
    run, new = tmp_path / os.fsdecode(b"run\xff"), tmp_path / os.fsdecode(b"new\xff")
    shutil.copytree(float_run[0], run)
    assert runs.load_run(run)
    for folder in (run, new):
        with pytest.raises(RunError, match=r"folder's name is Unicode, .*udcff'; pick another folder"):
            loop.train(tiny, folder, images=digits)
    assert not new.exists()
    with pytest.raises(
        ValueError, match=r"init goes into config\.yaml, which is Unicode; rename .*run.udcff"
    ):
        dataclasses.replace(tiny, init=str(run))


def test_a_full_disk_is_told_with_the_file_and_what_to_do(tmp_path, tiny, digits, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"disk is full: .*run.* could not be written; .*same command goes on"
        ):
            loop.train(tiny, tmp_path / "run", images=digits, threads=1)
    assert loop.train(tiny, tmp_path / "run", images=digits, threads=1).finished


def test_classes_may_have_any_names(tmp_path):
    names = ["caf\udce9", "größe", "b"]  # the first is no Unicode: a folder's name may be any bytes
    with runs.claimed(tmp_path / "run", recipes.Recipe(), names, resuming=False):
        pass
    runs.check_classes(tmp_path / "run", names)
    with pytest.raises(RunError):
        runs.check_classes(tmp_path / "run", names[::-1])
