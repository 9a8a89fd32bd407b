"""The state of a training: everything that its next step depends on but the data, saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from foldbit.training import checkpoints
from foldbit.training.runs import RunError


@dataclass
class Progress:
    """Where training stands.

    Attributes:
        epoch: finished epochs.
        step: steps into the next one.
        loss: summed over the images of these steps, up to the last look.
        correct: how many of them were classified right.
        images: how many they were.
        unseen: loss and correct ones of the steps since the last look.
        unseen_images: how many images these had.
        seconds: that the epoch has taken.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    unseen: list[float] = field(default_factory=lambda: [0.0, 0.0])
    unseen_images: int = 0
    seconds: float = 0.0


class State:
    """Network, optimizer, schedule and progress; random numbers are torch's, NumPy's and Python's own.

    Args:
        accelerator: of :func:`foldbit.training.processes.accelerator`.
        network: the model itself, on the accelerator's device, not what wraps it for several processes.
        optimizer: of its parameters.
        schedule: of the optimizer.

    Attributes:
        progress: where training stands.
        sums: of this process's loss and correct images since the last look, float64 ``[2]`` on the device.
    """

    def __init__(
        self, accelerator: Accelerator, network: nn.Module, optimizer: Optimizer, schedule: LRScheduler
    ) -> None:
        self.accelerator = accelerator
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.progress = Progress()
        self.sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)

    def take_in(self, sums: Tensor, images: int) -> None:
        """Count what a look has seen of all processes."""
        loss, correct = sums.tolist()
        self.progress.loss += loss
        self.progress.correct += correct
        self.progress.images += images
        self.progress.unseen_images = 0
        self.sums.zero_()

    def save(self, run: Path) -> None:
        """Write a checkpoint. All processes call this after the same step; the first one writes."""
        self.progress.unseen = self.sums.tolist()
        numbers = gather_object([checkpoints.random_numbers(self.accelerator.device)])
        if self.accelerator.is_main_process:
            training = {
                "progress": asdict(self.progress),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": numbers,
            }
            checkpoints.write(run, self.network.state_dict(), training)

    def restore(self, run: Path) -> None:
        """Go back to where the run's newest checkpoint was written.

        Raises:
            RunError: where it is damaged.
        """
        path = checkpoints.newest(run)
        assert path is not None
        try:
            weights, training = checkpoints.read_weights(path), checkpoints.read_training(path)
            self.network.load_state_dict(weights)
            self.optimizer.load_state_dict(training["optimizer"])
            self.schedule.load_state_dict(training["schedule"])
            self.progress = Progress(**training["progress"])
            numbers, rank = training["random"], self.accelerator.process_index
            if rank == 0:
                self.sums.copy_(torch.tensor(self.progress.unseen, dtype=torch.float64))
            else:
                self.progress.unseen_images = 0  # those that one process saw count once
            if rank < len(numbers):  # on more processes than before, the added ones draw afresh
                checkpoints.restore_random_numbers(numbers[rank], self.accelerator.device)
        except (checkpoints.Damaged, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, checkpoints.Damaged) else checkpoints.line(error)
            raise RunError(
                f"the checkpoint {path} is damaged ({reason}); delete it to train from the beginning"
            ) from error
