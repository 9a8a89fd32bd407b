"""What a packed layer is, apart from its numbers: kind, geometry, quantization.

One record serves the packed layers, the file that holds them, and the check of one against the other.
Every layer is described as a 2-d convolution: a linear layer has a 1x1 kernel, a 1-d convolution a kernel
of height 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from foldbit.core import schemes
from foldbit.core.config import QuantConfig
from foldbit.kernels import layout

Kind = Literal["linear", "conv1d", "conv2d"]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Pair = tuple[int, int]

_MAX_SIZE = 1 << 24  # a bound on every size that a file may claim


@dataclass(frozen=True)
class LayerSpec:
    """Kind, geometry and quantization of a packed layer.

    Attributes:
        kind: ``linear``, ``conv1d`` or ``conv2d``.
        in_channels, out_channels, groups, padding_mode: as in torch.nn.
        kernel_size, stride, dilation: (vertical, horizontal).
        padding: (top, bottom, left, right).
        bias: whether there is one.
        config: how weight and input are quantized.
    """

    kind: Kind
    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair
    padding: tuple[int, int, int, int]
    dilation: Pair
    groups: int
    padding_mode: PaddingMode
    bias: bool
    config: QuantConfig

    @classmethod
    def of(cls, layer: nn.Module, config: QuantConfig) -> LayerSpec:
        """The spec of a torch.nn layer, or of a subclass of one, quantized so.

        Raises:
            TypeError: for a layer of another kind.
        """
        if isinstance(layer, nn.Linear):
            has_bias = layer.bias is not None
            return cls(
                "linear", layer.in_features, layer.out_features, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1,
                "zeros", has_bias, config,
            )  # fmt: skip
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            raise TypeError(f"expected a Linear, Conv1d or Conv2d layer, got {type(layer).__name__}")
        flat = isinstance(layer, nn.Conv1d)
        # Torch keeps padding as (left, right, top, bottom), whatever way it was spelled.
        left, right, *vertical = layer._reversed_padding_repeated_twice
        top, bottom = vertical or (0, 0)
        return cls(
            kind="conv1d" if flat else "conv2d",
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            kernel_size=_pair(layer.kernel_size),
            stride=_pair(layer.stride),
            padding=(top, bottom, left, right),
            dilation=_pair(layer.dilation),
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            bias=layer.bias is not None,
            config=config,
        )

    def attributes(self) -> dict[str, Any]:
        """What forward passes and tools read of such a layer of torch.nn, under its names there."""
        if self.kind == "linear":
            return {"in_features": self.in_channels, "out_features": self.out_channels}
        names = ("in_channels", "out_channels", "groups", "padding_mode", "kernel_size", "stride", "dilation")
        found = {name: getattr(self, name) for name in names}
        if self.kind == "conv1d":
            found |= {name: found[name][1:] for name in ("kernel_size", "stride", "dilation")}
        return found

    @property
    def channels(self) -> int:
        """Input channels that an output channel sees."""
        return self.in_channels // self.groups

    @property
    def segments(self) -> int:
        """Runs of input channels that have a weight scale of their own."""
        return self.channels // self.config.group_size if self.config.group_size else 1

    @property
    def weight_planes(self) -> int:
        """Bits per weight."""
        return schemes.parse(self.config.weight).planes

    @property
    def activation_planes(self) -> int:
        """Bits per input value; 0 where the input stays float."""
        return schemes.parse(self.config.activation).planes

    @property
    def is_static(self) -> bool:
        """Whether the input's scales are fixed, hence stored."""
        return self.activation_planes > 0 and self.config.activation_scales == "static"

    def differences(self, other: LayerSpec) -> str:
        """What is different in the other, as in ``stride (1, 1), not (2, 2)``."""
        mine, theirs = (dataclasses.asdict(spec) for spec in (self, other))
        for fields in (mine, theirs):
            fields |= fields.pop("config")
        return "; ".join(f"{k} {mine[k]}, not {theirs[k]}" for k in mine if mine[k] != theirs[k])

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for an input of that size.

        Raises:
            ValueError: where the kernel is larger than the padded input.
        """
        if self.kind == "linear":
            return height, width  # of which there may be none
        top, bottom, left, right = self.padding
        height, width = height + top + bottom, width + left + right
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        spans = dh * (kh - 1) + 1, dw * (kw - 1) + 1
        if height < spans[0] or width < spans[1]:
            raise ValueError(
                f"the kernel spans {spans[0]}×{spans[1]}, but the input is only {height}×{width}, "
                "padding included"
            )
        return (height - spans[0]) // self.stride[0] + 1, (width - spans[1]) // self.stride[1] + 1

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of everything that the layer stores: the layout of packed files."""
        k, out = self.weight_planes, self.out_channels
        stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "planes": (torch.uint8, (k, out, *self.kernel_size, layout.bytes_for(self.channels))),
            "scales": (torch.float32, self._scales_shape()),
        }
        if self.bias:
            stored["bias"] = (torch.float32, (out,))
        if self.is_static:
            stored["activation_scales"] = (torch.float32, (self.activation_planes,))
        return stored

    def _scales_shape(self) -> tuple[int, ...]:
        k, out = self.weight_planes, self.out_channels
        # Two that no file holds (QuantConfig.why_not_packed), for the bytes that they would take.
        if self.config.granularity == "input":
            return (k, self.in_channels)
        if self.config.rank is not None:
            return (k, self.config.rank, out + self.channels * self.kernel_size[0] * self.kernel_size[1])
        return (k, out) if self.segments == 1 else (k, out, self.segments)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> LayerSpec:
        """The spec of plain values that nobody has checked yet.

        Raises:
            ValueError: for anything that does not describe a layer.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or set(fields) != set(names):
            raise ValueError(f"a layer has the fields {', '.join(names)}; got {_brief(fields)}")
        choices = {"kind": get_args(Kind), "padding_mode": get_args(PaddingMode), "bias": (True, False)}
        for name, allowed in choices.items():
            given = fields[name]
            if not any(type(given) is type(value) and given == value for value in allowed):
                raise ValueError(f"{name} is one of {allowed}; got {_brief(given)}")
        checked = dict(fields)
        for name in ("in_channels", "out_channels", "groups"):
            _check_sizes(name, [fields[name]], 1, at_least=1)
        for name, count, least in (
            ("kernel_size", 2, 1), ("stride", 2, 1), ("dilation", 2, 1), ("padding", 4, 0),
        ):  # fmt: skip
            _check_sizes(name, fields[name], count, at_least=least)
            checked[name] = tuple(fields[name])
        if fields["in_channels"] % fields["groups"] or fields["out_channels"] % fields["groups"]:
            raise ValueError(f"groups {fields['groups']} does not divide the channels")
        if not isinstance(fields["config"], dict):
            raise ValueError(f"config is a mapping; got {_brief(fields['config'])}")
        try:
            checked["config"] = QuantConfig.from_dict(fields["config"])
        except (TypeError, OverflowError) as error:  # the latter from integers too large for a float
            raise ValueError(str(error)) from error
        spec = cls(**checked)
        if spec.weight_planes == 0:
            raise ValueError("a packed layer has a quantized weight; got scheme 'fp'")
        if spec.config.why_not_packed is not None:
            raise ValueError(spec.config.why_not_packed)
        if spec.config.group_size and spec.channels % spec.config.group_size:
            raise ValueError(f"group_size {spec.config.group_size} does not divide {spec.channels} channels")
        return spec


def _pair(sizes: Any) -> Pair:
    return (1, int(sizes[0])) if len(sizes) == 1 else (int(sizes[0]), int(sizes[1]))


def _check_sizes(name: str, given: Any, count: int, *, at_least: int) -> None:
    ok = isinstance(given, list | tuple) and len(given) == count
    if not ok or not all(type(size) is int and at_least <= size <= _MAX_SIZE for size in given):
        raise ValueError(
            f"{name} is {count} whole number(s) from {at_least} to {_MAX_SIZE}; got {_brief(given)}"
        )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
