"""Training's passes as custom operators over the native core: one or two passes over the data each way.

Eager code, autograd and torch.compile run them on CPU tensors; other devices, torch.export and, but for
:func:`solve_rows`, the transforms of torch.func keep to the plain torch code of :mod:`foldbit.core.folding`
and :mod:`foldbit.nn.estimators`, which says the same in words that any device knows. :func:`runs` tells
whether x can be taken at all.

Where scales are shared over ``dim``, elements that share them are a row, and a tensor that is dense in any
memory order is read and written in that order, without copies. Half-precision values go through float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from foldbit.core import axes, schemes
from foldbit.kernels import native

#: Estimators of :mod:`foldbit.nn.estimators` whose windows the core knows.
ESTIMATORS = native.ESTIMATORS

#: Schemes that :func:`solve_rows` solves for.
SCHEMES = ("ls-1", "ls-2", "ls-T", *(f"gf-{k}" for k in range(1, schemes.MAX_PLANES + 1)))

# In releases without it, whatever compiles may be exporting.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

torch.library.define(
    "foldbit::solve_rows", "(Tensor rows, str scheme, float? clamp=None) -> (Tensor scales, Tensor excess)"
)
torch.library.define(
    "foldbit::approximate", "(Tensor x, Tensor scales, int[] dim, str estimator, float? clamp=None) -> Tensor"
)
torch.library.define(
    "foldbit::window",
    "(Tensor grad, Tensor x, Tensor scales, int[] dim, str estimator, float? clamp=None) -> Tensor",
)


def runs(x: Tensor) -> bool:
    """Whether the operators can take x: on the CPU, with the native core, and not on the way into a file."""
    if x.device.type != "cpu" or not native.has_solvers():
        return False
    if torch.compiler.is_compiling():
        return not _is_exporting()
    return type(x) in (Tensor, torch.nn.Parameter)  # others may have no memory to read


def solve_rows(rows: Tensor, scheme: str, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """Scales of least squared error, and of ``gf-k`` greedy ones, for rows clipped to ±clamp.

    Args:
        rows: ``[rows, n]``, n ≥ 1, of any float dtype.
        scheme: one of :data:`SCHEMES`.
        clamp: values are clipped to [−clamp, clamp] as they are read; None for no clip.

    Returns:
        Scales float64 ``[rows, k]``, constants to autograd; NaN for a row that holds NaN or, within the
        clamp, infinity. And the certificate float64 ``[rows]``: a bound on (squared error − least squared
        error) / ‖x‖²; infinite for ``gf-k`` of two planes or more, which nothing bounds.

    Cost: linear time, below 1 MB of memory a thread.
    """
    solved: tuple[Tensor, Tensor] = torch.ops.foldbit.solve_rows.default(rows, scheme, clamp)
    return solved


def approximate(
    x: Tensor, scales: Tensor, dim: Sequence[int], estimator: str, clamp: float | None = None
) -> Tensor:
    """Clip x to ±clamp, fold and unfold it; backward, the estimator's window and the clip's mask.

    The numbers are those of ``x.clamp(−clamp, clamp)`` and :func:`foldbit.core.folding.approximate`, bit for
    bit; the gradient is that of :func:`foldbit.nn.estimators.straight_through` behind the clamp, for float32
    and float64 bit for bit, for half precision with fewer roundings. Nothing but x and the scales is kept for
    the backward pass, which has no gradient of its own and says so, as forward-mode differentiation does.

    Args:
        x: any shape and float dtype.
        scales: ``[..., k]``, k = 1…8, as :func:`foldbit.solve` returns them; constants to autograd.
        dim: the non-negative dims whose elements share scales.
        estimator: one of :data:`ESTIMATORS`.
        clamp: the clip; None for none.

    Returns:
        x̂ in the shape, dtype and, where x is dense, memory order of x.

    Raises:
        RuntimeError: in forward-mode differentiation.
        ValueError: where the scales do not fit x, or the estimator is unknown.

    Cost: one pass forward, one pass backward.
    """
    kept = axes.kept_shape(x.shape, tuple(dim))
    if scales.ndim != len(kept) + 1 or list(scales.shape[:-1]) != kept:
        raise ValueError(
            f"scales of shape {tuple(scales.shape)} do not fit a tensor of shape {tuple(x.shape)} that "
            f"shares scales over dim {tuple(dim)}: expected {(*kept, 'k')}"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; known are {', '.join(ESTIMATORS)}")
    approximated: Tensor = torch.ops.foldbit.approximate.default(x, scales, dim, estimator, clamp)
    return approximated


# ---------------------------------------------------------------------------------------------------------
# On the CPU


def _solve_rows(rows: Tensor, scheme: str, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    if rows.dtype in (torch.float16, torch.bfloat16):
        rows = _clipped(rows, clamp).float()
        clamp = None
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    scales, excess = native.solve_rows(
        rows.detach().numpy(), scheme, clamp=clamp, threads=torch.get_num_threads()
    )
    return torch.from_numpy(scales), torch.from_numpy(excess)


def _approximate(
    x: Tensor, scales: Tensor, dim: Sequence[int], estimator: str, clamp: float | None = None
) -> Tensor:
    _check_no_tangents()
    if x.dtype in (torch.float16, torch.bfloat16):
        return _approximate(_clipped(x, clamp).float(), scales.float(), dim, estimator).to(x.dtype)
    rows = _Rows(x, dim)

    def write(out: NDArray[Any]) -> None:
        native.approximate_rows(
            rows.of(x), rows.scales(scales), clamp, out=out, threads=torch.get_num_threads()
        )

    return rows.new(write)


def _window(
    grad: Tensor,
    x: Tensor,
    scales: Tensor,
    dim: Sequence[int],
    estimator: str,
    clamp: float | None = None,
) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        if clamp is not None:
            clamp = float(torch.tensor(clamp, dtype=x.dtype))  # as torch.clamp rounds it
        return _window(grad.float(), x.float(), scales.float(), dim, estimator, clamp).to(x.dtype)
    rows = _Rows(x, dim)

    def write(out: NDArray[Any]) -> None:
        native.window_rows(
            rows.of(grad),
            rows.of(x),
            rows.scales(scales),
            estimator,
            clamp,
            out=out,
            threads=torch.get_num_threads(),
        )

    return rows.new(write)


def _clipped(x: Tensor, clamp: float | None) -> Tensor:
    return x if clamp is None else x.clamp(-clamp, clamp)


class _Rows:
    """How tensors of x's shape are read and written as NumPy matrices ``[rows, n]`` in x's memory order."""

    def __init__(self, x: Tensor, dim: Sequence[int]) -> None:
        self.x = x
        inner = sorted(dim, key=lambda d: x.stride(d), reverse=True)
        self.order = (*(d for d in range(x.ndim) if d not in dim), *inner)
        self.count, self.n = 1, 1
        for d in self.order[: x.ndim - len(inner)]:
            self.count *= x.shape[d]
        for d in inner:
            self.n *= x.shape[d]

    def of(self, x: Tensor) -> NDArray[Any]:
        """The matrix of a tensor, a view of it where its memory order allows."""
        rows = x.detach().to(self.x.dtype).permute(self.order).reshape(self.count, self.n)
        return (rows if self.n <= 1 or rows.stride(1) == 1 else rows.contiguous()).numpy()

    def scales(self, scales: Tensor) -> NDArray[Any]:
        return scales.detach().to(self.x.dtype).reshape(self.count, -1).contiguous().numpy()

    def new(self, write: Callable[[NDArray[Any]], None]) -> Tensor:
        """A new tensor like x, whose matrix is handed to `write` to be filled."""
        out = torch.empty_like(self.x)
        if out.numel() == 0:
            return out
        rows = self.of(out)
        write(rows)
        if not np.may_share_memory(rows, out.numpy()):  # the order allowed no view
            shape = [out.shape[d] for d in self.order]
            out.permute(self.order).copy_(torch.from_numpy(rows).reshape(shape))
        return out


torch.library.impl("foldbit::solve_rows", "CPU", _solve_rows)
torch.library.impl("foldbit::approximate", "CPU", _approximate)
torch.library.impl("foldbit::window", "CPU", _window)


# ---------------------------------------------------------------------------------------------------------
# Under tracing


@torch.library.register_fake("foldbit::solve_rows")
def _(rows: Tensor, scheme: str, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    planes = schemes.parse(scheme).planes
    double = torch.float64
    return rows.new_empty((rows.shape[0], planes), dtype=double), rows.new_empty(rows.shape[0], dtype=double)


@torch.library.register_fake("foldbit::approximate")
def _(x: Tensor, scales: Tensor, dim: Sequence[int], estimator: str, clamp: float | None = None) -> Tensor:
    _check_no_tangents()
    return torch.empty_like(x)


@torch.library.register_fake("foldbit::window")
def _(
    grad: Tensor,
    x: Tensor,
    scales: Tensor,
    dim: Sequence[int],
    estimator: str,
    clamp: float | None = None,
) -> Tensor:
    return torch.empty_like(x)


# ---------------------------------------------------------------------------------------------------------
# Under vmap: a batch of matrices has its rows one after the other


@torch.library.register_vmap("foldbit::solve_rows")
def _(
    info: Any, in_dims: tuple[int | None, ...], rows: Tensor, scheme: str, clamp: float | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    batched = rows.movedim(in_dims[0] or 0, 0)
    scales, excess = solve_rows(batched.flatten(0, 1), scheme, clamp)
    shape = batched.shape[:2]
    return (scales.unflatten(0, shape), excess.unflatten(0, shape)), (0, 0)


# ---------------------------------------------------------------------------------------------------------
# Gradients


def _keep_no_graph(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _of_constants(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
    return None, None, None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scales, ctx.dim, ctx.estimator, ctx.clamp = inputs
    ctx.save_for_backward(x, scales)


def _through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    if ctx.estimator == "identity" and ctx.clamp is None:
        return grad, None, None, None, None
    x, scales = ctx.saved_tensors
    window = torch.ops.foldbit.window.default
    return window(grad, x, scales, ctx.dim, ctx.estimator, ctx.clamp), None, None, None, None


def _check_no_tangents() -> None:
    """Refuse forward mode, for which an operator has no formula: torch would take its derivative for zero."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "foldbit::approximate has no forward-mode derivative. Differentiate outside torch.compile, where "
            "quantizers take foldbit.nn.estimators.straight_through instead"
        )


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "foldbit::window is a gradient and has none of its own: fused quantizers are differentiable once. "
        "For gradients of gradients use foldbit.nn.estimators.straight_through, which is plain torch"
    )


torch.library.register_autograd("foldbit::solve_rows", _of_constants, setup_context=_keep_no_graph)
torch.library.register_autograd("foldbit::approximate", _through, setup_context=_keep)
torch.library.register_autograd("foldbit::window", _refuse)
