"""Values to planes and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import axes, folding

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-1", "gf-3", "gf-8"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def fold_by_hand(x, scales):
    """One row, value by value, in Python's floats. Returns signs ``[k, n]``."""
    planes = [[] for _ in scales]
    for value in x:
        residual = value
        for plane, v in zip(planes, scales, strict=True):
            sign = -1 if residual < 0 else 1
            residual -= v * sign
            plane.append(sign)
    return planes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_planes_are_signs_of_what_the_earlier_ones_left(scheme):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 40)))
    scales = fb.solve(x, scheme)
    planes = fb.fold(x, scales)
    assert planes.dtype == torch.bool and planes.shape == (scales.shape[-1], 5, 40)
    values = fb.unfold(planes, scales)
    assert values.dtype == x.dtype and values.shape == x.shape
    for row in range(5):
        signs = fold_by_hand(x[row].tolist(), scales[row].tolist())
        assert (1 - 2 * planes[:, row].int()).tolist() == signs
        torch.testing.assert_close(values[row], scales[row] @ torch.tensor(signs, dtype=x.dtype))


def test_zero_minus_zero_and_nan_count_as_positive():
    scales = torch.tensor([2.0, 1.0])
    x = torch.tensor([0.0, -0.0, torch.nan, -1e-45, 1e-45, 2.0, -2.0])
    first, second = fb.fold(x, scales).tolist()
    assert first == [False, False, False, True, False, False, True]
    # 0 leaves −2; ±2 leave 0.
    assert second == [True, True, False, False, True, False, False]
    assert not fb.fold(torch.tensor([0.0, -0.0]), torch.tensor([0.0, -0.0])).any()


