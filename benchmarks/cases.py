"""Convolutions to time: what one is, and a packed layer that does it, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import peers
import torch
from results import native_calls

import foldbit as fb
from foldbit.kernels import native
from foldbit.packed.layers import Neighbours, PackedLayer
from foldbit.packed.spec import LayerSpec


@dataclass(frozen=True)
class Case:
    """A convolution."""

    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """As in ``3x3, 28x28x128 to 256, stride 2``."""
        widths = f"{self.in_channels}" + (
            "" if self.in_channels == self.out_channels else f" to {self.out_channels}"
        )
        stride = "" if self.stride == 1 else f", stride {self.stride}"
        return f"{self.kernel}×{self.kernel}, {self.size}×{self.size}×{widths}{stride}"

    @property
    def out_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def macs(self, *, padded_taps: bool = False) -> int:
        """Binary MACs, channels rounded up to whole words and blocks; of taps inside the image, or of all."""
        assert self.groups == 1, "not counted"
        words, blocks = -(-self.in_channels // 32), -(-self.out_channels // 16)
        return self.taps(padded_taps) ** 2 * words * 32 * blocks * 16

    def taps(self, padded: bool) -> int:
        """Over all output positions along one axis, the taps inside the image, or all."""
        if padded:
            return self.out_size * self.kernel
        starts = [i * self.stride - self.kernel // 2 for i in range(self.out_size)]
        return sum(0 <= start + tap < self.size for start in starts for tap in range(self.kernel))


class Layer:
    """A packed convolution with scale, bias, residual and ReLU, and its pieces."""

    def __init__(self, case: Case, planes: int, layers: peers.Chain | None = None) -> None:
        self.case, self.planes = case, planes
        generator = torch.Generator().manual_seed(0)
        shape = (case.out_channels, case.in_channels // case.groups, case.kernel, case.kernel)
        if layers is None:
            x = torch.randn(1, case.in_channels, case.size, case.size, generator=generator)
            weight, bias = torch.randn(shape, generator=generator), torch.zeros(case.out_channels)
            scales = fb.solve(x, f"ls-{planes}", dim=None)
        else:
            x, weight, bias, scales = layers.x, layers.weights[0], layers.biases[0], layers.scales
        config = fb.QuantConfig("ls-1", f"ls-{planes}", activation_scales="static")
        conv = torch.nn.Conv2d(
            case.in_channels,
            case.out_channels,
            case.kernel,
            case.stride,
            case.kernel // 2,
            groups=case.groups,
        )
        self.layer = PackedLayer.from_codes(
            LayerSpec.of(conv, config),
            (weight < 0)[None],
            weight.abs().mean((1, 2, 3)).reshape(1, -1, 1),
            bias,
            scales,
        )
        self.layer.absorb(Neighbours(nonlinearity=torch.nn.ReLU()))
        order = torch.channels_last
        self.x = x.contiguous(memory_format=order)
        out = (1, case.out_channels, case.out_size, case.out_size)
        same = layers is not None
        self.residual = (
            self.x if same else torch.randn(out, generator=generator).contiguous(memory_format=order)
        )

    def module(self) -> Callable[[], torch.Tensor]:
        """The layer as a network calls it."""
        return partial(self.layer, self.x, self.residual)

    def kernel(self, threads: int = 1) -> Callable[[], object]:
        """The native call inside it."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with native_calls() as calls, torch.no_grad():
                self.module()()
        finally:
            torch.set_num_threads(before)
        (call,) = calls
        return call

    def packing(self) -> Callable[[], object]:
        """The first step of it: floats to words."""
        packed = self.layer
        assert packed.input_scales is not None and packed.thresholds is not None and packed.flips is not None
        return partial(
            native.pack_activation,
            self.x.numpy(),
            packed.input_scales.numpy(),
            self.case.groups,
            thresholds=packed.thresholds.numpy(),
            flips=packed.flips.numpy().view(np.uint32),
        )

    def core(self) -> Callable[[], object]:
        """The integers alone, of packed words: neither packing nor scales."""
        words, pad, size = self.packing()(), self.case.kernel // 2, self.case.out_size
        return partial(
            native.conv_integers,
            words,
            self.layer.words.numpy().view(np.uint32),
            stride=(self.case.stride,) * 2,
            padding=(pad, pad),
            out_size=(size, size),
            in_channels_per_segment=self.case.in_channels // self.case.groups,
            out_channels=self.case.out_channels,
        )
