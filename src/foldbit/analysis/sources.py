"""What can be analyzed, by name or file: distributions, checkpoints, safetensors and ONNX files, networks.

A source hands out weights one at a time, so that a large file never lies in memory as a whole.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

#: The shape of a sample of a distribution: a matrix, so that scales of rank r mean something on it.
SAMPLE = (3136, 64)


class SourceError(ValueError):
    """Nothing can be analyzed there. The message says why, and what to try."""


class MissingPackage(SourceError):
    """What is asked for takes a package that is not installed. The message names it."""


@dataclass(frozen=True)
class Weight:
    """A weight that can be loaded.

    Attributes:
        name: in its network.
        kind: what its layer does: ``linear``, ``pointwise convolution``, …
        shape: ``[out, in, *kernel]``, or as ``load`` returns it.
        load: reads it, floating point of that shape; every call reads afresh.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """Something to analyze.

    Attributes:
        name: what the user called it.
        description: what it is and where it came from, in a sentence or two.
        weights: in the network's order; or one, the sample of a distribution.
        one_scale_set: whether all values share scales, as a sample's do; otherwise each output channel's do.
        model: the network, where there is one that runs.
        batches: its inputs, where there are any.
        inputs: what they are, or why there are none.
        left_out: how many tensors are no weights and are not looked at, by reason.
    """

    name: str
    description: str
    weights: Sequence[Weight]
    one_scale_set: bool = False
    model: nn.Module | None = None
    batches: Callable[[], Iterator[Tensor]] | None = None
    inputs: str = ""
    left_out: Mapping[str, int] | None = None


def distributions() -> tuple[str, ...]:
    """Distributions by name."""
    return tuple(_SAMPLERS)


def distribution(name: str, seed: int = 0) -> Source:
    """A sample of a distribution, one set of scales for all of it."""
    title, sampler = _SAMPLERS[name]

    def sample() -> Tensor:
        return sampler(torch.Generator().manual_seed(seed)).float()

    rows, columns = SAMPLE
    return Source(
        name,
        f"{rows:,} × {columns} independent values of the {title}, seed {seed}; one set of scales for all.",
        [Weight(name, "sample", SAMPLE, sample)],
        one_scale_set=True,
        inputs="a distribution has no activations",
    )


def safetensors_file(path: Path) -> Source:
    """The weights of a safetensors file.

    Raises:
        SourceError: for a file that is no safetensors file, is packed already, or holds no weights.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            if "foldbit" in (file.metadata() or {}):
                raise SourceError(
                    f"{path} is a packed file: its weights are bits already, and what they approximate is "
                    "gone. Analyze the run folder that it was packed from"
                )
            names = sorted(file.keys(), key=_with_numbers)
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            dtypes = {name: file.get_slice(name).get_dtype() for name in shapes}
    except safetensors.SafetensorError as error:
        raise SourceError(f"{path} is not a readable safetensors file: {error}") from error

    def load(name: str) -> Tensor:
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(name)

    floats = {name: dtypes[name] in ("F16", "BF16", "F32", "F64") for name in shapes}
    weights, left_out = _choose(shapes, floats, load)
    return Source(
        path.name,
        f"The weights of {path}, a safetensors file; scales for each output channel.",
        _some(weights, path),
        inputs="a file of weights alone cannot be run: no activations",
        left_out=left_out,
    )


def checkpoint(path: Path) -> Source:
    """The weights of a PyTorch checkpoint, read without running code that it may hold.

    State dicts are found at any depth of nested dicts, as under ``state_dict`` or ``model``.

    Raises:
        SourceError: for another kind of file, one that holds more than tensors and plain values, one without
            weights, or one with a tensor that has no values, or more of them than are stored.
    """
    try:
        # Mapped where the format allows: then only what is looked at is read.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{path} is not a state dict of tensors and plain values, and loading anything else could run "
            f"code that it holds ({_first_line(error)}). Save model.state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} is not a readable PyTorch checkpoint: {_first_line(error)}") from error
    tensors = dict(_tensors(held))
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_nested:
            what = (
                "has a shape and no values, for it is on the meta device" if tensor.is_meta else "is nested"
            )
            raise SourceError(f"{path}: {name} {what}. Save a state dict of ordinary tensors instead")
    weights, left_out = _choose(
        {name: tuple(t.shape) for name, t in tensors.items()},
        {name: t.dtype in _DTYPES and t.layout == torch.strided for name, t in tensors.items()},
        lambda name: tensors[name].detach(),
    )
    for weight in weights:
        tensor = tensors[weight.name]
        stored = tensor.untyped_storage().nbytes()
        if tensor.nbytes > stored:  # as a few bytes on disk can say of gigabytes
            raise SourceError(
                f"{path}: {weight.name} is an expanded tensor: {tensor.nbytes:,} bytes, of which {stored:,} "
                "are stored. Save its clone() instead"
            )
    return Source(
        path.name,
        f"The weights of {path}, a PyTorch checkpoint; scales for each output channel.",
        _some(weights, path),
        inputs="a state dict alone cannot be run: no activations",
        left_out=left_out,
    )


def network(
    name: str,
    description: str,
    model: nn.Module,
    batches: Callable[[], Iterator[Tensor]] | None = None,
    inputs: str = "",
) -> Source:
    """The weights of a network's convolutions, linear layers and embeddings, and its inputs."""
    weights = []
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear | nn.Embedding):
            weights.append(Weight(layer_name, kind_of(layer), tuple(layer.weight.shape), layer.weight.detach))
    if not weights:
        raise SourceError(f"{name} has no convolutions, linear layers or embeddings")
    return Source(name, description, weights, model=model, batches=batches, inputs=inputs)


