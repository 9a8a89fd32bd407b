"""Scales that vary over a matrix: X ≈ V1∘S1 + … + Vk∘Sk, every V of low rank, every S of signs.

One scale a tensor, a row or a column are special matrices V of rank 1; V of rank r is the general case, and
one frame to compare them all in: more scales against more bits.

**One plane.** With S = sign(X), ‖X − V∘S‖ = ‖|X| − V‖, so the best V of rank r is the truncated singular
value decomposition of |X| (Eckart and Young 1936). For r = 1 its factors are non-negative (Perron and
Frobenius), and no other signs do better. For r ≥ 2 entries of V may be negative; there the opposite sign is
the better one, so that planes are S = sign(X∘V).

**Several planes.** ``gf-k`` repeats this on what is left: R_1 = X, S_i = sign(R_i∘V_i), V_i the truncated
decomposition of |R_i|, R_{i+1} = R_i − V_i∘S_i. ``ls-2`` starts from the best of three solutions, greedy
and the exact ones for rows and for columns, and alternates

    S1, S2 ← for every element, the level nearest to it of ±V1 ± V2
    V1 ← truncated decomposition of S1∘(X − V2∘S2)
    V2 ← truncated decomposition of S2∘(X − V1∘S1)

Each line minimises the squared error over what it changes, so the error never grows, and is never above that
of the three. It is no global optimum: none is known. ``ls-1`` alternates in the same way (V2 = 0), which
changes nothing at rank 1 and mends negative entries above.

Source: Pouransari, Tu, Tuzel, "Least squares binary quantization of neural networks", arXiv 2001.02786,
section 3, for one plane; the alternation over several is ours, after Xu et al. 2018 for scalars.
docs/mathematics.md has the proofs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from foldbit.core import axes, folding, schemes
from foldbit.core.schemes import Scheme

Side = Literal["tensor", "row", "column"]

# Steps of the alternation. On normal and Laplace matrices 8 save at least three quarters of what 100 save.
_STEPS = {"ls-1": 0, "ls-2": 8}


class LowRank(NamedTuple):
    """A matrix as sign planes, each scaled by a matrix of low rank.

    Attributes:
        left: ``[k, ..., rows, r]``, or ``[k, ..., 1, r]`` where all rows share their scales.
        right: ``[k, ..., r, cols]``, or ``[k, ..., r, 1]`` where all columns do. A side of size 1 whose
            number the other side has absorbed holds 1.
        planes: boolean ``[k, ..., rows, cols]``, True where negative.
    """

    left: Tensor
    right: Tensor
    planes: Tensor

    @property
    def rank(self) -> int:
        """The rank r that each plane's scales may have."""
        return self.left.shape[-1]

    @property
    def bitwise(self) -> bool:
        """Whether X̂·a is a bitwise product and a scale a row: no scale varies along the sum."""
        return self.right.shape[-1] == 1

    @property
    def sign_products(self) -> int:
        """Products of a sign plane with a vector that X̂·a takes, k·r.

        (l·rᵀ∘S)·a = l∘(S·(r∘a)): each term of V scales the vector before its own product. Unless
        :attr:`bitwise`, a vector that was signs is none any more then, and needs folding again.
        """
        return len(self.left) * self.rank

    @property
    def numbers(self) -> int:
        """Floats stored for one matrix, its planes together; sides that hold 1 are not."""
        sides = (self.left.shape[-2], self.right.shape[-1])
        return self.sign_products * max(sum(side for side in sides if side > 1), 1)

    def bits_per_value(self, scale_bits: int = 32) -> float:
        """Bits stored a value: k for the planes, and the scales' share."""
        rows, cols = self.planes.shape[-2:]
        return len(self.planes) + scale_bits * self.numbers / (rows * cols)

    def scales(self) -> Tensor:
        """Σ left·right, the matrix V of each plane: ``[k, ..., rows | 1, cols | 1]``, float64."""
        return self.left.double() @ self.right.double()

    def values(self) -> Tensor:
        """x̂ = Σ V_i∘S_i: ``[..., rows, cols]``, in the dtype that was quantized."""
        scales = self.scales()
        return torch.where(self.planes, -scales, scales).sum(0).to(self.left.dtype)

    def error(self, x: Tensor) -> Tensor:
        """Relative squared error ‖x − x̂‖² / ‖x‖² of each matrix ``[...]``, in float64; 0 for all zeros."""
        scales = self.scales()
        difference = x.double() - torch.where(self.planes, -scales, scales).sum(0)
        unit = x.double().abs().amax((-2, -1), keepdim=True)
        unit = torch.where(unit > 0, unit, 1)  # squares then neither over- nor underflow
        lost, energy = ((y / unit).square().sum((-2, -1)) for y in (difference, x.double()))
        return torch.where(energy == 0, lost, lost / energy)


