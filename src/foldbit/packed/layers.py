"""Packed layers: bits and scales instead of float weights, bitwise kernels instead of float products.

A packed layer computes what its quantized twin computes in evaluation. The integers are exact, so the two
differ by float rounding only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foldbit.core import schemes, solvers
from foldbit.kernels import layout
from foldbit.packed import ops, thresholds
from foldbit.packed.spec import LayerSpec
from foldbit.packed.weight import PackedWeight


@dataclass(frozen=True)
class Neighbours:
    """Modules whose work a packed layer does, as they were before.

    Attributes:
        before: monotone ones that its input goes through, in order: batch norm, ReLU and the like.
        norm_after: a batch norm of its output.
        nonlinearity: after that: ReLU, LeakyReLU, PReLU or Identity.
    """

    before: tuple[nn.Module, ...] = ()
    norm_after: nn.BatchNorm1d | nn.BatchNorm2d | None = None
    nonlinearity: nn.Module | None = None

    @property
    def by_channel(self) -> bool:
        """Whether one of them treats channels differently."""
        norms = any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in (*self.before, self.norm_after))
        slopes = self.nonlinearity
        return norms or (isinstance(slopes, nn.PReLU) and slopes.num_parameters > 1)


class PackedLayer(nn.Module):
    """What all packed layers share; use :class:`PackedConv2d`, :class:`PackedConv1d`, :class:`PackedLinear`.

    A packed layer is for inference on the CPU and is not differentiable. Its tensors keep their dtypes,
    layout and device whatever ``model.to(...)`` asks for. With a float input (activation scheme ``fp``) the
    weight is stored in bits and unpacked at every call: small, not fast.

    Attributes:
        spec: kind, geometry and quantization.
        planes: the weight's sign planes, ``uint8 [k, out, kh, kw, ceil(in/8)]``.
        scales: their scales, ``float32 [k, out]``, or ``[k, out, segments]`` when scaled by group.
        bias: ``float32 [out]`` or None.
        activation_scales: the input's scales ``float32 [k]`` where they are static, else None.

    A packed layer can do the work of its neighbours (:mod:`foldbit.packed.fusion`): monotone modules before
    it become thresholds, a batch norm after it changes its scales and bias, a ReLU is its last step.
    """

    planes: Tensor
    scales: Tensor
    bias: Tensor | None
    activation_scales: Tensor | None
    words: Tensor
    weight_scales: Tensor
    input_scales: Tensor | None
    output_bias: Tensor | None
    thresholds: Tensor | None
    flips: Tensor | None
    slopes: Tensor | None

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.__dict__.update(spec.attributes())
        stored = spec.tensors()
        for name in ("planes", "scales", "bias", "activation_scales"):
            dtype, shape = stored.get(name, (None, ()))
            empty = torch.zeros(shape, dtype=dtype, device="cpu") if name in stored else None
            self.register_buffer(name, empty)
        # What the kernels take, made from the tensors above whenever those are loaded.
        # No buffers: those cost a search at every use, and layers of a small network take microseconds.
        self.words = torch.empty(0, dtype=torch.int32, device="cpu")
        self.weight_scales = torch.empty(0, device="cpu")
        self.input_scales = self.output_bias = self.thresholds = self.flips = self.slopes = None
        self.neighbours = Neighbours()
        self.register_load_state_dict_post_hook(PackedLayer._lay_out)

    @classmethod
    def from_codes(
        cls,
        spec: LayerSpec,
        planes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        activation_scales: Tensor | None,
    ) -> PackedLayer:
        """Pack a layer.

        Args:
            spec: kind, geometry and quantization.
            planes: boolean ``[k, out, in/groups, *kernel]``, True where negative.
            scales: ``[k, out, segments]``.
            bias: ``[out]`` or None.
            activation_scales: ``[k]`` where the input's scales are static, else None.
        """
        layer = _KINDS[spec.kind](spec)
        bits = planes.reshape(*planes.shape[:2], spec.channels, *spec.kernel_size).movedim(2, -1)
        state = {
            "planes": torch.from_numpy(layout.pack_bits(bits.cpu().numpy())),
            "scales": scales.float().reshape(layer.scales.shape),
        }
        if bias is not None:
            state["bias"] = bias.detach().float()
        if activation_scales is not None:
            state["activation_scales"] = activation_scales.float()
        layer.load_state_dict(state)
        return layer.eval()

    def absorb(self, neighbours: Neighbours) -> None:
        """Do the work of these modules, as they are now, from here on."""
        self.neighbours = neighbours
        self.lay_out()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output, in the dtype of the input, and the residual added to it.

        Args:
            input: of any float dtype.
            residual: of the output's shape. Dense channels-last memory is read as it is.

        Raises:
            RuntimeError: in training mode, where a gradient would silently stop here.
            TypeError: for an input that is not float.
            ValueError: for an input or a residual of another shape.
        """
        x = input
        if self.training and x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "packed layers are for inference and pass no gradient on; train the quantized model, "
                "then pack it, or call model.eval()"
            )
        images = self._as_images(x)
        if self.spec.config.activation == "fp":
            y = self._from_images(self._float_conv(images), x).to(x.dtype)
            if residual is not None:
                _check_residual(residual, y.shape)
            return y if residual is None else y + residual
        added = None if residual is None else self._as_output_images(_float32(residual), x)
        y = self._from_images(self._bitwise_conv(images, added), x)
        return y if y.dtype is x.dtype else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Quantization and geometry."""
        s = self.spec
        return (
            f"{s.config.name}, {s.in_channels}, {s.out_channels}, kernel_size={s.kernel_size}, "
            f"stride={s.stride}, padding={s.padding}, dilation={s.dilation}, groups={s.groups}, bias={s.bias}"
        )

    @property
    def weight(self) -> PackedWeight:
        """The approximated weight, without any neighbour's work: ``layer.weight()`` is the tensor."""
        return PackedWeight(self.spec, self.planes, self.scales)

    def _bitwise_conv(self, x: Tensor, residual: Tensor | None) -> Tensor:
        spec = self.spec
        if spec.config.clamp is not None and self.thresholds is None:
            x = x.clamp(-spec.config.clamp, spec.config.clamp)
        scales = self._input_scales(x)
        out_size = spec.out_size(x.shape[2], x.shape[3])
        x = _float32(x if spec.padding_mode == "zeros" else self._pad(x)[0])
        return ops.packed_conv(x, self.constants, scales, out_size, residual)

    def _input_scales(self, x: Tensor) -> Tensor:
        """The input's scales, float32 ``[N, k]``."""
        if self.input_scales is not None:
            return self.input_scales
        scheme = schemes.parse(self.spec.config.activation)
        if x.numel() == 0:
            return x.new_zeros(x.shape[0], scheme.planes, dtype=torch.float32)
        per_sample = self.spec.config.activation_granularity == "sample"
        scales = solvers.solve(x, scheme, tuple(range(1, x.ndim)) if per_sample else None)
        return scales.float().expand(x.shape[0], -1)

    def _float_conv(self, x: Tensor) -> Tensor:
        spec = self.spec
        x, (top, bottom, left, right) = self._pad(x)
        x = F.pad(x, (left, right, top, bottom))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(
            x, self.weight.as_images().to(x.dtype), bias, spec.stride, 0, spec.dilation, spec.groups
        )

    def _pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Pad with values where the padding mode asks for values; say what zero padding is left to do."""
        if self.spec.padding_mode == "zeros":
            return x, self.spec.padding
        top, bottom, left, right = self.spec.padding
        return F.pad(x, (left, right, top, bottom), mode=self.spec.padding_mode), (0, 0, 0, 0)

    def _as_images(self, x: Tensor) -> Tensor:
        """View the input as ``[N, C, H, W]``."""
        raise NotImplementedError

    def _from_images(self, y: Tensor, x: Tensor) -> Tensor:
        """View the output ``[N, out, OH, OW]`` in the rank of the input x."""
        raise NotImplementedError

    def _as_output_images(self, y: Tensor, x: Tensor) -> Tensor:
        """View something of the output's shape as ``[N, out, OH, OW]``; undoes :meth:`_from_images`."""
        raise NotImplementedError

    def _for_neighbours(self, x: Tensor) -> Tensor:
        """View values ``[n, channels]`` as a batch of inputs."""
        raise NotImplementedError

    def _check_input(self, x: Tensor, ranks: tuple[int, ...], channel_dim: int, expected: str) -> None:
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} got an input of {x.dtype}; expected float32, or another float type"
            )
        if x.ndim not in ranks or x.shape[channel_dim] != self.spec.in_channels:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; expected {expected} "
                f"with C = {self.spec.in_channels}"
            )

    @staticmethod
    def _lay_out(layer: nn.Module, _incompatible_keys: Any) -> None:
        assert isinstance(layer, PackedLayer)
        spec = layer.spec
        words = layout.disk_to_kernel(
            layer.planes.numpy(), spec.channels, groups=spec.groups, segments=spec.segments
        )
        # A copy: torch aligns its memory to whole vectors, NumPy does not, and loads across lines are slower.
        layer.words = torch.from_numpy(words.view("int32")).clone()
        layer.lay_out()

    @torch.no_grad()
    def lay_out(self) -> None:
        """Bring scales, bias and neighbours into the kernels' form: to be called whenever they change."""
        spec = self.spec
        self.weight_scales = self.scales.reshape(spec.weight_planes, spec.out_channels, spec.segments)
        self.output_bias = self.bias
        if self.neighbours.norm_after is not None:
            gain, shift = affine(self.neighbours.norm_after)
            self.weight_scales = (self.weight_scales * gain[:, None]).float()
            self.output_bias = (shift if self.bias is None else self.bias * gain + shift).float()
        self.slopes = _slopes(self.neighbours.nonlinearity, spec.out_channels)
        if self.activation_scales is not None:
            self.input_scales = self.activation_scales.unsqueeze(0)
            self.thresholds = self.flips = None
            if spec.activation_planes <= thresholds.MAX_PLANES:
                with torch.device("cpu"):  # which need not be the default
                    found = thresholds.find(self._before_folding(), self.activation_scales, spec.in_channels)
                self.thresholds, self.flips = thresholds.lay_out(*found, spec.groups * spec.segments)
        self.constants = ops.Constants(
            self.words,
            self.weight_scales,
            self.output_bias,
            spec.stride,
            spec.padding[::2] if spec.padding_mode == "zeros" else (0, 0),  # top and left
            spec.dilation,
            self.thresholds,
            self.flips,
            self.slopes,
        )

    def _before_folding(self) -> Callable[[Tensor], Tensor]:
        """What happens to values ``[n, channels]`` before they are folded."""
        # Copies: a network in half precision, or on another device, still folds in float32 on the CPU.
        before = [copy.deepcopy(m).cpu().float().eval() for m in self.neighbours.before]
        clamp = self.spec.config.clamp

        def function(x: Tensor) -> Tensor:
            y = self._for_neighbours(x)
            for module in before:
                y = module(y)
            return (y if clamp is None else y.clamp(-clamp, clamp)).reshape(x.shape)

        return function

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        return self  # see the class: .to(), .half() and the like change float layers, not packed ones


