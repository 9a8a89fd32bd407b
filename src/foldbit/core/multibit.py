"""Scales of 3 and 4 bits: least squares over all sign codes, over foldable ones, and published baselines.

With k planes a value's magnitude is given one of 2^(k−1) levels |v1 ± v2 ± … ± vk|. For fixed scales the best
level is the nearest; for fixed levels the cells are runs of sorted magnitudes, and the best scales a k×k
least-squares problem (:mod:`foldbit.core.sorted_rows`). Alternating the two never raises the error, but ends
in one of many local minima, so where it starts matters.

What each scheme minimises, for a row x of n values:

- ``ls``: ‖x − Σ v_i·s_i‖² over all v and all signs. The signs of the best v give every value its nearest
  level; peeling need not find that level, so the codes are not foldable in general.
- ``lsf``: ‖x − Σ v_i·s_i‖² over v ≥ 0 with *peeled* signs, s_i = sign(x − Σ_{j<i} v_j·s_j), which is
  ‖ |…||x| − v1| − … | − vk ‖², a continuous function of v. Peeling finds the nearest level of every value if
  each scale is at least the sum of the later ones, and in general not otherwise. Such scales form a cone, and
  in it alternating works as above, the least-squares step being constrained to the cone. Outside it peeling
  gives some values a level that is not the nearest. Where greedy's scales lie there and still leave less, as
  on rows of few values, they are the answer.
- ``alt`` (Xu et al., "Alternating multi-bit quantization for recurrent neural networks", ICLR 2018, arXiv
  1802.00150, algorithm 2): greedy signs, then alternating until nothing moves (the paper stops after two
  rounds).
- ``rg`` (Guo et al., "Network sketching: exploiting binary structure in deep CNNs", CVPR 2017, arXiv
  1706.02021, algorithm 2): greedy, with all scales refitted after each plane. Its values are then given their
  nearest level, which is at least as near as the paper's own signs.

No polynomial exact method is known for k ≥ 3. ``ls`` and ``lsf`` search: they start from least-squares fits
of each order that the levels can have (2 orders for k = 3, 14 for k = 4) to two guesses of the cells,
alternate, perturb the best and alternate again, first on 512 cells a row and at last on all. Rows of at most
32 (k = 3) or 6 (k = 4) elements are solved exactly, by trying every choice of cells under every order. By
construction the answer is never worse than greedy (``lsf``), and than greedy, ``lsf``, ``alt`` and ``rg``
(``ls``).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from foldbit.core.schemes import Scheme
from foldbit.core.sorted_rows import (
    Fit,
    SortedRows,
    between,
    codes,
    cone,
    fit_of,
    least_squares,
    least_squares_in_cone,
    nearest_cells,
    peeled_cells,
    sort_rows,
)

# Scales of each order type: the 2^(k−1) levels |v1 ± …| of any scales have the order, and the signs inside
# |…|, of one of these. The first of each is foldable.
ORDER_TYPES = {
    2: ((2, 1),),
    3: ((4, 2, 1), (4, 3, 2)),
    4: (
        *((8, 4, 2, 1), (8, 4, 3, 2), (8, 5, 4, 2), (8, 6, 4, 1), (8, 6, 4, 3), (8, 6, 5, 4), (8, 7, 4, 2)),
        *((7, 6, 5, 3), (10, 4, 3, 2), (10, 6, 3, 2), (10, 7, 4, 2), (10, 7, 6, 2), (10, 8, 4, 3), (10, 8, 6,
        3)),
    ),
}  # fmt: skip

#: Names of the schemes that are solved here.
SCHEMES = tuple(
    f"{kind}-{k}" for kind, least in (("ls", 3), ("lsf", 3), ("alt", 2), ("rg", 2)) for k in range(least, 5)
)

_EXACT_UP_TO = {2: 0, 3: 32, 4: 6}  # elements a row
_CHUNK = 1 << 19  # elements sorted at once
_ROWS = 2048  # rows solved at once
_THINNED = 512
_STEPS = 8  # of alternation, before starts are compared
_LAST_STEPS = 300
_ROUNDS = {3: 3, 4: 6}
_SPREADS = (0.03, 0.05, 0.1, 0.1, 0.15, 0.2, 0.2, 0.25, 0.3, 0.3, 0.35, 0.4, 0.4, 0.5, 0.6, 0.8)

Rule = Callable[[Fit, Tensor], Tensor]
Types = tuple[tuple[int, ...], ...]


def solve_rows(rows: Tensor, scheme: Scheme) -> Tensor:
    """Scales of rows.

    Args:
        rows: ``[R, n]``, floating point, n ≥ 1, on any device.
        scheme: one of :data:`SCHEMES`.

    Returns:
        float64 ``[R, k]``, non-negative, descending (but greedy's own order where ``lsf`` takes greedy's);
        NaN for rows that hold NaN or infinity.

    Cost: a sort, then milliseconds a row for ``ls`` and ``lsf``; memory beyond the input is bounded, as rows
    are solved in chunks. Deterministic. One custom operator, so that torch.compile and torch.export see
    through it.
    """
    scales: Tensor = torch.ops.foldbit.solve_multibit.default(rows, scheme.name, scheme.planes)
    return scales


@torch.library.custom_op("foldbit::solve_multibit", mutates_args=())
def _solve_multibit(rows: Tensor, scheme: str, planes: int) -> Tensor:
    kind = scheme.partition("-")[0]
    finite = torch.isfinite(rows).all(1, keepdim=True)
    scales = rows.new_empty(len(rows), planes, dtype=torch.float64)
    step = max(1, min(_ROWS, _CHUNK // rows.shape[1]))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        sorted_rows = sort_rows(torch.where(finite[chunk], rows[chunk], 0))
        scales[chunk] = _solve_sorted(sorted_rows, kind, planes) * sorted_rows.unit
    return torch.where(finite, scales, torch.nan)


@_solve_multibit.register_fake
def _(rows: Tensor, scheme: str, planes: int) -> Tensor:
    return rows.new_empty(rows.shape[0], planes, dtype=torch.float64)


def _solve_sorted(rows: SortedRows, kind: str, planes: int) -> Tensor:
    greedy, greedy_fit = peeled_cells(rows, planes, refit=False)
    if kind == "lsf":
        return _foldable(rows, greedy, greedy_fit)
    refined, refined_fit = peeled_cells(rows, planes, refit=True)
    if kind == "rg":
        return _canonical(refined)
    fitted = least_squares(greedy_fit, greedy).unsqueeze(1)
    alternating = _descend(rows, fitted, least_squares, _LAST_STEPS)[0].squeeze(1)
    if kind == "alt":
        return _canonical(alternating)
    foldable = _foldable(rows, greedy, greedy_fit)
    types = ORDER_TYPES[planes]
    if rows.n <= _EXACT_UP_TO[planes]:
        found = _every_choice(rows, planes, types, least_squares)
    else:
        known = torch.stack([foldable, alternating, least_squares(refined_fit, refined)], 1)
        starts = torch.cat([known, _order_type_starts(rows, planes, types, least_squares)], 1)
        found = _search(rows, starts, least_squares, torch.eye(planes).to(starts))
    return _least(
        rows, _canonical(torch.stack([found, foldable, alternating, refined, greedy], 1)), nearest_error
    )


def _foldable(rows: SortedRows, greedy: Tensor, greedy_fit: Fit) -> Tensor:
    """``lsf`` scales ``[R, k]``, never worse than the greedy ones."""
    planes = greedy.shape[1]
    types = ORDER_TYPES[planes][:1]
    if rows.n <= _EXACT_UP_TO[planes]:
        found = _every_choice(rows, planes, types, least_squares_in_cone)
    else:
        _, refined_fit = peeled_cells(rows, planes, refit=True)
        origin = torch.zeros_like(greedy)
        known = [least_squares_in_cone(fit, origin) for fit in (greedy_fit, refined_fit)]
        dyadic = greedy[:, :1] * greedy.new_tensor([[2.0**-i for i in range(planes)]])
        starts = torch.cat(
            [
                torch.stack([*known, dyadic], 1),
                _order_type_starts(rows, planes, types, least_squares_in_cone),
            ],
            1,
        )
        found = _search(rows, starts, least_squares_in_cone, cone(planes, greedy))
    return _least(rows, torch.stack([found, greedy], 1), peeled_error)


def _search(rows: SortedRows, starts: Tensor, rule: Rule, generators: Tensor) -> Tensor:
    """The best scales ``[R, k]`` found from starts ``[R, S, k]`` and from around the best of them."""
    planes = starts.shape[-1]
    thin = rows.thinned(_THINNED)
    best, explained = _best(*_descend(thin, starts, rule, _STEPS))
    for kicks in _kicks(planes).to(starts.device):
        weights = torch.linalg.solve_triangular(generators, best.unsqueeze(-1), upper=True).squeeze(-1)
        kicked = (weights.unsqueeze(1) * kicks) @ generators.T
        found, gains = _descend(thin, kicked, rule, _STEPS)
        best, explained = _best(
            torch.cat([best.unsqueeze(1), found], 1), torch.cat([explained.unsqueeze(1), gains], 1)
        )
    return _best(*_descend(rows, best.unsqueeze(1), rule, _LAST_STEPS))[0]


def _descend(rows: SortedRows, scales: Tensor, rule: Rule, steps: int) -> tuple[Tensor, Tensor]:
    """Alternate nearest levels and the rule's scales: scales ``[R, S, k]`` and their gain ``[R, S]``."""
    last: Tensor | None = None
    for _ in range(steps):
        cuts, fit = nearest_cells(rows, scales)
        found = rule(fit, scales)
        if last is not None:
            # What has come to rest is left alone, so that a row's answer does not depend on its neighbours.
            moved = (cuts != last).any(-1, keepdim=True)
            if not moved.any():
                break
            found = torch.where(moved, found, scales)
        last, scales = cuts, found
    return scales, nearest_cells(rows, scales)[1].gain(scales)


