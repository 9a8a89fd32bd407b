"""Packed models in files: save_packed, load_packed, and how large a file is."""

from __future__ import annotations

import copy
import os
from typing import TypeVar

import torch
from torch import nn

from foldbit import convert, models
from foldbit.core.config import QuantConfig
from foldbit.nn import layers
from foldbit.nn.layers import QuantLayer
from foldbit.packed import files, fusion
from foldbit.packed.absorbed import Absorbed, FoldedConv2d
from foldbit.packed.layers import PackedLayer, empty
from foldbit.packed.spec import LayerSpec

Model = TypeVar("Model", bound=nn.Module)


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a packed model to a file, whole or not at all.

    A model of :mod:`foldbit.models` can be rebuilt from the file alone.

    Raises:
        TypeError: where the model is itself a layer.
        ValueError: where the model has quantized layers that are not packed yet, or no packed ones, or its
            state dict holds anything but tensors.
    """
    files.write(path, packed_bytes(model))


def packed_bytes(model: nn.Module) -> bytes:
    """The bytes that :func:`save_packed` writes."""
    if isinstance(model, PackedLayer):
        raise TypeError(f"a file holds layers of a model; wrap this {type(model).__name__} in nn.Sequential")
    unpacked = [name for name, module in model.named_modules() if isinstance(module, QuantLayer)]
    if unpacked:
        raise ValueError(f"layers not packed yet: {', '.join(unpacked[:5])}; call foldbit.pack_(model) first")
    if not any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError("the model has no packed layers; call foldbit.quantize_ and foldbit.pack_ first")
    return files.serialize(model, _architecture(model))


def packed_size(model: nn.Module) -> int:
    """The size in bytes of a model's packed file, whether it is packed already or not; it is not changed.

    Everything that is not quantized counts as it is, so that a float model's size is that of its state dict.
    """
    skeleton = copy.deepcopy(model)
    replacements: dict[nn.Module, nn.Module] = {
        module: empty(LayerSpec.of(module, module.config))
        for module in skeleton.modules()
        if isinstance(module, QuantLayer) and not module.weight_quantizer.scheme.is_float
    }
    fusion.replace(skeleton, replacements)
    return len(files.serialize(skeleton, _architecture(model)))


def load_packed(
    path: str | os.PathLike[str], model: Model | None = None, *, fuse: bool = True
) -> Model | nn.Module:
    """Read a packed model, in evaluation mode.

    Args:
        path: a file that :func:`save_packed` wrote.
        model: a network to fill: float, quantized or packed, of the same shape. Without one, a model of
            :mod:`foldbit.models` is built from the file alone.
        fuse: as in :func:`foldbit.pack_`.

    Returns:
        The given model, its layers replaced by packed ones; or a new one.

    Raises:
        FileNotFoundError: where there is no such file.
        foldbit.PackedFileError: one of its subclasses, for a file that is broken or of another model. The
            given model is then unchanged.
    """
    contents = files.read(path)
    if model is None:
        # First without memory: what a file claims must agree with what it holds before it costs anything.
        with torch.device("meta"):
            draft = _build(path, contents.architecture)
        _plan(path, contents, draft)
        return _fill(path, contents, _build(path, contents.architecture), fuse)
    return _fill(path, contents, model, fuse)


def _architecture(model: nn.Module) -> files.Architecture | None:
    built = models.architecture_of(model)
    return None if built is None else files.Architecture(*built)


def _fill(path: str | os.PathLike[str], contents: files.Contents, model: Model, fuse: bool) -> Model:
    plan = _plan(path, contents, model)
    fusion.unfuse_(model)
    fusion.replace(model, {module: empty(spec) for module, spec in plan.items()})
    model.load_state_dict(contents.tensors)
    return convert.finish_(model, fuse)


def _plan(
    path: str | os.PathLike[str], contents: files.Contents, model: nn.Module
) -> dict[nn.Module, LayerSpec]:
    """Which of the model's layers become packed ones, after checking that the whole file fits the model."""
    modules = {  # the file has every name of a layer
        name: m.original if isinstance(m, Absorbed | FoldedConv2d) else m
        for name, m in model.named_modules(remove_duplicate=False)
    }
    plan = {}
    state = model.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise files.MismatchedModel(f"{path} holds tensors only; the model's state has {other[0]!r} besides")
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    for name, spec in contents.layers.items():
        module = modules.get(name)
        if not name or module is None:
            raise files.MismatchedModel(f"{path} has a packed layer {name!r}, the model has no such layer")
        own = module.spec if isinstance(module, PackedLayer) else _spec_or_none(module, spec.config)
        if own != spec:
            raise files.MismatchedModel(
                f"{path}: layer {name!r} is a packed {spec.kind}, in the model it is {type(module).__name__}"
                if own is None
                else f"{path}: layer {name!r} has {spec.differences(own)} as in the model"
            )
        plan[module] = spec
        for key in module.state_dict(prefix=f"{name}."):
            del expected[key]
        expected |= {f"{name}.{suffix}": stored for suffix, stored in spec.tensors().items()}
    left = [n for n, m in modules.items() if isinstance(m, QuantLayer | PackedLayer) and m not in plan]
    if left:
        raise files.MismatchedModel(f"{path} has no packed layer {left[0]!r}, which the model quantizes")
    files.check_tensors(path, expected, contents)
    return plan


def _build(path: str | os.PathLike[str], architecture: files.Architecture | None) -> nn.Module:
    if architecture is None:
        raise files.MismatchedModel(
            f"{path} does not say which network it belongs to; pass one: load_packed(path, model)"
        )
    try:
        return models.create(architecture.name, **architecture.kwargs)
    except Exception as error:  # a builder of the user's own may raise anything at a file's arguments
        raise files.MismatchedModel(f"{path}: {error}") from error


def _spec_or_none(module: nn.Module, config: QuantConfig) -> LayerSpec | None:
    ours = type(module) in layers.TWINS or isinstance(module, QuantLayer)
    return LayerSpec.of(module, config) if ours else None
