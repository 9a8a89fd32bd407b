"""Custom operators over the kernels, so that torch.export and torch.compile see through packed layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from foldbit.kernels import native

# A pair as the dispatcher hands it over: a list or a tuple of two numbers.
Pair = Sequence[int]

torch.library.define(
    "foldbit::packed_conv",
    "(Tensor x, Tensor words, Tensor weight_scales, Tensor activation_scales, Tensor? bias, int[2] stride, "
    "int[2] padding, int[2] dilation, SymInt[2] out_size) -> Tensor",
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
) -> Tensor:
    """Fold x into planes, convolve them with packed weights, scale and add the bias.

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

    Returns:
        float32 ``[N, out, height, width]``, channels-last.

    Raises:
        foldbit.kernels.native.KernelUnavailable: without the native core, unless the slow path was chosen.
    """
    return torch.ops.foldbit.packed_conv.default(
        x, words, weight_scales, activation_scales, bias, stride, padding, dilation, out_size
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
) -> Tensor:
    out = _output(x, weight_scales, out_size)
    native.conv(
        x.detach().numpy(),  # in grad mode the float layers before make x require a gradient
        words.numpy().view(np.uint32),
        weight_scales.numpy(),
        activation_scales.contiguous().numpy(),
        None if bias is None else bias.numpy(),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1]),
        dilation=(dilation[0], dilation[1]),
        out_size=(out_size[0], out_size[1]),
        out=out.permute(0, 2, 3, 1).numpy(),
        threads=torch.get_num_threads(),
    )
    return out


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
) -> Tensor:
    return _output(x, weight_scales, out_size)


def _output(x: Tensor, weight_scales: Tensor, out_size: Pair) -> Tensor:
    shape = (x.shape[0], weight_scales.shape[1], *out_size)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


torch.library.impl("foldbit::packed_conv", "CPU", _on_cpu)
torch.library.register_fake("foldbit::packed_conv", _fake)
