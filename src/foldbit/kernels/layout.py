"""The packed layout: how sign planes become bytes on disk and words in the kernels.

One plane keeps one bit per value: a set bit means negative (the IEEE sign bit), a clear bit means
positive or zero. Two forms exist.

*On disk*: ``uint8 [k, out, kh, kw, ceil(in/8)]``. Bit ``c % 8`` of byte ``c // 8`` is input channel ``c``
(of the channels one group of the convolution sees); spare bits are 0. A linear layer is a 1x1 kernel, a
one-dimensional convolution a kernel of height 1.

*In the kernels*: ``uint32 [k, groups, blocks, segments, kh, kw, words, LANES]``. A block is LANES output
channels side by side, so that one activation word meets LANES weight words without a horizontal sum. A
segment is a run of input channels that share one scale (one segment, unless weights are scaled by group);
it starts on a word of its own. Spare bits, and the lanes that fill up the last block, are 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 32
LANES = 16


def bytes_for(channels: int) -> int:
    """Bytes that one plane of ``channels`` values takes on disk."""
    return -(-channels // 8)


def words_for(channels: int) -> int:
    """32-bit words that one plane of ``channels`` values takes in a kernel."""
    return -(-channels // WORD_BITS)


def pack_bits(negative: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pack booleans ``[..., c]`` into bytes ``[..., ceil(c/8)]``, lowest bit first, spare bits 0."""
    return np.packbits(negative, axis=-1, bitorder="little")


def unpack_bits(packed: NDArray[np.uint8], channels: int) -> NDArray[np.bool_]:
    """Unpack bytes ``[..., ceil(c/8)]`` into booleans ``[..., c]``: the inverse of :func:`pack_bits`."""
    return np.unpackbits(packed, axis=-1, count=channels, bitorder="little").astype(bool)


def spare_bits_are_zero(packed: NDArray[np.uint8], channels: int) -> bool:
    """Whether the bits past the last channel are all 0, as the layout asks."""
    used = channels % 8
    return used == 0 or not np.any(packed[..., -1] >> used)


def bits_to_words(negative: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """Pack booleans ``[..., c]`` into words ``[..., ceil(c/32)]``, lowest bit first, spare bits 0."""
    spare = -negative.shape[-1] % WORD_BITS
    padded = np.pad(negative, [(0, 0)] * (negative.ndim - 1) + [(0, spare)])
    return np.ascontiguousarray(pack_bits(padded)).view("<u4").astype(np.uint32, copy=False)


def disk_to_kernel(
    planes: NDArray[np.uint8], channels: int, *, groups: int = 1, segments: int = 1
) -> NDArray[np.uint32]:
    """Lay the planes of a file out for the kernels.

    Args:
        planes: ``uint8 [k, out, kh, kw, ceil(channels/8)]``.
        channels: input channels of one group.
        groups: groups of the convolution; divides ``out``.
        segments: runs of input channels with a scale of their own; divides ``channels``.

    Returns:
        ``uint32 [k, groups, blocks, segments, kh, kw, words, LANES]``.
    """
    k, out, kh, kw, _ = planes.shape
    negative = unpack_bits(planes, channels)
    words = bits_to_words(negative.reshape(k, out, kh, kw, segments, channels // segments))
    per_group = out // groups
    blocks = -(-per_group // LANES)
    words = words.reshape(k, groups, per_group, kh, kw, segments, -1)
    words = np.pad(words, [(0, 0), (0, 0), (0, blocks * LANES - per_group)] + [(0, 0)] * 4)
    words = words.reshape(k, groups, blocks, LANES, kh, kw, segments, -1)
    return np.ascontiguousarray(words.transpose(0, 1, 2, 6, 4, 5, 7, 3))
