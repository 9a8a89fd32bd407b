"""Values to planes and planes to values, given scales.

Planes are foldable: each is the sign of what the earlier ones left, s_i = sign(x − Σ_{j<i} v_j·s_j), with
sign(0) = sign(−0) = +1. They are stored as booleans, True where negative (the IEEE sign bit).
Half-precision values are folded in float32, as the packed kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from foldbit.core import axes, encoding, schemes, solvers
from foldbit.core.schemes import Scheme


def fold(x: Tensor, scales: Tensor, dim: axes.Dims = -1) -> Tensor:
    """Turn values into sign planes.

    Args:
        x: ``[..., n]``, floating point.
        scales: ``[..., k]``, as :func:`foldbit.solve` returns them for the same ``dim``.
        dim: the dim or dims whose elements share scales; None for all.

    Returns:
        Boolean planes ``[k, ..., n]``, True where the plane's sign is negative. NaN counts as positive.

    Raises:
        TypeError: where x is not floating point.
        ValueError: where scales do not fit x.
    """
    axes.check_float(x)
    spread = axes.spread(scales, x.shape, axes.normalize(x.ndim, dim))
    return torch.stack([negative for negative, _ in walk(x, spread)])


def unfold(planes: Tensor, scales: Tensor, dim: axes.Dims = -1) -> Tensor:
    """Turn sign planes into values: x̂ = Σ v_i·s_i.

    Args:
        planes: boolean ``[k, ..., n]``, True where negative.
        scales: ``[..., k]``.
        dim: the dim or dims, of the values, whose elements share scales; None for all.

    Returns:
        Values ``[..., n]`` in the scales' dtype.

    Raises:
        TypeError: where planes are not boolean.
        ValueError: where scales do not fit the planes.
    """
    if planes.dtype != torch.bool:
        raise TypeError(f"planes are boolean, True where negative; got {planes.dtype}")
    if planes.ndim == 0 or scales.shape[-1:] != planes.shape[:1]:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} for planes of shape {tuple(planes.shape)}: "
            "expected [..., k] and [k, ...]"
        )
    spread = axes.spread(scales, planes.shape[1:], axes.normalize(planes.ndim - 1, dim))
    spread = _at_least_float32(spread)
    total = torch.where(planes[0], -spread[0], spread[0])
    for negative, scale in zip(planes[1:], spread[1:], strict=True):
        total = total + torch.where(negative, -scale, scale)
    return total.to(scales.dtype)


def walk(x: Tensor, spread: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Peel x plane by plane: yields where the plane is negative, and its scaled signs v_i·s_i.

    Args:
        x: values ``[...]``.
        spread: scales ``[k, ...]`` that broadcast against x plane by plane (:func:`axes.spread`).
    """
    residual = _at_least_float32(x)
    spread = _at_least_float32(spread)
    for i, scale in enumerate(spread):
        negative = residual < 0
        signed = torch.where(negative, -scale, scale)
        yield negative, signed
        if i + 1 < len(spread):
            residual = residual - signed


def approximate(x: Tensor, spread: Tensor) -> Tensor:
    """x̂ = Σ v_i·s_i for scales ``[k, ...]`` that broadcast against x: fold and unfold in one walk."""
    total: Tensor | None = None
    for _, signed in walk(x, spread):
        total = signed if total is None else total + signed
    assert total is not None, "a scheme has at least one plane"
    return total.to(x.dtype)


class Quantized(NamedTuple):
    """A quantized tensor: scales ``[..., k]`` and boolean planes ``[k, ..., n]``.

    ``dim`` holds the dims, of the values, whose elements share scales.
    """

    scales: Tensor
    planes: Tensor
    dim: tuple[int, ...]

    def values(self) -> Tensor:
        """x̂ = Σ v_i·s_i, of the shape and dtype that was quantized.

        A level can lie beyond every value, and where those reach to the end of their dtype's range, beyond
        that: it is infinite then.
        """
        return unfold(self.planes, self.scales, self.dim)

    def error(self, x: Tensor) -> Tensor:
        """Relative squared error ‖x − x̂‖² / ‖x‖² of each row ``[...]``, in float64; 0 for an all-zero row."""
        x, approximation = x.double(), self.values().double()
        unit = x.abs().amax(self.dim, keepdim=True)
        unit = torch.where(unit > 0, unit, 1)  # squares then neither over- nor underflow
        lost = (x / unit - approximation / unit).square().sum(self.dim)
        energy = (x / unit).square().sum(self.dim)
        return torch.where(energy == 0, lost, lost / energy)


def quantize(x: Tensor, scheme: str | Scheme, dim: axes.Dims = -1) -> Quantized:
    """Solve for the scales of x and fold it: scales and planes together.

    Where the scheme is not foldable, x is encoded instead (:func:`foldbit.encode`). Arguments, errors and
    cost are those of :func:`foldbit.solve`.

    Example:
        >>> import torch, foldbit as fb
        >>> x = torch.tensor([-3.0, -1.0, 1.0, 3.5])
        >>> q = fb.quantize(x, "ls-2")
        >>> q.values()
        tensor([-3.2500, -1.0000,  1.0000,  3.2500])
        >>> q.error(x)
        tensor(0.0054, dtype=torch.float64)
    """
    scheme = schemes.parse(scheme)
    scales = solvers.solve(x, scheme, dim)
    dims = axes.normalize(x.ndim, dim)
    planes = fold(x, scales, dims) if scheme.foldable else encoding.encode(x, scales, dims)
    return Quantized(scales, planes, dims)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
