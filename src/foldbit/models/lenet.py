"""LeNet-5 as the paper trains it on MNIST: two 5x5 convolutions of 20 and 50 filters, two linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from foldbit.models.registry import register


class LeNet5(nn.Module):
    """Images ``[N, in_channels, 28, 28]`` to logits ``[N, num_classes]``; other sizes are pooled to fit."""

    head = "linear2"  # what depends on the number of classes

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        for what, size in (("num_classes", num_classes), ("in_channels", in_channels)):
            if type(size) is not int or not 0 < size <= 1 << 14:
                raise ValueError(f"{what} is a whole number from 1 to {1 << 14}; got {size!r:.100}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.bn1 = nn.BatchNorm2d(20)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.bn2 = nn.BatchNorm2d(50)
        self.pool = nn.MaxPool2d(2)
        self.fit = nn.AdaptiveMaxPool2d(4)  # changes nothing at 28x28
        self.linear1 = nn.Linear(50 * 4 * 4, 500)
        self.linear2 = nn.Linear(500, num_classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        # Normalised before each quantized layer: behind a ReLU alone all signs would be the same.
        x = self.bn1(self.pool(self.relu(self.conv1(x))))  # [N, 20, 12, 12]
        x = self.bn2(self.fit(self.pool(self.relu(self.conv2(x)))))  # [N, 50, 4, 4]
        return self.linear2(self.relu(self.linear1(x.flatten(1))))


@register("lenet5")
def lenet5(num_classes: int = 10, in_channels: int = 1) -> LeNet5:
    """The network of the paper's MNIST experiment; the middle two layers are the quantizable ones."""
    return LeNet5(num_classes, in_channels)
