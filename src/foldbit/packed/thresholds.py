"""Thresholds: all that happens to a value before it is folded, as comparisons of the value itself.

With fixed scales, a plane's bit says on which side of some point a value lies: plane 1 asks for the sign,
plane 2 for the side of ±v1, and so on down a binary tree of 2^k - 1 comparisons. Batch norm, clamp, ReLU and
their like work on every channel by itself and are monotone, so the point can as well be given in terms of the
value that goes into them, channel by channel. Nothing of them is then left to compute.

The points are found by bisection of the function as it is: 32 evaluations tell the exact float32 at which its
bit changes, rounding included, whatever the function. NaN, which counts as positive when it is folded by
scales, compares as not below: in channels whose function falls its bits are negative.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from foldbit.kernels import layout

MAX_PLANES = 4  # the tree has 2^k - 1 nodes

_LARGEST = 0x7F7FFFFF  # the bits of the largest finite float32


@torch.no_grad()
def find(function: Callable[[Tensor], Tensor], scales: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The thresholds that fold a value as its function is folded by scales.

    Args:
        function: float32 ``[n, channels] -> [n, channels]``, for any n; each channel by itself, monotone.
        scales: float32 ``[k]``, k at most :data:`MAX_PLANES`.
        channels: how many channels.

    Returns:
        Thresholds float32 ``[2^k - 1, channels]`` and flips, boolean ``[channels]``: where the function
        falls, so that comparisons mean the contrary. Node i's children are 2i + 1, for values below its
        threshold, and 2i + 2.
    """
    ends = function(_floats(torch.tensor([[-_LARGEST], [_LARGEST]]).expand(2, channels)))
    flips = ends[0] > ends[1]
    planes = len(scales)
    nodes = 2**planes - 1

    def below(keys: Tensor) -> Tensor:
        """Whether values lie below each node's threshold, ``[nodes, channels]``."""
        y = function(_floats(keys))
        answers = []
        for node in range(nodes):
            residual = y[node]
            for level, was_below in enumerate(_path(node)):
                negative = flips != was_below
                residual = residual - torch.where(negative, -scales[level], scales[level])
            answers.append((residual < 0) != flips)
        return torch.stack(answers)

    low = torch.full((nodes, channels), -_LARGEST)
    high = torch.full((nodes, channels), _LARGEST)
    never, always = ~below(low), below(high)
    for _ in range(32):  # below at low, not below at high
        middle = (low + high).div(2, rounding_mode="floor")
        answer = below(middle)
        low, high = torch.where(answer, middle, low), torch.where(answer, high, middle)
    thresholds = torch.where(always, torch.inf, torch.where(never, -torch.inf, _floats(high)))
    return thresholds, flips


def lay_out(thresholds: Tensor, flips: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """What the kernels take: float32 ``[nodes, runs, 32 * words]`` and int32 ``[runs, words]``."""
    per_run = flips.shape[0] // runs
    spare = layout.words_for(per_run) * layout.WORD_BITS - per_run
    padded = torch.nn.functional.pad(thresholds.unflatten(1, (runs, per_run)), (0, spare))
    words = layout.bits_to_words(flips.reshape(runs, per_run).numpy())
    return padded.contiguous(), torch.from_numpy(words.view(np.int32))


def _path(node: int) -> list[bool]:
    """Whether the path from the root went below, level by level."""
    steps: list[bool] = []
    while node:
        steps.insert(0, node % 2 == 1)
        node = (node - 1) // 2
    return steps


def _floats(keys: Tensor) -> Tensor:
    """The float32 of whole numbers that count floats in order, 0 at 0."""
    bits = keys.abs().to(torch.int32)
    magnitudes = bits.view(torch.float32)
    return torch.where(keys < 0, -magnitudes, magnitudes)
