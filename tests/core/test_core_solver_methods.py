"""Every way to search for ls-2 and ls-T, on every family of data, against sorting in float64."""

import numpy as np
import pytest
import torch

import foldbit as fb
from foldbit.core import schemes, solvers
from foldbit.kernels import native

METHODS = ["native", "sort", "histogram"]
SCHEMES = ["ls-2", "ls-T"]

FAMILIES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.random(n),
    "half-normal": lambda rng, n: np.abs(rng.standard_normal(n)),
    "relu, 50 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "relu, 90 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 1.28, 0),
    "relu, 99 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 2.33, 0),
    "student t, 2": lambda rng, n: rng.standard_t(2, n),
    "student t, 3": lambda rng, n: rng.standard_t(3, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "log-normal, 3": lambda rng, n: np.exp(3 * rng.standard_normal(n)),
    "two values": lambda rng, n: rng.choice([-0.3, 1.7], n),
    "three values": lambda rng, n: rng.choice([-1.0, 0, 1], n),
    "three magnitudes": lambda rng, n: rng.choice([0.25, 1.0, 2.0], n),
    "constant": lambda rng, n: np.full(n, -0.7),
    "zeros": lambda rng, n: np.zeros(n) * rng.choice([-1, 1], n),
    "one-hot": lambda rng, n: np.eye(1, n, rng.integers(n))[0],
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e6, rng.standard_normal(n)),
    "times 1e-30": lambda rng, n: 1e-30 * rng.standard_normal(n),
    "times 1e30": lambda rng, n: 1e30 * rng.standard_normal(n),
    # Not in the wild, but hard: plateaus of the gain, and clusters that only many bits tell apart.
    "power law": lambda rng, n: (1 - rng.random(n)) ** -0.7,
    "integers": lambda rng, n: rng.integers(-127, 128, n) * 0.03,
    "nearly constant": lambda rng, n: 1e4 + 1e-3 * rng.standard_normal(n),
    "nearly two values": lambda rng, n: rng.choice([1, 1e3], n) * (1 + 1e-6 * rng.standard_normal(n)),
    "nested clusters": lambda rng, n: 10.0 ** rng.integers(-12, 3, n) * (1 + 1e-9 * rng.standard_normal(n)),
}


def least_error(x, scheme):
    """Least squared error of a float64 row: sort, and try every split."""
    magnitudes = np.sort(np.abs(x))
    n = len(magnitudes)
    low_sums = np.concatenate([[0.0], np.cumsum(magnitudes)[:-1]])
    m = np.arange(n)
    if scheme == "ls-T":
        gain = (magnitudes.sum() - low_sums) ** 2 / (n - m)
    else:
        gain = (m * magnitudes.mean() - low_sums) ** 2 / (np.maximum(m, 1) * (n - m))
    m = int(gain.argmax())
    low, high = magnitudes[:m], magnitudes[m:]
    low_level = low.mean() if scheme == "ls-2" and m else 0.0
    return ((low - low_level) ** 2).sum() + ((high - high.mean()) ** 2).sum()


def reached_error(x, scales):
    v1, v2 = scales
    return (np.where(np.abs(x) >= v1, np.abs(x) - v1 - v2, np.abs(x) - v1 + v2) ** 2).sum()


def check(x, scheme, method):
    """Hold rows ``[rows, n]`` against the oracle, before scales are rounded to the dtype."""
    scales, excess = solvers._solve_rows(x, schemes.parse(scheme), method, None)
    assert scales.dtype == excess.dtype == torch.float64
    assert scales.shape == (len(x), 2) and excess.shape == (len(x),)
    for row, v, bound in zip(x.double().numpy(), scales.numpy(), excess.tolist(), strict=True):
        assert v[0] >= v[1] >= 0 and (scheme == "ls-2" or v[0] == v[1])
        least, energy = least_error(row, scheme), (row**2).sum()
        missed = reached_error(row, v) - least
        assert missed <= 1e-6 * least + 1e-14 * energy
        assert missed <= (bound + 1e-14) * energy and 0 <= bound <= 1e-6


def rows(family, n, dtype, count):
    rng = np.random.default_rng(n)
    return torch.from_numpy(np.stack([FAMILIES[family](rng, n) for _ in range(count)])).to(dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reaches_the_optimum(family, method):
    for scheme in SCHEMES:
        for n in [1, 2, 3, 9, 64, 577, 3001]:
            for dtype in [torch.float32, torch.float64]:
                check(rows(family, n, dtype, 2), scheme, method)
        if "e-30" not in family and "e30" not in family and "outlier" not in family:
            for dtype in [torch.float16, torch.bfloat16]:
                x = rows(family, 577, dtype, 2)
                if x.isfinite().all():
                    check(x, scheme, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_a_long_row(family, method):
    for scheme in SCHEMES:
        check(rows(family, 100_003, torch.float32, 1), scheme, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["normal", "cauchy", "relu, 90 % zeros"])
def test_a_million_elements(family, method):
    check(rows(family, 1_000_000, torch.float32, 1), "ls-2", method)


@pytest.mark.parametrize("method", METHODS)
def test_denormals_and_the_largest_finite_values(method):
    steps = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (2, 1000)))
    for x in [steps * 2.0**-149, torch.finfo(torch.float32).max * (1 - steps / 200)]:
        for scheme in SCHEMES:
            check(x.float(), scheme, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_with_nan_or_infinity_spoils_no_other(method):
    for n in [1, 9, 3000]:
        x = rows("normal", n, torch.float32, 5)
        for scheme in SCHEMES:
            expected = fb.solve(x, scheme, method=method)
            broken = x.clone()
            broken[0, n // 2], broken[2, 0], broken[4, n - 1] = torch.nan, torch.inf, -torch.inf
            scales, excess = fb.solve(broken, scheme, method=method, certificate=True)
            assert scales[::2].isnan().all() and excess[::2].isnan().all()
            assert torch.equal(scales[1::2], expected[1::2]) and excess[1::2].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_memory_formats_and_empty_batches(scheme, method):
    x = rows("normal", 600, torch.float32, 6)
    expected = fb.solve(x, scheme, method=method)
    for view in [
        x.T.contiguous().T,
        torch.stack([x, x], 2)[..., 0],
        x.unflatten(1, (20, 30)).transpose(1, 2),
    ]:
        dims = tuple(range(1, view.ndim))
        torch.testing.assert_close(fb.solve(view, scheme, dims, method=method), expected)
    repeated = fb.solve(x[:1].expand(3, -1), scheme, method=method)
    torch.testing.assert_close(repeated, expected[:1].expand(3, -1))
    scales, excess = fb.solve(x[:0], scheme, method=method, certificate=True)
    assert scales.shape == (0, 2) and excess.shape == (0,)


def test_long_rows_go_through_histograms_where_the_native_core_cannot_run(monkeypatch):
    took = []
    for name, search in list(solvers._SEARCHES.items()):
        monkeypatch.setitem(
            solvers._SEARCHES, name, lambda *a, search=search, name=name: took.append(name) or search(*a)
        )
    short, long = torch.randn(2, 100), torch.randn(2, solvers._LONG)
    for x in [short, long]:
        fb.solve(x, "ls-2")
    assert "sort" not in took and "histogram" not in took
    took.clear()
    monkeypatch.setattr(native, "_native", None)
    for x in [short, long]:
        fb.solve(x, "ls-2")
    assert fb.solve(torch.empty(3, solvers._LONG, device="meta"), "ls-T").shape == (3, 2)
    assert took == ["sort", "histogram", "histogram"]
