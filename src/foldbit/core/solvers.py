"""Scales of least squared error.

``solve`` minimises ‖x − Σ v_i·s_i‖² over the scales v and the signs s, for every set of elements that
shares scales. With 1 bit the optimum is the mean magnitude. With 2 bits the approximation has two
magnitudes, v1 − v2 and v1 + v2, so the optimum is one-dimensional 2-means on |x|; it splits sorted
magnitudes at one place, and every place can be tried after one sort and one cumulative sum. Ternary is
the same search for the tail alone. Three bits and more have no such order (:mod:`foldbit.core.multibit`).

Source: Pouransari, Tu, Tuzel, "Least squares binary quantization of neural networks", arXiv 2001.02786,
sections 3 and 4, whose optimality condition v1 = ½(E[|x| : |x| > v1] + E[|x| : |x| ≤ v1]) every optimum
of this search satisfies. The greedy baseline is its section 4.2 (after Guo et al., 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from foldbit.core import axes, fused, histograms, multibit, schemes
from foldbit.core.schemes import Scheme

Method = Literal["auto", "native", "sort", "histogram"]

# Where the native core cannot run, rows of at least so many elements are searched by histograms. Both ways
# are exact. Measured on a CPU (benchmarks/solvers.py --traced): below some 5,000 elements histograms cost
# more than the row; here they take half the time of sorting, at 200,000 a fifth, and compiled an eighth.
_LONG = 8192


@overload
def solve(
    x: Tensor,
    scheme: str | Scheme,
    dim: axes.Dims = -1,
    *,
    method: Method = "auto",
    clamp: float | None = None,
) -> Tensor: ...
@overload
def solve(
    x: Tensor,
    scheme: str | Scheme,
    dim: axes.Dims = -1,
    *,
    method: Method = "auto",
    clamp: float | None = None,
    certificate: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def solve(
    x: Tensor,
    scheme: str | Scheme,
    dim: axes.Dims = -1,
    *,
    method: Method = "auto",
    clamp: float | None = None,
    certificate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Solve for the scales of x.

    ``ls-1``, ``ls-2`` and ``ls-T`` reach the global optimum up to the rounding of the scales to
    x's dtype, for any shape, memory format, ties, zeros, constants and outliers. ``ls-k`` and ``lsf-k`` of
    3 and 4 bits are the best that a search finds: ``ls-k`` never worse than another scheme of as many bits,
    ``lsf-k`` never worse than greedy. ``gf-k``, ``rg-k`` and ``alt-k`` are baselines.

    Args:
        x: float16, bfloat16, float32 or float64, of any shape ``[..., n]``.
        scheme: any but ``fp`` (:mod:`foldbit.core.schemes`).
        dim: the dim or dims whose elements share scales; None for all.
        method: how ``ls-2`` and ``ls-T`` search: in the ``native`` core, by ``sort`` or by ``histogram`` in
            torch, or ``auto``, which takes the native core where it can read the tensor and elsewhere
            histograms for long rows.
        clamp: solve for x clipped to [−clamp, clamp]; the native core makes no clipped copy of it. One beyond
            the largest number of x's dtype is none.
        certificate: also return how far from optimal the scales can be.

    Returns:
        Scales ``[..., k]`` in x's dtype: x's shape without ``dim``, then one non-negative scale a plane,
        the largest first (greedy ones can grow, on sparse data). Constants to autograd. A row that holds
        NaN, or infinity within the clamp, gets NaN scales; others do not, but for float64 rows whose
        magnitudes add up to more than float64 holds, 1.8e308: ``ls-1`` and ``gf-k`` add them up as they are.

        With ``certificate``, also the excess, float64 ``[...]``: an upper bound, up to float64 rounding, on
        (squared error − least squared error) / ‖x‖² before the scales are rounded to x's dtype.

    Raises:
        TypeError: for integer, boolean or complex input.
        ValueError: for an unknown scheme, ``fp``, rows without elements, or a clamp that is not positive; for
            a method that cannot serve the scheme or the tensor, and for the certificate of a scheme that
            promises none.

    Cost: on the CPU, torch.compile included, all run in the native core, in linear time and memory below
    1 MB a thread; ``ls-1`` takes one pass and ``gf-k`` takes k. On other devices and under torch.export, for
    ``ls-2`` and ``ls-T`` rows of 8192 elements or more go through histograms: linear time, ten times the
    memory of a float32 input; shorter rows are sorted: O(n log n), about seven times the input's memory.
    The schemes of :mod:`foldbit.core.multibit` sort, and ``ls-k`` and ``lsf-k`` then take milliseconds a row.

    Example:
        >>> import torch, foldbit as fb
        >>> fb.solve(torch.tensor([-3.0, -1.0, 1.0, 3.0]), "ls-2")
        tensor([2., 1.])
    """
    scheme = schemes.parse(scheme)
    axes.check_float(x)
    if scheme.is_float:
        raise ValueError("scheme 'fp' leaves a tensor float and has no scales; pick another, such as ls-2")
    dims = axes.normalize(x.ndim, dim)
    rows = axes.as_rows(x.detach(), dims)
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is a positive number or None; got {clamp!r}")
    scales, excess = _solve_rows(rows, scheme, method, axes.reachable(clamp, x.dtype))
    kept = axes.kept_shape(x.shape, dims)
    scales = scales.to(x.dtype).reshape(*kept, scheme.planes)
    if not certificate:
        return scales
    if excess is None:
        raise ValueError(f"scheme {scheme} has no certificate: nothing bounds how far from optimal it stays")
    return scales, excess.reshape(kept)


