"""Where quantization loses: the relative squared error of every quantized layer's weight and input."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLinear


@dataclass(frozen=True)
class LayerError:
    """‖x − x̂‖² / ‖x‖² of a layer's weight and of its input (before the clamp).

    Attributes:
        name: the layer's, in the model.
        weight: 0 for a weight of zeros.
        activation: over all calls of the layer together; NaN for a layer that was not called.
    """

    name: str
    weight: float
    activation: float


@torch.no_grad()
def layer_errors(model: nn.Module, x: Tensor) -> list[LayerError]:
    """Run x through a quantized model in evaluation mode, and measure each quantized layer.

    Raises:
        ValueError: where the model has no quantized layers.
    """
    layers = {
        name: m for name, m in model.named_modules() if isinstance(m, QuantConv2d | QuantConv1d | QuantLinear)
    }
    if not layers:
        raise ValueError("the model has no quantized layers; measure it before foldbit.pack_")
    inputs: dict[nn.Module, list[Tensor]] = {layer.input_quantizer: [] for layer in layers.values()}

    def measure(quantizer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        inputs[quantizer].append(_squares(given[0], output))

    handles = [quantizer.register_forward_hook(measure) for quantizer in inputs]
    before = {module: module.training for module in model.modules()}
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code may call no hooks
            model.eval()(x)
    finally:
        for module, training in before.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return [
        LayerError(
            name,
            _ratio([_squares(layer.weight, layer.weight_quantizer(layer.weight))]),
            _ratio(inputs[layer.input_quantizer]),
        )
        for name, layer in layers.items()
    ]


def _squares(x: Tensor, approximation: Tensor) -> Tensor:
    """‖x − x̂‖² and ‖x‖², float64 ``[2]``."""
    x = x.double()
    return torch.stack([(x - approximation.double()).square().sum(), x.square().sum()])


def _ratio(squares: list[Tensor]) -> float:
    if not squares:
        return math.nan
    lost, energy = torch.stack(squares).sum(0).tolist()
    return float(lost / energy if energy else lost)
