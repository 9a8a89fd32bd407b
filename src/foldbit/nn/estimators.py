"""Gradients through sign.

The gradient of a sum of scaled signs is zero almost everywhere. A straight-through estimator replaces it
by a window: how much of the output's gradient an input gets, given its value x and the scales v.

==============  ==========================================================  =============================
name            window                                                      source
==============  ==========================================================  =============================
``identity``    1                                                           Bengio et al. 2013
``clipped``     1 where |x| ≤ 1, else 0                                     the paper's code; Hubara 2016
``scaled``      1 where |x| ≤ limit, else 0; the limit is the clamp, or     the same, in units of the data
                3·v1 without one
``polynomial``  Σ_i max(0, 1 − |r_i| / 2v_i), r_i the residual that plane   Bi-Real net (Liu et al. 2018),
                i takes the sign of                                         stretched to each plane's scale
==============  ==========================================================  =============================

``clipped`` is absolute: activations much wider than 1 lose most of their gradients to it. The polynomial
is the derivative of Bi-Real's piecewise quadratic, which runs from −v to v over [−2v, 2v]; at v = ½ it is
v·(2 − 2|x|) on [−1, 1], as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from foldbit.core import axes, folding, fused

# (x, scales [k, ...] that broadcast against x, clamp) -> window, broadcastable against x
Estimator = Callable[[Tensor, Tensor, float | None], Tensor]

# (x, scales [k, ...] that broadcast against x) -> x̂
Values = Callable[[Tensor, Tensor], Tensor]


def identity(x: Tensor, scales: Tensor, clamp: float | None) -> Tensor:
    """Every input gets the whole gradient."""
    return x.new_ones(())


def clipped(x: Tensor, scales: Tensor, clamp: float | None) -> Tensor:
    """Inputs beyond ±1 get none."""
    return x.abs() <= 1


def scaled(x: Tensor, scales: Tensor, clamp: float | None) -> Tensor:
    """Inputs beyond the clamp, or beyond three times the first scale, get none."""
    return x.abs() <= (3 * scales[0] if clamp is None else clamp)


def polynomial(x: Tensor, scales: Tensor, clamp: float | None) -> Tensor:
    """Inputs near a sign's threshold get most, in proportion to the sign's scale."""
    residual = x
    window = torch.zeros_like(x)
    for scale, (_, signed) in zip(scales, folding.walk(x, scales), strict=True):
        # A plane whose scale is 0 changes nothing, hence has no gradient to give.
        reach = torch.where(scale > 0, 2 * scale, 1)
        window = window + torch.where(scale > 0, (1 - residual.abs() / reach).clamp(min=0), 0)
        residual = residual - signed
    return window.to(x.dtype)


ESTIMATORS: dict[str, Estimator] = {
    "identity": identity,
    "clipped": clipped,
    "scaled": scaled,
    "polynomial": polynomial,
}


def get(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown gradient estimator {name!r}; known are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def approximate(
    x: Tensor, scales: Tensor, dim: Sequence[int], estimator: str, clamp: float | None = None
) -> Tensor:
    """Clip x to ±clamp, then x̂ = Σ v_i·s_i; backward, the estimator's window where the clip did not cut.

    On the CPU two fused passes (:mod:`foldbit.core.fused`); elsewhere, under torch.export, in torch.func's
    transforms and in forward-mode differentiation :func:`straight_through`.

    Args:
        x: any shape and float dtype.
        scales: ``[..., k]``, as :func:`foldbit.solve` returns them; constants to autograd.
        dim: the non-negative dims whose elements share scales.
        estimator: a name.
        clamp: the clip; None, or a number beyond x's dtype, for none.
    """
    window, clamp = get(estimator), axes.reachable(clamp, x.dtype)
    if estimator in fused.ESTIMATORS and fused.runs(x) and not _transformed(x):
        return fused.approximate(x, scales, dim, estimator, clamp)
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return straight_through(x, axes.spread(scales, x.shape, tuple(dim)), window, clamp)


def straight_through(
    x: Tensor,
    scales: Tensor,
    estimator: Estimator,
    clamp: float | None = None,
    values: Values = folding.approximate,
) -> Tensor:
    """x̂ = Σ v_i·s_i forward, the estimator's window times what comes in either way of differentiation.

    Plain torch: it can be differentiated again, and transformed by torch.func.

    Args:
        x: values, already clamped.
        scales: ``[k, ...]``, broadcastable against x plane by plane; constants to autograd.
        estimator: the window of the gradient.
        clamp: the clip x went through, for estimators that follow it.
        values: x̂ of x and the scales: peeled, or :func:`foldbit.core.encoding.nearest`.
    """
    transformed = _transformed(x)
    if not (transformed or (torch.is_grad_enabled() and x.requires_grad)):
        return values(x, scales)
    function = _Transformed if transformed else _StraightThrough
    out: Tensor = function.apply(x, scales, estimator, clamp, values)
    return out


def _transformed(x: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation may follow x, which requires_grad does not tell."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or is_functorch_wrapped_tensor(x)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor, estimator: Estimator, clamp: float | None, values: Values
    ) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.estimator, ctx.clamp = estimator, clamp
        return values(x, scales)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, scales = ctx.saved_tensors
        return grad * ctx.estimator(x, scales, ctx.clamp), None, None, None, None


class _Transformed(torch.autograd.Function):
    """The same for torch.func and forward mode, which torch takes longer to call, and does not compile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scales: Tensor, estimator: Estimator, clamp: float | None, values: Values
    ) -> Tensor:
        return values(x, scales)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scales, ctx.estimator, ctx.clamp, _ = inputs
        ctx.save_for_backward(x, scales)
        ctx.save_for_forward(x, scales)

    backward = staticmethod(_StraightThrough.backward)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *of_constants: Any) -> Tensor:
        x, scales = ctx.saved_tensors
        return tangent * ctx.estimator(x, scales, ctx.clamp)
