"""Residual networks of any depth, of regular blocks or XNOR blocks (:mod:`foldbit.models.blocks`).

He et al. 2016; Pouransari et al., arXiv 2001.02786, section 5. Stem and classifier are meant to stay float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from foldbit.models.blocks import (
    Nonlinearity,
    RegularBlock,
    RegularBottleneck,
    Shortcut,
    XnorBlock,
    XnorBottleneck,
)
from foldbit.models.registry import register

Block = Literal["regular", "xnor"]
Stem = Literal["small", "imagenet"]

_MAX_WIDTH, _MAX_BLOCKS = 1 << 14, 1 << 8  # a file may ask for any size: refuse the absurd


class ResNet(nn.Module):
    """A residual network.

    Args:
        depths: blocks in each stage; every stage but the first halves the image.
        widths: channels of each stage; a bottleneck puts out four times as many.
        block: ``xnor`` or ``regular``.
        nonlinearity: after each convolution of an XNOR block.
        stem_stride: stride of the stem, a 3x3 convolution.
        in_channels: channels of the images.
        num_classes: outputs.
        stem: ``small`` is that; ``imagenet`` a 7x7 convolution and a pooling, of stride 2 each, for images of
            224x224 pixels.
        shortcut: of XNOR blocks: ``double`` around every convolution, ``single`` around the block.
        bottleneck: blocks of three convolutions, as in ResNet-50, instead of two.
    """

    float_layers = ("*.shortcut.*",)  # beside the first and the last, which quantize_ leaves by itself
    head = "classifier"  # what depends on the number of classes

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        block: Block = "xnor",
        nonlinearity: Nonlinearity = "relu",
        stem_stride: int = 1,
        in_channels: int = 3,
        num_classes: int = 10,
        stem: Stem = "small",
        shortcut: Shortcut = "double",
        bottleneck: bool = False,
    ) -> None:
        super().__init__()
        _check("depths", depths, _MAX_BLOCKS)
        _check("widths", widths, _MAX_WIDTH)
        _check("stem_stride, in_channels, num_classes", (stem_stride, in_channels, num_classes), _MAX_WIDTH)
        if len(depths) != len(widths):
            raise ValueError(f"one width a stage: got depths {list(depths)} and widths {list(widths)}")
        if block not in ("regular", "xnor"):
            raise ValueError(f"block is 'regular' or 'xnor'; got {block!r}")
        if stem not in ("small", "imagenet"):
            raise ValueError(f"stem is 'small' or 'imagenet'; got {stem!r}")
        self.block = block
        self.stem = _stem(in_channels, widths[0], stem_stride, large=stem == "imagenet")
        stages = []
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                if block == "xnor":
                    xnor = XnorBottleneck if bottleneck else XnorBlock
                    blocks.append(xnor(channels, width, stride, nonlinearity, shortcut))
                    channels = width * xnor.EXPANSION
                else:
                    regular = RegularBottleneck if bottleneck else RegularBlock
                    blocks.append(regular(channels, width, stride))
                    channels = width * regular.EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, num_classes]``."""
        x = self.stem(x)  # [N, widths[0], H/stem_stride, W/stem_stride], or a quarter of the size
        x = self.stages(x)
        return self.classifier(self.pool(x).flatten(1))


@register("resnet8-xnor")
def resnet8_xnor(
    widths: Sequence[int] = (32, 64, 128),
    nonlinearity: Nonlinearity = "relu",
    stem_stride: int = 2,
    in_channels: int = 1,
    num_classes: int = 10,
) -> ResNet:
    """Three stages of one XNOR block: a network for small images that two cores can train in minutes."""
    return ResNet((1, 1, 1), widths, "xnor", nonlinearity, stem_stride, in_channels, num_classes)


@register("resnet18-cifar")
def resnet18_cifar(
    block: Block = "xnor",
    widths: Sequence[int] = (64, 128, 256, 512),
    nonlinearity: Nonlinearity = "relu",
    in_channels: int = 3,
    num_classes: int = 100,
    shortcut: Shortcut = "double",
) -> ResNet:
    """ResNet-18 with a 3x3 stem and no pooling, for images of 32x32 pixels."""
    return ResNet((2, 2, 2, 2), widths, block, nonlinearity, 1, in_channels, num_classes, shortcut=shortcut)


@register("resnet18")
def resnet18(
    block: Block = "xnor",
    widths: Sequence[int] = (64, 128, 256, 512),
    nonlinearity: Nonlinearity = "relu",
    in_channels: int = 3,
    num_classes: int = 1000,
    shortcut: Shortcut = "double",
) -> ResNet:
    """ResNet-18 for images of 224x224 pixels."""
    return ResNet(
        (2, 2, 2, 2), widths, block, nonlinearity, 1, in_channels, num_classes, "imagenet", shortcut
    )


@register("resnet34")
def resnet34(
    block: Block = "xnor",
    widths: Sequence[int] = (64, 128, 256, 512),
    nonlinearity: Nonlinearity = "relu",
    in_channels: int = 3,
    num_classes: int = 1000,
    shortcut: Shortcut = "double",
) -> ResNet:
    """ResNet-34 for images of 224x224 pixels."""
    return ResNet(
        (3, 4, 6, 3), widths, block, nonlinearity, 1, in_channels, num_classes, "imagenet", shortcut
    )


@register("resnet50")
def resnet50(
    block: Block = "xnor",
    widths: Sequence[int] = (64, 128, 256, 512),
    nonlinearity: Nonlinearity = "relu",
    in_channels: int = 3,
    num_classes: int = 1000,
    shortcut: Shortcut = "double",
) -> ResNet:
    """ResNet-50, of blocks with a bottleneck, for images of 224x224 pixels."""
    return ResNet(
        (3, 4, 6, 3), widths, block, nonlinearity, 1, in_channels, num_classes, "imagenet", shortcut, True
    )


def _stem(in_channels: int, width: int, stride: int, large: bool) -> nn.Sequential:
    if not large:
        conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
    conv = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
    # The largest of some values is the same before a ReLU, and behind the pooling a quarter of them is left.
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU())


def _check(what: str, sizes: Sequence[int], largest: int) -> None:
    if not isinstance(sizes, list | tuple) or not 0 < len(sizes) <= 16:
        raise ValueError(f"{what}: expected a short sequence of whole numbers, got {sizes!r:.100}")
    if not all(type(size) is int and 0 < size <= largest for size in sizes):
        raise ValueError(f"{what}: expected whole numbers from 1 to {largest}, got {sizes!r:.100}")
