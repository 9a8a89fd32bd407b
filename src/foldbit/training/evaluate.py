"""How well a network classifies, and what: the images of a recipe, of a run, or of a data set by name."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foldbit import timing
from foldbit.calibrate import CalibrationReport
from foldbit.calibrate import calibrate as calibrate_
from foldbit.training import data as datasets
from foldbit.training.images import ImageData, Images, batches
from foldbit.training.recipes import Recipe
from foldbit.training.runs import RunError, check_classes, recipe_of

_MOST_VALUES = 20_000_000  # of a batch's images; what a network makes of them takes many times as much

Normalize = tuple[Sequence[float], Sequence[float]]


def load_data(recipe: Recipe, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """The recipe's images, from another folder where one is given, with the channels its model asks for."""
    return datasets.load(
        recipe.data.name,
        folder or recipe.data.folder,
        download=recipe.data.download,
        image_size=recipe.data.image_size,
        channels=recipe.model_args.get("in_channels"),
    )


def images_for(
    what: str | os.PathLike[str],
    recipe: Recipe | None,
    name: datasets.Name | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> ImageData:
    """The images to evaluate a network on: those named, or those of the run that it belongs to.

    Args:
        what: a run folder, or a packed file, which may lie in one.
        recipe: the run folder's.
        name: of the data set.
        folder: where its files are.

    Raises:
        RunError: where no data set is named, and the packed file lies in no run folder; and where the images
            have other classes than those that the run was trained on.
    """
    run = Path(what)
    if recipe is None and (run.parent / "config.yaml").is_file():
        run = run.parent
        recipe = recipe_of(run)
    if recipe is not None and name in (None, recipe.data.name):
        images = load_data(recipe, folder)
        check_classes(run, images.classes)
        return images
    if name is None:
        raise RunError(
            f"{what} does not say what it was trained on, and lies in no run folder; name the data set: "
            f"--dataset {' or '.join(get_args(datasets.Name))}"
        )
    return datasets.load(name, folder)


def calibrate(
    model: nn.Module, recipe: Recipe, count: int = 1024, *, images: ImageData | None = None
) -> CalibrationReport:
    """Give a recipe's network static activation scales, from the first ``count`` of its training images.

    Raises:
        RunError: for a count below 1.
        ValueError: as :func:`foldbit.calibrate` does.
    """
    if count < 1:
        raise RunError(f"calibration needs an image at least; got {count}")
    images = images or load_data(recipe)
    chosen = images.train[: min(count, recipe.data.train_images or count)]
    loader = batches(chosen, 256, shuffle=False, normalize=(images.mean, images.std))
    return calibrate_(model, loader)


@torch.no_grad()
def accuracy_on(
    model: nn.Module, images: ImageData, split: Literal["test", "train"] = "test", threads: int | None = None
) -> float:
    """The share of a data set's images that the model classifies right.

    Args:
        threads: of torch, on the CPU; None tries out whether one is faster than all.
    """
    normalize = (images.mean, images.std)
    some, _ = next(iter(batches(images[split], 64, shuffle=False, normalize=normalize)))
    model.eval()
    with timing.threads(threads, lambda: model(some)):
        right = predictions(model, images[split], normalize) == images[split].labels
    return right.double().mean().item()


@torch.no_grad()
def predictions(model: nn.Module, images: Images, normalize: Normalize) -> Tensor:
    """The class that the model gives each image, int64 ``[N]``."""
    model.eval()
    loader = batches(images, batch_size(images.shape), shuffle=False, normalize=normalize)
    return torch.cat([model(x).argmax(1) for x, _ in loader])


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, accelerator: Accelerator) -> float:
    """The share of images that the model classifies right, each counted once on any number of processes.

    Args:
        model: on the accelerator's device; it is put in evaluation mode.
        loader: as the accelerator has prepared it: each process counts its part of every batch.
        accelerator: of :func:`foldbit.training.processes.accelerator`.
    """
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # right, all: nobody waits for them
    for x, labels in loader:
        counts[0] += (model(x).argmax(1) == labels).sum()
        counts[1] += len(labels)
    right, count = accelerator.reduce(counts, "sum").tolist()
    return right / count


def batch_size(shape: Sequence[int], processes: int = 1) -> int:
    """How many images of such a shape to classify at once: up to 1,000, and as many for each process."""
    images = max(1, min(1000, _MOST_VALUES // math.prod(shape)))
    return max(1, images // processes) * processes
