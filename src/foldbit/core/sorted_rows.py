"""Rows of sorted magnitudes with prefix sums, and the least-squares fit of scales to cells of them.

Once a row is sorted, the magnitudes nearest to a level are a run of it, a *cell*; prefix sums give a cell's
count and sum in one look-up. From those alone the scales of least squared error for fixed signs follow: a
k×k system. So a step of alternating minimisation costs O(2^(k−1)·log n) a row, whatever the row's length.

A code is a plane of signs, up to its overall sign, which the value's own sign gives. The 2^(k−1) codes are
the rows of :func:`codes`: +1 first, then ±1, in the order that peeling visits them from small magnitudes to
large.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-12  # keeps singular systems solvable, and a scale that nothing determines where it was


class SortedRows(NamedTuple):
    """Magnitudes of ``R`` rows in ascending order, in units of a power of two near each row's largest.

    A view may be *thinned*, its cells cut at some of the places only: then ``keys[j]`` stands for the
    magnitudes between the cuts j and j + 1, of which ``counts`` and ``sums`` say how much lies below.

    Attributes:
        keys: float64 ``[R, m]``, ascending, below 2.
        counts: float64 ``[R, m + 1]``: elements below each cut; the last is n.
        sums: float64 ``[R, m + 1]``: their sum.
        unit: float64 ``[R, 1]``; 1 for a row of zeros.
        n: elements a row.
    """

    keys: Tensor
    counts: Tensor
    sums: Tensor
    unit: Tensor
    n: int

    def take(self, rows: Tensor) -> SortedRows:
        """Only those rows."""
        return SortedRows(self.keys[rows], self.counts[rows], self.sums[rows], self.unit[rows], self.n)

    def thinned(self, cells: int) -> SortedRows:
        """A view of ``cells`` keys, of about equal counts plus sums; itself where it has no more elements."""
        if self.n <= cells:
            return self
        share = self.counts / self.n + self.sums / self.sums[:, -1:].clamp(
            min=torch.finfo(torch.float64).tiny
        )
        parts = torch.arange(cells + 1, dtype=torch.float64, device=self.keys.device) / cells
        cuts = torch.searchsorted(share, share[:, -1:] * parts).clamp(max=self.n)
        cuts[:, -1] = self.n
        middles = ((cuts[:, :-1] + cuts[:, 1:]) // 2).clamp(max=self.n - 1)
        keys, counts, sums = (
            self.keys.gather(1, middles),
            self.counts.gather(1, cuts),
            self.sums.gather(1, cuts),
        )
        return SortedRows(keys, counts, sums, self.unit, self.n)


def sort_rows(rows: Tensor) -> SortedRows:
    """Sort the magnitudes of finite rows ``[R, n]`` of any float dtype."""
    keys = rows.abs().contiguous().sort(1).values.double()  # a look-up in strided keys would copy them
    largest = keys[:, -1:]
    # A power of two, so that nothing rounds: largest / (its mantissa in [1, 2)).
    unit = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1)
    keys = keys / unit
    sums = torch.nn.functional.pad(keys.cumsum(1), (1, 0))
    counts = torch.arange(rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
    return SortedRows(keys, counts.expand_as(sums), sums, unit, rows.shape[1])


@functools.cache
def _codes(planes: int) -> tuple[tuple[int, ...], ...]:
    return tuple((1, *rest) for rest in itertools.product((-1, 1), repeat=planes - 1))


def codes(planes: int, like: Tensor) -> Tensor:
    """All codes up to sign, float ``[2^(k−1), k]``, in the dtype and on the device of ``like``."""
    return torch.tensor(_codes(planes), dtype=like.dtype, device=like.device)


class Fit(NamedTuple):
    """What cells say about scales: the mean squared error is energy − 2·b·v + v·M·v.

    Attributes:
        gram: M, float64 ``[..., k, k]``: mean products of two planes' signs, 1 on the diagonal.
        target: b, float64 ``[..., k]``: mean products of a plane's signs and the values.
    """

    gram: Tensor
    target: Tensor

    def gain(self, scales: Tensor) -> Tensor:
        """How much of the mean square the scales explain: 2·b·v − v·M·v, ``[...]``."""
        return (scales * (2 * self.target - (self.gram @ scales.unsqueeze(-1)).squeeze(-1))).sum(-1)


def fit_of(counts: Tensor, sums: Tensor, n: int) -> Fit:
    """The fit of cells with those counts and signed sums, ``[..., 2^(k−1)]`` in the order of the codes."""
    planes = counts.shape[-1].bit_length()
    table = codes(planes, counts)
    products = (table.unsqueeze(2) * table.unsqueeze(1)).flatten(1)
    return Fit((counts @ products).unflatten(-1, (planes, planes)) / n, sums @ table / n)


def nearest_cells(rows: SortedRows, scales: Tensor) -> tuple[Tensor, Fit]:
    """Give every magnitude its nearest level.

    Args:
        rows: ``R`` rows.
        scales: ``[R, starts, k]``.

    Returns:
        The cuts between the cells, ``[R, starts, 2^(k−1) − 1]``, and the cells' fit.
    """
    levels = scales @ codes(scales.shape[-1], scales).T
    magnitudes, order = levels.abs().sort(-1)
    thresholds = (magnitudes[..., 1:] + magnitudes[..., :-1]) / 2
    cuts = torch.searchsorted(rows.keys, thresholds.flatten(1)).reshape(thresholds.shape)
    counts, sums = between(rows, cuts)
    counts = torch.empty_like(counts).scatter_(-1, order, counts)
    sums = torch.empty_like(sums).scatter_(-1, order, sums)
    return cuts, fit_of(counts, torch.where(levels < 0, -sums, sums), rows.n)


def between(rows: SortedRows, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums of the cells that ascending cuts ``[R, ..., c]`` leave: ``[R, ..., c + 1]``."""
    ends = torch.nn.functional.pad(cuts, (1, 1))
    ends[..., -1] = rows.keys.shape[1]
    counts = rows.counts.gather(1, ends.flatten(1)).reshape(ends.shape)
    sums = rows.sums.gather(1, ends.flatten(1)).reshape(ends.shape)
    return counts.diff(dim=-1), sums.diff(dim=-1)


