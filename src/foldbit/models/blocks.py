"""Residual blocks: regular ones, and XNOR blocks that survive quantization; basic, and with a bottleneck.

A regular block is conv → BN → ReLU, ..., conv → BN, with one shortcut around all of it. An XNOR block
normalises before it quantizes, BN → (clamp → quantize →) conv → nonlinearity (Rastegari et al. 2016), and has
either one shortcut, too, or one around every convolution, to carry past it what bits cannot (Bi-Real net, Liu
et al. 2018). Both kinds are plain float networks: ``foldbit.quantize_`` puts the quantizers in. The 1x1
convolutions of the shortcuts are meant to stay float.

All take images ``[N, channels, H, W]`` to ``[N, width·EXPANSION, H/stride, W/stride]``, sizes rounded up.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from foldbit.packed.absorbed import Absorbed

Nonlinearity = Literal["relu", "prelu", "none"]
Shortcut = Literal["double", "single"]


class RegularBlock(nn.Module):
    """The basic block of He et al. 2016."""

    EXPANSION = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _projection(channels, width, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, width, H/stride, W/stride]``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + self.shortcut(x))


class RegularBottleneck(nn.Module):
    """The block of three convolutions of He et al. 2016; it strides at the 3x3 one, as torchvision's does."""

    EXPANSION = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = _projection(channels, out, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, 4·width, H/stride, W/stride]``."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + self.shortcut(x))


class XnorBlock(nn.Module):
    """Two 3x3 convolutions that each take a normalised input.

    With one shortcut it ends in act2(conv2(...) + shortcut(x)), as in the paper's code.
    """

    EXPANSION = 1

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        nonlinearity: Nonlinearity = "relu",
        shortcut: Shortcut = "double",
    ) -> None:
        super().__init__()
        self.double_shortcut = _is_double(shortcut)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1)
        self.act1 = _nonlinearity(nonlinearity, width)
        self.shortcut = _projection(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.act2 = _nonlinearity(nonlinearity, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, width, H/stride, W/stride]``."""
        if not self.double_shortcut:
            y = self.act1(self.conv1(self.bn1(x)))
            return self.act2(self.conv2(self.bn2(y)) + self.shortcut(x))
        x = _convolve(self.conv1, self.act1, self.bn1(x), self.shortcut(x))
        return _convolve(self.conv2, self.act2, self.bn2(x), x)


class XnorBottleneck(nn.Module):
    """Three convolutions, 1x1, 3x3 and 1x1, that each take a normalised input.

    Double shortcuts are one around the block, and one around the 3x3 convolution, an average pooling where it
    strides. The 1x1 convolutions change the number of channels: a shortcut around one of them would be a
    float convolution of as much work as its own.
    """

    EXPANSION = 4

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        nonlinearity: Nonlinearity = "relu",
        shortcut: Shortcut = "double",
    ) -> None:
        super().__init__()
        out = width * self.EXPANSION
        self.double_shortcut = _is_double(shortcut)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.act1 = _nonlinearity(nonlinearity, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1)
        self.act2 = _nonlinearity(nonlinearity, width)
        self.inner = nn.Identity() if stride == 1 else nn.AvgPool2d(stride, ceil_mode=True)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1)
        self.act3 = _nonlinearity(nonlinearity, out)
        self.shortcut = _projection(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, 4·width, H/stride, W/stride]``."""
        y = self.act1(self.conv1(self.bn1(x)))
        if not self.double_shortcut:
            y = self.act2(self.conv2(self.bn2(y)))
            return self.act3(self.conv3(self.bn3(y)) + self.shortcut(x))
        y = _convolve(self.conv2, self.act2, self.bn2(y), self.inner(y))
        return _convolve(self.conv3, self.act3, self.bn3(y), self.shortcut(x))


def _convolve(conv: nn.Module, nonlinearity: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """nonlinearity(conv(x)) + shortcut, by a packed layer that does it all at once where there is one."""
    if isinstance(nonlinearity, Absorbed):
        return conv(x, residual=shortcut)
    return nonlinearity(conv(x)) + shortcut


def _projection(channels: int, width: int, stride: int) -> nn.Module:
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


def _is_double(shortcut: Shortcut) -> bool:
    if shortcut not in ("double", "single"):
        raise ValueError(f"shortcut is 'double' or 'single'; got {shortcut!r}")
    return shortcut == "double"
