"""The packed convolution for torch: an operator that export and compile see, and a way past it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

from foldbit.kernels import native

# A pair as the dispatcher hands it over: a list or a tuple of two numbers.
Pair = Sequence[int]

torch.library.define(
    "foldbit::packed_conv",
    "(Tensor x, Tensor words, Tensor weight_scales, Tensor activation_scales, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, SymInt[2] out_size, Tensor? thresholds=None, Tensor? flips=None, "
    "Tensor? slopes=None, Tensor? residual=None) -> Tensor",
)


@dataclass(frozen=True, eq=False)
class Constants:
    """What a packed layer brings to every call of its convolution.

    Attributes:
        words: int32 ``[k, groups, blocks, segments, kh, kw, words, lanes]``: weight planes in the kernels'
            layout (:mod:`foldbit.kernels.layout`).
        weight_scales: float32 ``[k, out, segments]``.
        bias: float32 ``[out]`` or None.
        stride, dilation: (vertical, horizontal).
        padding: (top, left) rows and columns of exact zeros; bottom and right follow from the size asked for.
        thresholds: float32 ``[2^planes - 1, runs, 32 * words]``: fold x by comparisons with these, which may
            hold a batch norm and a clamp before the layer, instead of by the activation scales
            (:mod:`foldbit.packed.thresholds`).
        flips: int32 ``[runs, words]``, with the thresholds.
        slopes: float32 ``[out]``: what negative outputs of a channel are multiplied by; 0 is ReLU.
    """

    words: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    thresholds: Tensor | None = None
    flips: Tensor | None = None
    slopes: Tensor | None = None

    def prepared(self, activation_planes: int, in_channels: int) -> Any:
        """The native core's convolution with these constants, which it has checked; made once."""
        key = f"_prepared for {activation_planes} planes of {in_channels} channels"
        known = self.__dict__.get(key)
        if known is None:
            known = native.prepare_conv(
                _array(self.words),
                _array(self.weight_scales),
                _optional(self.bias),
                **self._geometry(),
                thresholds=_optional(self.thresholds),
                flips=_optional(self.flips),
                slopes=_optional(self.slopes),
                activation_planes=activation_planes,
                in_channels=in_channels,
            )
            self.__dict__[key] = known
        return known

    def _geometry(self) -> dict[str, tuple[int, int]]:
        names = ("stride", "padding", "dilation")
        return {name: (getattr(self, name)[0], getattr(self, name)[1]) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def packed_conv(
    x: Tensor,
    constants: Constants,
    activation_scales: Tensor,
    out_size: Pair,
    residual: Tensor | None = None,
) -> Tensor:
    """Fold x into planes, convolve them with packed weights, scale, add the bias.

    On the CPU only, and not differentiable.

    Args:
        x: float32 ``[N, C, H, W]``, any strides.
        constants: the layer's.
        activation_scales: float32 ``[N, planes]``, or ``[1, planes]`` for all images.
        out_size: (height, width) of the output.
        residual: float32, of the output's shape: added last.

    Returns:
        float32 ``[N, out, height, width]``, channels-last.

    Raises:
        foldbit.kernels.native.KernelUnavailable: without the native core, unless the slow path was chosen.
        RuntimeError: in forward-mode differentiation; in backward mode it comes with the backward pass.
        ValueError: for x, scales or residual of another type or size.
    """
    if forward_ad._current_level >= 0 and any(map(_has_tangent, (x, residual))):
        raise RuntimeError(_NO_GRADIENT)
    # The dispatcher takes longer than a small layer: plain inference goes past it.
    if (
        not torch.compiler.is_compiling()
        and native.is_compiled()
        and _nobody_watches(x)
        and (residual is None or _nobody_watches(residual))
    ):
        return _directly(x, constants, activation_scales, out_size, residual)
    c = constants
    convolved: Tensor = torch.ops.foldbit.packed_conv.default(
        x, c.words, c.weight_scales, activation_scales.expand(x.shape[0], -1), c.bias, c.stride, c.padding,
        c.dilation, out_size, c.thresholds, c.flips, c.slopes, residual,
    )  # fmt: skip
    return convolved


def _nobody_watches(x: Tensor) -> bool:
    """Whether x is an ordinary tensor on the CPU, and neither autograd nor a tracer needs to see more.

    Ordinary memory holds the values themselves: where torch has only noted that they are to be negated
    (``z.conj().imag``), its dispatcher negates them.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and not x.is_neg()
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _is_tracing()
        and _len_torch_dispatch_stack() == 0
        and maybe_current_level() is None  # torch.func's transforms wrap tensors, which have no memory
        and not torch._is_functional_tensor(x)
    )


def _directly(
    x: Tensor, constants: Constants, activation_scales: Tensor, out_size: Pair, residual: Tensor | None
) -> Tensor:
    """By memory addresses, a tenth as dear as NumPy's views: all that is assumed is checked here."""
    shape = x.shape
    images, (height, width) = shape[0], out_size
    out_channels = constants.weight_scales.shape[1]
    rows, planes = activation_scales.shape
    scales = activation_scales
    if not scales.is_contiguous():
        scales = scales.contiguous()
    out = torch.empty_strided(
        (images, out_channels, height, width),
        (height * width * out_channels, 1, width * out_channels, out_channels),
        dtype=torch.float32,
        device="cpu",  # whatever torch.device(...) makes the default
    )
    address = 0
    if residual is not None:
        if residual.shape != out.shape:
            raise ValueError(
                f"residual must be of the output's shape {tuple(out.shape)}; got {tuple(residual.shape)}"
            )
        residual = residual.contiguous(memory_format=torch.channels_last)
        address = residual.data_ptr()
    if not (
        x.dtype is scales.dtype is torch.float32
        and (residual is None or residual.dtype is torch.float32)
        and scales.is_cpu
        and rows in (1, images)
    ):
        raise ValueError(
            "x, scales and residual must be float32 on the CPU, and scales "
            f"[{images}, planes] or [1, planes]; got "
            f"{', '.join(f'{t.dtype} {list(t.shape)}' for t in (x, scales, residual) if t is not None)}"
        )
    constants.prepared(planes, shape[1]).run_at(
        x.data_ptr(),
        shape,
        x.stride(),
        scales.data_ptr(),
        rows > 1,
        address,
        out.data_ptr(),
        out_size,
        torch.get_num_threads(),
    )
    return out


def _on_cpu(
    x: Tensor,
    words: Tensor,
    weight_scales: Tensor,
    activation_scales: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out_size: Pair,
    thresholds: Tensor | None = None,
    flips: Tensor | None = None,
    slopes: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    out = torch.empty(x.shape[0], *out_size, weight_scales.shape[1], dtype=torch.float32, device="cpu")
    native.conv(
        x.detach().numpy(),
        _array(words),
        _array(weight_scales),
        _array(activation_scales),
        _optional(bias),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        out_size=(out_size[0], out_size[1]),
        thresholds=_optional(thresholds),
        flips=_optional(flips),
        slopes=_optional(slopes),
        residual=None if residual is None else _channels_last(residual),
        out=out.numpy(),
        threads=torch.get_num_threads(),
    )
    return out.permute(0, 3, 1, 2)


def _array(tensor: Tensor) -> NDArray[Any]:
    """A dense view, or a copy of what is not dense."""
    array = tensor.detach().contiguous().numpy()
    # Words of bits are int32 in torch, which has few operations on unsigned ones.
    return array.view(np.uint32) if tensor.dtype == torch.int32 else array


def _optional(tensor: Tensor | None) -> NDArray[Any] | None:
    return None if tensor is None else _array(tensor)


def _channels_last(x: Tensor) -> NDArray[np.float32]:
    """``[N, H, W, C]``, dense: a view of what packed layers give, a copy of anything else."""
    return x.detach().contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).numpy()


def _fake(
    x: Tensor,
    words: Tensor,
    weight_scales: Tensor,
    activation_scales: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    out_size: Pair,
    thresholds: Tensor | None = None,
    flips: Tensor | None = None,
    slopes: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    shape = (x.shape[0], weight_scales.shape[1], *out_size)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


_NO_GRADIENT = (
    "packed layers are for inference and pass no gradient on; take gradients of the quantized network, "
    "before foldbit.pack_"
)


def _has_tangent(x: Tensor | None) -> bool:
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _refuse_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(_NO_GRADIENT)


torch.library.impl("foldbit::packed_conv", "CPU", _on_cpu)
torch.library.register_fake("foldbit::packed_conv", _fake)
torch.library.register_autograd("foldbit::packed_conv", _refuse_gradient)
