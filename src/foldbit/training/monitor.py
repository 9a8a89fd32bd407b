"""What quantization does while a network trains: scales, flips, dead gradients and errors, layer by layer.

At a looked-at step every quantized layer is measured; at all others nothing is done, and no hook is there.
What is measured of a layer, and called so in TensorBoard:

    weight scale i       the mean over channels of the scale v_i of its weights
    weight error         ‖w − ŵ‖² / ‖w‖²
    weight flips         share of weights whose sign is not that of the last look
    weight dead          share of weights that the estimator gives no gradient
    weight negative i    share of plane i that is −1
    activation ...       the same of its input (before the clamp, the first 32 images of the batch); no flips

Measuring changes nothing: no running average, no random number, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foldbit.core import folding
from foldbit.nn import estimators
from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear
from foldbit.nn.quantizers import ActivationQuantizer

_IMAGES = 32

#: Later planes of less than this share of the first one's scale are starved; they change nothing.
STARVED = 1e-3

#: A larger share of dead activations is worth a warning.
DEAD = 0.95

#: ``measured[layer][what]``
Measured = Mapping[str, Mapping[str, float]]


class Monitor:
    """Looks at the quantized layers of a model at some of its training steps.

    Args:
        model: the model itself, not what wraps it for several processes.
        every: steps from look to look; the very first step and the last one of each epoch are looked at
            besides. 0 never looks.

    Cost of a look: for each layer some ten elementwise passes over 32 images' input and over the weights.
    Between looks a byte a weight is kept, for the flips.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self.every = every
        quantized = (QuantConv2d, QuantConv1d, QuantLinear)
        self.layers: dict[str, QuantLayer] = {
            name: m for name, m in model.named_modules() if isinstance(m, quantized)
        }
        self._signs: dict[str, Tensor] = {}
        self._found: list[tuple[str, str, Tensor]] = []

    def due(self, step: int, ends_epoch: bool) -> bool:
        """Whether to look at this step, counted from 1 over the whole training."""
        if not self.every or not self.layers:
            return False
        return ends_epoch or step == 1 or step % self.every == 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the forward pass within, and the weights that it used."""

        def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            return lambda quantizer, inputs: self._measure_input(name, quantizer, inputs[0])

        handles = [
            layer.input_quantizer.register_forward_pre_hook(watch(name))
            for name, layer in self.layers.items()
            if not layer.input_quantizer.scheme.is_float
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for name, layer in self.layers.items():
            if not layer.weight_quantizer.scheme.is_float:
                self._measure_weight(name, layer)

    def take(self) -> dict[str, dict[str, float]]:
        """What was measured since this was last called, ``[layer][what]``. It waits for the device, once."""
        found, self._found = self._found, []
        measured: dict[str, dict[str, float]] = {}
        values = torch.stack([value.double() for _, _, value in found]).tolist() if found else []
        for (layer, what, _), value in zip(found, values, strict=True):
            measured.setdefault(layer, {})[what] = value
        return measured

    def _measure_weight(self, name: str, layer: QuantLayer) -> None:
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        self._add_approximation(name, "weight", weight, quantizer)
        if layer.config.why_not_packed is None:  # else there is no scale a channel and plane to speak of
            planes, scales = quantizer.codes(weight)
            self._add_planes(name, "weight", planes, scales.flatten(1).mean(1))
        signs = weight < 0
        if name in self._signs:
            self._found.append((name, "weight flips", (signs != self._signs[name]).double().mean()))
        self._signs[name] = signs

    def _measure_input(self, name: str, quantizer: nn.Module, x: Tensor) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        if x.numel() == 0:
            return
        x = x.detach()[:_IMAGES].float()
        clamp = quantizer.clamp
        scales, dims = quantizer.solve(x)
        self._add_approximation(
            name,
            "activation",
            x,
            lambda leaf: estimators.approximate(leaf, scales, dims, quantizer.estimator, clamp),
        )
        clipped = x if clamp is None else x.clamp(-clamp, clamp)
        planes = folding.fold(clipped, scales, dims)
        self._add_planes(name, "activation", planes, scales.reshape(-1, len(planes)).mean(0))

    def _add_approximation(
        self, name: str, what: str, x: Tensor, approximate: Callable[[Tensor], Tensor]
    ) -> None:
        """The error of x̂, and where a gradient of ones ends, as the quantizer itself passes it on."""
        leaf = x.requires_grad_()
        with torch.enable_grad():
            approximation = approximate(leaf)
            (passed,) = torch.autograd.grad(approximation.sum(), leaf)
        exact, approximation = x.detach().double(), approximation.detach().double()
        error = (exact - approximation).square().sum() / exact.square().sum()
        self._found.append((name, f"{what} error", error))
        self._found.append((name, f"{what} dead", (passed == 0).double().mean()))

    def _add_planes(self, name: str, what: str, planes: Tensor, scales: Tensor) -> None:
        for i, (plane, scale) in enumerate(zip(planes, scales, strict=True), 1):
            self._found.append((name, f"{what} scale {i}", scale))
            self._found.append((name, f"{what} negative {i}", plane.double().mean()))


def complaints(measured: Measured) -> dict[tuple[str, str], str]:
    """What is wrong with the planes of a measured network, and what to do about it.

    Returns:
        Sentences, by layer and kind of complaint, of which a training says each but once.
    """
    found = {}
    for layer, values in measured.items():
        for what in ("weight", "activation"):
            for kind, sentence in _of_planes(what, values):
                found[layer, f"{what}, {kind}"] = f"layer {layer}: {sentence}"
        if values.get("activation dead", 0.0) > DEAD and values["activation scale 1"] > 0:
            found[layer, "activation, dead"] = (
                f"layer {layer}: {values['activation dead']:.1%} of its inputs get no gradient, for they lie "
                "outside the clamp or the estimator's window; take a larger clamp, a batch norm before the "
                "layer, or activation_estimator 'polynomial', which follows the scales"
            )
    return found


def _of_planes(what: str, values: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    first = values.get(f"{what} scale 1")
    if first is None:
        return
    whose = "weights" if what == "weight" else "inputs"
    if first == 0:
        yield "zero", f"its {whose} are all 0, so that nothing passes it; look at what comes before it"
        return
    i = 1
    while (scale := values.get(f"{what} scale {i}")) is not None:
        negative = values[f"{what} negative {i}"]
        if scale < STARVED * first:
            yield (
                f"starved {i}",
                f"plane {i} of its {whose} adds nothing (its scale is {scale:.2g}, that of plane 1 is "
                f"{first:.2g}): they have few levels already, and fewer planes would do",
            )
        elif negative in (0.0, 1.0):
            sign = "negative" if negative else "positive"
            advice = (
                "as behind a ReLU; normalise before the layer, as XNOR blocks do"
                if what == "activation" and i == 1
                else "and fewer planes would do"
            )
            yield (
                f"constant {i}",
                f"plane {i} of its {whose} is {sign} throughout and tells nothing, {advice}",
            )
        i += 1
