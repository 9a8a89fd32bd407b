"""Custom operators over the kernels, so that torch.export and torch.compile see through packed layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldbit.kernels import native


@torch.library.custom_op("foldbit::packed_conv", mutates_args=(), device_types="cpu")
def packed_conv(
    x: Tensor,
    words: Tensor,
    weight_scales: Tensor,
    activation_scales: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_size: Sequence[int],
) -> Tensor:
    """Fold x into planes, convolve them with packed weights, scale and add the bias.

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
    out = _output(x, weight_scales, out_size)
    native.conv(
        x.detach().numpy(),
        words.numpy().view("uint32"),
        weight_scales.numpy(),
        activation_scales.contiguous().numpy(),
        None if bias is None else bias.detach().numpy(),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        out_size=tuple(out_size),
        out=out.permute(0, 2, 3, 1).numpy(),
        threads=torch.get_num_threads(),
    )
    return out


@packed_conv.register_fake
def _(
    x: Tensor,
    words: Tensor,
    weight_scales: Tensor,
    activation_scales: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_size: Sequence[int],
) -> Tensor:
    return _output(x, weight_scales, out_size)


def _output(x: Tensor, weight_scales: Tensor, out_size: Sequence[int]) -> Tensor:
    shape = (x.shape[0], weight_scales.shape[1], *out_size)
    return torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
