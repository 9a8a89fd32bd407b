"""Pooled scales against solving for all values at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import pooled
from foldbit.core.pooled import Pool

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-1", "gf-2", "gf-3"]
FAMILIES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "relu": lambda rng, n: np.maximum(rng.standard_normal(n), 0),
    "clamped": lambda rng, n: np.clip(2 * rng.standard_normal(n), -3, 3),
    "student t, 2": lambda rng, n: rng.standard_t(2, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "log-normal, 3": lambda rng, n: np.exp(3 * rng.standard_normal(n)),
    "three values": lambda rng, n: rng.choice([-1.0, 0.0, 1.0], n),
    "integers": lambda rng, n: rng.integers(-127, 128, n) * 0.03,
    "constant": lambda rng, n: np.full(n, -0.7),
    "zeros": lambda rng, n: np.zeros(n),
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e6, rng.standard_normal(n)),
    "times 1e-30": lambda rng, n: 1e-30 * rng.standard_normal(n),
    "times 1e30": lambda rng, n: 1e30 * rng.standard_normal(n),
}


def relative_error(x, scales):
    if not x.any():
        return 0.0
    return float((x - fb.unfold(fb.fold(x, scales), scales)).square().sum() / x.square().sum())


def check(parts, schemes=SCHEMES):
    pool = Pool()
    for part in parts:
        pool.add(part)
    x = torch.cat([part.double().flatten() for part in parts])
    assert pool.count == x.numel() and not pool.broken()
    for scheme in schemes:
        found = pool.solve(scheme)
        reached = relative_error(x, found.scales)
        least = relative_error(x, fb.solve(x, scheme))
        assert abs(reached - least) <= 1e-6  # greedy is not optimal: it may be better by chance
        assert found.error == pytest.approx(reached, abs=1e-6)
        if scheme.startswith("ls"):
            assert 0 <= found.excess <= 1e-6 and reached - least <= found.excess + 1e-12
        else:
            assert found.excess == (0 if scheme == "gf-1" else None)
    return pool


@pytest.mark.parametrize("order", ["as it comes", "rising", "falling"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_what_the_whole_gives(family, order):
    """Rising data makes the range grow with every piece."""
    for n in [1, 2, 9, 1000, 50_000]:
        x = torch.from_numpy(FAMILIES[family](np.random.default_rng(n), n))
        if order != "as it comes":
            x = x[x.abs().argsort(descending=order == "falling")]
        check(x.chunk(7))


@given(
    st.lists(
        hnp.arrays(
            "float64",
            st.integers(1, 30),
            elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-20]),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_pieces(parts):
    # With so few values the bin that a threshold cuts is a large part of them: greedy's are not compared.
    pool = Pool()
    x = torch.from_numpy(np.concatenate(parts))
    for part in parts:
        pool.add(torch.from_numpy(part))
    for scheme in ["ls-1", "ls-2", "ls-T"]:
        found = pool.solve(scheme)
        missed = relative_error(x, found.scales) - relative_error(x, fb.solve(x, scheme))
        assert missed <= found.excess + 1e-9 and 0 <= found.excess <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_shape_and_empty_pieces(dtype):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator).to(dtype) for shape in [(3, 4, 5), (), (0, 7), (100,)]]
    check([*parts, torch.randn(8, 9, generator=generator).to(dtype).T])


def test_values_far_below_the_largest_keep_their_counts_and_sums():
    small, large = torch.full((1000,), 1e-3), torch.tensor([1e12])
    found = check([small, large], ["ls-1", "ls-2"]).solve("ls-2").scales.tolist()
    # The small ones' own level, which only their sum tells.
    assert found == pytest.approx([5e11, 5e11]) and found[0] - found[1] == pytest.approx(1e-3, rel=0.2)


def test_memory_does_not_grow():
    pool = Pool()
    for i in range(20):
        pool.add(torch.randn(1000) * 10.0**i)
    tensors = [value for value in vars(pool).values() if isinstance(value, torch.Tensor)]
    assert sum(t.nbytes for t in tensors) < 400_000


def test_the_certificate_tells_when_bins_are_too_coarse(monkeypatch):
    monkeypatch.setattr(pooled, "_PER_OCTAVE", 2)
    monkeypatch.setattr(pooled, "_SHIFT", 51)
    monkeypatch.setattr(pooled, "_BINS", 2 * 24)
    x = torch.randn(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = Pool()
    pool.add(x)
    for scheme in ["ls-2", "ls-T"]:
        found = pool.solve(scheme)
        missed = relative_error(x, found.scales) - relative_error(x, fb.solve(x, scheme))
        assert 1e-6 < missed <= found.excess < 0.1


def test_the_error_of_other_scales():
    x = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = Pool()
    pool.add(x)
    for scales in [[1.0, 0.5], [0.3, 0.7], [2.0], [0.0]]:
        scales = torch.tensor(scales, dtype=torch.float64)
        assert pool.error(scales) == pytest.approx(relative_error(x, scales), abs=1e-6)


def test_schemes_without_a_search_of_their_own_are_solved_on_quantiles():
    x = torch.randn(30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pool = Pool()
    pool.add(x)
    found = pool.solve("lsf-4")
    assert found.excess is None and found.scales.shape == (4,)
    reached = relative_error(x, found.scales)
    assert reached == pytest.approx(relative_error(x, fb.solve(x, "lsf-4")), rel=2e-3)
    assert found.error == pytest.approx(reached, abs=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_remembered(value):
    pool = Pool()
    pool.add(torch.tensor([1.0, value, 2.0]))
    pool.add(torch.ones(5))
    assert pool.broken()
    with pytest.raises(ValueError, match="NaN or infinity"):
        pool.solve("ls-2")


@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-3", "lsf-3"])
def test_squares_beyond_float64_are_refused(scheme):
    x = torch.tensor([1.0, 2.0, -7.0, 3.5], dtype=torch.float64)
    expected = Pool()
    expected.add(x)
    expected = expected.solve(scheme)
    for unit in [1e-119, 1e119]:
        pool = Pool()
        pool.add(x * unit)
        found = pool.solve(scheme)
        torch.testing.assert_close(found.scales / unit, expected.scales)
        assert found.error == pytest.approx(expected.error)
    for unit in [1e-200, 1e200]:
        pool = Pool()
        pool.add(x * unit)
        with pytest.raises(ValueError, match=r"the largest magnitude is 7e.*; scale them into 1e-120"):
            pool.solve(scheme)
        with pytest.raises(ValueError, match="the largest magnitude is 7e"):
            pool.error(found.scales)
    pool = Pool()
    pool.add(torch.zeros(3))
    assert pool.solve(scheme).error == 0


def test_mistakes_are_told():
    pool = Pool()
    with pytest.raises(ValueError, match="no values were added"):
        pool.solve("ls-2")
    with pytest.raises(TypeError, match="expected float16"):
        pool.add(torch.ones(3, dtype=torch.int32))
    pool.add(torch.ones(3))
    with pytest.raises(ValueError, match="'fp' leaves a tensor float"):
        pool.solve("fp")
