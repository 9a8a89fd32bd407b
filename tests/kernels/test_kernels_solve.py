"""The compiled solvers against sorting in float64, and their certificates against what they certify."""

import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foldbit import _native

solve_rows = _native.solve_rows

SCHEMES = ["ls-2", "ls-T"]
DTYPES = [np.float32, np.float64]

# ‖x‖² is summed over up to 200,000 elements here and in the solver: what float64 leaves uncertain, and more.
ROUNDING = 1e-14


# ---------------------------------------------------------------------------------------------------------
# The oracle


def least_error(x, scheme):
    """Least squared error of a row: sort, and try every split."""
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
    """Squared error of x ≈ v1·s1 + v2·s2 with s1 = sign(x) and s2 the sign of what it leaves."""
    v1, v2 = scales
    return (np.where(np.abs(x) >= v1, np.abs(x) - v1 - v2, np.abs(x) - v1 + v2) ** 2).sum()


def check(x, scheme, scales, excess, tolerance=1e-12):
    """Hold one row's solution against the oracle. Returns by how much of ‖x‖² it misses the optimum."""
    v1, v2 = scales
    assert v1 >= v2 >= 0
    if scheme == "ls-T":
        assert v1 == v2
    if not x.any():
        assert v1 == v2 == excess == 0
        return 0
    # Only a power of two apart, rows can be told about in numbers whose squares float64 holds.
    exponent = -int(np.frexp(np.abs(x).max())[1])
    x, scales = np.ldexp(x.astype(np.float64), exponent), np.ldexp(scales, exponent)
    missed = (reached_error(x, scales) - least_error(x, scheme)) / (x**2).sum()
    assert missed <= excess + ROUNDING
    assert 0 <= excess <= tolerance
    return missed


def check_rows(x, **options):
    for scheme in SCHEMES:
        scales, excess = solve_rows(x, scheme, **options)
        assert scales.shape == (len(x), 2) and scales.dtype == np.float64
        assert excess.shape == (len(x),) and excess.dtype == np.float64
        for row, row_scales, row_excess in zip(x, scales, excess, strict=True):
            check(row, scheme, row_scales, row_excess, options.get("tolerance", 1e-12))


# ---------------------------------------------------------------------------------------------------------
# Families of rows

FAMILIES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.random(n),
    "exponential": lambda rng, n: rng.exponential(1, n),
    "student t, 2": lambda rng, n: rng.standard_t(2, n),
    "student t, 3": lambda rng, n: rng.standard_t(3, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "log-normal, 3": lambda rng, n: np.exp(3 * rng.standard_normal(n)),
    "log-normal, 10": lambda rng, n: np.exp(np.minimum(10 * rng.standard_normal(n), 60)),
    "relu, 50 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "relu, 99 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 2.33, 0),
    "constant": lambda rng, n: np.full(n, -0.7),
    "zeros": lambda rng, n: np.zeros(n) * rng.choice([-1, 1], n),
    "two values": lambda rng, n: rng.choice([-0.3, 1.7], n),
    "three values": lambda rng, n: rng.choice([-1, 0, 1], n),
    "three magnitudes": lambda rng, n: rng.choice([0.0, 1.0, 2.0], n),
    "integers": lambda rng, n: rng.integers(-127, 128, n) * 0.03,
    "one-hot": lambda rng, n: np.eye(1, n, rng.integers(n))[0],
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e6, rng.standard_normal(n)),
    "nearly constant": lambda rng, n: 1e4 + 1e-3 * rng.standard_normal(n),
    "nearly two values": lambda rng, n: rng.choice([1, 1e3], n) * (1 + 1e-6 * rng.standard_normal(n)),
    "one step apart": lambda rng, n: rng.choice([1, 1 + 2.0**-23], n),
    "nested clusters": lambda rng, n: 10.0 ** rng.integers(-12, 3, n) * (1 + 1e-9 * rng.standard_normal(n)),
    "powers of two": lambda rng, n: 2.0 ** -np.minimum(np.arange(n), 120),
    "power law": lambda rng, n: (1 - rng.random(n)) ** -0.7,
}
# About 64 and 700 are the borders between ways of solving; 27 and 576 are kernels of 3x3.
LENGTHS = [1, 2, 3, 9, 27, 63, 64, 65, 100, 257, 576, 767, 768, 4608, 20_011]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_length(family, dtype):
    rng = np.random.default_rng(0)
    for n in LENGTHS:
        rows = 1 + (n < 1000) * 3
        check_rows(np.stack([FAMILIES[family](rng, n) for _ in range(rows)]).astype(dtype))


