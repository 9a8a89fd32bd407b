"""Recipes: everything that decides a training run, as frozen records with plain values.

A recipe is the defaults below, changed by YAML files and dotted options, in the order they are given.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from foldbit import convert, models, options
from foldbit.core.config import QuantConfig


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how training changes them.

    Attributes:
        name: a published data set, or ``folder`` for images of your own (docs/data.md says where each lies).
        folder: where the data lie, looked at before anything else.
        download: whether they may be downloaded where they cannot be found.
        train_images: train on the first so many only; None for all.
        augment: none; crop-flip, the paper's for CIFAR: pad by 4, crop at random, flip half of them; or
            imagenet: a random part, resized; half of them flipped; brightness, contrast and saturation
            changed by up to .4.
        image_size: height and width, of ``folder`` and ``imagenet``; None is 224 for imagenet, and for a
            folder the size that its images have, where they all have one.
        workers: processes that decode images; sets that are held in memory need none.
    """

    name: Literal["fashion-mnist", "mnist", "digits", "cifar10", "cifar100", "imagenet", "folder"] = (
        "fashion-mnist"
    )
    folder: str | None = None
    download: bool = True
    train_images: int | None = None
    augment: Literal["none", "crop-flip", "imagenet"] = "none"
    image_size: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train_images", 1), ("image_size", 1), ("workers", 0)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ValueError(f"data.{name} must be at least {least}; got {given}")


@dataclass(frozen=True)
class Distillation:
    """Learn from the outputs of a trained network, the teacher (Hinton, Vinyals & Dean 2015).

    Attributes:
        teacher: a run folder, ``torchvision/NAME`` or ``timm/NAME``.
        temperature: T, by which both networks' logits are divided before they are compared.
        weight: the comparison's share of the loss, from 0 to 1; the rest is cross-entropy with the labels.
        correct: take cross-entropy alone for images that the teacher classifies wrong.
    """

    teacher: str
    temperature: float = 1.0
    weight: float = 1.0
    correct: bool = False

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("teacher is a run folder, torchvision/NAME or timm/NAME; got nothing")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is a share of the loss, from 0 to 1; got {self.weight}")


@dataclass(frozen=True)
class Recipe:
    """What to train and how.

    Attributes:
        model: a registered model, such as resnet8-xnor.
        model_args: arguments of the model.
        quant: how to quantize it; None trains it in float.
        init: a run folder whose weights to start from, of the same model; None starts from random ones.
        data: which images.
        epochs: passes over the training images.
        batch_size: images a step, on all processes together.
        optimizer: adam, sgd with Nesterov momentum .9, or adadelta.
        lr: the peak learning rate.
        weight_decay: L2 penalty, as the optimizer applies it.
        schedule: of the learning rate, step by step: one-cycle (up, then down by cosine), linear (down to a
            thousandth), steps (times ``gamma`` after each of the milestones) or constant.
        milestones: finished epochs after which ``steps`` lowers the learning rate; others ignore them.
        gamma: the factor by which it does.
        distill: a teacher to learn from; None learns from the labels alone.
        precision: no trains in float32, bf16 in mixed precision.
        seed: of initial weights and of the order of the images. It repeats a training to the last digit on as
            many threads: on another number of them sums are rounded in another order.
    """

    model: str = "resnet8-xnor"
    model_args: dict[str, Any] = field(default_factory=dict)
    quant: QuantConfig | None = None
    init: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    epochs: int = 3
    batch_size: int = 128
    optimizer: Literal["adam", "sgd", "adadelta"] = "adam"
    lr: float = 3e-3
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "linear", "steps", "constant"] = "one-cycle"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    distill: Distillation | None = None
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr", "gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if sorted(set(self.milestones)) != self.milestones or min(self.milestones, default=1) < 1:
            raise ValueError(f"milestones are numbers of epochs, from 1, in order; got {self.milestones}")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule 'steps' needs milestones, such as --milestones=[150,250]")


def names() -> tuple[str, ...]:
    """The packaged recipes."""
    folder = resources.files("foldbit") / "recipes"
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def path_of(name: str) -> Path:
    """The YAML file of a packaged recipe.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in names():
        raise ValueError(
            f"unknown recipe {name!r}; known are {', '.join(names())}, or give a file to --config"
        )
    return Path(str(resources.files("foldbit") / "recipes" / f"{name}.yaml"))


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe as YAML."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def load(*paths: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: later files change earlier ones, and overrides (``--data.name=digits``) change all.

    Raises:
        ValueError: where a file or an override does not fit, saying why.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_class_arguments(Recipe)
    try:
        given = parser.parse_args([*(f"--config={path}" for path in paths), *overrides])
        del given["config"]
        return Recipe(**vars(parser.instantiate(given)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        why = options.explain(str(error), options.fields_of(Recipe))
        raise ValueError(f"not a recipe: {', '.join(map(str, paths))}: {why}") from error


def build(recipe: Recipe) -> nn.Module:
    """The recipe's model, fresh: created, quantized where it asks for it, its weights random."""
    torch.manual_seed(recipe.seed)
    model = models.create(recipe.model, **recipe.model_args)
    if recipe.quant is not None:
        convert.quantize_(model, recipe.quant, overrides=models.float_layers(model))
    return model
