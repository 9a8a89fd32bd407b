"""Where quantization loses: the relative squared error of every quantized layer's weight and input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLinear


@dataclass(frozen=True)
class LayerError:
    """‖x − x̂‖² / ‖x‖² of a layer's weight and of its input (before the clamp)."""

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
    activation: dict[nn.Module, float] = {}

    def measure(quantizer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        activation[quantizer] = _relative_error(inputs[0], output)

    handles = [layer.input_quantizer.register_forward_hook(measure) for layer in layers.values()]
    was_training = model.training
    try:
        model.eval()(x)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [
        LayerError(
            name,
            _relative_error(layer.weight, layer.weight_quantizer(layer.weight)),
            activation[layer.input_quantizer],
        )
        for name, layer in layers.items()
    ]


def _relative_error(x: Tensor, approximation: Tensor) -> float:
    x = x.double()
    return float((x - approximation.double()).square().sum() / x.square().sum())
