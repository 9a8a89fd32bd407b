"""How fast a recipe trains: images per second of its network quantized and in float, timed in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

from foldbit import timing
from foldbit.tables import table
from foldbit.training import memory_order, processes, recipes, schedules
from foldbit.training.recipes import Recipe

#: Images of the data sets, ``(channels, height, width)``, and how many classes they have.
IMAGES = {
    "fashion-mnist": ((1, 28, 28), 10),
    "mnist": ((1, 28, 28), 10),
    "digits": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "imagenet": ((3, 224, 224), 1000),
}


def against_float(recipe: Recipe, *, threads: int | None = None, seconds: float = 20.0) -> str:
    """Time a recipe's training steps, quantized and in float, and tell the result as a table.

    A step is that of :mod:`foldbit.training.loop` on one process: forward and backward pass in the recipe's
    precision, and its optimizer. It computes on random images that are on the device already; reading images,
    a teacher and evaluation are not in it.

    Args:
        recipe: a quantized one; its images are those of its data set, or, of ``folder``, of
            ``data.image_size``. No data is read.
        threads: torch's threads, on the CPU; None leaves them as they are.
        seconds: how long to measure; some steps are taken in any case.

    Raises:
        ValueError: for a recipe that trains in float, images of a size that nobody says, or fewer than one
            thread.
    """
    quant = recipe.quant
    if quant is None:
        raise ValueError(
            "nothing to compare: this recipe trains in float; name the schemes, such as --weight ls-1 "
            "--activation ls-2"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads is a whole number, at least 1; got {threads}")
    shape, classes = _images(recipe)
    recipe = recipes.fit(recipe, classes, shape[0])
    device = processes.accelerator().device
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        steps = 1 if device.type == "cpu" else 10  # a device works ahead of Python while nobody waits for it
        candidates = {
            "float": _training(dataclasses.replace(recipe, quant=None), shape, device, steps),
            quant.name: _training(recipe, shape, device, steps),
        }
        times = timing.interleaved(candidates, seconds=seconds, rounds=5)
        where = timing.machine()
        if device.type != "cpu":
            where = torch.get_device_module(device).get_device_name(device)
    finally:
        torch.set_num_threads(before)
    base, images = times["float"].median, recipe.batch_size * steps
    rows = [
        [
            name,
            f"{images / t.median:,.0f}",
            f"{base / t.median:.2f}",
            f"{base / t.high:.2f} - {base / t.low:.2f}",
        ]
        for name, t in times.items()
    ]
    return "\n".join(
        filter(
            None,
            [
                f"{recipe.model}, batch {recipe.batch_size} of {'×'.join(map(str, shape))}, "
                f"{'bfloat16' if recipe.precision == 'bf16' else 'float32'}, {recipe.optimizer}, {where}",
                table(["training", "images/s", "speed over\nfloat", "quartiles"], rows),
                timing.warning(times),
            ],
        )
    )


def _images(recipe: Recipe) -> tuple[tuple[int, int, int], int]:
    """The shape of an image, and the number of classes."""
    side = recipe.data.image_size
    if recipe.data.name in IMAGES:
        (channels, height, width), classes = IMAGES[recipe.data.name]
        given = recipe.model_args.get("in_channels", channels)
        return (given, side or height, side or width), classes
    if side is None:
        raise ValueError("say how large your images are: --data.image_size 224")
    return (recipe.model_args.get("in_channels", 3), side, side), recipe.model_args.get("num_classes", 10)


def _training(
    recipe: Recipe, shape: tuple[int, int, int], device: torch.device, steps: int
) -> Callable[[], None]:
    """So many steps of training on random images, and waiting for the device."""
    network = recipes.build(recipe)
    order = memory_order.fastest(network, device)
    network = memory_order.arrange(network.to(device), order).train()
    optimizer = schedules.optimizer(recipe, network)
    classes = recipe.model_args.get("num_classes", 10)
    generator = torch.Generator().manual_seed(recipe.seed)
    x = torch.randn(recipe.batch_size, *shape, generator=generator).to(device)
    x = x.contiguous(memory_format=order)
    labels = torch.randint(classes, (recipe.batch_size,), generator=generator).to(device)
    half = recipe.precision == "bf16"

    def train() -> None:
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = network(x)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return train