def least_squares(fit: Fit, scales: Tensor) -> Tensor:
    """The scales of least error for the fit's cells; the given ones where the cells leave them open.

    Never worse than the given scales: the answer minimises error + ridge·‖v − given‖².
    """
    rest = fit.target - (fit.gram @ scales.unsqueeze(-1)).squeeze(-1)
    return scales + solve_small(_planes_first(fit.gram, 2), _planes_first(rest, 1)).movedim(0, -1)


def _planes_first(x: Tensor, dims: int) -> Tensor:
    """``[..., k]`` or ``[..., k, k]`` with the planes' dims in front, where a column is one run of memory."""
    return x.movedim(tuple(range(-dims, 0)), tuple(range(dims))).contiguous()


def solve_small(gram: Tensor, target: Tensor) -> Tensor:
    """(M + ridge)⁻¹·b for positive semi-definite k×k systems, by Cholesky without roots.

    ``[k, k, ...], [k, ...] -> [k, ...]``. Written out over columns, for a batch of a million tiny systems is
    what LAPACK is slowest at.
    """
    planes = len(target)
    y = list(target.unbind(0))
    lower: dict[tuple[int, int], Tensor] = {}
    pivots: list[Tensor] = []
    for j in range(planes):
        scaled = [lower[j, q] * pivots[q] for q in range(j)]
        pivot = gram[j, j] + _RIDGE
        for q in range(j):
            pivot = pivot - lower[j, q] * scaled[q]
        pivots.append(pivot.clamp(min=_RIDGE))
        for i in range(j + 1, planes):
            entry = gram[i, j]
            for q in range(j):
                entry = entry - lower[i, q] * scaled[q]
            lower[i, j] = entry / pivots[j]
    for i in range(planes):
        for q in range(i):
            y[i] = y[i] - lower[i, q] * y[q]
    y = [value / pivot for value, pivot in zip(y, pivots, strict=True)]
    for i in reversed(range(planes)):
        for q in range(i + 1, planes):
            y[i] = y[i] - lower[q, i] * y[q]
    return torch.stack(y)


