"""Residual networks of regular blocks, and of XNOR blocks that survive quantization.

A regular block is conv → BN → ReLU, conv → BN, with one shortcut around both. An XNOR block normalises
before it quantizes, BN → (clamp → quantize →) conv → nonlinearity, and has a shortcut around every
convolution (Bi-Real net, Liu et al. 2018; Pouransari et al., arXiv 2001.02786, section 5). Both are plain
float networks: ``foldbit.quantize_`` puts the quantizers in. The 1x1 convolutions of the shortcuts, the
stem and the classifier are meant to stay float.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from foldbit.models.registry import register
from foldbit.packed.absorbed import Absorbed

Nonlinearity = Literal["relu", "prelu", "none"]
Block = Literal["regular", "xnor"]
Stem = Literal["small", "imagenet"]

_MAX_WIDTH, _MAX_BLOCKS = 1 << 14, 1 << 8  # a file may ask for any size: refuse the absurd


class ResNet(nn.Module):
    """A residual network.

    Args:
        depths: blocks in each stage; every stage but the first halves the image.
        widths: channels of each stage.
        block: ``xnor`` or ``regular``.
        nonlinearity: after each convolution of an XNOR block.
        stem_stride: stride of the stem, a 3x3 convolution.
        stem: ``small`` is that; ``imagenet`` a 7x7 convolution and a pooling, of stride 2 each, for images of
            224x224 pixels.
        in_channels: channels of the images.
        num_classes: outputs.
    """

    float_layers = ("*.shortcut.*",)  # beside the first and the last, which quantize_ leaves by itself

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
        large = stem == "imagenet"
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 7, stride=2, padding=3, bias=False)
            if large
            else nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            *([nn.MaxPool2d(3, stride=2, padding=1)] if large else []),
        )
        stages = []
        channels = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                if block == "xnor":
                    blocks.append(XnorBlock(channels, width, stride, nonlinearity))
                else:
                    blocks.append(RegularBlock(channels, width, stride))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, num_classes]``."""
        x = self.stem(x)  # [N, widths[0], H/stem_stride, W/stem_stride], or a quarter of the size
        x = self.stages(x)
        return self.classifier(self.pool(x).flatten(1))


class XnorBlock(nn.Module):
    """Two convolutions that each take a normalised input and have a shortcut of their own."""

    def __init__(self, channels: int, width: int, stride: int, nonlinearity: Nonlinearity) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1)
        self.act1 = _nonlinearity(nonlinearity, width)
        self.shortcut = _shortcut(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.act2 = _nonlinearity(nonlinearity, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, width, H/stride, W/stride]``."""
        x = _convolve(self.conv1, self.act1, self.bn1(x), self.shortcut(x))
        return _convolve(self.conv2, self.act2, self.bn2(x), x)


class RegularBlock(nn.Module):
    """The basic block of He et al. 2016."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels, width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, width, H/stride, W/stride]``."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


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
) -> ResNet:
    """ResNet-18 with a 3x3 stem and no pooling, for images of 32x32 pixels."""
    return ResNet((2, 2, 2, 2), widths, block, nonlinearity, 1, in_channels, num_classes)


@register("resnet18")
def resnet18(
    block: Block = "xnor",
    widths: Sequence[int] = (64, 128, 256, 512),
    nonlinearity: Nonlinearity = "relu",
    in_channels: int = 3,
    num_classes: int = 1000,
) -> ResNet:
    """ResNet-18 for images of 224x224 pixels."""
    return ResNet((2, 2, 2, 2), widths, block, nonlinearity, 1, in_channels, num_classes, stem="imagenet")


def _convolve(conv: nn.Module, nonlinearity: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """nonlinearity(conv(x)) + shortcut, by a packed layer that does it all at once where there is one."""
    if isinstance(nonlinearity, Absorbed):
        return conv(x, residual=shortcut)
    return nonlinearity(conv(x)) + shortcut


def _shortcut(channels: int, width: int, stride: int) -> nn.Module:
    if channels == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))


def _nonlinearity(name: Nonlinearity, width: int) -> nn.Module:
    if name == "relu":
        return nn.ReLU()
    if name == "prelu":
        return nn.PReLU(width)
    if name == "none":
        return nn.Identity()
    raise ValueError(f"nonlinearity is 'relu', 'prelu' or 'none'; got {name!r}")


def _check(what: str, sizes: Sequence[int], largest: int) -> None:
    if not isinstance(sizes, list | tuple) or not 0 < len(sizes) <= 16:
        raise ValueError(f"{what}: expected a short sequence of whole numbers, got {sizes!r:.100}")
    if not all(type(size) is int and 0 < size <= largest for size in sizes):
        raise ValueError(f"{what}: expected whole numbers from 1 to {largest}, got {sizes!r:.100}")
