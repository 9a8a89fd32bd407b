"""Sorted rows and fits of cells, against NumPy on the values themselves."""

import itertools

import numpy as np
import pytest
import torch

from foldbit.core import sorted_rows

DOUBLE = torch.empty(0, dtype=torch.float64)


def random_rows(rows=5, n=40):
    return torch.from_numpy(np.random.default_rng(n).standard_normal((rows, n)))


def test_magnitudes_ascend_in_units_of_a_power_of_two():
    x = random_rows() * torch.tensor([1e-300, 1e-20, 1.0, 1e20, 1e300], dtype=torch.float64)[:, None]
    x[2] = 0
    rows = sorted_rows.sort_rows(x.T.contiguous().T)
    assert rows.keys.is_contiguous() and rows.n == 40
    assert torch.equal(rows.keys * rows.unit, x.abs().sort(1).values)
    assert torch.equal(rows.unit.log2(), rows.unit.log2().round())
    assert (rows.keys < 2).all() and (rows.keys[[0, 1, 3, 4], -1] >= 1).all() and not rows.keys[2].any()
    torch.testing.assert_close(rows.sums[:, 1:], rows.keys.cumsum(1))
    taken = rows.take(torch.tensor([3]))
    assert torch.equal(taken.keys, rows.keys[3:4]) and torch.equal(taken.unit, rows.unit[3:4])


@pytest.mark.parametrize("n", [10, 16, 17, 1000])
def test_a_thinned_view_keeps_counts_and_sums_at_its_cuts(n):
    rows = sorted_rows.sort_rows(random_rows(3, n))
    thin = rows.thinned(16)
    assert thin.n == n and thin.keys.shape[1] <= 16
    assert torch.equal(thin.counts[:, -1], torch.full((3,), float(n), dtype=torch.float64))
    cuts = thin.counts.long()
    assert torch.equal(thin.sums, rows.sums.gather(1, cuts)) and (cuts.diff(dim=1) >= 0).all()
    if n == 1000:  # the tail, whose values are large, has finer cells than the middle
        assert (cuts[:, -1] - cuts[:, -3] < cuts[:, 2] - cuts[:, 0]).all()


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_nearest_cells_and_their_scales_are_those_of_the_values(planes):
    x = random_rows()
    rows = sorted_rows.sort_rows(x)
    scales = torch.rand(5, 3, planes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cuts, fit = sorted_rows.nearest_cells(rows, scales)
    assert cuts.shape == (5, 3, 2 ** (planes - 1) - 1)
    found = sorted_rows.least_squares(fit, scales)
    table = sorted_rows.codes(planes, DOUBLE).numpy()
    table = np.concatenate([table, -table])
    for row, start in itertools.product(range(5), range(3)):
        keys, v = rows.keys[row].numpy(), scales[row, start].numpy()
        signs = table[np.abs(keys[:, None] - table @ v).argmin(1)]
        expected, *_, singular = np.linalg.lstsq(signs, keys, rcond=None)
        energy = (keys**2).mean()
        lost = ((keys - signs @ v) ** 2).mean()
        assert energy - float(fit.gain(scales)[row, start]) == pytest.approx(lost, abs=1e-12)
        if singular.min() > 1e-6:
            np.testing.assert_allclose(found[row, start].numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_scales_in_the_cone_are_the_best_of_all_its_faces(planes):
    rng = np.random.default_rng(planes)
    generators = sorted_rows.cone(planes, DOUBLE)
    for _ in range(20):
        signs = rng.choice([-1.0, 1.0], (12, planes))
        values = rng.standard_normal(12)
        fit = sorted_rows.Fit(torch.from_numpy(signs.T @ signs / 12), torch.from_numpy(signs.T @ values / 12))
        given = generators @ torch.from_numpy(rng.random(planes))
        found = sorted_rows.least_squares_in_cone(fit, given)
        later = found.flip(0).cumsum(0).flip(0) - found
        assert (found >= later - 1e-9).all() and (found >= 0).all()
        best = 0.0
        for size in range(1, planes + 1):
            for face in itertools.combinations(range(planes), size):
                columns = signs @ generators.numpy()[:, face]
                weights = np.linalg.lstsq(columns, values, rcond=None)[0]
                if (weights >= 0).all():
                    best = max(best, ((values**2).sum() - ((values - columns @ weights) ** 2).sum()) / 12)
        assert float(fit.gain(found)) == pytest.approx(best, abs=1e-9)
        assert fit.gain(found) >= fit.gain(given) - 1e-12


def test_what_the_cells_leave_open_stays_as_it_was():
    """All values in one cell: only the sum of the signed scales is determined."""
    gram = torch.ones(3, 3, dtype=torch.float64)
    fit = sorted_rows.Fit(gram, torch.full((3,), 5.0, dtype=torch.float64))
    given = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
    found = sorted_rows.least_squares(fit, given)
    torch.testing.assert_close(found, given + (5 - given.sum()) / 3, rtol=1e-4, atol=0)
