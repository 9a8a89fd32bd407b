"""Three and four bits: against brute force, the baselines on every row, and the best known values."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import multibit, schemes, sorted_rows

SCHEMES = multibit.SCHEMES
SEARCHED = ["ls-3", "ls-4", "lsf-3", "lsf-4"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

FAMILIES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "student t, 2": lambda rng, n: rng.standard_t(2, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "log-normal, 3": lambda rng, n: rng.lognormal(0, 3, n),
    "relu, 90 % zeros": lambda rng, n: np.maximum(rng.standard_normal(n) - 1.28, 0),
    "three values": lambda rng, n: rng.choice([-1, 0, 1], n),
    "few values": lambda rng, n: rng.choice([0, 1, 16], n),
    "ties": lambda rng, n: rng.integers(-4, 5, n) * 0.25,
    "constant": lambda rng, n: np.full(n, -0.7),
    "zeros of both signs": lambda rng, n: rng.choice([-0.0, 0.0], n),
    "one-hot": lambda rng, n: np.eye(1, n, rng.integers(n))[0],
    "one outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 1e6, rng.standard_normal(n)),
}


def family(name, n, rows=6, seed=0):
    rng = np.random.default_rng((seed, n))
    return torch.from_numpy(np.stack([FAMILIES[name](rng, n) for _ in range(rows)]).astype(np.float64))


def error(x, scheme):
    return fb.quantize(x, scheme).error(x)


def quantiles(name, n=4608):
    """Values at the middles of n equal shares of a distribution."""
    shares = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal = torch.special.ndtri(shares)
    return {"normal": normal, "laplace": -torch.log1p(-shares), "relu": normal.clamp(min=0)}[name]


# ---------------------------------------------------------------------------------------------------------
# Brute force


def least_over_signs(x, planes):
    """Least squared error over all choices of all signs, each with its best scales."""
    codes = np.array([(1.0, *rest) for rest in itertools.product([-1, 1], repeat=planes - 1)])
    # A value's code and the opposite one differ by the value's sign only, and ±|x| have the same best error.
    signed = np.concatenate([codes, -codes])
    choices = np.array(list(itertools.product(range(len(signed)), repeat=len(x) - 1)), dtype=int)
    rest = signed[choices]  # the first value's code: +1 first, for the scales may have any sign
    first = np.ones((len(rest), 1, planes))
    signs = np.concatenate([first, rest], 1)
    solutions = np.linalg.pinv(signs) @ x[:, None]
    return ((x - (signs @ solutions)[..., 0]) ** 2).sum(1).min()


def least_in_cone(x, planes):
    """Least squared error over scales each at least the sum of the later ones: every cut of sorted |x|, every
    face of the cone."""
    magnitudes = np.sort(np.abs(x))
    codes = np.array([(1.0, *rest) for rest in itertools.product([-1, 1], repeat=planes - 1)])
    generators = np.eye(planes)
    for i in reversed(range(planes)):
        generators[i] += generators[i + 1 :].sum(0)
    best = (magnitudes**2).sum()
    for cells in itertools.combinations_with_replacement(range(len(codes)), len(x)):
        signs = codes[list(cells)] @ generators
        for face in range(1, 2**planes):
            columns = signs[:, [i for i in range(planes) if face >> i & 1]]
            weights = np.linalg.lstsq(columns, magnitudes, rcond=None)[0]
            if (weights >= -1e-12).all():
                best = min(best, ((magnitudes - columns @ weights) ** 2).sum())
    return best


TINY = st.floats(-4, 4, width=16) | st.sampled_from([0.0, 1.0, -1.0, 3.0])


@given(hnp.arrays(np.float64, st.integers(1, 4), elements=TINY))
@settings(max_examples=25, deadline=None)
def test_no_choice_of_signs_does_better_with_three_bits(x):
    least = least_over_signs(x, 3)
    assert float(error(torch.from_numpy(x), "ls-3")) * (x**2).sum() == pytest.approx(least, abs=1e-10)


@given(hnp.arrays(np.float64, st.integers(1, 3), elements=TINY))
@settings(max_examples=15, deadline=None)
def test_no_choice_of_signs_does_better_with_four_bits(x):
    least = least_over_signs(x, 4)
    assert float(error(torch.from_numpy(x), "ls-4")) * (x**2).sum() == pytest.approx(least, abs=1e-10)


@given(hnp.arrays(np.float64, st.integers(1, 5), elements=TINY))
@settings(max_examples=15, deadline=None)
def test_no_foldable_scales_do_better_with_three_bits(x):
    reached = float(error(torch.from_numpy(x), "lsf-3")) * (x**2).sum()
    assert reached <= least_in_cone(x, 3) + 1e-10


def least_over_cuts(x):
    """Least squared error of 3 bits over all cuts of sorted |x| into four cells, under both orders."""
    magnitudes = np.sort(np.abs(x))
    n = len(x)
    cuts = np.array(list(itertools.combinations_with_replacement(range(n + 1), 3)))
    cells = (np.arange(n) >= cuts[..., None]).sum(1)  # [cuts, n]
    best = np.inf
    for low in [(1, -1, -1), (-1, 1, 1)]:
        signs = np.array([low, (1, -1, 1), (1, 1, -1), (1, 1, 1)], float)[cells]
        left = magnitudes[:, None] - signs @ (np.linalg.pinv(signs) @ magnitudes[:, None])
        best = min(best, (left**2).sum((1, 2)).min())
    return best


@pytest.mark.parametrize("name", ["normal", "student t, 2", "relu, 90 % zeros", "ties", "one outlier"])
def test_short_rows_of_three_bits_are_exact(name):
    for n in [2, 5, 9, 14]:
        x = family(name, n, rows=3)
        for row, reached in zip(x, error(x, "ls-3"), strict=True):
            energy = float(row.square().sum())
            assert float(reached) * energy == pytest.approx(least_over_cuts(row.numpy()), abs=1e-11 * energy)


def test_longer_rows_can_be_searched_as_well_as_enumerated(monkeypatch):
    x = family("normal", 32, rows=40)
    exact = error(x, "ls-3")
    monkeypatch.setattr(multibit, "_EXACT_UP_TO", {3: 0, 4: 0})
    searched = error(x, "ls-3")
    assert (searched >= exact * (1 - 1e-9)).all()
    assert (searched <= exact * (1 + 1e-9)).double().mean() > 0.6
    assert (searched.mean() / exact.mean() - 1) < 0.03


# ---------------------------------------------------------------------------------------------------------
# Never worse


def check_order(x, slack=1e-12):
    for k in [3, 4]:
        errors = {kind: error(x, f"{kind}-{k}") for kind in ["ls", "lsf", "gf", "alt", "rg"]}
        # What rounds to nothing is left out: the error of a row that is reproduced.
        for better, worse in [("ls", "lsf"), ("ls", "gf"), ("ls", "alt"), ("ls", "rg"), ("lsf", "gf")]:
            assert (errors[better] <= errors[worse] * (1 + slack) + 1e-27).all(), (better, worse, k)
        assert (errors["ls"] <= error(x, f"gf-{k - 1}") + 1e-27).all()
    for baseline in ["alt-2", "rg-2"]:
        assert (error(x, "ls-2") <= error(x, baseline) + 1e-12).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_never_worse_than_greedy_alternating_or_refined_greedy_on_any_row(name):
    for n in [1, 2, 7, 33, 300]:
        check_order(family(name, n, rows=4))


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
        elements=st.floats(-1000, 1000, width=16) | st.integers(-9, 9).map(float),
    )
)
@settings(max_examples=12, deadline=None)
def test_never_worse_on_any_values(x):
    check_order(torch.from_numpy(x))


def test_rounding_to_half_precision_does_not_turn_the_order():
    x = family("normal", 300)
    for dtype in [torch.float32, torch.float16]:
        check_order(x.to(dtype), slack=0.01)


# ---------------------------------------------------------------------------------------------------------
# The best known values

# On quantiles, found by long searches: 800 random starts, of which these are the best.
BEST_KNOWN = {
    ("normal", "ls-3"): 0.0351459,
    ("normal", "ls-4"): 0.0097974,
    ("laplace", "ls-3"): 0.0555409,
    ("laplace", "ls-4"): 0.0170784,
    ("relu", "ls-3"): 0.0445367,
    ("relu", "ls-4"): 0.0117316,
}


@pytest.mark.parametrize(("name", "scheme"), BEST_KNOWN)
def test_the_best_known_values_are_reached(name, scheme):
    x = quantiles(name)
    assert float(error(x, scheme)) <= BEST_KNOWN[name, scheme] * 1.001


def test_the_normal_distribution():
    x = quantiles("normal", 100_000)
    three, four = fb.quantize(x, "ls-3"), fb.quantize(x, "ls-4")
    assert float(three.error(x)) == pytest.approx(0.035251, rel=1e-3)
    assert float(four.error(x)) == pytest.approx(0.009877, rel=1e-3)
    assert three.scales.tolist() == pytest.approx([0.9879, 0.7479, 0.4509], rel=5e-3)
    # What peeled signs cost.
    assert float(error(x, "lsf-3")) == pytest.approx(1.048 * 0.035251, rel=2e-3)
    assert float(error(x, "lsf-4")) == pytest.approx(1.15 * 0.009877, rel=1e-2)


# ---------------------------------------------------------------------------------------------------------
# Scales, and what they are


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", FAMILIES)
def test_scales_are_non_negative_and_descend(name, scheme):
    x = family(name, 50)
    scales = fb.solve(x, scheme)
    assert scales.shape == (6, schemes.parse(scheme).planes) and scales.dtype == x.dtype
    assert (scales >= 0).all()
    if not scheme.startswith("lsf"):  # which may take greedy's, and those can grow
        assert (scales.diff(dim=1) <= 0).all()


def test_foldable_scales_are_each_at_least_the_sum_of_the_later_ones_or_greedys():
    greedy_won = 0
    for name, n in itertools.product(["normal", "ties", "few values"], [9, 16]):
        x = family(name, n, rows=30)
        for k in [3, 4] if n == 16 else [3]:
            scales = fb.solve(x, f"lsf-{k}")
            later = scales.flip(1).cumsum(1).flip(1) - scales
            in_cone = (scales >= later * (1 - 1e-9)).all(1)
            torch.testing.assert_close(scales[~in_cone], fb.solve(x[~in_cone], f"gf-{k}"))
            greedy_won += int((~in_cone).sum())
            values = fb.unfold(fb.encode(x, scales), scales)
            torch.testing.assert_close(
                values[in_cone].abs(), fb.quantize(x, f"lsf-{k}").values()[in_cone].abs()
            )
    assert greedy_won > 0  # so that this test can tell


@pytest.mark.parametrize("planes", [3, 4])
def test_every_order_type_is_known(planes):
    """Random scales of any shape have the order, and the signs, of one that the search starts from."""
    table = sorted_rows.codes(planes, torch.empty(0, dtype=torch.float64))

    def kinds(scales):
        levels = scales @ table.T
        return {
            (*o, *s) for o, s in zip(levels.abs().argsort(1).tolist(), levels.sign().tolist(), strict=True)
        }

    known = kinds(torch.tensor(multibit.ORDER_TYPES[planes], dtype=torch.float64))
    random = torch.rand(20_000, planes, dtype=torch.float64).sort(1, descending=True).values
    assert kinds(random) == known and len(known) == {3: 2, 4: 14}[planes]


def greedy_by_hand(x, planes, refit):
    """Guo et al.: peel a plane; with refit, fit all scales again."""
    residual, signs, scales = x.copy(), [], np.empty(0)
    for _ in range(planes):
        signs.append(np.where(residual < 0, -1.0, 1.0))
        scales = np.append(scales, np.abs(residual).mean())
        if refit:
            scales = np.linalg.lstsq(np.stack(signs, 1), x, rcond=None)[0]
        residual = x - np.stack(signs, 1) @ scales
    return np.stack(signs, 1), scales


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_refined_greedy_is_the_papers(planes):
    for x in family("normal", 40):
        _, scales = greedy_by_hand(x.numpy(), planes, refit=True)
        expected = np.sort(np.abs(scales))[::-1].copy()
        torch.testing.assert_close(fb.solve(x, f"rg-{planes}"), torch.from_numpy(expected))


@pytest.mark.parametrize("planes", [2, 3, 4])
def test_alternating_is_the_papers_until_nothing_moves(planes):
    for x in family("student t, 2", 40):
        signs, _ = greedy_by_hand(x.numpy(), planes, refit=False)
        levels = np.array(list(itertools.product([-1.0, 1.0], repeat=planes)))
        for _ in range(200):
            scales = np.linalg.lstsq(signs, x.numpy(), rcond=None)[0]
            signs = levels[np.abs(x.numpy()[:, None] - levels @ scales).argmin(1)]
        expected = np.sort(np.abs(scales))[::-1].copy()
        torch.testing.assert_close(fb.solve(x, f"alt-{planes}"), torch.from_numpy(expected))


# ---------------------------------------------------------------------------------------------------------
# Any input


@pytest.mark.parametrize("scheme", SCHEMES)
def test_order_signs_units_and_neighbours_do_not_matter(scheme):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.integers(-1000, 1000, (4, 300)) / 64)  # sums of these are exact in any order
    expected = fb.solve(x, scheme)
    assert torch.equal(fb.solve(-x, scheme), expected)
    assert torch.equal(fb.solve(torch.from_numpy(rng.permuted(x.numpy(), axis=1)), scheme), expected)
    for unit in [2.0**-1000, 2.0**-100, 2.0**100, 2.0**1000]:
        assert torch.equal(fb.solve(x * unit, scheme), expected * unit)
    for factor in [1e-30, 1e30]:
        torch.testing.assert_close(fb.solve(x * factor, scheme), expected * factor, rtol=1e-3, atol=0)
        torch.testing.assert_close(error(x * factor, scheme), error(x, scheme), rtol=1e-4, atol=0)
    torch.testing.assert_close(fb.solve(x[2], scheme), expected[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_of_rows_do_not_matter(scheme, monkeypatch):
    x = family("normal", 60, rows=7)
    expected = fb.solve(x, scheme)
    monkeypatch.setattr(multibit, "_CHUNK", 200)
    torch.testing.assert_close(fb.solve(x, scheme), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_dtype_and_bad_rows_stay_alone(scheme, dtype):
    x = family("normal", 50).to(dtype)
    expected = fb.solve(x, scheme)
    assert expected.dtype == dtype and expected.isfinite().all()
    for row, value in [(0, torch.nan), (2, torch.inf), (5, -torch.inf)]:
        x[row, 7] = value
        expected[row] = torch.nan
    got = fb.solve(x, scheme)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=0)
    assert fb.quantize(x, scheme).values()[[0, 2, 5]].isnan().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_trivial_rows(scheme):
    k = schemes.parse(scheme).planes
    assert fb.solve(torch.zeros(2, 5), scheme).tolist() == [[0] * k] * 2
    for x in [torch.tensor([-5.0]), torch.full((9,), 0.1), torch.tensor(-3.0), torch.full((40,), -2e30)]:
        torch.testing.assert_close(fb.quantize(x, scheme).values(), x)
    assert fb.solve(torch.empty(0, 5), scheme).shape == (0, k)
    assert fb.solve(torch.empty(3, 0, 5).half(), scheme).shape == (3, 0, k)
    with pytest.raises(ValueError, match="nothing to solve for"):
        fb.solve(torch.empty(3, 0), scheme)
    assert fb.solve(torch.empty(2, 9, device="meta"), scheme).shape == (2, k)


@pytest.mark.parametrize("scheme", ["ls-3", "lsf-4", "alt-2", "rg-3"])
def test_any_dims_and_memory_formats(scheme):
    x = torch.from_numpy(np.random.default_rng(2).integers(-500, 500, (3, 4, 5, 6)) / 64)
    expected = torch.stack([fb.solve(sample.flatten(), scheme) for sample in x])
    for y in [x, x.to(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)]:
        torch.testing.assert_close(fb.solve(y, scheme, (1, 2, 3)), expected, rtol=1e-12, atol=0)
        assert fb.solve(y, scheme, None).shape == expected.shape[1:]
        assert fb.quantize(y, scheme, (0, 2)).values().shape == y.shape


def test_exactly_representable_rows_of_few_values_are_reproduced():
    for values in [[1.0, 2.0, 3.0], [0.0, 1.0], [0.5, 4.0, 9.0]]:
        x = torch.tensor(values * 12).double()
        for scheme in ["ls-3", "ls-4", "lsf-3", "lsf-4"]:
            torch.testing.assert_close(fb.quantize(x, scheme).values(), x)


def test_what_is_not_promised_is_refused():
    with pytest.raises(ValueError, match="ls-3 has no certificate"):
        fb.solve(torch.ones(9), "ls-3", certificate=True)
    with pytest.raises(ValueError, match="'sort' searches for ls-2 and ls-T; lsf-4 has"):
        fb.solve(torch.ones(9), "lsf-4", method="sort")


def test_a_clip_comes_first():
    x = family("cauchy", 60)
    torch.testing.assert_close(fb.solve(x, "ls-3", clamp=1.5), fb.solve(x.clamp(-1.5, 1.5), "ls-3"))
    x[0, 0] = torch.inf
    assert fb.solve(x, "lsf-3", clamp=1.5).isfinite().all()
