"""Recipes: everything that decides a training run, as frozen records with plain values.

A recipe is the defaults below, changed by YAML files and dotted options, in the order they are given.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

from foldbit import convert, models, options
from foldbit.core.config import QuantConfig
from foldbit.training import composition
from foldbit.training.composition import names as names
from foldbit.training.composition import path_of as path_of


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
        quant: how to quantize it; None, or ``fp`` for weight and activation, trains it in float.
        init: weights to start from: a run folder of the same model, ``torchvision/NAME``, ``timm/NAME`` or a
            file with a state dict (:mod:`foldbit.models.pretrained`); None starts from random ones.
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
        if self.quant is not None and self.quant.weight == self.quant.activation == "fp":
            object.__setattr__(self, "quant", None)  # one way to say that a network stays float
        for name in ("epochs", "batch_size", "lr", "gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be at least 0 and finite; got {self.weight_decay}")
        options.check_seed(self.seed)
        taught = self.distill and self.distill.teacher
        for name, path in (("init", self.init), ("data.folder", self.data.folder), ("teacher", taught)):
            if path and not options.is_unicode(path):
                raise ValueError(f"{name} goes into config.yaml, which is Unicode; rename {path!a}")
        if sorted(set(self.milestones)) != self.milestones or min(self.milestones, default=1) < 1:
            raise ValueError(f"milestones are numbers of epochs, from 1, in order; got {self.milestones}")
        if self.schedule == "steps" and not self.milestones:
            raise ValueError("schedule 'steps' needs milestones, such as --milestones=[150,250]")


_HEAD = "# Written by foldbit train, which may replace it: change a copy, and name that with --config.\n"


def dump(recipe: Recipe) -> str:
    """A recipe as YAML, all of it."""
    return _HEAD + yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


def is_dump(text: str) -> bool:
    """Whether YAML is as :func:`dump` writes it, with any version's fields: no person's, without remarks."""
    # The values go through YAML alone: a recipe writes 1 as 1.0, and fields that an older version lacked.
    return text.startswith(_HEAD) and text == _HEAD + yaml.safe_dump(yaml.safe_load(text), sort_keys=False)


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe as YAML."""
    Path(path).write_text(dump(recipe), "utf-8")


def load(
    *paths: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    weight: str | None = None,
    activation: str | None = None,
) -> Recipe:
    """Read a recipe.

    Args:
        paths: YAML files, which may name a base (:mod:`foldbit.training.composition`); later ones change
            earlier ones.
        overrides: options, ``--data.name=digits``, that change all files.
        weight: scheme of the weights, instead of the files'.
        activation: scheme of the activations, likewise, with the settings that the files have for it.

    Raises:
        ValueError: where a file or an override does not fit, saying why.
    """
    import jsonargparse

    parser = options.parser()
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_class_arguments(Recipe)
    found = [composition.resolve(path, weight=weight, activation=activation) for path in paths]
    files = [word for fields in found for word in composition.spell(fields)]
    try:
        given = parser.parse_args([*files, *overrides])
        del given["config"]
        return Recipe(**vars(parser.instantiate(given)))
    except options.MISTAKES as error:
        why = options.explain(str(error), options.fields_of(Recipe))
        raise ValueError(f"not a recipe: {', '.join(map(str, paths))}: {why}") from error


def fit(recipe: Recipe, classes: int | None = None, channels: int | None = None) -> Recipe:
    """The recipe for images of so many classes and channels: written into the arguments of its model.

    A model that takes no ``num_classes`` or ``in_channels`` is left as it is.

    Raises:
        ValueError: where the recipe asks for other numbers, or there is no such model.
    """
    taken = models.arguments(recipe.model)
    filled = dict(recipe.model_args)
    for name, count, what in (("num_classes", classes, "classes"), ("in_channels", channels, "channels")):
        if count is None or name not in taken:
            continue
        if filled.setdefault(name, count) != count:
            raise ValueError(
                f"model_args.{name} is {filled[name]}, and the images ({recipe.data.name}) have {count} "
                f"{what}; leave {name} out, and it follows from the images"
            )
    return dataclasses.replace(recipe, model_args=filled)


def build(recipe: Recipe, *, classes: int | None = None, channels: int | None = None) -> nn.Module:
    """The recipe's model, fresh: created, quantized where it asks for it, its weights random.

    Args:
        recipe: what to build.
        classes: of the images; None takes the recipe's, or the model's default.
        channels: of the images, likewise.

    Raises:
        ValueError: as :func:`fit` does, and where the model refuses its arguments.
    """
    recipe = fit(recipe, classes, channels)
    torch.manual_seed(recipe.seed)
    model = models.create(recipe.model, **recipe.model_args)
    if recipe.quant is not None:
        convert.quantize_(model, recipe.quant, overrides=models.float_layers(model))
    return model
