"""Verbs that convert whole models: quantize_ and pack_."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from foldbit.core.config import QuantConfig
from foldbit.nn import layers
from foldbit.nn.layers import QuantLayer
from foldbit.packed import fusion
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec

Model = TypeVar("Model", bound=nn.Module)

_REPORT = "_foldbit_report"
_QUANTIZABLE = tuple(layers.TWINS)


@dataclass
class ConversionReport:
    """What :func:`quantize_` did: which layers it quantized how, and what it left float and why.

    After :func:`pack_`, ``fusion`` says which neighbours' work each packed layer does.
    """

    quantized: dict[str, QuantConfig] = field(default_factory=dict)
    left_float: dict[str, str] = field(default_factory=dict)
    fusion: fusion.FusionReport | None = None

    def __str__(self) -> str:
        lines = [f"quantized {len(self.quantized)} layers, left {len(self.left_float)} float"]
        lines += [
            f"  {name}: {c.name} ({c.weight} weight, {c.activation} input)"
            for name, c in self.quantized.items()
        ]
        lines += [f"  {name}: float, {reason}" for name, reason in self.left_float.items()]
        if self.fusion is not None:
            lines += ["packed layers do the work of their neighbours", str(self.fusion)]
        return "\n".join(lines)


def quantize_(
    model: Model,
    config: QuantConfig = layers.DEFAULT_CONFIG,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    overrides: Mapping[str, QuantConfig | None] | None = None,
    skip: str | tuple[str, ...] = "first-last",
) -> Model:
    """Replace a model's Conv2d, Conv1d and Linear layers by quantized ones that share their parameters.

    Optimizers that hold the parameters stay valid. Layers that are quantized already stay as they are. What
    was left float, and why, is in :func:`conversion_report`.

    Args:
        model: any network; changed in place.
        config: how to quantize a layer.
        filter_fn: ``(module, name) -> bool``; layers for which it is false stay float.
        overrides: configs for layer names or shell-style patterns (``"blocks.*.conv1"``), None to leave a
            layer float. The first pattern that matches decides, over ``config`` and ``skip`` too.
        skip: ``"first-last"`` leaves the first and the last quantizable layer float, in the order of
            ``named_modules``; a tuple of names leaves those; ``()`` leaves none.

    Returns:
        The same model.

    Raises:
        TypeError: where the model itself is a layer, which cannot replace itself, or a config is none.
        ValueError: where an override or a skipped name matches no layer, or a config does not fit one. The
            model is then unchanged.
    """
    if isinstance(model, _QUANTIZABLE):
        raise TypeError(
            f"quantize_ changes layers inside a model, and this {type(model).__name__} is a layer itself; "
            f"wrap it in nn.Sequential, or build a {layers.TWINS[kind].__name__}"
            if (kind := layers.kind_of(model))
            else f"quantize_ changes layers inside a model; got a bare {type(model).__name__}"
        )
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config is a QuantConfig; got {type(config).__name__}")
    overrides = dict(overrides or {})
    reasons = _unsupported(model)
    candidates = {name: m for name, m in model.named_modules() if layers.kind_of(m) and name not in reasons}
    _check_patterns(overrides, candidates)
    skipped = _skipped(skip, candidates)
    report = ConversionReport()
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if name not in candidates:
            if isinstance(module, QuantLayer):
                report.quantized[name] = module.config
            elif name in reasons:
                report.left_float[name] = reasons[name]
            continue
        chosen: QuantConfig | None = config
        reason = "its config is fp for weight and activation"
        pattern = next((p for p in overrides if fnmatchcase(name, p)), None)
        if pattern is not None:
            chosen, reason = overrides[pattern], f"override {pattern!r}"
        elif name in skipped:
            chosen, reason = None, skipped[name]
        if chosen is not None and filter_fn is not None and not filter_fn(module, name):
            chosen, reason = None, "filter_fn"
        if chosen is None or chosen.weight == chosen.activation == "fp":
            report.left_float[name] = reason
            continue
        try:
            replacements[module] = layers.from_float(module, chosen)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        report.quantized[name] = chosen
    fusion.replace(model, replacements)
    setattr(model, _REPORT, report)
    return model


def conversion_report(model: nn.Module) -> ConversionReport:
    """What :func:`quantize_` last did to this model.

    Raises:
        ValueError: where it has not been quantized.
    """
    report = getattr(model, _REPORT, None)
    if report is None:
        raise ValueError("no report: this model has not been through foldbit.quantize_")
    return report


def update_report(model: nn.Module, changed: Mapping[str, QuantConfig]) -> None:
    """Tell the model's report, where it has one, of layers whose config has changed since."""
    report = getattr(model, _REPORT, None)
    if report is not None:
        report.quantized.update({name: c for name, c in changed.items() if name in report.quantized})