@pytest.mark.parametrize(("dtype", "factors"), [(np.float32, (1e-30, 1e30)), (np.float64, (1e-300, 1e300))])
@pytest.mark.parametrize("family", ["normal", "uniform", "relu, 50 % zeros", "two values", "one-hot"])
def test_rows_near_the_ends_of_their_dtype(family, dtype, factors):
    rng = np.random.default_rng(1)
    for n in [1, 9, 576, 5000]:
        x = np.stack([FAMILIES[family](rng, n) for _ in range(2)]).astype(dtype)
        for factor in factors:
            check_rows(x * dtype(factor))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_and_the_largest_finite_values(dtype):
    rng = np.random.default_rng(2)
    information = np.finfo(dtype)
    # float64 scales cannot halve float64's smallest step: leave them some bits.
    step = float(information.smallest_subnormal) * (2**20 if dtype == np.float64 else 1)
    for n in [1, 2, 50, 1000]:
        steps = rng.integers(0, 100, (2, n))
        check_rows((steps * step).astype(dtype))
        check_rows((information.max * (1 - steps / 200)).astype(dtype))
        check_rows(np.where(steps < 50, information.tiny, information.max).astype(dtype))


@pytest.mark.parametrize("family", ["normal", "cauchy", "relu, 50 % zeros", "integers", "one outlier"])
def test_long_rows(family):
    x = FAMILIES[family](np.random.default_rng(3), 1_000_000)
    check_rows(x.astype(np.float32)[None])


@given(
    hnp.arrays(
        st.sampled_from(DTYPES),
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=90),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-20]),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_values(x):
    check_rows(x)


@given(
    st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=3),
    st.integers(1, 3000),
    st.integers(-60, 60),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
@example(["one outlier", "one outlier"], 2000, 0, np.float32, 0)
@settings(max_examples=200, deadline=None)
def test_mixtures_of_families(names, n, exponent, dtype, seed):
    rng = np.random.default_rng(seed)
    parts = [FAMILIES[name](rng, n) * 10.0 ** (exponent / 10 * i) for i, name in enumerate(names)]
    check_rows(rng.permutation(np.concatenate(parts)).astype(dtype)[None])


# ---------------------------------------------------------------------------------------------------------
# The certificate


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tolerance", [0, 1e-9, 1e-6, 1e-3, 0.1])
def test_the_certificate_bounds_what_a_tolerance_leaves(family, tolerance, dtype):
    rng = np.random.default_rng(4)
    for n in [70, 576, 3000]:
        check_rows(np.stack([FAMILIES[family](rng, n) for _ in range(4)]).astype(dtype), tolerance=tolerance)


def test_the_certificate_is_no_constant():
    x = np.random.default_rng(5).standard_normal((50, 2000))
    for scheme in SCHEMES:
        scales, excess = solve_rows(x, scheme, tolerance=1e-2)
        missed = [check(*row, tolerance=1e-2) for row in zip(x, [scheme] * 50, scales, excess, strict=True)]
        assert max(missed) > 0 and np.unique(excess).size == 50
        assert np.all(excess < 1e-3)  # splits between bins are good, and the bounds inside them close


# ---------------------------------------------------------------------------------------------------------
# Rows, memory and threads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_with_nan_or_infinity_spoils_no_other(scheme, dtype):
    rng = np.random.default_rng(6)
    for n in [1, 20, 31, 500, 3000]:
        x = rng.standard_normal((9, n)).astype(dtype)
        scales, excess = solve_rows(x, scheme)
        bad = {1: np.nan, 3: np.inf, 4: -np.inf, 8: -np.nan}
        for row, value in bad.items():
            x[row, rng.integers(n)] = value
        x[4, rng.integers(n)] = np.nan
        scales[list(bad)] = excess[list(bad)] = np.nan
        got_scales, got_excess = solve_rows(x, scheme)
        np.testing.assert_array_equal(got_scales, scales)
        np.testing.assert_array_equal(got_excess, excess)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(1000, 9), (60, 576), (7, 40_000)])
def test_any_number_of_threads_gives_the_same_numbers(shape, scheme):
    x = np.random.default_rng(7).standard_t(2, shape).astype(np.float32)
    expected = solve_rows(x, scheme)
    for threads in [2, 3, 16, 1]:
        for got, one_thread in zip(solve_rows(x, scheme, threads), expected, strict=True):
            np.testing.assert_array_equal(got, one_thread)