@torch.no_grad()
def low_rank(
    x: Tensor, scheme: str | Scheme = "ls-1", scaling: Side | int = 1, *, steps: int | None = None
) -> LowRank:
    """Approximate matrices by sign planes, each scaled by a matrix of low rank.

    Args:
        x: matrices ``[..., rows, cols]``, floating point; every matrix gets scales of its own.
        scheme: any with scales where a ``tensor``, ``row`` or ``column`` shares them; ``ls-1``, ``ls-2`` or
            ``gf-k`` for a rank.
        scaling: what shares scales: the whole ``tensor``, each ``row``, each ``column``; or the rank of the
            scaling matrix, from 1 to the smaller side.
        steps: of the alternation that lowers the error of ``ls-1`` and ``ls-2`` at a rank. None is 8 for
            ``ls-2``, and 0 for ``ls-1``, which they hardly help (rank 8 on a normal matrix: .3085 becomes
            .3082). Other schemes take none.

    Returns:
        A :class:`LowRank`, in x's dtype. At rank 1 of ``ls-1`` the factors are non-negative; above, the
        largest entry of each left vector is positive. A matrix that holds NaN or infinity gets NaN scales.

    Raises:
        TypeError: for anything but real floating-point matrices.
        ValueError: for fewer than two dims, a scheme or a scaling that is unknown or does not fit the
            other, a rank above the smaller side, and matrices without elements.

    Cost: for a side, that of :func:`foldbit.solve`. At a rank, every decomposition is that of a Gram matrix
    of the smaller side m, O(n·m² + m³) in float64; ``ls-1`` takes 1 + steps of them, ``ls-2``
    2 + 2·steps, ``gf-k`` k. One of 256×2304 takes some 30 ms on a core. Memory is about ten float64 copies
    of x.

    Example:
        >>> import torch, foldbit as fb
        >>> x = torch.tensor([[1.0, -2.0], [-3.0, -6.0]])
        >>> [round(float(fb.low_rank(x, "ls-1", scaling).error(x)), 3) for scaling in ("tensor", "row", 1)]
        [0.28, 0.1, 0.0]
    """
    scheme = schemes.parse(scheme)
    _check_matrices(x)
    if isinstance(scaling, str):
        return _shared(x, scheme, scaling, steps)
    steps = _check_rank(scheme, scaling, steps, x.shape)
    left, right = _factors(x, scheme, scaling, steps)
    left, right = left.to(x.dtype), right.to(x.dtype)
    # Signs are chosen for the factors as they are stored.
    scales = left.double() @ right.double()
    return LowRank(left, right, _nearest(x.double(), scales, scheme))


@torch.no_grad()
def foldable_scales(x: Tensor, scheme: str | Scheme, rank: int, *, steps: int | None = None) -> Tensor:
    """Scales for every element ``[k, ..., rows, cols]`` with which folding x gives ``low_rank``'s values.

    They are the magnitudes of the planes' scaling matrices; those of ``ls-2`` the larger first at every
    element, for then the folded value is the nearest of its four levels. Arguments, errors and cost are those
    of :func:`low_rank`; in x's dtype.
    """
    scheme = schemes.parse(scheme)
    _check_matrices(x)
    left, right = _factors(x, scheme, rank, _check_rank(scheme, rank, steps, x.shape))
    return _in_folding_order(left @ right, scheme)[0].to(x.dtype)