def cone(planes: int, like: Tensor) -> Tensor:
    """Generators of the foldable scales, as columns ``[k, k]``: v = cone·w with w ≥ 0.

    In this cone every scale is at least the sum of the later ones, v_i = w_i + Σ_{j>i} v_j.
    """
    rows = torch.zeros(planes, planes, dtype=like.dtype)
    for i in reversed(range(planes)):
        rows[i] = rows[i + 1 :].sum(0)
        rows[i, i] = 1
    return rows.to(like.device)


def least_squares_in_cone(fit: Fit, scales: Tensor) -> Tensor:
    """The foldable scales of least error for the fit's cells, exactly: the best face of the cone.

    Never worse than the given scales, which are foldable too.
    """
    planes = scales.shape[-1]
    generators = cone(planes, scales)
    gram = generators.T @ fit.gram @ generators
    target = fit.target @ generators
    given = torch.linalg.solve_triangular(
        generators, scales.unsqueeze(-1), upper=True, unitriangular=True
    ).squeeze(-1)
    # Planes first and the faces last, ``[k, k, ..., faces]``.
    faces = torch.tensor(list(itertools.product((0, 1), repeat=planes)), dtype=scales.dtype).to(scales.device)
    shape = (*[1] * (scales.ndim - 1), len(faces))
    on = faces.T.reshape(planes, *shape)
    off = torch.diag_embed(1 - faces).permute(1, 2, 0).reshape(planes, planes, *shape)
    gram, target, given = (
        _planes_first(x, dims).unsqueeze(-1) for x, dims in ((gram, 2), (target, 1), (given, 1))
    )
    on_face = solve_small(gram * (on.unsqueeze(1) * on) + off, (target + _RIDGE * given) * on)
    weights = on_face.clamp(min=0)
    explained = (weights * (2 * target - (gram * weights).sum(1)) - _RIDGE * (weights - given).square()).sum(
        0
    )  # Rounding may leave a weight that should be 0 a little below it.
    slack = 1e-9 * on_face.abs().amax(0)
    explained = torch.where((on_face >= -slack).all(0), explained, -torch.inf)
    best = explained.argmax(-1, keepdim=True).expand(planes, *scales.shape[:-1], 1)
    return weights.gather(-1, best).squeeze(-1).movedim(0, -1) @ generators.T


def peeled_cells(rows: SortedRows, planes: int, refit: bool) -> tuple[Tensor, Fit]:
    """Greedy scales, plane by plane: every cell is split where its level lies.

    Args:
        rows: ``R`` rows.
        planes: k.
        refit: whether all scales are fitted again after each plane, by least squares.

    Returns:
        Scales ``[R, k]``, and the fit of the cells.
    """
    size = rows.keys.shape[1]
    first = rows.sums.new_zeros(len(rows.keys), 1, dtype=torch.long)
    ends = torch.cat([first, first + size], 1)
    counts, sums = between(rows, ends[:, 1:-1])
    fit = fit_of(counts, sums, rows.n)
    scales = fit.target
    for plane in range(2, planes + 1):
        levels = scales @ codes(plane - 1, scales).T
        cuts = torch.searchsorted(rows.keys, levels)
        cuts = cuts.clamp(ends[:, :-1], ends[:, 1:])
        inner = torch.stack([cuts, ends[:, 1:]], -1).flatten(1)[:, :-1]
        ends = torch.cat([first, inner, first + size], 1)
        counts, sums = between(rows, inner)
        fit = fit_of(counts, sums, rows.n)
        # What the planes so far leave, as the new plane's signs see it: mean|r|.
        left = fit.target[:, -1] - (fit.gram[:, -1, :-1] * scales).sum(1)
        scales = torch.cat([scales, left.unsqueeze(1)], 1)
        if refit:
            scales = least_squares(fit, scales)
    return scales, fit
