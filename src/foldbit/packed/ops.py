"""Custom operators over the kernels, so that torch.export and torch.compile see through packed layers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from foldbit.kernels import native

# A pair as the dispatcher hands it over: a list or a tuple of two numbers.
Pair = Sequence[int]

torch.library.define(
    "foldbit::packed_conv",
    "(Tensor x, Tensor words, Tensor weight_scales, Tensor activation_scales, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, SymInt[2] out_size, Tensor? thresholds=None, Tensor? flips=None, "
    "Tensor? slopes=None, Tensor? residual=None) -> Tensor",
)


def packed_conv(
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
    """Fold x into planes, convolve them with packed weights, scale, and add the bias.

    On the CPU only, and not differentiable.

    Args:
        x: float32 ``[N, C, H, W]``, any strides.
        words: int32 ``[k, groups, blocks, segments, kh, kw, words, lanes]``: weight planes in the kernels'
            layout (:mod:`foldbit.kernels.layout`).
        weight_scales: float32 ``[k, out, segments]``.
        activation_scales: float32 ``[N, planes]``.
        bias: float32 ``[out]`` or None.
        stride, dilation: (vertical, horizontal).
        padding: (top, left) rows and columns of exact zeros; bottom and right follow from ``out_size``.
        out_size: (height, width) of the output.
        thresholds: float32 ``[2^planes - 1, runs, 32 * words]``: fold x by comparisons with these, which may
            hold a batch norm and a clamp before the layer, instead of by the activation scales
            (:mod:`foldbit.packed.thresholds`).
        flips: int32 ``[runs, words]``, with the thresholds.
        slopes: float32 ``[out]``: what negative outputs of a channel are multiplied by; 0 is ReLU.
        residual: float32, of the output's shape: added last.

    Returns:
        float32 ``[N, out, height, width]``, channels-last.

    Raises:
        foldbit.kernels.native.KernelUnavailable: without the native core, unless the slow path was chosen.
    """
    arguments = (
        x, words, weight_scales, activation_scales, bias, stride, padding, dilation, out_size,
        thresholds, flips, slopes, residual,
    )  # fmt: skip
    # The dispatcher takes longer than a small layer: plain inference goes past it.
    if _nobody_watches(x) and (residual is None or _nobody_watches(residual)):
        return _on_cpu(*arguments)
    convolved: Tensor = torch.ops.foldbit.packed_conv.default(*arguments)
    return convolved


def _nobody_watches(x: Tensor) -> bool:
    """Whether x is an ordinary tensor on the CPU, and neither autograd nor a tracer needs to see more."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.jit.is_tracing()
        and not _get_current_dispatch_mode_stack()
    )


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
    out = torch.empty(x.shape[0], *out_size, weight_scales.shape[1], dtype=torch.float32)
    native.conv(
        (x.detach() if x.requires_grad else x).numpy(),
        _view(words),
        _view(weight_scales),
        _view(activation_scales) if len(x) == 1 else activation_scales.contiguous().numpy(),
        None if bias is None else _view(bias),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        out_size=(out_size[0], out_size[1]),
        thresholds=None if thresholds is None else _view(thresholds),
        flips=None if flips is None else _view(flips),
        slopes=None if slopes is None else _view(slopes),
        residual=None if residual is None else _channels_last(residual),
        out=out.numpy(),
        threads=torch.get_num_threads(),
    )
    return out.permute(0, 3, 1, 2)


# NumPy's view of a tensor costs a microsecond, and a layer's constants are viewed again at every call.
_views: dict[int, tuple[weakref.ref[Tensor], NDArray[Any]]] = {}


def _view(constant: Tensor) -> NDArray[Any]:
    known = _views.get(id(constant))
    if known is not None and known[0]() is constant:
        return known[1]
    key = id(constant)
    # Of an alias, which holds the memory: a view of the tensor itself would keep that alive forever.
    view = constant.detach().contiguous().numpy()
    if constant.dtype == torch.int32:  # words of bits: torch has few operations on unsigned ones
        view = view.view(np.uint32)
    if not constant.is_contiguous():
        return view  # of a copy, which would not follow changes
    _views[key] = weakref.ref(constant, lambda _: _views.pop(key, None)), view
    return view


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
    return _output(x, weight_scales, out_size)


def _output(x: Tensor, weight_scales: Tensor, out_size: Pair) -> Tensor:
    shape = (x.shape[0], weight_scales.shape[1], *out_size)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


torch.library.impl("foldbit::packed_conv", "CPU", _on_cpu)


def _refuse_gradient(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "packed layers are for inference and pass no gradient on; take gradients of the quantized network, "
        "before foldbit.pack_"
    )


torch.library.register_fake("foldbit::packed_conv", _fake)
torch.library.register_autograd("foldbit::packed_conv", _refuse_gradient)