def kind_of(layer: nn.Module) -> str:
    """What a layer does, in words."""
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.groups == layer.in_channels > 1:
            return "depthwise convolution"
        return "pointwise convolution" if math.prod(layer.kernel_size) == 1 else "convolution"
    return "linear"


def _choose(
    shapes: Mapping[str, tuple[int, ...]], floats: Mapping[str, bool], load: Callable[[str], Tensor]
) -> tuple[list[Weight], dict[str, int]]:
    """The weights among the tensors of a state dict, and how many others there are, by reason."""
    left_out: dict[str, int] = {}
    matrices = []
    for name, shape in shapes.items():
        reason = ""
        if not floats[name]:
            reason = "integers or of an unknown kind"
        elif len(shape) < 2 or shape[0] < 2 or math.prod(shape[1:]) < 2:
            reason = "vectors, such as biases and norms"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            matrices.append(name)
    named = [name for name in matrices if name.rpartition(".")[2].endswith("weight")]
    if named and len(named) < len(matrices):
        left_out["not named as a weight"] = len(matrices) - len(named)
    return [
        Weight(name, _kind_by_shape(name, shapes[name]), shapes[name], lambda name=name: load(name))  # type: ignore[misc]
        for name in named or matrices
    ], left_out


def _kind_by_shape(name: str, shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "embedding" if "embed" in name.lower() else "linear"
    if math.prod(shape[2:]) == 1:
        return "pointwise convolution"
    return "convolution" if shape[1] > 1 else "convolution of one channel"


def _some(weights: list[Weight], path: Path) -> list[Weight]:
    if not weights:
        raise SourceError(
            f"{path} holds no weights: no floating-point tensor of two or more dims, [out, in, ...]"
        )
    return weights


def _tensors(held: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(held, Tensor):
        yield prefix, held
    elif isinstance(held, Mapping) and depth < 8:
        for key, value in held.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _with_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


_Sampler = Callable[[torch.Generator], Tensor]


def _uniform(generator: torch.Generator) -> Tensor:
    # Never 0 nor 1, at which quantile functions are infinite.
    return torch.rand(SAMPLE, dtype=torch.float64, generator=generator).clamp(1e-12, 1 - 1e-12)


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(SAMPLE, dtype=torch.float64, generator=generator)


def _laplace(generator: torch.Generator) -> Tensor:
    centred = _uniform(generator) - 0.5
    return -centred.sign() * torch.log1p(-2 * centred.abs())


def _student(degrees: int) -> _Sampler:
    def sample(generator: torch.Generator) -> Tensor:
        shape = (*SAMPLE, degrees)
        chi = torch.randn(shape, dtype=torch.float64, generator=generator).square().sum(-1)
        return _normal(generator) / (chi / degrees).sqrt()

    return sample


_SAMPLERS: dict[str, tuple[str, _Sampler]] = {
    "normal": ("normal distribution N(0, 1)", _normal),
    "laplace": ("Laplace distribution", _laplace),
    "uniform": ("uniform distribution on [−1, 1]", lambda g: 2 * _uniform(g) - 1),
    "logistic": ("logistic distribution", lambda g: torch.logit(_uniform(g))),
    "student-t": ("Student distribution with 3 degrees of freedom, which has heavy tails", _student(3)),
    "relu-normal": (
        "normal distribution behind a ReLU, half of it zeros",
        lambda g: _normal(g).clamp(min=0),
    ),
    "half-normal": ("magnitudes of the normal distribution", lambda g: _normal(g).abs()),
    "log-normal": ("log-normal distribution, σ = 1, with random signs", lambda g: _log_normal(g)),
}


def _log_normal(generator: torch.Generator) -> Tensor:
    return _normal(generator).exp() * (_uniform(generator) - 0.5).sign()