def _best(scales: Tensor, gains: Tensor) -> tuple[Tensor, Tensor]:
    """The scales ``[R, k]`` of largest gain, of ``[R, S, k]``, and the gain ``[R]``."""
    gain, place = gains.max(1)
    return scales.gather(1, place.reshape(-1, 1, 1).expand(-1, 1, scales.shape[-1])).squeeze(1), gain


@functools.cache
def _kicks(planes: int) -> Tensor:
    """Factors around 1, ``[rounds, S, k]``: the same in every call, so that results are reproducible."""
    generator = torch.Generator().manual_seed(0)
    shape = (_ROUNDS.get(planes, 1), len(_SPREADS), planes)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (normal * torch.tensor(_SPREADS, dtype=torch.float64).unsqueeze(1)).exp()


@functools.cache
def _typed_codes(planes: int, types: Types) -> tuple[Tensor, Tensor]:
    """For each order type, which place each code's level takes, and its sign: ``[types, codes]``."""
    levels = torch.tensor(types, dtype=torch.float64) @ codes(planes, torch.empty(0, dtype=torch.float64)).T
    return levels.abs().argsort(1).argsort(1), levels.sign()


def _typed_fit(counts: Tensor, sums: Tensor, n: int, planes: int, types: Types) -> Fit:
    """The fits ``[..., types]`` of ascending cells ``[..., codes]`` whose levels have these order types."""
    places, signs = (table.to(counts.device) for table in _typed_codes(planes, types))
    return fit_of(counts[..., places], sums[..., places] * signs, n)


