"""Passes over rows: every instruction set against the oracle, bit for bit; greedy scales against NumPy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldbit.kernels import native, reference

ISAS = [name for name in native.available() if name != native.REFERENCE]
DTYPES = [np.float32, np.float64]
NASTY = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45, 1e30, -1e30, 1.0, -1.0, 0.5]


def bits(x):
    """Bits to compare: −0 is not 0, but one NaN is as good as another."""
    return np.where(np.isnan(x), np.nan, x).view(np.uint32 if x.dtype == np.float32 else np.uint64)


def strided(x):
    """The same rows in a wider matrix."""
    room = np.full((len(x), x.shape[1] + 3), np.nan, x.dtype)
    room[:, 1 : 1 + x.shape[1]] = x
    return room[:, 1 : 1 + x.shape[1]]


@st.composite
def problems(draw):
    """Rows, gradients, scales and a clamp: around the sizes of vectors, with all kinds of values."""
    rows, n = draw(st.integers(0, 4)), draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 333]))
    planes, dtype = draw(st.integers(1, 8)), draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x, grad = (2 * rng.standard_normal((2, rows, n))).astype(dtype)
    x[rng.random(x.shape) < 0.2] = draw(st.sampled_from(NASTY))
    grad[rng.random(x.shape) < 0.1] = draw(st.sampled_from(NASTY))
    scales = np.abs(rng.standard_normal((rows, planes))).astype(dtype)
    scales[rng.random(scales.shape) < 0.2] = draw(st.sampled_from([0.0, 0.5, -0.5, np.nan, np.inf, 1.0]))
    # Values on thresholds, where a sign hangs on the last bit.
    on_threshold = rng.random(x.shape) < 0.2
    x[on_threshold] = np.broadcast_to(scales[:, :1], x.shape)[on_threshold]
    clamp = draw(st.sampled_from([None, 0.3, 1.0, 3.0, 65504]))
    if draw(st.booleans()):
        x, grad = strided(x), strided(grad)
    return x, grad, scales, clamp


@settings(deadline=None, max_examples=250)
@given(problems(), st.integers(1, 3))
def test_every_instruction_set_gives_the_numbers_of_the_reference(problem, threads):
    x, grad, scales, clamp = problem
    limit = math.inf if clamp is None else clamp
    expected, got = np.empty_like(x), np.empty_like(x)
    reference.approximate_rows(x, scales, expected, limit)
    for isa in ISAS:
        with native.use(isa):
            native.approximate_rows(x, scales, clamp, out=got, threads=threads)
        np.testing.assert_array_equal(bits(got), bits(expected), err_msg=isa)
    for estimator in native.ESTIMATORS:
        reference.window_rows(grad, x, scales, estimator, expected, limit)
        for isa in ISAS:
            with native.use(isa):
                native.window_rows(grad, x, scales, estimator, clamp, out=got, threads=threads)
            np.testing.assert_array_equal(bits(got), bits(expected), err_msg=f"{isa} {estimator}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 100_003), (3, 20_000), (7000, 9), (40_000, 1)])
def test_long_and_many_rows_on_threads(shape, dtype):
    """More than a task's worth: the pieces have to meet."""
    rng = np.random.default_rng(0)
    x, grad = rng.standard_normal((2, *shape)).astype(dtype)
    scales = rng.random((shape[0], 2)).astype(dtype)
    expected, got = np.empty_like(x), np.empty_like(x)
    for threads in [1, 2, 3]:
        reference.approximate_rows(x, scales, expected, 1.5)
        native.approximate_rows(x, scales, 1.5, out=got, threads=threads)
        np.testing.assert_array_equal(got, expected)
        reference.window_rows(grad, x, scales, "polynomial", expected, 1.5)
        native.window_rows(grad, x, scales, "polynomial", 1.5, out=got, threads=threads)
        np.testing.assert_array_equal(got, expected)


def test_the_reference_can_be_chosen():
    x, scales = np.array([[-3.0, 0.5, 2.0]]), np.array([[1.0, 0.5]])
    results = []
    for backend in native.available():
        out = np.empty_like(x)
        with native.use(backend):
            native.approximate_rows(x, scales, out=out)
        results.append(out.tolist())
    assert results == [[[-1.5, 0.5, 1.5]]] * len(results)


# ---------------------------------------------------------------------------------------------------------
# Scales


def greedy(row, planes, clamp):
    """v_i = mean|r|, r ← r − v_i·sign(r), with sums rounded once."""
    residual = np.abs(np.clip(row, -clamp, clamp)).astype(np.float64)
    scales = []
    for _ in range(planes):
        scales.append(math.fsum(residual) / len(residual))
        residual = np.abs(residual - scales[-1])
    return scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 576, 16_384, 16_385, 50_000])
def test_greedy_scales(n, dtype):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((5, n)).astype(dtype)
    x[1] = 0
    x[2] = -0.7
    x[3] *= dtype(1e30)
    x[4] *= dtype(1e-30)
    for clamp in [None, 0.5]:
        limit = np.inf if clamp is None else dtype(clamp)
        for scheme, planes in [("ls-1", 1), *((f"gf-{k}", k) for k in range(1, 9))]:
            scales, excess = native.solve_rows(x, scheme, clamp=clamp)
            assert scales.shape == (5, planes) and scales.dtype == excess.dtype == np.float64
            assert (excess == (0 if planes == 1 else np.inf)).all()
            expected = np.array([greedy(row, planes, limit) for row in x])
            # Later planes see the rounding of earlier ones; it is small beside the row.
            largest = np.minimum(np.abs(x).max(1), limit)[:, None].astype(np.float64)
            assert (np.abs(scales - expected) <= 1e-14 * largest).all()
            assert (scales[:, 0] >= 0).all() and (scales[1] == 0).all()


