"""Static activation scales from pooled statistics: calibrate(model, batches).

Scales that are fixed have to serve all inputs at once. Those of least squared error are the optimum of all
the inputs taken together, and not the average of each input's own: where the sizes of normal inputs differ by
a log-normal factor of σ = ½, the average leaves a relative error of .225, the pooled optimum .194, and each
input's own scales, which only dynamic ones can be, .118.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foldbit import convert
from foldbit.core import schemes
from foldbit.core.pooled import Pool
from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear
from foldbit.nn.quantizers import ActivationQuantizer
from foldbit.packed.layers import PackedLayer
from foldbit.tables import table

_QUANTIZED = (QuantConv2d, QuantConv1d, QuantLinear)


@dataclass(frozen=True)
class LayerCalibration:
    """What a layer's input was like, and the static scales it got.

    Attributes:
        name: the layer.
        scheme: how its input is quantized.
        scales: the scales, the largest first.
        error: squared error of the input on all batches, relative to its squares, with these scales.
        excess: how much of it is above the least possible, at most; None where the scheme promises nothing.
        error_before: the error that the static scales it had would have left; None where it had none.
        values: how many values the layer saw.
        negative: whether any of them was below 0.
    """

    name: str
    scheme: str
    scales: tuple[float, ...]
    error: float
    excess: float | None
    error_before: float | None
    values: int
    negative: bool

    @property
    def warning(self) -> str | None:
        """What is wrong with the layer's input, if anything is."""
        if self.negative or schemes.parse(self.scheme).planes > 1:
            return None
        return (
            "its input is never below 0, so that 1 bit of it says nothing; put a batch norm between the "
            "nonlinearity and the layer, or quantize it with 2 bits"
        )


@dataclass(frozen=True)
class CalibrationReport:
    """What :func:`calibrate` did: layers in the order of the model, and the ones it left, with the reason."""

    layers: tuple[LayerCalibration, ...]
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [
            [
                layer.name,
                layer.scheme,
                " ".join(f"{v:.4f}" for v in layer.scales),
                f"{layer.error:.4f}",
                "-" if layer.error_before is None else f"{layer.error_before:.4f}",
                "-" if layer.excess is None else f"{layer.excess:.0e}",
                f"{layer.values:,}",
            ]
            for layer in self.layers
        ]
        header = ["layer", "input", "static scales", "error", "error before", "excess at most", "values"]
        warnings = {layer.name: layer.warning for layer in self.layers if layer.warning}
        notes = [f"{name}: {note}" for name, note in (*self.left.items(), *warnings.items())]
        return "\n".join([table(header, rows), *notes])


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], object] | None = None,
    progress: bool = True,
) -> CalibrationReport:
    """Give every quantized layer static activation scales: the optimum over all batches taken together.

    The model runs once over the batches, in evaluation mode and without gradients, with the scales it has
    (dynamic ones, running averages, earlier calibrated ones), while each layer's clamped input goes into a
    histogram; then all layers get their scales. Layers with dynamic scales become static ones, so that they
    compute without solving. Later layers thus saw inputs made with the scales of before; calibrating once
    more lets them see those of after.

    Args:
        model: a network that :func:`foldbit.quantize_` converted; changed in place.
        batches: tensors, or tuples, lists or mappings whose first item is the input, as a data loader
            yields them. A few hundred inputs that are like those to come will do.
        run: how to run the model on a batch, where ``model(input)`` is not it.
        progress: show a progress bar, on a terminal and where tqdm is installed.

    Returns:
        For each layer its scales, the error they leave, how far from optimal they can be, and the values it
        was computed from.

    Raises:
        TypeError: where the model is a layer itself, or batches are not batches.
        ValueError: where the model is packed or has no layer that quantizes its input, there are no batches,
            or an input holds NaN or infinity. The model is then unchanged.

    Cost: the forward passes, and some ten elementwise passes over each layer's input; 400 KB a layer.

    Example:
        >>> import torch, foldbit as fb
        >>> model = fb.quantize_(torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3))))
        >>> report = fb.calibrate(model, [torch.randn(64, 8) for _ in range(4)])
        >>> [layer.name for layer in report.layers], report.layers[0].values
        (['1'], 2048)
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            "batches are several: for a single one, pass it in a list, as in calibrate(model, [x])"
        )
    layers = _layers(model)
    pools = {name: _Inputs(layer.weight.device) for name, layer in layers.items()}
    # Compiled networks run uncompiled: compiled code that exists already would not call the hooks.
    uncompiled = torch.compiler.set_stance("force_eager")
    with _watched(layers, pools), _evaluating(model), torch.no_grad(), uncompiled:
        number = 0
        for number, batch in enumerate(_bar(batches, progress), 1):
            if run is not None:
                run(model, batch)
            else:
                model(_to(_input(batch), model))
            _check_finite(pools, number)
    if number == 0:
        raise ValueError("there are no batches; if they come from an iterator, it was used up before")
    left = {name: "left as it was: no input reached it" for name, pool in pools.items() if pool.count == 0}
    solved = {name: pool.solve(layers[name].config.activation) for name, pool in pools.items() if pool.count}
    entries = []
    for name, found in solved.items():
        quantizer = layers[name].input_quantizer
        before = pools[name].error(quantizer.running_scales) if quantizer.static and quantizer.seen else None
        scales = tuple(found.scales.tolist())
        entries.append(
            LayerCalibration(
                name,
                str(quantizer.scheme),
                scales,
                found.error,
                found.excess,
                before,
                pools[name].count,
                bool(pools[name].negative),
            )
        )
    for name, found in solved.items():
        _set_scales(layers[name], found.scales)
    convert.update_report(model, {name: layers[name].config for name in solved})
    return CalibrationReport(tuple(entries), left)


class _Inputs(Pool):
    """What reached a layer, and whether any of it was below 0."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.negative = torch.zeros((), dtype=torch.bool, device=device)

    def add(self, x: Tensor) -> None:
        super().add(x)
        self.negative = self.negative | (x < 0).any()