class PackedConv2d(PackedLayer):
    """A packed 2-d convolution. Input ``[N, C, H, W]`` or ``[C, H, W]``; the output is channels-last."""

    def _as_images(self, x: Tensor) -> Tensor:
        self._check_input(x, (3, 4), -3, "[N, C, H, W] or [C, H, W]")
        return x if x.ndim == 4 else x.unsqueeze(0)

    def _from_images(self, y: Tensor, x: Tensor) -> Tensor:
        return y if x.ndim == 4 else y.squeeze(0)

    def _as_output_images(self, y: Tensor, x: Tensor) -> Tensor:
        return y if y.ndim == 4 else y.unsqueeze(0)

    def _for_neighbours(self, x: Tensor) -> Tensor:
        return x[:, :, None, None]


class PackedConv1d(PackedLayer):
    """A packed 1-d convolution. Input ``[N, C, L]`` or ``[C, L]``."""

    def _as_images(self, x: Tensor) -> Tensor:
        self._check_input(x, (2, 3), -2, "[N, C, L] or [C, L]")
        return (x if x.ndim == 3 else x.unsqueeze(0)).unsqueeze(2)

    def _from_images(self, y: Tensor, x: Tensor) -> Tensor:
        return y.squeeze(2) if x.ndim == 3 else y.squeeze(2).squeeze(0)

    def _as_output_images(self, y: Tensor, x: Tensor) -> Tensor:
        return (y if y.ndim == 3 else y.unsqueeze(0)).unsqueeze(2)

    def _for_neighbours(self, x: Tensor) -> Tensor:
        return x[:, :, None]


