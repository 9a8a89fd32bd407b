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
    """Which images.

    Attributes:
        name: fashion-mnist, or scikit-learn's digits.
        folder: where the data lie, looked at before anything else.
        download: whether they may be downloaded where they cannot be found.
        train_images: train on the first so many only; None for all.
    """

    name: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    folder: str | None = None
    download: bool = True
    train_images: int | None = None


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
        batch_size: images a step.
        optimizer: adam, or sgd with Nesterov momentum .9.
        lr: the peak learning rate.
        weight_decay: L2 penalty, as the optimizer applies it.
        schedule: one-cycle (up, then down by cosine), linear (down to a thousandth) or constant.
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
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 3e-3
    weight_decay: float = 0.0
    schedule: Literal["one-cycle", "linear", "constant"] = "one-cycle"
    precision: Literal["no", "bf16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")


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