@given(
    hnp.arrays(
        st.sampled_from([np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
        elements=st.integers(-640, 640).map(lambda i: i / 64),
    ),
    st.sampled_from(SCHEMES),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_round_trips(x, scheme, data):
    x = torch.from_numpy(x)
    dim = data.draw(st.none() | st.sets(st.integers(-x.ndim, -1), min_size=1).map(tuple))
    q = fb.quantize(x, scheme, dim)
    kept = axes.kept_shape(x.shape, axes.normalize(x.ndim, dim))
    assert q.dim == axes.normalize(x.ndim, dim)
    assert q.planes.shape == (q.scales.shape[-1], *x.shape) and list(q.scales.shape[:-1]) == kept
    assert torch.equal(q.scales, fb.solve(x, scheme, dim))
    assert torch.equal(q.planes, fb.fold(x, q.scales, dim))
    values = q.values()
    assert torch.equal(values, fb.unfold(q.planes, q.scales, dim))
    assert values.dtype == q.scales.dtype == x.dtype and values.shape == x.shape
    if x.dtype == torch.float64 and scheme.startswith("ls"):
        # What is quantized already is quantized to itself.
        torch.testing.assert_close(fb.quantize(values, scheme, dim).values(), values, rtol=1e-9, atol=1e-9)
    spread = axes.spread(q.scales, x.shape, q.dim)
    assert torch.equal(folding.approximate(x, spread), values)
    stacked = torch.stack([negative for negative, _ in folding.walk(x, spread)])
    assert torch.equal(stacked, q.planes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T"])
def test_folding_again_with_the_returned_scales_reaches_the_optimum(scheme, dtype):
    """No split is kept beside the scales: they alone reproduce it, rounded to their dtype as they are."""
    x = torch.from_numpy(np.random.default_rng(1).standard_t(3, (20, 300)).clip(-20, 20)).to(dtype)
    exact = fb.quantize(x.double(), scheme)
    again = fb.unfold(fb.fold(x, fb.solve(x, scheme)), fb.solve(x, scheme)).double()
    errors = (x.double() - again).square().sum(-1) / x.double().square().sum(-1)
    torch.testing.assert_close(
        errors, exact.error(x.double()), rtol=1e-6, atol=8 * torch.finfo(dtype).eps ** 2
    )


def test_values_lie_on_the_levels():
    x = torch.randn(1000, dtype=torch.float64)
    for scheme, count in [("ls-1", 2), ("ls-2", 4), ("ls-T", 3), ("gf-3", 8)]:
        values = fb.quantize(x, scheme).values()
        levels = values.unique()
        assert len(levels) == count
        torch.testing.assert_close(levels, -levels.flip(0))
    v = fb.solve(x, "ls-2")
    expected = torch.stack([-v[0] - v[1], v[1] - v[0], v[0] - v[1], v[0] + v[1]])
    assert torch.equal(fb.quantize(x, "ls-2").values().unique(), expected)
    v = fb.solve(x, "ls-T")[0]
    assert fb.quantize(x, "ls-T").values().unique().tolist() == [-2 * v, 0, 2 * v]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_folded_in_float32(dtype):
    x = torch.randn(50, 100, dtype=dtype)
    for scheme in ["ls-2", "gf-4"]:
        q = fb.quantize(x, scheme)
        wide = q.scales.float()
        assert torch.equal(q.planes, fb.fold(x.float(), wide))
        assert torch.equal(q.values(), fb.unfold(q.planes, wide).to(dtype))


def test_scalars():
    for scheme in SCHEMES:
        x = torch.tensor(-2.5)
        q = fb.quantize(x, scheme)
        assert q.scales.shape == (len(q.planes),) and q.planes.shape == (len(q.planes),) and q.dim == ()
        assert q.values().shape == () and q.values() == x and q.error(x) == 0
        assert torch.equal(fb.fold(x, q.scales), q.planes)
        assert torch.equal(fb.unfold(q.planes, q.scales), q.values())


def test_empty_batches():
    q = fb.quantize(torch.empty(0, 5), "ls-2")
    assert (
        q.planes.shape == (2, 0, 5)
        and q.values().shape == (0, 5)
        and q.error(torch.empty(0, 5)).shape == (0,)
    )


def test_errors_are_relative_and_float64():
    x = torch.tensor([[3.0, 1.0], [0.0, -0.0], [2.0, -2.0]])
    error = fb.quantize(x, "ls-1").error(x)
    assert error.dtype == torch.float64
    assert error.tolist() == pytest.approx([(1 + 1) / (9 + 1), 0, 0], rel=1e-15, abs=0)
    assert fb.quantize(x.half(), "ls-1", None).error(x.half()).shape == ()
    # The error of a zero row that planes do not reproduce is not hidden by the division.
    assert fb.quantize(x, "ls-1").error(torch.zeros_like(x)).tolist() == [8, 0, 8]


@pytest.mark.parametrize("unit", [1e-320, 1e-170, 1.0, 1e200, 4e307])
def test_errors_are_those_of_any_unit(unit):
    x = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64) * unit
    error = fb.quantize(x, "ls-1").error(x)
    assert error.tolist() == pytest.approx([0.2, 0], rel=1e-3)


@pytest.mark.parametrize("scheme", ["ls-2", "gf-3"])
def test_bad_rows_do_not_touch_others(scheme):
    x = torch.randn(4, 30)
    expected = fb.quantize(x, scheme).values()
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    values = fb.quantize(x, scheme).values()
    assert torch.equal(values[[0, 3]], expected[[0, 3]])
    assert values[[1, 2]].isnan().all()


def test_channels_last_and_other_strides():
    x = torch.randn(2, 3, 4, 5)
    for scheme in SCHEMES:
        expected = fb.quantize(x, scheme, (1, 2, 3))
        for y in [x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)]:
            q = fb.quantize(y, scheme, (1, 2, 3))
            torch.testing.assert_close(q.values(), expected.values())
            torch.testing.assert_close(q.error(y), expected.error(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fb.fold(torch.ones(3, dtype=torch.int64), torch.ones(1)), TypeError, "got torch.int64"),
        (lambda: fb.fold([1.0], torch.ones(1)), TypeError, "expected a torch.Tensor, got list"),
        (
            lambda: fb.fold(torch.ones(2, 3), torch.ones(3, 1)),
            ValueError,
            r"\(3, 1\) do not fit .*\(2, 'k'\)",
        ),
        (lambda: fb.fold(torch.ones(2, 3), torch.ones(2, 1), 0), ValueError, "do not fit"),
        (lambda: fb.fold(torch.ones(3), torch.ones(0)), ValueError, "do not fit .* k ≥ 1"),
        (
            lambda: fb.unfold(torch.ones(1, 3), torch.ones(1)),
            TypeError,
            "planes are boolean.*got torch.float32",
        ),
        (lambda: fb.unfold(PLANES, torch.ones(3)), ValueError, r"scales of shape \(3,\) for planes of shape"),
        (lambda: fb.unfold(PLANES, torch.tensor(1.0)), ValueError, r"expected \[..., k\] and \[k, ...\]"),
        (lambda: fb.unfold(PLANES[0, 0], torch.ones(1)), ValueError, r"planes of shape \(\)"),
        (lambda: fb.unfold(PLANES[:0], torch.ones(0)), ValueError, "k ≥ 1"),
        (lambda: fb.unfold(PLANES, torch.ones(2, 2)), ValueError, "do not fit"),
        (lambda: fb.quantize(torch.ones(3), "fp"), ValueError, "'fp' leaves a tensor float"),
        (lambda: fb.quantize(torch.ones(3, dtype=torch.bool), "ls-1"), TypeError, "got torch.bool"),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()


PLANES = torch.zeros(2, 3, dtype=torch.bool)
