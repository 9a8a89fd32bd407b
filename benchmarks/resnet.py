"""The ResNet-18 that benchmarks/networks.py times: float, fake-quantized, and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peers import check
from torch import Tensor, nn

import foldbit as fb
from foldbit import models

SCHEMES = {"W1A1": ("ls-1", "ls-1"), "W1A2": ("ls-1", "ls-2"), "W2A2": ("ls-2", "ls-2")}
CLAMP = 3.0

Packed = dict[str, tuple[nn.Module, nn.Module]]  # of a scheme the packed network, fused and not


class Size:
    """How large a network and image."""

    def __init__(self, quick: bool) -> None:
        self.arguments: dict[str, Any] = {"widths": (16, 16, 32, 32), "num_classes": 10} if quick else {}
        self.image = 64 if quick else 224
        self.batches, self.batch = (2, 2) if quick else (6, 8)

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.image, self.image, generator=generator)

    def network(self, block: str) -> nn.Module:
        """A float ResNet-18."""
        torch.manual_seed(0)
        return models.create("resnet18", block=block, **self.arguments)


@torch.no_grad()
def settle(model: nn.Module, size: Size) -> nn.Module:
    """Show batch norms and static scales a few batches; batch norms keep the mean of what they saw."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    for i in range(size.batches):
        model(size.images(size.batch, seed=i + 1))
    return model.eval()


def quantized(scheme: str, size: Size) -> nn.Module:
    """The network of XNOR blocks with fake-quantized layers, which packing does not change."""
    weight, activation = SCHEMES[scheme]
    config = fb.QuantConfig(weight, activation, activation_scales="static", clamp=CLAMP)
    model = size.network("xnor")
    fb.quantize_(model, config, overrides=models.float_layers(model))
    return settle(model, size)


@torch.no_grad()
def packed_networks(size: Size) -> Packed:
    """Fused and unfused packed networks, checked against their fake-quantized twins."""
    x, found = size.images(1), {}
    for scheme in SCHEMES:
        twin = quantized(scheme, size)
        expected = twin(x).numpy()
        fused, plain = fb.pack_(copy.deepcopy(twin)), fb.pack_(twin, fuse=False)
        for name, model in (("fused", fused), ("not fused", plain)):
            # Rounding may flip a sign that lies on its threshold, and that sign others.
            check(f"foldbit {scheme}, {name}", model(x).numpy(), expected, 0.05)
        found[scheme] = fused, plain
    return found


def without_gradients(call: Callable[..., Any], *arguments: Tensor) -> Any:
    """What a call returns, as at inference."""
    with torch.no_grad():
        return call(*arguments)
