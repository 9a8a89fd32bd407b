"""One training on several processes: one batch that they share, one set of statistics, one decision to stop.

Each process computes on its part of the global batch, and torch's DistributedDataParallel averages the
gradients. What training keeps running averages of, batch norm's statistics and static activation scales, each
process learns from its own part; after every step :func:`average` makes one of them. It is the running
average of what the parts of each batch have in the mean, for running averages are linear. (While training,
batch norm normalises each part by the part's own statistics, as is usual; the ones kept for evaluation are
shared.)
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from foldbit.nn.quantizers import ActivationQuantizer


def accelerator() -> Accelerator:
    """Device and processes, as the launcher (torchrun, or none) says. A loader's batch is the global one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return Accelerator(
        # Apple's has no float64, in which solvers add up.
        cpu=found is None or found.type == "mps",
        mixed_precision="no",  # the loop casts by itself: accelerate knows one precision a Python process
        dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False, non_blocking=True),
    )


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(PartialState().is_main_process)


def check_shares(batch_size: int, accelerator: Accelerator) -> None:
    """Refuse a global batch of which not every process can have the same number of images.

    Raises:
        ValueError: for it.
    """
    if batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size counts the images of a step on all processes together, and {batch_size} cannot be "
            f"shared by {accelerator.num_processes}; take a multiple of {accelerator.num_processes}"
        )


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that training averages over batches, and evaluation uses."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            assert module.running_var is not None
            found += [module.running_mean, module.running_var]
        elif isinstance(module, ActivationQuantizer) and module.static:
            found.append(module.running_scales)
    return found


@torch.no_grad()
def average(statistics: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Replace each tensor by its mean over all processes, in place; every process has the same bits then.

    Cost: nothing on one process; on several one message of all tensors together.
    """
    if accelerator.num_processes == 1 or not statistics:
        return
    mean = accelerator.reduce(torch.cat([t.flatten() for t in statistics]), "mean")
    parts = mean.split([t.numel() for t in statistics])
    for tensor, part in zip(statistics, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM comes; a second signal acts at once, as it would have."""
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def remember(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread, which alone may handle signals: then nothing is caught
        before = {}
    try:
        yield caught
    finally:
        for caught_signal, handler in before.items():
            signal.signal(caught_signal, handler)
