"""The order in which a training keeps images and convolutions' weights in memory: the fastest safe one."""

from __future__ import annotations

import torch
from torch import nn

_VECTOR = 16  # floats of AVX-512's; AVX2's has 8


def fastest(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels-last, in which convolutions are faster, unless torch would crash.

    On the CPU, the backward pass of a strided 1x1 convolution whose input has fewer channels than a vector
    has floats writes past its memory in that order (torch 2.13 and its oneDNN, ``brgconv_strided:avx2``, seen
    with fewer than 8 channels; fewer than 16 are left alone, lest AVX-512 does likewise).
    """
    crash = (
        max(m.kernel_size) == 1 and max(m.stride) > 1 and m.in_channels // m.groups < _VECTOR
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    )
    return torch.contiguous_format if device.type == "cpu" and any(crash) else torch.channels_last


def arrange(model: nn.Module, order: torch.memory_format) -> nn.Module:
    """Keep the model's convolutions' weights in that order, in place."""
    return model.to(memory_format=order)  # type: ignore[call-overload]
