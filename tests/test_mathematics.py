"""docs/mathematics.md: every claim names tests that exist; and some claims tried as they are written."""

import ast
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("file", sorted({file for file, _ in REFERENCE.findall(PAGE)}))
def test_every_test_that_the_page_names_exists(file):
    named = {name for path, name in REFERENCE.findall(PAGE) if path == file}
    assert named <= {name for name in functions(ROOT / file) if name.startswith("test_")}


def test_every_reference_is_written_so_that_it_is_checked():
    assert PAGE.count("::") == len(REFERENCE.findall(PAGE)) > 30


def test_every_claim_is_numbered_in_order_and_checked():
    claims = [int(number) for number in re.findall(r"^\*\*Claim (\d+)\.", PAGE, re.MULTILINE)]
    assert claims == list(range(1, len(claims) + 1)) and len(claims) > 10
    # Between a claim and the next heading there is a list of tests.
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        parts = section.split("*Checked by*")
        assert not re.search(r"^\*\*Claim", parts[-1], re.MULTILINE), section.splitlines()[0]


MAGNITUDES = hnp.arrays(
    np.float64,
    st.integers(2, 40),
    elements=st.integers(0, 640).map(lambda i: i / 64) | st.floats(0, 10, width=32),
)


def error_of(a, levels):
    """Squared error of magnitudes at the nearest of some levels."""
    return float((np.abs(a[:, None] - np.array(levels)).min(1) ** 2).sum())


@given(MAGNITUDES)
@settings(max_examples=60, deadline=None)
def test_the_gain_is_what_a_split_saves(a):
    """Claims 5 and 6."""
    a, n = np.sort(a), len(a)
    mean, energy = a.mean(), (a**2).sum()
    one_level = energy - n * mean**2
    for m in range(1, n):
        low, high = a[:m], a[m:]
        deficit = m * mean - low.sum()
        error = ((low - low.mean()) ** 2).sum() + ((high - high.mean()) ** 2).sum()
        gain = n * deficit**2 / (m * (n - m))
        assert deficit >= -1e-12 * (1 + mean) * n
        assert error == pytest.approx(one_level - gain, abs=1e-12 * (1 + energy))
        ternary = (low**2).sum() + ((high - high.mean()) ** 2).sum()
        assert ternary == pytest.approx(energy - high.sum() ** 2 / (n - m), abs=1e-12 * (1 + energy))


@given(MAGNITUDES)
@settings(max_examples=60, deadline=None)
def test_v1_lies_half_way_between_the_means_it_parts(a):
    """Claim 4; a magnitude at the threshold is as near to either level, and may belong to either."""
    v1, v2 = fb.solve(torch.from_numpy(a), "ls-2").tolist()
    assume(v2 > 1e-6 * v1)
    at = np.abs(a - v1) <= 1e-9 * v1
    above, below = a[(a > v1) & ~at], a[(a < v1) & ~at]
    ties = a[at]
    conditions = [
        np.concatenate([above, ties[i:]]).mean() / 2 + np.concatenate([below, ties[:i]]).mean() / 2
        for i in range(len(ties) + 1)
        if len(above) + len(ties[i:]) and len(below) + i
    ]
    assert min(abs(v1 - c) for c in conditions) <= 1e-9 * v1
    # Either way the levels are the means, so that no other levels of these clusters are better.
    assert error_of(a, [v1 - v2, v1 + v2]) <= ((a - a.mean()) ** 2).sum() + 1e-9


def test_iterating_the_condition_can_stop_at_a_local_optimum():
    a = np.array([0.0, 7, 7, 7, 8, 9, 9, 9, 9])
    threshold = a.mean()
    for _ in range(100):
        high, low = a[a > threshold].mean(), a[a < threshold].mean()
        threshold = (high + low) / 2
    v1, v2 = fb.solve(torch.from_numpy(a), "ls-2").tolist()
    assert error_of(a, [low, high]) == pytest.approx(37.55)
    assert error_of(a, [v1 - v2, v1 + v2]) == pytest.approx(6.875)


@given(MAGNITUDES, st.integers(0, 12), st.integers(0, 12), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=150, deadline=None)
def test_edges_and_knee_bound_every_split_of_a_bin(a, skip, take, below, beyond):
    """Claim 7, for any bin: its bounds may lie anywhere between its magnitudes and its neighbours'."""
    a, n = np.sort(a), len(a)
    m0, c = min(skip, n - 1), 1 + take
    c = min(c, n - m0)
    inside = a[m0 : m0 + c]
    lowest = a[m0 - 1] if m0 else 0.0
    highest = a[m0 + c] if m0 + c < n else inside[-1] + 1
    lo = inside[0] - below * (inside[0] - lowest)
    hi = inside[-1] + beyond * (highest - inside[-1])
    assume(lo < hi)
    total, mean, s, under = a.sum(), a.mean(), inside.sum(), a[:m0].sum()
    knee = min(max((c * hi - s) / (hi - lo), 0.0), float(c))
    objectives = {
        "ls-2": (lambda m, low: m * mean - low, lambda m: m * (n - m) / n),
        "ls-T": (lambda m, low: total - low, lambda m: n - m),
    }
    for p, q in objectives.values():

        def gain(m, low, p=p, q=q):
            return max(p(m, low), 0) ** 2 / q(m) if q(m) > 0 else 0.0

        edges = [gain(m0, under), gain(m0 + c, under + s)]
        bound = max(*edges, gain(m0 + knee, under + knee * lo))
        for j in range(1, c):
            assert gain(m0 + j, under + inside[:j].sum()) <= bound + 1e-9 * (1 + bound)


