"""A recipe's optimizer, and the schedule of its learning rate: torch's own, with the recipe's numbers."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import lr_scheduler

from foldbit.training.recipes import Recipe


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Adam, SGD with Nesterov momentum .9, or Adadelta, over all parameters."""
    parameters = model.parameters()
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adadelta":
        return torch.optim.Adadelta(parameters, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        parameters, recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps_an_epoch: int
) -> lr_scheduler.LRScheduler:
    """The learning rate of every step, whose ``step()`` comes after each of the optimizer's."""
    steps = steps_an_epoch * recipe.epochs
    if recipe.schedule == "one-cycle":
        cycled = recipe.optimizer != "adadelta"  # which has no momentum to cycle
        return lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps + 1, cycle_momentum=cycled)
    if recipe.schedule == "steps":
        milestones = [epoch * steps_an_epoch for epoch in recipe.milestones]
        return lr_scheduler.MultiStepLR(optimizer, milestones, recipe.gamma)
    end = 1e-3 if recipe.schedule == "linear" else 1.0
    return lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=steps)