class PackedLinear(PackedLayer):
    """A packed linear layer. Input ``[N, ..., C]`` or ``[C]``; a sample is an index of the first dim."""

    def _as_images(self, x: Tensor) -> Tensor:
        self._check_input(x, tuple(range(1, max(x.ndim, 1) + 1)), -1, "[N, ..., C] or [C]")
        if x.ndim != 2 and self.neighbours.by_channel:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}; it does the work of a batch "
                "norm or PReLU, whose channels are dim 1, so it takes [N, C]; or pack with fuse=False"
            )
        if x.ndim == 2:  # the usual case, in one step: views cost as much as a small layer
            return x[:, :, None, None]
        samples = x.shape[0] if x.ndim > 1 else 1
        places = math.prod(x.shape[1:-1])
        return x.reshape(samples, places, x.shape[-1]).transpose(1, 2).unsqueeze(3)

    def _from_images(self, y: Tensor, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return y.flatten(1)
        return y.squeeze(3).transpose(1, 2).reshape(*x.shape[:-1], self.spec.out_channels)

    def _as_output_images(self, y: Tensor, x: Tensor) -> Tensor:
        _check_residual(y, torch.Size((*x.shape[:-1], self.spec.out_channels)))
        if y.ndim == 2:
            return y[:, :, None, None]
        samples = y.shape[0] if y.ndim > 1 else 1
        return y.reshape(samples, math.prod(y.shape[1:-1]), y.shape[-1]).transpose(1, 2).unsqueeze(3)

    def _for_neighbours(self, x: Tensor) -> Tensor:
        return x

    def _float_conv(self, x: Tensor) -> Tensor:
        # As a product, for a convolution refuses images without pixels.
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x.squeeze(3).transpose(1, 2), self.weight().to(x.dtype), bias)
        return y.transpose(1, 2).unsqueeze(3)