def has_dynamic_scales(model: nn.Module) -> bool:
    """Whether a layer of the model solves for the scales of every input."""
    return any(
        isinstance(m, _QUANTIZED)
        and not m.input_quantizer.scheme.is_float
        and m.config.activation_scales == "dynamic"
        for m in model.modules()
    )


def _layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The layers that quantize their input, by name."""
    if isinstance(model, _QUANTIZED):
        raise TypeError(
            f"calibrate looks at layers inside a model; wrap this {type(model).__name__} in nn.Sequential"
        )
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, _QUANTIZED)}
    layers = {name: m for name, m in quantized.items() if not m.input_quantizer.scheme.is_float}
    if layers:
        return layers
    if any(isinstance(m, PackedLayer) for m in model.modules()):
        raise ValueError("this model is packed already, its scales are in the bits; calibrate before pack_")
    if quantized:
        raise ValueError(
            "nothing to calibrate: all quantized layers leave their input float (activation 'fp')"
        )
    raise ValueError("nothing to calibrate: the model has no quantized layers; call foldbit.quantize_ first")


@contextmanager
def _watched(layers: Mapping[str, QuantLayer], pools: Mapping[str, Pool]) -> Iterator[None]:
    """Pour what reaches a layer's quantizer into its pool."""

    def watch(pool: Pool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def pour(quantizer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(quantizer, ActivationQuantizer)
            x = arguments[0]
            pool.add(x if quantizer.clamp is None else x.clamp(-quantizer.clamp, quantizer.clamp))

        return pour

    hooks = [
        layer.input_quantizer.register_forward_pre_hook(watch(pools[name])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's own again."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _bar(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if progress and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        bar: Iterable[Any] = tqdm(batches, desc="calibrating", unit="batch", leave=False, disable=None)
        return bar
    return batches


def _input(batch: Any) -> Tensor:
    first = batch
    while isinstance(first, Sequence | Mapping) and not isinstance(first, str) and len(first):
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if not isinstance(first, Tensor):
        raise TypeError(
            "a batch is a tensor, or a tuple, list or mapping whose first item is the input; "
            f"got {type(batch).__name__}; pass run=lambda model, batch: ... to run it another way"
        )
    return first


def _to(x: Tensor, model: nn.Module) -> Tensor:
    """The input, on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return x if parameter is None else x.to(parameter.device)


def _check_finite(pools: Mapping[str, Pool], number: int) -> None:
    # One look a batch, for it waits for the device.
    broken = torch.stack([pool.broken().cpu() for pool in pools.values()])
    if broken.any():
        name = list(pools)[int(broken.int().argmax())]
        raise ValueError(
            f"batch {number} brings NaN or infinity to the input of layer {name}, so it has no scales; "
            "look at the data and at the layers before it"
        )


def _set_scales(layer: QuantLayer, scales: Tensor) -> None:
    """Make these the layer's static scales."""
    old = layer.input_quantizer
    if not old.static:
        layer.config = dataclasses.replace(layer.config, activation_scales="static")
        layer.input_quantizer = ActivationQuantizer(layer.config, old.momentum, layer.weight.device)
        layer.input_quantizer.train(old.training)
    layer.input_quantizer.set_scales(scales)
