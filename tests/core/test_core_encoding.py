"""Values to the code of their nearest level: against trying every code."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import axes, encoding

SIXTEENTHS = st.integers(-160, 160).map(lambda i: i / 16)  # sums of these are exact


@given(
    hnp.arrays(np.float64, st.integers(1, 20), elements=SIXTEENTHS | st.just(-0.0)),
    hnp.arrays(np.float64, st.integers(1, 5), elements=SIXTEENTHS),
)
@settings(max_examples=150, deadline=None)
def test_no_code_is_nearer(x, scales):
    """Whatever the scales: unsorted, negative, equal or zero."""
    planes = fb.encode(torch.from_numpy(x), torch.from_numpy(scales))
    assert planes.dtype == torch.bool and planes.shape == (len(scales), len(x))
    levels = np.array(list(itertools.product([-1, 1], repeat=len(scales)))) @ scales
    values = fb.unfold(planes, torch.from_numpy(scales)).numpy()
    distances = np.abs(x[:, None] - levels)
    assert np.array_equal(np.abs(x - values), distances.min(1))
    # Of two levels as near, the one of larger magnitude; of a magnitude's two signs, the value's own.
    nearest = np.where(distances == distances.min(1, keepdims=True), np.abs(levels), -1).max(1)
    assert np.array_equal(values, np.where(x < 0, -nearest, nearest))


def test_zeros_ties_and_nan():
    scales = torch.tensor([2.0, 2.0, 1.0])  # magnitudes 1, 1, 3, 5
    x = torch.tensor([0.0, -0.0, 2.0, -2.0, 4.0, -4.0, 1.9, torch.nan])
    planes = fb.encode(x, scales)
    assert fb.unfold(planes, scales).tolist() == [1, 1, 3, -3, 5, -5, 1, 1]
    opposite = fb.encode(torch.tensor([0.5, -0.5]), scales)
    assert torch.equal(opposite[:, 0], ~opposite[:, 1])
    none = torch.zeros(3)
    assert not fb.unfold(fb.encode(torch.tensor([0.0, 7.0, -7.0]), none), none).any()


@given(
    hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-10, 10)),
    hnp.arrays(np.float64, st.integers(1, 4), elements=st.floats(0.01, 1)),
)
@settings(max_examples=100, deadline=None)
def test_where_each_scale_outweighs_the_later_ones_folding_finds_the_same_level(x, steps):
    scales = np.zeros(len(steps))
    for i in reversed(range(len(steps))):
        scales[i] = steps[i] + scales[i + 1 :].sum()
    x, scales = torch.from_numpy(x), torch.from_numpy(scales)
    nearest, folded = (fb.unfold(p, scales) for p in (fb.encode(x, scales), fb.fold(x, scales)))
    torch.testing.assert_close((x - nearest).abs(), (x - folded).abs(), rtol=0, atol=1e-12)


def test_where_they_do_not_folding_may_miss_it():
    x, scales = torch.linspace(-6, 6, 1001), torch.tensor([2.0, 1.5, 1.0])
    nearest = (x - fb.unfold(fb.encode(x, scales), scales)).abs()
    folded = (x - fb.unfold(fb.fold(x, scales), scales)).abs()
    assert (nearest <= folded + 1e-6).all() and (nearest < folded - 0.1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["ls-3", "alt-4", "rg-2", "gf-8"])
def test_any_dims_dtypes_and_memory_formats(scheme, dtype):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 5, 6))).to(dtype)
    for dim in [-1, (1, 2, 3), (0, 2), None]:
        scales = fb.solve(x, scheme, dim)
        planes = fb.encode(x, scales, dim)
        assert planes.shape == (scales.shape[-1], *x.shape)
        for y in [x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)]:
            assert torch.equal(fb.encode(y, scales, dim), planes)
        # In two steps or in one, the same numbers.
        spread = axes.spread(scales, x.shape, axes.normalize(x.ndim, dim))
        assert torch.equal(encoding.nearest(x, spread), fb.unfold(planes, scales, dim))
        if scheme != "gf-8":
            q = fb.quantize(x, scheme, dim)
            assert torch.equal(q.planes, planes) and torch.equal(q.scales, scales)
            assert (q.error(x) < 0.3).all()


@pytest.mark.parametrize("factor", [1e-30, 1e30, 3e38])
def test_scales_near_the_ends_of_the_dtype(factor):
    x = torch.tensor([0.15, -0.6, 1.0]) * factor
    scales = torch.tensor([0.4, 0.3, 0.2]) * factor
    expected = torch.tensor([0.1, -0.5, 0.9]) * factor
    torch.testing.assert_close(fb.unfold(fb.encode(x, scales), scales), expected, rtol=1e-5, atol=0)


def test_scalars_and_empty_batches():
    assert fb.encode(torch.tensor(-2.5), torch.tensor([1.0, 1.0])).tolist() == [True, True]
    assert fb.encode(torch.empty(0, 5), torch.empty(0, 3)).shape == (3, 0, 5)


def test_mistakes_are_told():
    with pytest.raises(TypeError, match=r"expected float16, .* got torch\.int64"):
        fb.encode(torch.ones(3, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match=r"scales of shape \(2, 3\) do not fit"):
        fb.encode(torch.ones(5), torch.ones(2, 3))
    with pytest.raises(ValueError, match="9 scales a value; at most 8 are encoded"):
        fb.encode(torch.ones(5), torch.ones(9))