def _solve_rows(
    rows: Tensor, scheme: Scheme, method: str, clamp: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scales float64 ``[rows, k]`` and the certificate ``[rows]``, where the scheme has one."""
    if method not in get_args(Method):
        raise ValueError(f"method is one of {', '.join(map(repr, get_args(Method)))}; got {method!r}")
    searched = scheme.name in ("ls-2", "ls-T")
    if method != "auto" and not searched:
        raise ValueError(f"method {method!r} searches for ls-2 and ls-T; {scheme} has method 'auto' only")
    if scheme.name in multibit.SCHEMES:
        return multibit.solve_rows(rows if clamp is None else rows.clamp(-clamp, clamp), scheme), None
    if method == "native" or (method == "auto" and _runs_native(rows)):
        scales, excess = fused.solve_rows(rows, scheme.name, clamp)
        return scales, excess if searched or scheme.planes == 1 else None
    if clamp is not None:
        rows = rows.clamp(-clamp, clamp)
    if searched:
        if method == "auto":
            method = "histogram" if _is_long(rows) else "sort"
        return _SEARCHES[method](rows, scheme)
    scales = _greedy(rows, scheme.planes)
    return scales, _none_missed(scales) if scheme.planes == 1 else None


def _runs_native(rows: Tensor) -> bool:
    return fused.runs(rows)


def _is_long(rows: Tensor) -> bool:
    if not torch.compiler.is_compiling():
        return rows.shape[1] >= _LONG
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes a third of a second

    # A length that is a symbol must not decide, for the graph would then serve some lengths only.
    return statically_known_true(rows.shape[1] >= _LONG)


def _by_sorting(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    scales = _two_planes_by_sorting(rows) if scheme.name == "ls-2" else _ternary_by_sorting(rows)
    return scales, _none_missed(scales)


def _none_missed(scales: Tensor) -> Tensor:
    """The certificate of an exhaustive search: 0, and NaN for a row that could not be solved."""
    return scales[:, 0] * 0


def _two_planes_by_sorting(rows: Tensor) -> Tensor:
    """The best split of sorted magnitudes into a low and a high mean. ``[rows, n] -> [rows, 2]``.

    The split after m of n elements saves n·D²/(m(n−m)) of squared error over one mean for all, with
    D = m·mean − (sum of the m smallest): a form in which nothing large cancels.
    """
    magnitudes, unit = _sorted_magnitudes(rows, descending=False)
    n = magnitudes.shape[1]
    mean = magnitudes.mean(1, keepdim=True)
    low_count = torch.arange(1, n + 1, dtype=torch.float64, device=rows.device)
    high_count = n - low_count
    drop = (mean - magnitudes).cumsum(1)
    # The last place leaves no high elements: it stands for "one level", which saves nothing.
    gain = torch.where(high_count > 0, drop.square() / (low_count * high_count.clamp(min=1)), 0)
    place = gain.argmax(1, keepdim=True)
    drop = torch.where(place == n - 1, 0, drop.gather(1, place))
    low = (mean - drop / (place + 1)).clamp(min=0)  # where all is 0, rounding may leave less
    high = mean + drop / (n - 1 - place).clamp(min=1)
    return torch.cat([high + low, (high - low).clamp(min=0)], 1) * (unit / 2)


def _ternary_by_sorting(rows: Tensor) -> Tensor:
    """The best tail to keep, all below it becoming 0. ``[rows, n] -> [rows, 2]``, both scales equal."""
    magnitudes, unit = _sorted_magnitudes(rows, descending=True)
    count = torch.arange(1, magnitudes.shape[1] + 1, dtype=torch.float64, device=rows.device)
    tail = magnitudes.cumsum(1)
    place = (tail.square() / count).argmax(1, keepdim=True)
    level = tail.gather(1, place) / (place + 1)
    return (level * (unit / 2)).repeat(1, 2)


def _sorted_magnitudes(rows: Tensor, *, descending: bool) -> tuple[Tensor, Tensor]:
    """Sorted |x| / unit in float64 and the unit, a row's maximum: squares then neither over- nor underflow.

    A row with NaN or infinity becomes NaN throughout.
    """
    magnitudes = rows.abs().sort(1, descending=descending).values.double()
    unit = magnitudes.amax(1, keepdim=True)
    return magnitudes / torch.where(unit > 0, unit, 1), unit


def _greedy(rows: Tensor, planes: int) -> Tensor:
    """v_i = mean|r|, r ← r − v_i·sign(r), from r = x: exact for one plane. ``[rows, n] -> [rows, k]``."""
    residual = rows.abs()  # only magnitudes matter, here and after every plane: |r| ← ||r| − v|
    scales = []
    for i in range(planes):
        scale = residual.mean(1, keepdim=True, dtype=torch.float64)
        scales.append(torch.where(scale.isfinite(), scale, torch.nan))
        if i + 1 < planes:
            residual = (residual.double() - scale).abs()
    return torch.cat(scales, 1)


_SEARCHES: dict[str, Callable[[Tensor, Scheme], tuple[Tensor, Tensor]]] = {
    "sort": _by_sorting,
    "histogram": histograms.solve_rows,
}
