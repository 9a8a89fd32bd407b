"""Which elements share scales: the dims that a solver reduces, as rows of a matrix and back.

And which tensors and clamps there can be scales for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Dims = int | Sequence[int] | None

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(x: Tensor) -> None:
    """Refuse what has no scales: anything but a real floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a torch.Tensor, got {type(x).__name__}; try torch.as_tensor(x)")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"expected float16, bfloat16, float32 or float64, got {x.dtype}; convert it, as with x.float()"
        )


def reachable(clamp: float | None, dtype: torch.dtype) -> float | None:
    """The clamp; None, as for no clamp, where it is beyond the largest finite number of the dtype."""
    return None if clamp is None or clamp > torch.finfo(dtype).max else clamp


def normalize(ndim: int, dim: Dims) -> tuple[int, ...]:
    """The dims as sorted, non-negative numbers; None means all of them.

    Raises:
        IndexError: for a dim that the tensor lacks.
        ValueError: for a dim named twice, or none at all.
    """
    if dim is None:
        return tuple(range(ndim))
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    if ndim == 0 and all(d in (-1, 0) for d in given):
        return ()  # a scalar has a dim to name, as in torch
    if not given:
        raise ValueError("dim is empty: name at least one dim to share scales over, or None for all")
    for d in given:
        if not -ndim <= d < ndim:
            raise IndexError(f"dim {d} is out of range for a tensor of {ndim} dims")
    dims = sorted(d % ndim for d in given)
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim names a dim twice: {given} for a tensor of {ndim} dims")
    return tuple(dims)


def kept_shape(shape: Sequence[int], dims: tuple[int, ...]) -> list[int]:
    """The shape without the dims."""
    return [size for d, size in enumerate(shape) if d not in dims]


def as_rows(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """View or copy x as ``[rows, n]``, one row per set of elements that share scales.

    The order inside a row is unspecified, for no solver depends on it: reduced dims go in the order of
    their strides, so that a dense tensor of any memory format is viewed and not copied.

    Raises:
        ValueError: where a row would be empty.
    """
    # Under tracing strides may be symbols, which have no order.
    tracing = torch.compiler.is_compiling()
    inner = dims if tracing else sorted(dims, key=lambda d: x.stride()[d], reverse=True)
    outer = [d for d in range(x.ndim) if d not in dims]
    n = 1
    for d in dims:
        n *= x.shape[d]
    if n == 0:
        raise ValueError(
            f"nothing to solve for: shape {tuple(x.shape)} has no elements along dim {dims}; "
            "only the other dims may be empty"
        )
    rows = 1
    for d in outer:
        rows *= x.shape[d]
    return x.permute((*outer, *inner)).reshape(rows, n)


def spread(scales: Tensor, shape: Sequence[int], dims: tuple[int, ...]) -> Tensor:
    """Lay scales ``[..., k]`` out as ``[k, ...]``, ready to broadcast against a tensor of that shape.

    Raises:
        ValueError: where the scales do not belong to such a tensor.
    """
    kept = kept_shape(shape, dims)
    if scales.ndim != len(kept) + 1 or list(scales.shape[:-1]) != kept or scales.shape[-1] == 0:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} do not fit a tensor of shape {tuple(shape)} that shares "
            f"scales over dim {dims}: expected {(*kept, 'k')} with k ≥ 1"
        )
    planes_first = scales.movedim(-1, 0)
    for d in dims:
        planes_first = planes_first.unsqueeze(d + 1)
    return planes_first