def _check_residual(residual: Tensor, shape: torch.Size) -> None:
    if residual.shape != shape:
        raise ValueError(
            f"residual must be of the output's shape {tuple(shape)}; got {tuple(residual.shape)}"
        )


def _float32(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 else x.float()


_KINDS: dict[str, type[PackedLayer]] = {
    "conv2d": PackedConv2d,
    "conv1d": PackedConv1d,
    "linear": PackedLinear,
}


@torch.no_grad()
def affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation as gain·y + shift, in float64 on the CPU, ``[channels]`` each."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean.double().cpu(), norm.running_var.double().cpu()
    gain = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double().cpu()
    shift = -mean * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double().cpu()


def _slopes(nonlinearity: nn.Module | None, channels: int) -> Tensor | None:
    """What a nonlinearity multiplies negative values by, float32 ``[channels]``; None for 1."""
    if nonlinearity is None or isinstance(nonlinearity, nn.Identity):
        return None
    if isinstance(nonlinearity, nn.PReLU):
        return nonlinearity.weight.detach().float().cpu().expand(channels).contiguous()
    slope = nonlinearity.negative_slope if isinstance(nonlinearity, nn.LeakyReLU) else 0.0
    return torch.full((channels,), slope, dtype=torch.float32, device="cpu")


def empty(spec: LayerSpec) -> PackedLayer:
    """A packed layer of that spec, all zeros: load a state into it."""
    return _KINDS[spec.kind](spec)