@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-3"])
def test_bad_rows_are_nan_and_alone_and_a_clamp_holds_infinity(scheme):
    x = np.random.default_rng(0).standard_normal((4, 20_000)).astype(np.float32)
    x[1, 17_000], x[2, 3] = np.nan, -np.inf
    for clamp, bad in [(None, [False, True, True, False]), (2.0, [False, True, False, False])]:
        scales, excess = native.solve_rows(x, scheme, clamp=clamp)
        assert np.isnan(scales).any(1).tolist() == np.isnan(scales).all(1).tolist() == bad
        assert np.isnan(excess).tolist() == bad
    np.testing.assert_allclose(scales[2], native.solve_rows(np.clip(x[2:3], -2, 2), scheme)[0][0], rtol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-3"])
def test_numbers_depend_neither_on_threads_nor_on_the_instruction_set(scheme, dtype):
    rng = np.random.default_rng(0)
    for shape in [(300, 70), (3, 40_000), (1, 200_000), (1, 1)]:
        x = rng.standard_t(3, shape).astype(dtype)
        results = []
        for isa in ISAS:
            with native.use(isa):
                results += [native.solve_rows(x, scheme, clamp=2.0, threads=t)[0] for t in [1, 2, 3]]
        for scales in results[1:]:
            np.testing.assert_array_equal(scales, results[0])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_clamp_is_a_clipped_copy(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.sampled_from([1, 5, 64, 65, 300, 5000]))
    x = rng.standard_t(2, (3, n)).astype(dtype)
    if dtype == np.float64 and data.draw(st.booleans()):
        x *= 1e250  # rescaled inside
    clamp = float(data.draw(st.sampled_from([0.1, 0.7, 3.0])) * np.abs(x).mean())
    clipped = np.clip(x, -dtype(clamp), dtype(clamp))
    for scheme in ["ls-1", "ls-2", "ls-T", "gf-4"]:
        got, expected = native.solve_rows(x, scheme, clamp=clamp), native.solve_rows(clipped, scheme)
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])


# ---------------------------------------------------------------------------------------------------------
# Mistakes

X = np.ones((2, 6), np.float32)
V = np.ones((2, 2), np.float32)


def approximate(x=X, scales=V, clamp=None, out=None, threads=1):
    native.approximate_rows(
        x, scales, clamp, out=np.empty((2, 6), np.float32) if out is None else out, threads=threads
    )


def window(grad=X, estimator="scaled", **options):
    native.window_rows(grad, X, V, estimator, out=np.empty_like(X), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: approximate(x=[[1.0]]), TypeError, "x must be a float32 or float64 array .*, got list"),
        (lambda: approximate(x=X.astype(int)), TypeError, r"x must be .*, got int64 \[2, 6\]"),
        (lambda: approximate(x=X[0]), TypeError, r"\[rows, n\], got float32 \[6\]"),
        (lambda: approximate(x=X.T), ValueError, "elements of a row of x must lie side by side .*stride 6"),
        (lambda: approximate(scales=V[:1]), ValueError, r"scales must be of the type of x, \[rows, 1 to 8\]"),
        (lambda: approximate(scales=V[:, :0]), ValueError, "scales must be of the type of x"),
        (
            lambda: approximate(scales=np.ones((2, 9), np.float32)),
            ValueError,
            r"1 to 8\], got float32 \[2, 9\]",
        ),
        (lambda: approximate(scales=V.astype(np.float64)), ValueError, "scales must be of the type of x"),
        (lambda: approximate(scales=np.ones((2, 4), np.float32)[:, :2]), ValueError, "must be C-contiguous"),
        (
            lambda: approximate(out=np.empty((2, 5), np.float32)),
            ValueError,
            "out must be of the type and shape",
        ),
        (lambda: approximate(out=np.broadcast_to(np.float32(0), (2, 6))), ValueError, "row of out must lie"),
        (lambda: approximate(clamp=0.0), ValueError, "clamp must be positive, got 0"),
        (lambda: approximate(clamp=float("nan")), ValueError, "clamp must be positive, got nan"),
        (lambda: approximate(threads=0), ValueError, "threads must be at least 1, got 0"),
        (lambda: window(grad=X[:, :5]), ValueError, "grad must be of the type and shape of x"),
        (lambda: window(estimator="ste"), ValueError, "identity, clipped, scaled or polynomial, got 'ste'"),
        (lambda: window(clamp=-1.0), ValueError, "clamp must be positive, got -1"),
        (lambda: native.solve_rows(X[:, :0], "ls-1"), ValueError, "at least one element a row"),
        (lambda: native.solve_rows(X, "ls-2", clamp=-1.0), ValueError, "clamp must be positive, got -1"),
        (lambda: native.solve_rows(X, "gf-2", clamp=0.0), ValueError, "clamp must be positive, got 0"),
        (lambda: native.solve_rows(X, "gf-9"), ValueError, "ls-1, ls-2, ls-T or gf-1 to gf-8, got 'gf-9'"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_read_only_outputs_are_refused():
    out = np.empty_like(X)
    out.flags.writeable = False
    with pytest.raises(TypeError, match="out must be a writable array"):
        approximate(out=out)
