"""Quantized layers: twins of torch.nn's, with the same parameters under the same names.

A float checkpoint loads strictly into them, and theirs (static scales aside) into a float network. The
forward pass quantizes the input and the weight and then does what torch.nn does; packing
(:func:`foldbit.pack_`) turns the same layer into bits.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from foldbit.core.config import QuantConfig
from foldbit.nn.quantizers import ActivationQuantizer, WeightQuantizer

DEFAULT_CONFIG = QuantConfig()


class QuantConv2d(nn.Conv2d):
    """A 2-d convolution of quantized weights and inputs.

    Takes torch.nn.Conv2d's arguments, and ``config``. Padding is added after quantization, so that a
    padded tap adds exactly nothing. Input ``[N, C, H, W]``, or ``[C, H, W]`` for a single sample.
    """

    config: QuantConfig
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def __init__(self, *args: Any, config: QuantConfig = DEFAULT_CONFIG, **kwargs: Any) -> None:
        _check_arguments(type(self).__name__, args, config)
        super().__init__(*args, **kwargs)
        _add_quantizers(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the approximations of input and weight."""
        return self._conv_forward(
            _quantize_input(self, input, 4), self.weight_quantizer(self.weight), self.bias
        )


class QuantConv1d(nn.Conv1d):
    """A 1-d convolution of quantized weights and inputs: :class:`QuantConv2d` along one dimension."""

    config: QuantConfig
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def __init__(self, *args: Any, config: QuantConfig = DEFAULT_CONFIG, **kwargs: Any) -> None:
        _check_arguments(type(self).__name__, args, config)
        super().__init__(*args, **kwargs)
        _add_quantizers(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the approximations of input and weight."""
        return self._conv_forward(
            _quantize_input(self, input, 3), self.weight_quantizer(self.weight), self.bias
        )


class QuantLinear(nn.Linear):
    """A linear layer of quantized weights and inputs ``[N, ..., in]``.

    Takes torch.nn.Linear's arguments, and ``config``. A sample is an index of the first dim.
    """

    config: QuantConfig
    weight_quantizer: WeightQuantizer
    input_quantizer: ActivationQuantizer

    def __init__(self, *args: Any, config: QuantConfig = DEFAULT_CONFIG, **kwargs: Any) -> None:
        _check_arguments(type(self).__name__, args, config)
        super().__init__(*args, **kwargs)
        _add_quantizers(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the approximations of input and weight."""
        return F.linear(_quantize_input(self, input, 2), self.weight_quantizer(self.weight), self.bias)


QuantLayer = QuantConv2d | QuantConv1d | QuantLinear

#: The twin of each float layer type.
TWINS: dict[type[nn.Module], type[QuantConv2d] | type[QuantConv1d] | type[QuantLinear]] = {
    nn.Conv2d: QuantConv2d,
    nn.Conv1d: QuantConv1d,
    nn.Linear: QuantLinear,
}


#: What a subclass may define and still be what it is a subclass of.
_SETTING_UP = {"__init__", "reset_parameters", "extra_repr"}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The type with a twin that a module is, or is a subclass of that is only set up otherwise; else None."""
    kind = next((kind for kind in TWINS if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or module._modules or module._buffers:
        return None
    own = type(module).__mro__[: type(module).__mro__.index(kind)]
    defined = {name for base in own for name, value in vars(base).items() if _is_code(value)}
    return kind if defined <= _SETTING_UP and module._parameters.keys() <= {"weight", "bias"} else None


def _is_code(value: Any) -> bool:
    return callable(value) or hasattr(type(value), "__get__")


def from_float(layer: nn.Module, config: QuantConfig) -> QuantLayer:
    """The quantized twin of a float layer. It shares the layer's parameters, hooks, attributes, mode and
    device.

    Raises:
        TypeError: for a layer without a twin.
        ValueError: where the config does not fit the layer.
    """
    twin: QuantLayer
    kind = kind_of(layer)
    if isinstance(layer, nn.Linear) and kind:
        twin = QuantLinear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta", config=config
        )
    elif isinstance(layer, nn.Conv1d | nn.Conv2d) and kind:
        twin = TWINS[kind](
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
            device="meta",
            config=config,
        )
    else:
        raise TypeError(
            f"{type(layer).__name__} has no quantized twin; those that do: "
            f"{', '.join(t.__name__ for t in TWINS)}"
        )
    twin.weight = layer.weight
    twin.bias = layer.bias
    _add_quantizers(twin, config)  # again, now that the device is known
    vars(twin).update({name: value for name, value in vars(layer).items() if name not in vars(twin)})
    keep_hooks(layer, twin)
    return twin.train(layer.training)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hand a forward pass's hooks to the module that takes a module's place; their handles go on working."""
    names = [name for name in vars(old) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))]
    vars(new).update({name: vars(old)[name] for name in names})


def _check_arguments(kind: str, args: tuple[Any, ...], config: Any) -> None:
    if any(isinstance(argument, QuantConfig) for argument in args):
        raise TypeError(f"{kind} takes its config by name: config=...")
    if not isinstance(config, QuantConfig):
        raise TypeError(f"config is a QuantConfig; got {type(config).__name__}")


def _add_quantizers(layer: QuantLayer, config: QuantConfig) -> None:
    layer.config = config
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    layer.weight_quantizer = WeightQuantizer(config, layer.weight.shape[1], groups)
    layer.weight_quantizer.check_fits(layer.weight)
    layer.input_quantizer = ActivationQuantizer(config, device=layer.weight.device)


def _quantize_input(layer: QuantLayer, x: Tensor, batched_ndim: int) -> Tensor:
    """Quantize a batch, or a single sample as a batch of one."""
    if x.ndim >= batched_ndim:
        quantized: Tensor = layer.input_quantizer(x)
        return quantized
    return layer.input_quantizer(x.unsqueeze(0)).squeeze(0)