def test_several_python_threads_at_once():
    inputs = [np.random.default_rng(seed).standard_normal((20, 3000)) for seed in range(4)]
    expected = [solve_rows(x, "ls-2")[0] for x in inputs]
    wrong = []

    def work(i):
        for _ in range(50):
            if not np.array_equal(solve_rows(inputs[i], "ls-2", threads=2)[0], expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_reversed_repeated_and_read_only(dtype):
    x = np.random.default_rng(8).standard_normal((12, 300)).astype(dtype)
    views = [x[::3, 10:90], x[::-1], np.broadcast_to(x[:1], (5, 300)), x[:0], x[:, :1], x[:, 7:8], x.T[:1]]
    views[-1] = x.T[:, :1]  # rows of one element have no stride to mind
    x.flags.writeable = False
    for view in views:
        for scheme in SCHEMES:
            for got, copied in zip(solve_rows(view, scheme), solve_rows(view.copy(), scheme), strict=True):
                np.testing.assert_array_equal(got, copied)


def test_the_order_and_the_signs_of_elements_do_not_matter():
    rng = np.random.default_rng(9)
    x = rng.integers(-1000, 1000, (3, 5000)) / 64  # sums of these are exact in any order
    for scheme in SCHEMES:
        expected = solve_rows(x, scheme)[0]
        np.testing.assert_array_equal(solve_rows(rng.permuted(x, axis=1), scheme)[0], expected)
        np.testing.assert_array_equal(solve_rows(-x, scheme)[0], expected)


@pytest.mark.parametrize(
    ("x", "scheme", "scales"),
    [
        ([-3.0, -1.0, 1.0, 3.0], "ls-2", [2, 1]),
        ([-5.0], "ls-2", [5, 0]),
        ([-5.0], "ls-T", [2.5, 2.5]),
        ([-1.0, 0.0, 1.0], "ls-T", [0.5, 0.5]),
        ([-1.0, 0.0, 1.0], "ls-2", [0.5, 0.5]),
        ([0.1] * 7, "ls-2", [0.1, 0]),
        ([0.1] * 777, "ls-2", [0.1, 0]),
        ([0.1] * 777, "ls-T", [0.05, 0.05]),
        ([-0.0, 0.0], "ls-2", [0, 0]),
    ],
)
def test_known_solutions(x, scheme, scales):
    got, excess = solve_rows(np.array([x]), scheme)
    assert got.tolist() == [scales] and excess.tolist() == [0]


@pytest.mark.parametrize(
    ("scheme", "error", "scales"), [("ls-2", 0.117464, (0.9815, 0.5288)), ("ls-T", 0.1902, None)]
)
def test_the_normal_distribution(scheme, error, scales):
    x = np.random.default_rng(10).standard_normal(400_000)
    got = solve_rows(x[None], scheme)[0][0]
    assert reached_error(x, got) / (x**2).sum() == pytest.approx(error, rel=5e-3)
    if scales:
        assert got == pytest.approx(scales, rel=5e-3)


# ---------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0, 2.0]], "ls-2"), TypeError, r"float32 or float64 array \[rows, n\], got list"),
        ((None, "ls-2"), TypeError, r"float32 or float64 array \[rows, n\], got NoneType"),
        ((np.ones((2, 3), np.float16), "ls-2"), TypeError, r"float32 or float64 .* got float16 \[2, 3\]"),
        ((np.ones((2, 3), np.int64), "ls-2"), TypeError, r"float32 or float64 .* got int64 \[2, 3\]"),
        ((np.ones((2, 3), bool), "ls-2"), TypeError, r"float32 or float64 .* got bool8 \[2, 3\]"),
        ((np.ones(3), "ls-2"), ValueError, r"two dimensions, \[rows, n\], got float64 \[3\]"),
        ((np.ones((2, 3, 4)), "ls-2"), ValueError, r"two dimensions, \[rows, n\], got float64 \[2, 3, 4\]"),
        ((np.ones((2, 0)), "ls-2"), ValueError, r"at least one element a row, got float64 \[2, 0\]"),
        ((np.ones((2, 3)).T, "ls-2"), ValueError, "side by side in memory, got stride 3; copy it first"),
        ((np.ones((2, 6))[:, ::-1], "ls-2"), ValueError, "side by side in memory, got stride -1"),
        ((np.ones((2, 3)), "ls-1"), ValueError, "scheme must be 'ls-2' or 'ls-T', got 'ls-1'"),
        ((np.ones((2, 3)), "ls-2", 0), ValueError, "threads must be at least 1, got 0"),
        ((np.ones((2, 3)), "ls-2", 1, -0.5), ValueError, "tolerance must be at least 0, got -0.5"),
        ((np.ones((2, 3)), "ls-2", 1, np.nan), ValueError, "tolerance must be at least 0, got nan"),
    ],
)
def test_mistakes_are_told(arguments, error, message):
    with pytest.raises(error, match=message):
        solve_rows(*arguments)