def _order_type_starts(rows: SortedRows, planes: int, types: Types, rule: Rule) -> Tensor:
    """For each guess of the cells and each order type, the rule's scales: ``[R, 2·types, k]``."""
    starts = []
    for counts, sums in _guessed_cells(rows.thinned(_THINNED), 2 ** (planes - 1)):
        fit = _typed_fit(counts, sums, rows.n, planes, types)
        starts.append(rule(fit, torch.zeros_like(fit.target)))
    return torch.cat(starts, 1)


def _guessed_cells(rows: SortedRows, cells: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts and sums of ascending cells ``[R, cells]``: of equal counts and of equal sums.

    Both are then improved as if every cell had a level of its own (Lloyd, Max).
    """
    parts = torch.arange(1, cells, dtype=torch.float64, device=rows.keys.device) / cells
    for filled in (rows.counts, rows.sums):
        cuts = torch.searchsorted(filled.contiguous(), filled[:, -1:] * parts).clamp(max=rows.keys.shape[1])
        counts, sums = between(rows, cuts)
        for _ in range(_STEPS):
            below = rows.keys.gather(
                1, torch.nn.functional.pad(cuts, (1, 0)).clamp(max=rows.keys.shape[1] - 1)
            )
            levels = torch.where(counts > 0, sums / counts.clamp(min=1), below)
            cuts = torch.searchsorted(rows.keys, (levels[:, 1:] + levels[:, :-1]) / 2)
            counts, sums = between(rows, cuts)
        yield counts, sums


def _every_choice(rows: SortedRows, planes: int, types: Types, rule: Rule) -> Tensor:
    """The best scales ``[R, k]`` over all choices of cells under all order types."""
    choices = torch.tensor(
        list(itertools.combinations_with_replacement(range(rows.n + 1), 2 ** (planes - 1) - 1))
    ).to(rows.keys.device)
    best = rows.sums.new_zeros(len(rows.keys), planes)
    explained = rows.sums.new_zeros(len(rows.keys))
    for cuts in choices.split(max(1, _CHUNK // (16 * len(types) * len(rows.keys)))):
        counts, sums = between(rows, cuts.expand(len(rows.keys), -1, -1))
        fit = _typed_fit(counts, sums, rows.n, planes, types)
        found = rule(fit, torch.zeros_like(fit.target))
        best, explained = _best(
            torch.cat([best.unsqueeze(1), found.flatten(1, 2)], 1),
            torch.cat([explained.unsqueeze(1), fit.gain(found).flatten(1)], 1),
        )
    return _descend(rows, best.unsqueeze(1), rule, _STEPS)[0].squeeze(1)


def _least(rows: SortedRows, candidates: Tensor, error: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The candidate ``[R, k]`` of ``[R, C, k]`` that leaves the least error, added up over the values."""
    errors = torch.stack([error(rows.keys, scales) for scales in candidates.unbind(1)], 1)
    return _best(candidates, -errors)[0]


def nearest_error(magnitudes: Tensor, scales: Tensor) -> Tensor:
    """Squared error ``[R]`` of magnitudes ``[R, n]`` at their nearest levels."""
    levels = scales[:, :1]  # added up in the order in which planes are unfolded, so that both round alike
    for scale in scales[:, 1:].split(1, 1):
        levels = torch.cat([levels - scale, levels + scale], 1)
    distance: Tensor | None = None
    for level in levels.abs().split(1, 1):
        other = (magnitudes - level).abs()
        distance = other if distance is None else torch.minimum(distance, other)
    assert distance is not None, "one scale has one level"
    return distance.square().sum(1)


def peeled_error(magnitudes: Tensor, scales: Tensor) -> Tensor:
    """Squared error ``[R]`` of magnitudes ``[R, n]`` that are peeled."""
    residual = magnitudes
    for scale in scales.unbind(1):
        residual = (residual - scale.unsqueeze(1)).abs()
    return residual.square().sum(1)


def _canonical(scales: Tensor) -> Tensor:
    """The same levels from scales that are non-negative and descend."""
    return scales.abs().sort(-1, descending=True).values