def pack_(model: Model, *, fuse: bool = True) -> Model:
    """Replace a model's quantized layers by packed ones, and put it in evaluation mode.

    The outputs are those of the quantized model in evaluation, up to float rounding. Packed layers also do
    the work of batch norms and nonlinearities next to them; which ones is in :func:`conversion_report`.

    Args:
        model: a network that :func:`quantize_` converted; changed in place.
        fuse: whether they do. Without it batch norms can still learn, after packing.

    Returns:
        The same model.

    Raises:
        TypeError: where the model is itself a layer.
        ValueError: where there is nothing to pack, or a layer cannot be: a float weight under a quantized
            input, or static scales that have never seen data. The model is then unchanged.
    """
    if isinstance(model, QuantLayer):
        raise TypeError(
            f"pack_ changes layers inside a model; wrap this {type(model).__name__} in nn.Sequential"
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            try:
                replacements[module] = _packed_twin(module)
            except ValueError as error:
                raise ValueError(f"layer {name} cannot be packed: {error}") from error
    if not replacements and not any(isinstance(m, PackedLayer) for m in model.modules()):
        raise ValueError(
            "nothing to pack: foldbit.quantize_ left every layer float; foldbit.conversion_report says why"
            if hasattr(model, _REPORT)
            else "nothing to pack: the model has no quantized layers; call foldbit.quantize_ first"
        )
    fusion.replace(model, replacements)
    return finish_(model, fuse)


def finish_(model: Model, fuse: bool) -> Model:
    """Put a packed model into evaluation mode, its layers fused or not, and report which."""
    model.eval()
    if not fuse:
        fusion.unfuse_(model)
    packed = {name: m.spec.config for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    report = getattr(model, _REPORT, None) or ConversionReport(quantized=packed)
    report.fusion = fusion.fuse_(model) if fuse else None
    setattr(model, _REPORT, report)
    return model


def _packed_twin(layer: QuantLayer) -> PackedLayer:
    if layer.weight_quantizer.scheme.is_float:
        raise ValueError("its weight is float; quantize it, or leave the whole layer float with an override")
    quantizer = layer.input_quantizer
    if quantizer.static and not quantizer.seen:
        raise ValueError(
            "its static activation scales have never seen data; train it, call foldbit.calibrate(model, "
            "batches), or use activation_scales='dynamic'"
        )
    if not all(torch.isfinite(p).all() for p in layer.parameters()):
        raise ValueError("its parameters hold NaN or infinity")
    planes, scales = layer.weight_quantizer.codes(layer.weight)
    spec = LayerSpec.of(layer, layer.config)
    running = quantizer.running_scales if quantizer.static else None
    packed = PackedLayer.from_codes(spec, planes, scales, layer.bias, running)
    layers.keep_hooks(layer, packed)
    return packed


def _check_patterns(overrides: Mapping[str, QuantConfig | None], candidates: Mapping[str, nn.Module]) -> None:
    for pattern, chosen in overrides.items():
        if chosen is not None and not isinstance(chosen, QuantConfig):
            raise TypeError(f"override {pattern!r} is a QuantConfig or None; got {type(chosen).__name__}")
        if not any(fnmatchcase(name, pattern) for name in candidates):
            raise ValueError(
                f"override {pattern!r} matches no quantizable layer; "
                f"there are: {', '.join(candidates) or 'none'}"
            )


def _skipped(skip: str | tuple[str, ...], candidates: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names to leave float, with the reason."""
    if skip == "first-last":
        if not candidates:
            return {}
        names = list(candidates)
        return {
            names[-1]: "the last quantizable layer (skip='first-last')",
            names[0]: "the first quantizable layer (skip='first-last')",
        }
    if isinstance(skip, str):
        raise ValueError(f"skip is 'first-last', or a tuple of layer names; got {skip!r}")
    unknown = [name for name in skip if name not in candidates]
    if unknown:
        raise ValueError(f"skip names no quantizable layer: {', '.join(map(repr, unknown))}")
    return {name: "named in skip" for name in skip}


def _unsupported(model: nn.Module) -> dict[str, str]:
    """Layers that hold a weight matrix and are not quantizable, with the reason."""
    read = {kind: _reads_weights_of(kind) for kind in {type(module) for module in model.modules()}}
    bypassed = {
        child: f"{type(module).__name__} reads its weight without calling it"
        for module in model.modules()
        for name, child in module.named_children()
        if name in read[type(module)]
    }
    reasons = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, QuantLayer | PackedLayer):
            continue
        if isinstance(module, _QUANTIZABLE):
            if module in bypassed:
                reasons[name] = bypassed[module]
            elif "weight" not in module._parameters:
                reasons[name] = "its weight is computed from other parameters, as weight_norm does"
            elif "forward" in vars(module):
                reasons[name] = "its forward pass has been replaced"
            elif layers.kind_of(module) is None:
                reasons[name] = f"{kind} is a subclass with code, parameters or parts of its own"
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear | nn.RNNBase | nn.RNNCellBase):
            reasons[name] = f"{kind} has no quantized twin"
    return reasons


_PROPERTIES = ("dtype", "device", "shape", "ndim", "requires_grad")


def _reads_weights_of(kind: type[nn.Module]) -> frozenset[str]:
    """Names of children whose ``weight`` a forward pass reads, past their own forward passes.

    torch's transformer layers do, and windowed attention in torchvision and timm, which has
    ``F.linear(x, self.qkv.weight)``. The bytecode of the forward pass, and of the methods and properties that
    it names, tells, where two attributes are loaded in a row, or the first by way of a variable; a third one
    that is no more than a property of the weight, as in ``x.to(self.proj.weight.dtype)``, needs no value.
    """
    found, seen, waiting = set(), {"forward"}, ["forward"]
    while waiting:
        name = waiting.pop()
        for code in (code for base in kind.__mro__ for code in _code(vars(base).get(name))):
            loaded = _loaded(code)
            triples = zip(loaded, loaded[1:], [*loaded[2:], None], strict=False)
            found |= {a for a, b, c in triples if a and b == "weight" and c not in _PROPERTIES}
            methods = {name for name in loaded if name and _code(inspect.getattr_static(kind, name, None))}
            waiting += methods - seen
            seen |= methods
    return frozenset(found)


def _code(member: object) -> list[types.CodeType]:
    """The bytecode of a method or property, and of the functions inside it."""
    method = inspect.unwrap(member.fget) if isinstance(member, property) and member.fget else member
    method = inspect.unwrap(method) if callable(method) else getattr(method, "__func__", None)
    codes = [method.__code__] if inspect.isfunction(method) else []
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return codes


def _loaded(code: types.CodeType) -> list[str | None]:
    """The attributes that are loaded one after the other; None for any other instruction."""
    loaded: list[str | None] = []
    variables: dict[str, str | None] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_FAST":
            variables[instruction.argval] = loaded[-1] if loaded else None
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):  # the latter up to Python 3.11
            loaded.append(instruction.argval)
        else:
            loaded.append(variables.get(instruction.argval) if instruction.opname == "LOAD_FAST" else None)
    return loaded
