"""Learning rates are what the recipe and the paper say, step by step."""

import dataclasses

import pytest
import torch
from torch import nn

from foldbit.training import schedules
from foldbit.training.recipes import Recipe


def rates(recipe, steps_an_epoch):
    """The learning rate of every step, and the one after the last."""
    optimizer = schedules.optimizer(recipe, nn.Linear(1, 1))
    schedule = schedules.schedule(recipe, optimizer, steps_an_epoch)
    found = []
    for _ in range(steps_an_epoch * recipe.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adadelta"])
@pytest.mark.parametrize(
    ("schedule", "last"), [("one-cycle", 4e-8), ("linear", 1e-5), ("constant", 1e-2), ("steps", 1e-4)]
)
def test_every_schedule_goes_with_every_optimizer(optimizer, schedule, last):
    recipe = Recipe(epochs=5, lr=1e-2, optimizer=optimizer, schedule=schedule, milestones=[2, 4])
    found = rates(recipe, 2)
    assert max(found) == pytest.approx(recipe.lr, rel=0.05)  # ten steps may straddle the peak of one-cycle
    assert found[-1] == pytest.approx(last)


def test_linear_falls_evenly_to_a_thousandth():
    found = rates(Recipe(epochs=3, lr=2e-4, schedule="linear"), 4)
    assert found == pytest.approx([2e-4 + (2e-7 - 2e-4) * i / 12 for i in range(13)])


def test_steps_fall_after_whole_epochs():
    """As in the paper's recipe for CIFAR: times .1 after each milestone."""
    recipe = Recipe(epochs=5, lr=1.0, schedule="steps", milestones=[2, 3], gamma=0.1)
    assert rates(recipe, 3)[:-1] == pytest.approx([1.0] * 6 + [0.1] * 3 + [0.01] * 6)


def test_a_milestone_every_epoch():
    """As in the paper's recipe for MNIST: Adadelta of 1.0, times .7 an epoch."""
    recipe = Recipe(epochs=4, lr=1.0, optimizer="adadelta", schedule="steps", milestones=[1, 2, 3], gamma=0.7)
    assert rates(recipe, 1)[:-1] == pytest.approx([1.0, 0.7, 0.49, 0.343])


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adam", torch.optim.Adam), ("sgd", torch.optim.SGD), ("adadelta", torch.optim.Adadelta)],
)
def test_optimizers_are_torchs(name, kind):
    optimizer = schedules.optimizer(Recipe(optimizer=name, lr=0.5, weight_decay=0.25), nn.Linear(2, 2))
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    if name == "sgd":
        assert group["nesterov"] and group["momentum"] == 0.9


@pytest.mark.parametrize("milestones", [[], [3, 2], [0, 1], [2, 2]])
def test_milestones_that_make_no_sense(milestones):
    with pytest.raises(ValueError, match="milestones"):
        dataclasses.replace(Recipe(schedule="steps", milestones=[1]), milestones=milestones)
