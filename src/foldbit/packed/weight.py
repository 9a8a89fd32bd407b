"""A packed layer's weight for those who want numbers: the bits and scales, unpacked when asked."""

from __future__ import annotations

import torch
from torch import Tensor

from foldbit.packed.spec import LayerSpec


class PackedWeight:
    """A packed layer's weight, which is a tensor only when it is called.

    A forward pass that asks a layer's weight for its dtype, device or shape gets an answer without one.

    Args:
        spec: of the layer.
        planes: its sign planes, as the layer stores them.
        scales: their scales, as the layer stores them.

    Attributes:
        dtype, device, requires_grad: of the tensor.
    """

    dtype, device, requires_grad = torch.float32, torch.device("cpu"), False

    def __init__(self, spec: LayerSpec, planes: Tensor, scales: Tensor) -> None:
        self._spec, self._planes, self._scales = spec, planes, scales

    @property
    def shape(self) -> torch.Size:
        """As in the quantized twin: ``[out, in/groups, *kernel]``."""
        kernel = self._spec.kernel_size[{"linear": 2, "conv1d": 1, "conv2d": 0}[self._spec.kind] :]
        return torch.Size((self._spec.out_channels, self._spec.channels, *kernel))

    @property
    def ndim(self) -> int:
        """How many dims."""
        return len(self.shape)

    def __call__(self) -> Tensor:
        """The approximated weight, float32 ``[out, in/groups, *kernel]``, made anew."""
        return self.as_images().reshape(self.shape)

    def as_images(self) -> Tensor:
        """The same for a convolution of images, float32 ``[out, in/groups, kh, kw]``."""
        spec = self._spec
        shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
        bits = (self._planes.unsqueeze(-1) >> shifts) & 1
        negative = bits.flatten(-2)[..., : spec.channels].bool()  # [k, out, kh, kw, in/groups]
        segmented = negative.unflatten(-1, (spec.segments, -1))
        scales = self._scales.reshape(spec.weight_planes, spec.out_channels, 1, 1, spec.segments, 1)
        signed = torch.where(segmented, -scales, scales)
        return signed.sum(0).flatten(-2).movedim(-1, 1)
