"""Scales against brute force: every split of a row and, for tiny rows, every choice of signs."""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import solvers
from foldbit.kernels import native

EXACT = ["ls-1", "ls-2", "ls-T"]
GREEDY = [f"gf-{k}" for k in range(1, 9)]
SCHEMES = EXACT + GREEDY
PATHS = ["native", "sorting"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@contextmanager
def forced(path):
    """Solve in the native core, or by sorting as under tracing and on other devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "_runs_native", lambda rows: path == "native")
        yield


# ---------------------------------------------------------------------------------------------------------
# The oracle, in float64 and in NumPy


def least_error(x, scheme):
    """Least squared error of a row: give every split of the sorted magnitudes its best two levels."""
    magnitudes = np.sort(np.abs(x))
    if scheme == "ls-1":
        return ((magnitudes - magnitudes.mean()) ** 2).sum()
    n = len(magnitudes)
    high = np.arange(n) >= np.arange(n)[:, None]  # [splits, n]
    levels = [magnitudes @ high.T / high.sum(1), magnitudes @ ~high.T / np.maximum((~high).sum(1), 1)]
    if scheme == "ls-T":
        levels[1][:] = 0
    return ((magnitudes - np.where(high, levels[0][:, None], levels[1][:, None])) ** 2).sum(1).min()


def reached_error(x, scales):
    """Squared error of the foldable planes that belong to the scales."""
    residual = x.copy()
    for v in scales:
        residual -= np.where(residual < 0, -v, v)
    return (residual**2).sum()


def greedy_scales(x, planes):
    residual, scales = x.copy(), []
    for _ in range(planes):
        scales.append(np.abs(residual).mean())
        residual -= np.where(residual < 0, -scales[-1], scales[-1])
    return np.array(scales)


def as_rows(x):
    """Rows in float64, each times a power of two that keeps squares in range; and those powers."""
    rows = x.double().numpy()
    exponents = -np.frexp(np.abs(rows).max(1))[1]
    return np.ldexp(rows, exponents[:, None]), exponents


def check(x, scheme):
    """Hold the solution for rows ``[rows, n]`` against the oracle."""
    scales = fb.solve(x, scheme)
    planes = 1 if scheme == "ls-1" else 2
    assert scales.shape == (len(x), planes) and scales.dtype == x.dtype and not scales.requires_grad
    rows, exponents = as_rows(x)
    for row, exponent, v in zip(rows, exponents, scales.double().numpy(), strict=True):
        v = np.ldexp(v, exponent)
        assert np.all(v >= 0) and np.all(np.diff(v) <= 0)
        if scheme == "ls-T":
            assert v[0] == v[1]
        # Scales are rounded to their dtype, which moves both levels by a little of the larger.
        rounding = 2 * len(row) * max(torch.finfo(x.dtype).eps / 2, 1e-8) ** 2
        least, energy = least_error(row, scheme), (row**2).sum()
        assert reached_error(row, v) <= least * (1 + 1e-6) + rounding * energy


def check_greedy(x, planes):
    scales = fb.solve(x, f"gf-{planes}")
    assert scales.shape == (len(x), planes) and scales.dtype == x.dtype and not scales.requires_grad
    rows, exponents = as_rows(x)
    rtol = max(torch.finfo(x.dtype).eps, 1e-12)
    for row, exponent, v in zip(rows, exponents, scales.double().numpy(), strict=True):
        expected = greedy_scales(row, planes)
        atol = 1e-13 * expected[0] + np.ldexp(torch.finfo(x.dtype).smallest_normal, exponent)
        np.testing.assert_allclose(np.ldexp(v, exponent), expected, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------
# Against the oracle

FAMILIES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.random(n),
    "student t, 2": lambda rng, n: rng.standard_t(2, n),
    "cauchy": lambda rng, n: np.clip(rng.standard_cauchy(n), -1e4, 1e4),
    "relu, 90 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 1.28, 0),
    "three values": lambda rng, n: rng.choice([-1, 0, 1], n),
    "two magnitudes": lambda rng, n: rng.choice([-1.5, -0.25, 0.25, 1.5], n),
    "ties": lambda rng, n: rng.integers(-4, 5, n) * 0.25,
    "constant": lambda rng, n: np.full(n, -0.7),
    "zeros of both signs": lambda rng, n: rng.choice([-0.0, 0.0], n),
    "one-hot": lambda rng, n: np.eye(1, n, rng.integers(n))[0],
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e4, rng.standard_normal(n)),
}
LENGTHS = [1, 2, 3, 9, 64, 65, 257]


def family(name, n, dtype, rows=2):
    rng = np.random.default_rng(n)
    return torch.from_numpy(np.stack([FAMILIES[name](rng, n) for _ in range(rows)])).to(dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_reaches_the_optimum(name, dtype, path):
    with forced(path):
        for n in LENGTHS if dtype.itemsize > 2 else LENGTHS[::3]:
            for scheme in EXACT:
                check(family(name, n, dtype), scheme)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_scales_are_the_recurrences(name, dtype):
    for n in [1, 2, 9, 64, 300]:
        for planes in range(1, 9):
            check_greedy(family(name, n, dtype), planes)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-290)]
)
@pytest.mark.parametrize("name", ["normal", "student t, 2", "two magnitudes", "one-hot", "constant"])
def test_scales_near_the_ends_of_the_dtype(name, dtype, factor, path):
    with forced(path):
        for n in [1, 9, 300]:
            x = family(name, n, torch.float64).mul(factor).to(dtype)
            for scheme in EXACT:
                check(x, scheme)
            check_greedy(x, 4)


EIGHTHS = st.integers(-2000, 2000).map(lambda i: i / 8)
FLOATS = st.floats(-1000, 1000, width=16)
MATRICES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40)


@given(
    hnp.arrays(st.sampled_from([np.float32, np.float64]), MATRICES, elements=FLOATS | st.just(-0.0) | EIGHTHS)
    | hnp.arrays(np.float16, MATRICES, elements=EIGHTHS),
    st.sampled_from(PATHS),
)
@example(np.array([[1.0, 1.0, 1.0, 0.0]], np.float32), "sorting")
@settings(max_examples=100, deadline=None)
def test_any_values(x, path):
    x = torch.from_numpy(x)
    with forced(path):
        for scheme in EXACT:
            check(x, scheme)
        check_greedy(x, 5)


@given(
    hnp.arrays(
        np.float64, st.integers(1, 5), elements=st.floats(-4, 4, width=16) | st.sampled_from([0.0, 1.0, -1.0])
    ),
    st.sampled_from(PATHS),
)
@settings(max_examples=60, deadline=None)
def test_no_choice_of_signs_does_better(x, path):
    """One plane or two, foldable or not: try all 2^(2n) choices of signs, each with its best scales."""
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=len(x))))

    def best(planes):  # [choices, n, k]
        solutions = np.linalg.pinv(planes) @ x[:, None]
        return ((x - (planes @ solutions)[..., 0]) ** 2).sum(1).min()

    one = best(signs[..., None])
    two = best(np.stack([np.repeat(signs, len(signs), 0), np.tile(signs, (len(signs), 1))], -1))
    ternary = best((np.repeat(signs, len(signs), 0) + np.tile(signs, (len(signs), 1)))[..., None])
    with forced(path):
        for scheme, least in [("ls-1", one), ("gf-1", one), ("ls-2", two), ("ls-T", ternary)]:
            error = reached_error(x, fb.solve(torch.from_numpy(x), scheme).numpy())
            assert error == pytest.approx(least, rel=1e-6, abs=1e-12 * (1 + (x**2).sum()))


@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=1, max_side=50), elements=st.floats(-9, 9)),
)
@settings(max_examples=100, deadline=None)
def test_more_freedom_never_costs(x):
    x = torch.from_numpy(x)
    error = {scheme: float(fb.quantize(x, scheme).error(x)) for scheme in SCHEMES}
    slack = 1e-12
    assert error["gf-1"] == pytest.approx(error["ls-1"], abs=slack)
    assert error["ls-2"] <= error["ls-T"] + slack and error["ls-T"] <= error["ls-1"] + slack
    assert error["ls-2"] <= error["gf-2"] + slack
    assert all(error[f"gf-{k + 1}"] <= error[f"gf-{k}"] + slack for k in range(1, 8))


@pytest.mark.parametrize("path", PATHS)
def test_order_and_signs_do_not_matter_and_powers_of_two_pass_through(path):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(-1000, 1000, (3, 500)) / 64)  # sums of these are exact in any order
    with forced(path):
        for scheme in SCHEMES:
            expected = fb.solve(x, scheme)
            assert torch.equal(fb.solve(-x, scheme), expected)
            assert torch.equal(fb.solve(x * 2.0**70, scheme), expected * 2.0**70)
            if scheme in EXACT:
                shuffled = torch.from_numpy(rng.permuted(x.numpy(), axis=1))
                assert torch.equal(fb.solve(shuffled, scheme), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
def test_known_solutions(path, dtype):
    with forced(path):
        for x, scheme, scales in [
            ([-3.0, -1.0, 1.0, 3.0], "ls-1", [2]),
            ([-3.0, -1.0, 1.0, 3.0], "ls-2", [2, 1]),
            ([-3.0, -1.0, 1.0, 3.0], "gf-3", [2, 1, 0]),
            ([-5.0], "ls-2", [5, 0]),
            ([-5.0], "ls-T", [2.5, 2.5]),
            ([0.0, -0.0], "ls-2", [0, 0]),
            ([0.0, -0.0], "gf-2", [0, 0]),
            ([0.0, 8.0], "gf-2", [4, 4]),
        ]:
            got = fb.solve(torch.tensor(x, dtype=dtype), scheme)
            assert got.dtype == dtype and got.tolist() == scales


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("scheme", "error", "scales"),
    [
        ("ls-1", 0.36338, (0.7979,)),
        ("ls-T", 0.1902, None),
        ("ls-2", 0.117464, (0.9815, 0.5288)),
        ("gf-2", 1.11 * 0.117464, None),
        ("gf-3", 1.66 * 0.035251, None),
        ("gf-4", 3.33 * 0.009877, None),
    ],
)
def test_the_normal_distribution(scheme, error, scales, path):
    n = 100_000
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    with forced(path):
        q = fb.quantize(x, scheme)
    assert float(q.error(x)) == pytest.approx(error, rel=3e-3)
    if scales:
        assert q.scales.tolist() == pytest.approx(scales, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------
# Certificates


@pytest.mark.parametrize("method", ["native", "sort"])
@pytest.mark.parametrize("scheme", ["ls-2", "ls-T"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_certificate_bounds_the_excess(name, scheme, method):
    x = family(name, 257, torch.float64, rows=3)
    scales, excess = fb.solve(x, scheme, method=method, certificate=True)
    assert excess.dtype == torch.float64 and excess.shape == (3,)
    for row, v, bound in zip(x.numpy(), scales.numpy(), excess.tolist(), strict=True):
        energy = (row**2).sum() or 1.0
        assert 0 <= bound <= 1e-6
        assert reached_error(row, v) - least_error(row, scheme) <= (bound + 1e-12) * energy


def test_one_plane_is_certain_and_a_broken_row_is_not():
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, torch.nan, 3.0]])
    for scheme in EXACT:
        _, excess = fb.solve(x, scheme, certificate=True)
        assert excess[0] <= 1e-12 and excess[1].isnan()


def test_what_cannot_be_certified_or_searched_for_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"gf-3 has no certificate"):
        fb.solve(x, "gf-3", certificate=True)
    with pytest.raises(ValueError, match=r"method is one of 'auto', 'native'.*got 'magic'"):
        fb.solve(x, "ls-2", method="magic")
    with pytest.raises(ValueError, match=r"'sort' searches for ls-2 and ls-T; ls-1 has"):
        fb.solve(x, "ls-1", method="sort")


# ---------------------------------------------------------------------------------------------------------
# Which path runs


def test_the_cpu_runs_the_native_core_and_a_device_without_memory_sorts(monkeypatch):
    calls = []
    inside = native.solve_rows
    monkeypatch.setattr(native, "solve_rows", lambda *a, **options: calls.append(a) or inside(*a, **options))
    x = torch.randn(2, 9)
    for y in [x, x.half(), torch.nn.Parameter(x), x.T, x.clone().requires_grad_()]:
        for scheme, planes in [("ls-1", 1), ("ls-2", 2), ("ls-T", 2), ("gf-3", 3)]:
            calls.clear()
            scales = fb.solve(y, scheme)
            assert scales.shape == (len(y), planes) and len(calls) == 1 and not scales.requires_grad
    calls.clear()
    assert fb.solve(torch.randn(2, 9, device="meta"), "ls-T").shape == (2, 2)
    assert not calls


def test_without_a_native_core_it_sorts(monkeypatch):
    x = torch.randn(4, 100, dtype=torch.float64)
    expected = fb.solve(x, "ls-2")
    monkeypatch.setattr(native, "_native", None)
    torch.testing.assert_close(fb.solve(x, "ls-2"), expected)


# ---------------------------------------------------------------------------------------------------------
# Clamp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("path", PATHS)
def test_a_clamp_solves_for_the_clipped_tensor(path, scheme, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 700, dtype=torch.float64, generator=generator)
    x[1] *= 1e-3  # nothing to clip
    x[2] *= 1e3  # nearly all
    x[3, 5] = torch.inf
    x[4, 5] = torch.nan
    x = x.to(dtype)
    for clamp in [0.3, 2.0]:
        with forced(path):
            got = fb.solve(x, scheme, clamp=clamp)
            expected = fb.solve(x.clamp(-clamp, clamp), scheme)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0, equal_nan=True)
        assert got.isfinite().all(1).tolist() == [True, True, True, True, False, True]
        short = fb.solve(x[:, :9].T, scheme, 0, clamp=clamp)  # ranked, not binned
        torch.testing.assert_close(short, fb.solve(x[:, :9].clamp(-clamp, clamp), scheme), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [*EXACT, "gf-2", "ls-3"])
@pytest.mark.parametrize("path", PATHS)
def test_a_clamp_beyond_the_dtype_is_none(path, scheme, dtype):
    x = torch.tensor([[1.0, -2.0, 3e4], [1.0, -2.0, torch.inf]], dtype=dtype)
    for clamp in [2.0 * torch.finfo(dtype).max, torch.inf]:
        with forced(path):
            got = fb.solve(x, scheme, clamp=clamp)
            torch.testing.assert_close(got, fb.solve(x, scheme), rtol=0, atol=0, equal_nan=True)
        assert got[0].isfinite().all() and got[1].isnan().all()


def test_a_clamp_is_certified_too():
    x = torch.randn(3, 5000)
    scales, excess = fb.solve(x, "ls-2", clamp=1.0, certificate=True)
    assert torch.equal(scales, fb.solve(x.clamp(-1, 1), "ls-2")) and (excess <= 1e-12).all()
    for clamp in [0.0, -1.0, float("nan")]:
        with pytest.raises(ValueError, match="clamp is a positive number or None; got"):
            fb.solve(x, "ls-2", clamp=clamp)


# ---------------------------------------------------------------------------------------------------------
# Shapes, dims and memory formats

# Sums of sixty-fourths are exact in any order, so that equality can be asked for.
LATTICE = torch.from_numpy(np.random.default_rng(2).integers(-500, 500, (4, 3, 5, 6)) / 64)


def by_hand(x, scheme, dims):
    """Solve slice by slice, each flattened by itself."""
    dims = [d % x.ndim for d in dims]
    kept = [d for d in range(x.ndim) if d not in dims]
    shape = [x.shape[d] for d in kept]
    slices = x.permute(*kept, *dims).reshape(int(np.prod(shape)), -1)
    return torch.stack([fb.solve(s.clone(), scheme) for s in slices]).reshape(*shape, -1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-3"])
@pytest.mark.parametrize("dim", [0, 1, -1, (1, 2), (2, 1), (0, -1), (-3, -1, -2), (3, 1, 0, 2), [1, 3], None])
def test_any_dims(dim, scheme, path):
    with forced(path):
        got = fb.solve(LATTICE, scheme, dim)
        dims = range(4) if dim is None else [dim] if isinstance(dim, int) else dim
        rtol = 1e-12 if scheme == "gf-3" else 0  # what one plane leaves is no lattice
        torch.testing.assert_close(got, by_hand(LATTICE, scheme, list(dims)), rtol=rtol, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_rank(scheme, path):
    with forced(path):
        planes = int(scheme[-1]) if scheme[-1] != "T" else 2
        for rank in range(7):
            x = LATTICE.flatten()[:64].reshape([2] * rank + [-1] if rank else [64])[..., :3]
            assert fb.solve(x, scheme).shape == (*x.shape[:-1], planes)
            assert torch.equal(fb.solve(x, scheme, None), fb.solve(x.flatten(), scheme))
        scalar = torch.tensor(-6.0)
        for dim in [-1, 0, None, ()]:
            assert torch.equal(fb.solve(scalar, scheme, dim), fb.solve(scalar.reshape(1), scheme))


def formats(x):
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    backwards = torch.empty(x.shape[::-1], dtype=x.dtype).permute(3, 2, 1, 0)
    backwards.copy_(x)
    return {
        "channels-last": x.to(memory_format=torch.channels_last),
        "backwards": backwards,
        "every second element": wide[..., ::2],
        "cut out": torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_memory_formats(dtype, scheme, path):
    x = LATTICE.to(dtype)
    with forced(path):
        for name, y in formats(x).items():
            assert torch.equal(x, y) and x.stride() != y.stride(), name
            for dim in [-1, 1, (1, 2, 3), (0, 2, 3), None]:
                assert torch.equal(fb.solve(y, scheme, dim), fb.solve(x, scheme, dim)), (name, dim)
        row = x[0, 0, 0]
        assert torch.equal(fb.solve(row.expand(7, 6), scheme), fb.solve(row, scheme).expand(7, -1))
        assert torch.equal(
            fb.solve(row[:, None].expand(6, 50), scheme), fb.solve(row[:, None].repeat(1, 50), scheme)
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-4"])
def test_empty_batches(scheme, path):
    planes = 4 if scheme == "gf-4" else 1 + (scheme != "ls-1")
    with forced(path):
        assert fb.solve(torch.empty(0, 5), scheme).shape == (0, planes)
        assert fb.solve(torch.empty(3, 0, 5).half(), scheme).shape == (3, 0, planes)
        assert fb.solve(torch.empty(0, 2, 3, 4), scheme, (1, 2, 3)).shape == (0, planes)
        for shape, dim in [((3, 0), -1), ((0,), 0), ((0, 3), None), ((2, 0, 0), (1, 2)), ((0, 0), 1)]:
            with pytest.raises(ValueError, match=r"nothing to solve for: shape .* has no elements along dim"):
                fb.solve(torch.empty(shape), scheme, dim)


# ---------------------------------------------------------------------------------------------------------
# Bad values and mistakes


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_and_infinity_stay_in_their_rows(scheme, dtype, path):
    with forced(path):
        for n in [1, 9, 300]:
            x = family("normal", n, dtype, rows=6)
            expected = fb.solve(x, scheme)
            for row, value in [(0, torch.nan), (2, torch.inf), (5, -torch.inf)]:
                x[row, n // 2] = value
                expected[row] = torch.nan
            x[5, 0] = torch.inf
            torch.testing.assert_close(fb.solve(x, scheme), expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=f"expected float16, .* got {dtype}; convert it"):
        fb.solve(torch.zeros(3).to(dtype), "ls-2")


@pytest.mark.parametrize(
    ("x", "scheme", "dim", "error", "message"),
    [
        ([1.0, 2.0], "ls-2", -1, TypeError, "expected a torch.Tensor, got list; try torch.as_tensor"),
        (torch.ones(3), "ls-5", -1, ValueError, "unknown scheme 'ls-5'; known are .*ls-2"),
        (torch.ones(3), "fp", -1, ValueError, "'fp' leaves a tensor float and has no scales"),
        (torch.ones(3), 2, -1, TypeError, "a name such as 'ls-2', got int"),
        (torch.ones(2, 3), "ls-2", 2, IndexError, "dim 2 is out of range for a tensor of 2 dims"),
        (torch.ones(2, 3), "ls-2", (0, -3), IndexError, "dim -3 is out of range"),
        (torch.ones(2, 3), "ls-2", (1, -1), ValueError, r"names a dim twice: \(1, -1\)"),
        (torch.ones(2, 3), "ls-2", (), ValueError, "dim is empty"),
        (torch.tensor(1.0), "ls-2", 1, IndexError, "dim 1 is out of range for a tensor of 0 dims"),
    ],
)
def test_mistakes_are_told(x, scheme, dim, error, message):
    with pytest.raises(error, match=message):
        fb.solve(x, scheme, dim)


def test_scales_are_constants_to_autograd_and_the_input_is_left_alone():
    x = torch.randn(3, 50, requires_grad=True)
    before = x.detach().clone()
    for scheme in SCHEMES:
        for path in PATHS:
            with forced(path):
                assert not fb.solve(x, scheme).requires_grad
                assert not fb.quantize(x, scheme).values().requires_grad
    assert torch.equal(x, before)
    with torch.inference_mode():
        assert torch.equal(fb.solve(torch.ones(4), "ls-2"), torch.tensor([1.0, 0.0]))


# ---------------------------------------------------------------------------------------------------------
# What other libraries get wrong


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 9, 27, 3000])
def test_ternary_data_is_ternary_exactly(n, dtype, path):
    """Not all zeros, and not levels of half the size."""
    x = torch.tensor([-1, 0, 1]).repeat(n // 3).to(dtype)
    with forced(path):
        for scheme in ["ls-T", "ls-2"]:
            q = fb.quantize(x, scheme)
            assert q.scales.tolist() == pytest.approx([0.5, 0.5], rel=1e-14)
            torch.testing.assert_close(q.values(), x, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_nine_are_solved_as_well_as_long_ones(path):
    """A depthwise 3×3 kernel has nine weights: none can be left out, and v1 need not be one of them."""
    x = torch.from_numpy(np.random.default_rng(3).standard_t(2, (300, 9)))
    with forced(path):
        for scheme in EXACT:
            check(x, scheme)
    least = sum(least_error(row, "ls-2") for row in x.numpy())
    snapped = sum(min(reached_error(row, pair) for pair in snapped_pairs(row)) for row in x.numpy())
    assert snapped > 1.01 * least  # so that this test can tell


def snapped_pairs(row):
    """What a solver has to choose from that takes v1 from the data."""
    for v1 in np.abs(row):
        yield v1, np.abs(np.abs(row) - v1).mean()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", EXACT)
def test_long_rows_of_equal_values_take_no_quadratic_memory(scheme, path):
    x = torch.full((2, 200_000), 0.1)  # squared, this would be 160 GB
    with forced(path):
        q = fb.quantize(x, scheme)
    torch.testing.assert_close(q.values(), x)
    if scheme == "ls-T":
        torch.testing.assert_close(q.scales, torch.full((2, 2), 0.05))


@pytest.mark.parametrize("path", PATHS)
def test_channels_are_each_solved_for_their_own_cost(path):
    """Two bits a channel reach two bits' error, not that of the best ternary split."""
    x = torch.from_numpy(np.random.default_rng(4).standard_normal((16, 576)))
    with forced(path):
        error = fb.quantize(x, "ls-2").error(x)
        ternary_split = fb.quantize(x, "ls-T").error(x)
    assert error.shape == (16,)
    assert error.mean() == pytest.approx(0.1175, rel=0.03) and ternary_split.mean() > 1.5 * error.mean()