def check_scheme(scheme: Scheme) -> None:
    """Refuse a scheme that has no scales of a rank.

    Raises:
        ValueError: for it.
    """
    if scheme.name not in _STEPS and not scheme.name.startswith("gf-"):
        raise ValueError(
            f"scales of a rank are for ls-1, ls-2 and gf-k; got scheme {str(scheme)!r}, which can share "
            "scales over a tensor, rows or columns"
        )


def check_fits(rank: int, rows: int, cols: int) -> None:
    """Refuse a rank that a matrix cannot have.

    Raises:
        ValueError: for it.
    """
    if not 1 <= rank <= min(rows, cols):
        raise ValueError(
            f"rank {rank} does not fit a matrix of {rows}×{cols}: it is at least 1, at most the smaller "
            "side, and far less to save anything"
        )


def _shared(x: Tensor, scheme: Scheme, side: str, steps: int | None) -> LowRank:
    """Scales that a tensor, a row or a column shares: those that its solver finds."""
    if side not in get_args(Side):
        raise ValueError(f"scaling is a rank or one of {', '.join(map(repr, get_args(Side)))}; got {side!r}")
    if steps is not None:
        raise ValueError(f"steps are for scales of a rank; scales of a {side} are solved at once")
    dims = {"tensor": (-2, -1), "row": (-1,), "column": (-2,)}[side]
    quantized = folding.quantize(x, scheme, dims)
    spread = axes.spread(quantized.scales, x.shape, quantized.dim)
    ones = torch.ones_like(spread[..., :1, :1])
    left, right = (ones, spread) if side == "column" else (spread, ones)
    return LowRank(left, right, quantized.planes)


def _factors(x: Tensor, scheme: Scheme, rank: int, steps: int) -> tuple[Tensor, Tensor]:
    """Factors of each plane's scaling matrix, float64: ``[..., m, n] -> [k, ..., m, r], [k, ..., r, n]``."""
    x = x.detach().double()
    unit = x.abs().amax((-2, -1), keepdim=True)
    broken = ~unit.isfinite()
    x = torch.where(broken, 0, x) / torch.where(unit > 0, unit, 1)
    left, right = _greedy(x, rank, scheme.planes)
    if scheme.name == "ls-2":
        left, right = _best_start(x, rank, left, right)
    if scheme.planes > 1 or rank > 1:  # one plane of rank 1 is optimal already
        for _ in range(steps):
            left, right = _alternate(x, rank, left, right, scheme)
    half_unit = torch.where(broken, torch.nan, unit.sqrt())  # half to each side, lest one leave its range
    return left * half_unit, right * half_unit


def _greedy(x: Tensor, rank: int, planes: int) -> tuple[Tensor, Tensor]:
    """Plane after plane: the truncated decomposition of |what is left|."""
    residual = x.abs()  # only magnitudes matter, here and after every plane: |r| ← ||r| − |V||
    factors = []
    for i in range(planes):
        left, right = _truncated(residual, rank, non_negative=True)
        factors.append((left, right))
        if i + 1 < planes:
            residual = (residual - (left @ right).abs()).abs()
    return torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors])


