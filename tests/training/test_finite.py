"""A loss that is not finite stops the training, and the message names step, layer and what to try."""

import dataclasses

import pytest
import torch
from torch import nn

from foldbit import models, quantize_
from foldbit.training import checkpoints, finite, loop
from foldbit.training.loop import Habits
from foldbit.training.recipes import DataConfig


class Breaks(nn.Module):
    """Makes one value NaN in its so manieth forward pass in training mode, and in the passes after it."""

    def __init__(self, at=1):
        super().__init__()
        self.left = at

    def forward(self, x):
        self.left -= self.training
        if self.left > 0 or not self.training:
            return x
        return x + torch.nan * (torch.arange(x.numel()).reshape(x.shape) == 5)


@pytest.fixture
def six_steps(tiny):
    return dataclasses.replace(tiny, data=DataConfig(name="digits", train_images=192))


def build_with(breaking, monkeypatch):
    genuine = loop.recipes.build

    def build(recipe):
        model = genuine(recipe)
        breaking(model)
        return model

    monkeypatch.setattr(loop.recipes, "build", build)


def test_the_step_and_the_layer_are_named(tmp_path, monkeypatch, six_steps, quant, digits):
    def breaking(model):
        model.stages[1][0].act1 = Breaks(at=6)  # one pass of these is of the trial of threads

    build_with(breaking, monkeypatch)
    monkeypatch.setattr(loop.timing, "sensible_threads", lambda step: step() or 1)
    recipe = dataclasses.replace(six_steps, quant=quant, epochs=3)
    with pytest.raises(FloatingPointError) as caught:
        loop.train(recipe, tmp_path / "run", images=digits)
    said = str(caught.value)
    assert "the loss is nan in epoch 2, at step 3" in said
    assert "layer stages.1.0.act1 makes NaN or infinity of finite inputs" in said
    assert "lower learning rate than 0.01" in said and "keeps the last checkpoint" in said
    path = checkpoints.newest(tmp_path / "run")
    assert checkpoints.read_training(path)["progress"]["epoch"] == 1
    assert all(t.isfinite().all() for t in checkpoints.read_weights(path).values())


def test_where_looks_are_rare_the_message_says_so(tmp_path, monkeypatch, six_steps, digits):
    """As on a GPU: the loss is looked at in step 2, by which time the weights are lost."""
    build_with(lambda model: model.stages.insert(1, Breaks(at=1)), monkeypatch)
    monkeypatch.setattr(loop._Training, "_must_check", lambda self, looks: looks)
    with pytest.raises(FloatingPointError) as caught:
        loop.train(six_steps, tmp_path / "run", images=digits, threads=1, habits=Habits(look_every=2))
    said = str(caught.value)
    assert "in epoch 1, by step 2: " in said and "hold NaN or infinity already, " in said
    assert "go on with look_every 1" in said
    with pytest.raises(FloatingPointError, match=r"at step 1: layer stages\.1 makes NaN"):
        loop.train(six_steps, tmp_path / "run", images=digits, threads=1, habits=Habits(look_every=1))


def test_a_learning_rate_far_too_high_is_told_as_such(tmp_path, six_steps, digits):
    recipe = dataclasses.replace(six_steps, lr=1e30, optimizer="sgd", schedule="constant")
    with pytest.raises(FloatingPointError, match=r"epoch 1, at step \d: .*lower learning rate than 1e\+30"):
        loop.train(recipe, tmp_path / "run", images=digits, threads=1)


class TestCulprit:
    def test_images(self):
        assert "the images hold NaN" in finite.culprit(nn.Linear(2, 2), torch.tensor([[1.0, torch.inf]]))

    def test_parameters(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight.data[0, 0] = torch.inf
        said = finite.culprit(model, torch.randn(3, 2))
        assert "1 of the parameters hold NaN or infinity already, 1.weight the first" in said

    def test_the_first_layer_of_several(self):
        model = nn.Sequential(nn.Linear(2, 2), Breaks(), nn.Linear(2, 2)).train()
        assert finite.culprit(model, torch.randn(3, 2)) == ("layer 1 makes NaN or infinity of finite inputs")

    def test_a_quantized_layer_by_its_own_name(self):
        model = quantize_(models.create("resnet8-xnor", widths=[8, 8, 8]))
        conv = model.stages[0][0].conv1
        conv.input_quantizer.register_forward_hook(lambda *arguments: arguments[2] / 0)
        assert finite.culprit(model, torch.randn(2, 1, 28, 28)).startswith("layer stages.0.0.conv1 makes")

    def test_the_loss(self):
        assert "comes from the loss" in finite.culprit(nn.Linear(2, 2), torch.randn(3, 2))

    def test_what_no_layer_does(self):
        class Between(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(2, 2)

            def forward(self, x):
                return self.layer(x) / 0

        assert "though each layer's are" in finite.culprit(Between(), torch.randn(3, 2))