def levels_of(scales):
    """All Σ ±v_i, ``[..., 2^k]``, and their signs ``[2^k, k]``: in the first half the first is positive."""
    signs = np.array(list(itertools.product([1.0, -1.0], repeat=scales.shape[-1])))
    return scales @ signs.T, signs


@pytest.mark.parametrize(("planes", "count"), [(2, 1), (3, 2), (4, 14)])
def test_levels_come_in_few_orders(planes, count):
    """Claim 17: all that 200,000 draws of scales show."""
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.random((100_000, planes)), rng.exponential(size=(100_000, planes)) ** 2])
    inner = levels_of(np.sort(draws, 1)[:, ::-1])[0][:, : 2 ** (planes - 1)]
    order = np.abs(inner).argsort(1)
    types = np.concatenate([order, np.sign(inner).astype(int)], 1)
    assert len(np.unique(types, axis=0)) == count


@given(hnp.arrays(np.float64, st.integers(2, 4), elements=st.floats(0.01, 1)), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_folding_finds_the_nearest_level_where_each_scale_is_at_least_the_sum_of_the_later_ones(v, seed):
    """Claim 18, both ways."""
    later = v[::-1].cumsum()[::-1] - v
    in_cone = v.copy()
    for i in reversed(range(len(v))):
        in_cone[i] = v[i] + in_cone[i + 1 :].sum()
    x = np.random.default_rng(seed).normal(size=200) * in_cone.sum()
    folded = unfolded(x, in_cone)
    nearest = np.abs(x[:, None] - levels_of(in_cone)[0]).min(1)
    np.testing.assert_allclose(np.abs(x - folded), nearest, atol=1e-12)
    levels, signs = levels_of(v)
    assume(np.diff(np.sort(levels)).min() > 1e-6)
    for i in np.flatnonzero(v < later - 1e-9):
        missed = levels[(signs == np.where(np.arange(len(v)) == i, -1, 1)).all(1)]
        assert abs(unfolded(missed, v) - missed) > 1e-7


def unfolded(x, scales):
    x, scales = torch.from_numpy(x), torch.from_numpy(scales)
    return fb.unfold(fb.fold(x, scales), scales).numpy()


def test_alternating_signs_and_scales_never_raises_the_error():
    """Claim 16: nearest levels are runs, and either step lowers the error."""
    x = np.sort(np.abs(np.random.default_rng(1).laplace(size=300)))
    for planes in (2, 3, 4):
        scales = np.full(planes, np.abs(x).mean()) / 2 ** np.arange(planes)
        previous = np.inf
        for _ in range(8):
            levels, signs = levels_of(scales)
            chosen = np.abs(x[:, None] - levels).argmin(1)
            runs = 1 + (np.diff(chosen) != 0).sum()
            assert runs == len(set(chosen))
            after_signs = ((x - levels[chosen]) ** 2).sum()
            scales = np.linalg.lstsq(signs[chosen], x, rcond=None)[0]
            after_scales = ((x - signs[chosen] @ scales) ** 2).sum()
            assert after_scales <= after_signs + 1e-9 and after_signs <= previous + 1e-9
            previous = after_scales


def test_averages_are_right_for_one_bit_and_wrong_for_two():
    """Claims 19 and 20, on quantiles of the sizes and of the values."""

    def quantiles(n):
        return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)

    inputs = torch.exp(quantiles(200) / 2)[:, None] * quantiles(1000)

    def error(scales):
        spread = scales.expand(len(inputs), -1)
        return float(
            (inputs - fb.unfold(fb.fold(inputs, spread), spread)).square().sum() / inputs.square().sum()
        )

    one, two = fb.solve(inputs, "ls-1"), fb.solve(inputs, "ls-2")
    torch.testing.assert_close(one.mean(0), fb.solve(inputs, "ls-1", None))
    pooled = error(fb.solve(inputs, "ls-2", None))
    assert error(two) == pytest.approx(0.1175, abs=1e-3)
    assert error(two.mean(0)) == pytest.approx(0.224, abs=3e-3)
    assert pooled == pytest.approx(0.192, abs=3e-3)
    for factor in (0.97, 1.03):
        assert error(fb.solve(inputs, "ls-2", None) * factor) > pooled


NUMBERS = re.findall(r"^\| `([\w-]+)` \| (\.\d+) \|(?: (\d+) %)? \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("scheme", "error", "percent"), NUMBERS)
def test_the_table_of_the_normal_distribution(scheme, error, percent):
    n = 20_000
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    reached = float(fb.quantize(x, scheme).error(x))
    assert reached == pytest.approx(float(error), rel=5e-3)
    if percent:
        least = float(fb.quantize(x, f"ls-{scheme[-1]}").error(x))
        assert 100 * (reached / least - 1) == pytest.approx(float(percent), abs=0.7)


def test_the_table_is_read():
    assert len(NUMBERS) == PAGE.count("\n| `") > 5