def _best_start(x: Tensor, rank: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The better, matrix by matrix, of these factors, the exact scales of rows, and those of columns."""
    scheme = schemes.parse("ls-2")
    starts = [(left, right)]
    for side in ("row", "column"):
        exact = _shared(x, scheme, side, None)
        one_left, one_right = exact.left.expand_as(left[..., :1]), exact.right.expand_as(right[..., :1, :])
        starts.append((_padded(one_left, rank, -1), _padded(one_right, rank, -2)))
    errors = torch.stack([_lost(x, a @ b, scheme) for a, b in starts])
    best = errors.argmin(0)[..., None, None]
    for i, (other_left, other_right) in enumerate(starts[1:], 1):
        left = torch.where(best == i, other_left, left)
        right = torch.where(best == i, other_right, right)
    return left, right


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """One term, filled up with zeros to as many as the rank."""
    more = [*factor.shape]
    more[dim] = rank - 1
    return torch.cat([factor, factor.new_zeros(more)], dim)


def _alternate(x: Tensor, rank: int, left: Tensor, right: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The nearest signs, then one plane's scales after the other: nothing here raises the error."""
    scales = left @ right
    signs = torch.where(_nearest(x, scales, scheme), -1.0, 1.0).to(x.dtype)
    terms = list((scales * signs).unbind(0))
    factors = []
    for i, sign in enumerate(signs.unbind(0)):
        others = sum((term for j, term in enumerate(terms) if j != i), torch.zeros_like(x))
        factor = _truncated(sign * (x - others), rank)
        factors.append(factor)
        terms[i] = sign * (factor[0] @ factor[1])
    return torch.stack([left for left, _ in factors]), torch.stack([right for _, right in factors])


def _truncated(x: Tensor, rank: int, *, non_negative: bool = False) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r in Frobenius norm: ``[..., m, n] -> [..., m, r], [..., r, n]``.

    Projects on the leading eigenvectors of the smaller Gram matrix. Its eigenvectors are as exact as their
    eigenvalues are far apart, but the projection loses at most rounding of ‖x‖², whatever the spectrum. Each
    left vector is as long as its right one, and its largest entry is positive; at rank 1 of a non-negative
    matrix both factors are non-negative.
    """
    wide = x.shape[-2] <= x.shape[-1]
    y = x if wide else x.mT
    u = torch.linalg.eigh(y @ y.mT).eigenvectors[..., -rank:].flip(-1)
    if non_negative and rank == 1:
        # |u| is no worse a leading vector of a non-negative matrix than u, ties among eigenvalues included.
        u = u.abs()
    w = u.mT @ y
    u, w = (u, w) if wide else (w.mT, u.mT)
    size, other = u.norm(dim=-2, keepdim=True), w.norm(dim=-1, keepdim=True).mT  # [..., 1, r]
    balance = torch.where((size > 0) & (other > 0), (other / size).sqrt(), 0)
    largest = u.gather(-2, u.abs().argmax(-2, keepdim=True))
    balance = torch.where(largest < 0, -balance, balance)
    return u * balance, w * torch.where(balance == 0, 0, 1 / balance).mT


def _in_folding_order(scales: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Magnitudes of the scales as folding takes them, and where that swaps the two planes of ``ls-2``."""
    magnitudes = scales.abs()
    if scheme.name != "ls-2":
        return magnitudes, None
    first, second = magnitudes
    return torch.stack([torch.maximum(first, second), torch.minimum(first, second)]), second > first


def _nearest(x: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """The planes whose values Σ V_i∘S_i are x folded by the magnitudes of the scales."""
    magnitudes, swapped = _in_folding_order(scales, scheme)
    planes = torch.stack([negative for negative, _ in folding.walk(x, magnitudes)])
    if swapped is not None:
        planes = torch.where(swapped, planes.flip(0), planes)
    return planes ^ (scales < 0)


def _lost(x: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Squared error of each matrix with these scales and the signs nearest to it."""
    magnitudes, _ = _in_folding_order(scales, scheme)
    return (x - folding.approximate(x, magnitudes)).square().sum((-2, -1))


def _check_matrices(x: Tensor) -> None:
    axes.check_float(x)
    if x.ndim < 2:
        raise ValueError(f"expected matrices [..., rows, cols], got shape {tuple(x.shape)}; try x[None]")


def _check_rank(scheme: Scheme, rank: int, steps: int | None, shape: torch.Size) -> int:
    """The steps to do, after refusing what cannot be done."""
    if type(rank) is not int:
        raise TypeError(f"scaling is a rank, a whole number, or a name; got {rank!r}")
    check_scheme(scheme)
    check_fits(rank, shape[-2], shape[-1])
    if steps is None:
        return _STEPS.get(scheme.name, 0)
    if scheme.name not in _STEPS:
        raise ValueError(f"steps refine ls-1 and ls-2; {scheme} keeps what it finds first")
    if type(steps) is not int or steps < 0:
        raise ValueError(f"steps is a whole number, at least 0; got {steps!r}")
    return steps
