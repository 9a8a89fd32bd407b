"""Channels-last where it is safe."""

import dataclasses

import pytest
import torch
from torch import nn

from foldbit import models
from foldbit.training import loop, memory_order, runs


@pytest.mark.parametrize(
    ("layers", "device", "last"),
    [
        ([nn.Conv2d(4, 8, 1, stride=2)], "cpu", False),
        ([nn.Conv2d(15, 8, 1, stride=(1, 2))], "cpu", False),
        ([nn.Conv2d(32, 8, 1, stride=2, groups=4)], "cpu", False),
        ([nn.Conv2d(4, 8, 1, stride=2)], "cuda", True),
        ([nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(4, 8, 3, stride=2), nn.Conv2d(4, 8, 1)], "cpu", True),
        ([nn.Conv1d(4, 8, 1, stride=2), nn.Linear(3, 3)], "cpu", True),
    ],
)
def test_where_it_is_safe(layers, device, last):
    order = memory_order.fastest(nn.Sequential(*layers), torch.device(device))
    assert (order == torch.channels_last) == last


@pytest.mark.parametrize("widths", [[4, 8, 8], [16, 16, 16]])
def test_a_training_keeps_its_order_and_gives_back_torchs(tmp_path, monkeypatch, tiny, digits, widths):
    model = models.create("resnet8-xnor", widths=widths)
    order = memory_order.fastest(model, torch.device("cpu"))
    assert (order == torch.channels_last) == (widths[0] == 16)
    seen = []
    genuine = loop._Training._step

    def step(self, x, labels, looks):
        weight = self.state.network.stages[0][0].conv1.weight
        seen.append(weight.is_contiguous(memory_format=order) and x.is_contiguous(memory_format=order))
        genuine(self, x, labels, looks)

    monkeypatch.setattr(loop._Training, "_step", step)
    data = dataclasses.replace(tiny.data, train_images=128)
    recipe = dataclasses.replace(tiny, model_args={"widths": widths}, data=data, epochs=1)
    outcome = loop.train(recipe, tmp_path / "run", images=digits, threads=1)
    assert seen == [True, True]
    loaded = runs.load_run(tmp_path / "run")[0]
    x = torch.randn(3, 1, 28, 28)
    assert torch.equal(outcome.model(x), loaded(x))
