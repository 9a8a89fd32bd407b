"""LeNet-5 as the paper trains it on MNIST: two 5x5 convolutions of 20 and 50 filters, two linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from foldbit.models.registry import register


class LeNet5(nn.Module):
    """Images ``[N, 1, 28, 28]`` to logits ``[N, num_classes]``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        if type(num_classes) is not int or not 0 < num_classes <= 1 << 14:
            raise ValueError(f"num_classes is a whole number from 1 to {1 << 14}; got {num_classes!r:.100}")
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.bn1 = nn.BatchNorm2d(20)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.bn2 = nn.BatchNorm2d(50)
        self.pool = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(50 * 4 * 4, 500)
        self.linear2 = nn.Linear(500, num_classes)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.pool(self.relu(self.bn1(self.conv1(x))))  # [N, 20, 12, 12]
        x = self.pool(self.relu(self.conv2(x)))  # [N, 50, 4, 4]
        return self.linear2(self.relu(self.linear1(self.bn2(x).flatten(1))))


@register("lenet5")
def lenet5(num_classes: int = 10) -> LeNet5:
    """The network of the paper's MNIST experiment; the middle two layers are the quantizable ones."""
    return LeNet5(num_classes)
