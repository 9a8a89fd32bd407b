"""Values to the planes of their nearest level, given any scales.

Scales v have 2^k levels ±v1 ± … ± vk. :func:`foldbit.fold` peels signs off one by one, which finds the
nearest level only where each scale is at least the sum of the later ones. Encoding finds it for any scales,
by comparing |x| with the 2^(k−1) − 1 thresholds half-way between neighbouring magnitudes of levels (so does
the binary search tree of Xu et al. 2018, arXiv 1802.00150, section 3).

The code of a value is that of its magnitude, all signs flipped where the value is negative; sign(0) =
sign(−0) = +1. On a threshold the larger magnitude is taken; of two codes with the same magnitude, either. As
in folding, planes are True where negative, and half-precision values are encoded in float32.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from foldbit.core import axes, schemes


def encode(x: Tensor, scales: Tensor, dim: axes.Dims = -1) -> Tensor:
    """Turn values into the sign planes of their nearest level.

    Args:
        x: ``[..., n]``, floating point.
        scales: ``[..., k]``, k ≤ 8, in any order and of any sign, as :func:`foldbit.solve` returns them for
            the same ``dim``.
        dim: the dim or dims whose elements share scales; None for all.

    Returns:
        Boolean planes ``[k, ..., n]``, True where the plane's sign is negative: what :func:`foldbit.unfold`
        turns into the nearest level. NaN has the code of the smallest magnitude.

    Raises:
        TypeError: where x is not floating point.
        ValueError: where scales do not fit x, or are more than 8.

    Cost: 2·(2^(k−1) − 1) + k passes over x.

    Example:
        >>> import torch, foldbit as fb
        >>> x, scales = torch.tensor([0.2, -0.9, 4.0]), torch.tensor([2.0, 1.5, 1.0])
        >>> fb.unfold(fb.encode(x, scales), scales)
        tensor([ 0.5000, -0.5000,  4.5000])
        >>> fb.unfold(fb.fold(x, scales), scales)
        tensor([-0.5000, -1.5000,  4.5000])
    """
    axes.check_float(x)
    levels = _levels(axes.spread(scales, x.shape, axes.normalize(x.ndim, dim)))
    magnitude = _at_least_float32(x).abs()
    code = levels.codes[0].expand(magnitude.shape)
    for threshold, above in zip(levels.thresholds, levels.codes[1:], strict=True):
        code = torch.where(magnitude >= threshold, above, code)
    bits = torch.arange(scales.shape[-1], dtype=torch.uint8, device=x.device)
    negative = (code >> bits.reshape(-1, *[1] * x.ndim)) & 1 == 1
    return negative ^ (x < 0)


def nearest(x: Tensor, spread: Tensor) -> Tensor:
    """The level nearest to each value, in x's dtype: what encoding and unfolding give, without the planes.

    Args:
        x: values ``[...]``.
        spread: scales ``[k, ...]`` that broadcast against x plane by plane (:func:`axes.spread`).

    Cost: 2·(2^(k−1) − 1) passes over x.
    """
    levels = _levels(spread)
    magnitude = _at_least_float32(x).abs()
    level = levels.magnitudes[0].expand(magnitude.shape)
    for threshold, above in zip(levels.thresholds, levels.magnitudes[1:], strict=True):
        level = torch.where(magnitude >= threshold, above, level)
    return torch.where(x < 0, -level, level).to(x.dtype)


class _Levels(NamedTuple):
    """Ascending magnitudes of levels, for scales that broadcast.

    Attributes:
        magnitudes: ``[2^(k−1), ...]``.
        thresholds: ``[2^(k−1) − 1, ...]``: half-way between neighbours.
        codes: uint8 ``[2^(k−1), ...]``: bit i is set where the sign of plane i is negative.
    """

    magnitudes: Tensor
    thresholds: Tensor
    codes: Tensor


def _levels(spread: Tensor) -> _Levels:
    planes = len(spread)
    if planes > schemes.MAX_PLANES:
        raise ValueError(f"{planes} scales a value; at most {schemes.MAX_PLANES} are encoded")
    spread = _at_least_float32(spread)
    signed = []
    for signs in itertools.product((-1, 1), repeat=planes - 1):
        level = spread[0]  # added up in unfold's order, so that both give the same number
        for sign, scale in zip(signs, spread[1:], strict=True):
            level = level + sign * scale
        signed.append(level)
    levels = torch.stack(signed)
    code = torch.arange(2 ** (planes - 1), device=spread.device).flip(
        0
    )  # + is 0, - is 1, the second sign first
    bits = sum(((code >> (planes - 2 - i)) & 1) << (i + 1) for i in range(planes - 1)) + torch.zeros_like(
        code
    )
    bits = bits.reshape(-1, *[1] * (levels.ndim - 1))
    flipped = torch.where(levels < 0, 2**planes - 1 - bits, bits)  # |level| has all signs the other way round
    magnitudes, order = levels.abs().sort(dim=0, stable=True)
    return _Levels(
        magnitudes, magnitudes[:-1] / 2 + magnitudes[1:] / 2, flipped.gather(0, order).to(torch.uint8)
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
