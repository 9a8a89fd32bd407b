"""Run folders: whose they are, and what is had from them."""

import dataclasses
import shutil

import pytest
import torch

from foldbit import models
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
