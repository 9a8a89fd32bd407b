"""Scales that vary over a matrix, against NumPy's singular values and, for tiny ones, all signs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import foldbit as fb
from foldbit.core import axes, folding, low_rank

SIDES = ["tensor", "row", "column"]
RANKED = ["ls-1", "ls-2", "gf-1", "gf-2", "gf-3"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def block_diagonal(block, copies):
    return np.kron(np.eye(copies), block)


MATRICES = {
    "wide": lambda rng: rng.standard_normal((5, 12)),
    "tall": lambda rng: rng.standard_normal((12, 5)),
    "square": lambda rng: rng.laplace(size=(7, 7)),
    "heavy": lambda rng: rng.standard_t(2, (6, 9)),
    "rows and columns of their own": lambda rng: (
        np.exp(rng.normal(size=(8, 1))) * rng.normal(size=(8, 6)) * np.exp(rng.normal(size=6))
    ),
    "rank 2": lambda rng: rng.random((9, 2)) @ rng.random((2, 6)) * rng.choice([-1, 1], (9, 6)),
    "equal blocks": lambda rng: block_diagonal(np.array([[1.0, -2.0], [2.0, 1.0]]), 3),
    "constant": lambda rng: np.full((4, 6), -0.7),
    "zeros of both signs": lambda rng: rng.choice([-0.0, 0.0], (4, 6)),
    "one-hot": lambda rng: np.eye(6)[:, ::-1][2:3] * np.eye(4)[1:2].T,
    "half zeros": lambda rng: np.maximum(rng.standard_normal((6, 8)), 0),
    "a zero row and column": lambda rng: np.pad(rng.standard_normal((5, 5)), ((1, 0), (0, 1))),
    "integers": lambda rng: rng.integers(-2, 3, (6, 7)) * 1.0,
    "one row": lambda rng: rng.standard_normal((1, 9)),
    "one value": lambda rng: np.array([[-3.0]]),
}


def matrix(name, dtype=torch.float64):
    return torch.from_numpy(np.ascontiguousarray(MATRICES[name](np.random.default_rng(7)))).to(dtype)


def ranks(x):
    return range(1, min(x.shape[-2:]) + 1)


def truncated(x, rank):
    """The truncated singular value decomposition."""
    u, s, w = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ w[:rank]


def signs(planes):
    return torch.where(planes, -1.0, 1.0).double()


def lost(x, q):
    """Squared error in units of ‖x‖²."""
    return float(
        (x.double() - q.values().double()).square().sum() / x.double().square().sum().clamp(min=1e-300)
    )


# ---------------------------------------------------------------------------------------------------------
# One plane


@pytest.mark.parametrize("name", MATRICES)
def test_the_scales_of_one_plane_are_the_truncated_decomposition(name):
    x = matrix(name)
    energy = max(float(x.square().sum()), 1e-300)
    singular = np.linalg.svd(x.abs().numpy(), compute_uv=False)
    for rank in ranks(x):
        q = fb.low_rank(x, "ls-1", rank)
        scales = q.scales()[0]
        assert q.left.shape == (1, len(x), rank) and q.right.shape == (1, rank, x.shape[1])
        reached = float((x.abs() - scales).square().sum())
        assert reached == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-13 * energy)
        # Where the scale is negative, the planes turn over, which only helps.
        assert torch.equal(q.planes[0], (x < 0) ^ (scales < 0))
        assert lost(x, q) * energy <= reached + 1e-13 * energy
        assert float(q.error(x)) == pytest.approx(lost(x, q), abs=1e-15)


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(1, 7), st.integers(1, 7)),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-20, 1e-6]),
    ),
    st.integers(1, 7),
)
@settings(max_examples=80, deadline=None)
def test_any_values_reach_what_the_singular_values_allow(x, rank):
    rank = min(rank, *x.shape)
    x, magnitudes = torch.from_numpy(x), np.abs(x.astype(np.float64))
    tail = (np.linalg.svd(magnitudes, compute_uv=False)[rank:] ** 2).sum()
    energy = (magnitudes**2).sum()
    q = fb.low_rank(x, "ls-1", rank)
    scales = q.scales()[0].numpy()
    slack = 1e-13 if x.dtype == torch.float64 else 1e-12  # of factors that are rounded to float32
    assert ((magnitudes - scales) ** 2).sum() <= tail * (1 + 1e-6) + slack * energy
    assert rank > 1 or scales.min() >= 0


@pytest.mark.parametrize("name", MATRICES)
def test_factors_of_rank_1_are_non_negative(name):
    """Even where the largest singular value is a multiple one, of equal blocks."""
    x = matrix(name)
    q = fb.low_rank(x, "ls-1", 1)
    assert (q.left >= 0).all() and (q.right >= 0).all()
    largest = np.linalg.svd(x.abs().numpy(), compute_uv=False)[0]
    energy = float(x.square().sum())
    assert float(q.values().square().sum()) == pytest.approx(largest**2, abs=1e-13 * energy)


@pytest.mark.parametrize("angle", [0.3, 1.0, 2.0, 2.5])
def test_factors_of_rank_1_are_non_negative_whatever_leading_vectors_are_mixed(angle, monkeypatch):
    """The leading singular value of equal blocks is a multiple one, and LAPACK may mix its vectors."""
    x = torch.from_numpy(block_diagonal(np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]]), 2))
    eigh = torch.linalg.eigh

    def mixed(gram):
        values, vectors = eigh(gram)
        cos, sin = np.cos(angle), np.sin(angle)
        turned = vectors[..., -2:] @ torch.tensor([[cos, -sin], [sin, cos]], dtype=gram.dtype)
        vectors = torch.cat([vectors[..., :-2], turned], -1)
        torch.testing.assert_close(vectors @ values.diag() @ vectors.T, gram)
        return torch.return_types.linalg_eigh((values, vectors))

    monkeypatch.setattr(torch.linalg, "eigh", mixed)
    q = fb.low_rank(x, "ls-1", 1)
    assert (q.left >= 0).all() and (q.right >= 0).all()
    singular = np.linalg.svd(x.numpy(), compute_uv=False) ** 2
    assert singular[0] == pytest.approx(singular[1])
    assert lost(x, q) == pytest.approx(1 - singular[0] / singular.sum(), abs=1e-13)


SMALL = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    elements=st.floats(-4, 4, width=16) | st.sampled_from([0.0, 1.0, -1.0]),
)


@given(SMALL)
@settings(max_examples=60, deadline=None)
def test_no_choice_of_signs_does_better_at_rank_1(x):
    choices = np.array(list(itertools.product([-1.0, 1.0], repeat=x.size))).reshape(-1, *x.shape)
    saved = np.linalg.svd(choices * x, compute_uv=False)[:, 0].max() ** 2
    energy = (x**2).sum()
    error = float((torch.from_numpy(x) - fb.low_rank(torch.from_numpy(x), "ls-1", 1).values()).square().sum())
    assert error == pytest.approx(energy - saved, abs=1e-12 * (1 + energy))


def test_other_signs_can_do_better_at_rank_2():
    """Which is why the claim is made for rank 1 alone: here |x| has rank 3, and signs make a rank 2 of it."""
    low = torch.tensor([[1.0, 2.0, 3.0], [2.0, -1.0, 1.0], [3.0, 1.0, 4.0]], dtype=torch.float64)
    assert np.linalg.matrix_rank(low.numpy()) == 2 and np.linalg.matrix_rank(low.abs().numpy()) == 3
    x = low.abs()
    assert float(fb.low_rank(x, "ls-1", 2).error(x)) > 1e-3
    assert np.abs(truncated(low.numpy(), 2) - low.numpy()).max() < 1e-14  # V = low, S = sign(low): exact


@pytest.mark.parametrize("name", MATRICES)
def test_finer_scales_lose_no_more(name):
    x = matrix(name)
    tensor, row, column = (lost(x, fb.low_rank(x, "ls-1", side)) for side in SIDES)
    by_rank = [lost(x, fb.low_rank(x, "ls-1", rank)) for rank in ranks(x)]
    slack = 1e-13
    assert max(row, column) <= tensor + slack and by_rank[0] <= min(row, column) + slack
    assert by_rank[-1] <= slack  # full rank is the matrix itself


@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "ls-T", "gf-3", "ls-3", "lsf-3", "alt-2"])
def test_sides_share_what_their_solver_finds(scheme):
    x = matrix("rows and columns of their own", torch.float32)
    for side, dims in [("tensor", None), ("row", 1), ("column", 0)]:
        q, expected = fb.low_rank(x, scheme, side), fb.quantize(x, scheme, dims)
        assert torch.equal(q.planes, expected.planes) and q.rank == 1
        torch.testing.assert_close(q.values(), expected.values())  # of three planes, summed in float64 here
        spread = axes.spread(expected.scales, x.shape, expected.dim)
        assert torch.equal(q.scales(), spread.double())


# ---------------------------------------------------------------------------------------------------------
# Several planes


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("rank", [1, 2])
def test_greedy_planes_fit_what_the_earlier_ones_left(name, rank):
    x = matrix(name)
    if rank > min(x.shape):
        return
    q = fb.low_rank(x, "gf-3", rank)
    residual, energy = x.numpy().copy(), float(x.square().sum())
    for scales, planes in zip(q.scales(), q.planes, strict=True):
        singular = np.linalg.svd(np.abs(residual), compute_uv=False)
        reached = float(np.square(np.abs(residual) - scales.numpy()).sum())
        assert reached == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-12 * max(energy, 1e-300))
        term = scales.numpy() * signs(planes).numpy()
        # A residual that is rounding has a sign by chance; elsewhere it is that of residual times scale.
        clear = np.abs(residual) > 1e-12
        assert np.array_equal((term < 0)[clear & (term != 0)], (residual < 0)[clear & (term != 0)])
        residual = residual - term
    assert float(np.square(residual).sum()) == pytest.approx(lost(x, q) * energy, abs=1e-13 * energy)


def step_by_hand(x, scales, planes, rank):
    """One round of the alternation in NumPy, from given planes. Returns the error after each of its lines."""
    scales, planes = list(scales), list(planes)
    errors = []
    levels = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))
    values = np.einsum("ck,kmn->cmn", levels, np.array(scales))
    nearest = np.abs(x - values).argmin(0)
    planes = [levels[nearest, i] for i in range(2)]
    errors.append(np.square(x - sum(v * s for v, s in zip(scales, planes, strict=True))).sum())
    for i in range(2):
        scales[i] = truncated(planes[i] * (x - scales[1 - i] * planes[1 - i]), rank)
        errors.append(np.square(x - sum(v * s for v, s in zip(scales, planes, strict=True))).sum())
    return scales, planes, errors


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["wide", "tall", "square", "heavy", "rows and columns of their own"])
def test_each_line_of_the_alternation_lowers_the_error(name, rank):
    x = matrix(name)
    start = fb.low_rank(x, "ls-2", rank, steps=0)
    scales, planes = start.scales().numpy(), signs(start.planes).numpy()
    previous = lost(x, start) * float(x.square().sum())
    for steps in range(1, 6):
        scales, planes, errors = step_by_hand(x.numpy(), scales, planes, rank)
        for error in errors:
            assert error <= previous + 1e-12
            previous = error
        # The next line, the nearest levels again, is where the package stops.
        values = np.einsum("ck,kmn->cmn", [[1, 1], [1, -1], [-1, 1], [-1, -1]], np.array(scales))
        expected = np.square(np.abs(x.numpy() - values).min(0)).sum()
        q = fb.low_rank(x, "ls-2", rank, steps=steps)
        assert lost(x, q) * float(x.square().sum()) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(
    hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-8, 8, width=16) | st.integers(-3, 3).map(float),
    ),
    st.integers(1, 3),
    st.sampled_from(["ls-1", "ls-2"]),
)
@settings(max_examples=50, deadline=None)
def test_more_steps_never_raise_the_error(x, rank, scheme):
    x = torch.from_numpy(x)
    rank = min(rank, *x.shape)
    errors = [lost(x, fb.low_rank(x, scheme, rank, steps=steps)) for steps in range(5)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    if scheme == "ls-2":
        others = [fb.low_rank(x, "gf-2", rank), *(fb.low_rank(x, "ls-2", side) for side in SIDES)]
        assert errors[0] <= min(lost(x, q) for q in others) + 1e-12
        assert errors[0] <= lost(x, fb.low_rank(x, "ls-1", rank)) + 1e-12


def test_steps_of_one_plane_change_nothing_at_rank_1_and_mend_above():
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((40, 30)))
    first, same = fb.low_rank(x, "ls-1", 1), fb.low_rank(x, "ls-1", 1, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert lost(x, fb.low_rank(x, "ls-1", 8, steps=5)) < lost(x, fb.low_rank(x, "ls-1", 8)) - 1e-6


@pytest.mark.parametrize("scheme", ["ls-1", "ls-2"])
@pytest.mark.parametrize("name", MATRICES)
def test_planes_choose_the_nearest_level(name, scheme):
    x = matrix(name)
    for rank in ranks(x):
        q = fb.low_rank(x, scheme, rank)
        choices = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(q.planes))), dtype=x.dtype)
        levels = torch.einsum("ck,kmn->cmn", choices, q.scales())
        nearest = (x - levels).abs().amin(0)
        torch.testing.assert_close((x - q.values()).abs(), nearest, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", RANKED)
def test_folding_by_the_scales_of_every_element_gives_the_same_values(scheme, dtype):
    x = matrix("rows and columns of their own", dtype)
    for rank in [1, 3]:
        scales = low_rank.foldable_scales(x, scheme, rank)
        assert scales.dtype == dtype and (scales >= 0).all()
        assert scales.shape == (int(scheme[-1]), *x.shape)
        folded = folding.approximate(x, scales)
        expected = fb.low_rank(x, scheme, rank).values()
        tolerance = 8 * torch.finfo(dtype).eps * float(x.abs().max())
        # A value at a threshold may fall to either side of it: both levels are then as near.
        error, least = ((x - y).double().abs() for y in (folded, expected))
        torch.testing.assert_close(error, least, rtol=0, atol=2 * tolerance)


# ---------------------------------------------------------------------------------------------------------
# More scales against more bits


def test_more_scales_against_more_bits_on_a_normal_matrix():
    """The paper's argument: scales of rank 8 buy less than a second bit with one pair of scales."""
    x = torch.randn(3136, 64, generator=torch.Generator().manual_seed(0))
    for scheme, scaling, error in [
        ("ls-1", "tensor", 0.363),
        ("ls-1", "column", 0.363),
        ("ls-1", "row", 0.358),
        ("ls-1", 1, 0.3575),
        ("ls-1", 4, 0.336),
        ("ls-1", 8, 0.308),
        ("ls-2", "tensor", 0.117),
    ]:
        q = fb.low_rank(x, scheme, scaling)
        assert float(q.error(x)) == pytest.approx(error, abs=1.1e-3), scaling
    assert fb.low_rank(x, "ls-2", "tensor").bits_per_value() == pytest.approx(2, abs=1e-3)
    assert fb.low_rank(x, "ls-1", 8).bits_per_value() > 5  # and costs less than half the bits
    # σ1² is about 2/π of ‖x‖², and nothing else stands out.
    singular = np.linalg.svd(x.abs().numpy(), compute_uv=False) ** 2 / float(x.square().sum())
    assert singular[0] == pytest.approx(2 / np.pi, abs=0.01) and singular[1] < 0.01


def test_what_is_stored_and_computed():
    x = torch.randn(6, 10)
    for scaling, numbers, bitwise, products in [
        ("tensor", 2, True, 2), ("row", 12, True, 2), ("column", 20, False, 2),
        (1, 32, False, 2), (3, 96, False, 6),
    ]:  # fmt: skip
        q = fb.low_rank(x, "ls-2", scaling)
        assert (q.numbers, q.bitwise, q.sign_products) == (numbers, bitwise, products), scaling
        assert q.bits_per_value() == pytest.approx(2 + 32 * numbers / 60)
        assert q.bits_per_value(16) == pytest.approx(2 + 16 * numbers / 60)


@pytest.mark.parametrize("scaling", [*SIDES, 1, 3])
def test_a_product_takes_one_sign_product_a_term(scaling):
    x, a = matrix("square"), torch.from_numpy(np.random.default_rng(0).standard_normal(7))
    q = fb.low_rank(x, "ls-2", scaling)
    total, products = torch.zeros(7, dtype=x.dtype), 0
    for left, right, plane in zip(q.left, q.right, signs(q.planes), strict=True):
        for l_, r_ in zip(left.T, right, strict=True):
            total += l_ * (plane @ (r_ * a))
            products += 1
    assert products == q.sign_products
    torch.testing.assert_close(total, q.values() @ a)


# ---------------------------------------------------------------------------------------------------------
# Shapes, dtypes, ends of the range


@pytest.mark.parametrize("scheme", RANKED)
@pytest.mark.parametrize("scaling", [*SIDES, 1, 2])
def test_batches_are_matrices_one_by_one(scheme, scaling):
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    x[1, 0] = 0
    q = fb.low_rank(x, scheme, scaling)
    error = q.error(x)
    assert error.shape == (2, 3) and q.values().shape == x.shape and error.dtype == torch.float64
    for i, j in itertools.product(range(2), range(3)):
        alone = fb.low_rank(x[i, j].clone(), scheme, scaling)
        torch.testing.assert_close(q.values()[i, j], alone.values())
        torch.testing.assert_close(error[i, j], alone.error(x[i, j]))
    none = fb.low_rank(x[:0], scheme, scaling)
    assert none.values().shape == (0, 3, 6, 4) and none.error(x[:0]).shape == (0, 3)


@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "gf-2"])
def test_memory_formats_and_transposes(scheme):
    x = torch.randn(5, 8, dtype=torch.float64)
    wide = torch.zeros(5, 16, dtype=x.dtype)
    wide[:, ::2] = x
    for rank in [1, 3]:
        values = fb.low_rank(x, scheme, rank).values()
        torch.testing.assert_close(fb.low_rank(wide[:, ::2], scheme, rank).values(), values)
        torch.testing.assert_close(fb.low_rank(x.T.contiguous().T, scheme, rank).values(), values)
        torch.testing.assert_close(fb.low_rank(x.T, scheme, rank).values().T, values)
    row, column = fb.low_rank(x, scheme, "row"), fb.low_rank(x.T, scheme, "column")
    torch.testing.assert_close(row.values(), column.values().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", RANKED)
@pytest.mark.parametrize("scaling", [*SIDES, 1, 3])
def test_every_dtype_is_computed_in_float64(scheme, dtype, scaling):
    x = matrix("rows and columns of their own", dtype)
    q, exact = fb.low_rank(x, scheme, scaling), fb.low_rank(x.double(), scheme, scaling)
    assert q.left.dtype == q.right.dtype == q.values().dtype == dtype and q.planes.dtype == torch.bool
    assert q.scales().dtype == torch.float64
    slack = 20 * torch.finfo(dtype).eps
    assert float(q.error(x)) == pytest.approx(float(exact.error(x.double())), rel=slack, abs=slack**2 + 1e-14)


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1e-30), (torch.float32, 1e30), (torch.float64, 1e-290), (torch.float64, 1e300),
     (torch.float16, 1e4), (torch.float16, 1e-4), (torch.bfloat16, 1e35)],
)  # fmt: skip
@pytest.mark.parametrize("scheme", RANKED)
def test_the_ends_of_the_range(scheme, dtype, factor):
    x = matrix("square")
    for rank in [1, 3]:
        expected = float(fb.low_rank(x, scheme, rank).error(x))
        y = (x * factor).to(dtype)
        error = fb.low_rank(y, scheme, rank).error(y)
        eps = torch.finfo(dtype).eps
        assert float(error) == pytest.approx(expected, rel=1e-8 + 100 * eps, abs=4 * eps**2)


@pytest.mark.parametrize("scheme", RANKED)
@pytest.mark.parametrize("rank", [1, 2])
def test_nan_and_infinity_stay_in_their_matrix(scheme, rank):
    x = torch.randn(4, 3, 5)
    expected = fb.low_rank(x, scheme, rank)
    x[0, 1, 1], x[2, 0, 4], x[3, 2, 2] = torch.nan, torch.inf, -torch.inf
    q = fb.low_rank(x, scheme, rank)
    assert torch.equal(q.values()[1], expected.values()[1])
    broken = [0, 2, 3]
    assert (
        q.values()[broken].isnan().all()
        and q.left[:, broken].isnan().all()
        and q.error(x)[broken].isnan().all()
    )


def test_repeated_runs_agree_and_signs_are_settled():
    x = torch.randn(20, 30, dtype=torch.float64)
    q = fb.low_rank(x, "ls-1", 5)
    again = fb.low_rank(x.clone(), "ls-1", 5)
    assert all(torch.equal(a, b) for a, b in zip(q, again, strict=True))
    largest = q.left.gather(-2, q.left.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(q.left.norm(dim=-2), q.right.norm(dim=-1))  # of one length
    flipped = fb.low_rank(-x, "ls-1", 5)
    assert torch.equal(flipped.left, q.left) and torch.equal(flipped.planes, ~q.planes)


def test_the_input_is_left_alone_and_constants_come_back():
    x = torch.randn(4, 5, requires_grad=True)
    before = x.detach().clone()
    for scaling in [*SIDES, 2]:
        assert not fb.low_rank(x, "ls-2", scaling).values().requires_grad
    assert torch.equal(x, before)


class Everything(torch.nn.Module):
    def forward(self, x):
        results = []
        for scheme, scaling, steps in [("ls-1", 1, 0), ("gf-2", 2, None), ("ls-2", "column", None)]:
            q = fb.low_rank(x, scheme, scaling, steps=steps)
            results += [q.values(), q.error(x), q.planes]
        return [*results, low_rank.foldable_scales(x, "ls-2", 2, steps=1)]


def test_compile_and_export():
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = Everything()(x)
    torch.compiler.reset()
    compiled = torch.compile(Everything(), backend="aot_eager", fullgraph=True)(x)
    exported = torch.export.export(Everything(), (x,)).module()(x)
    for got in (compiled, exported):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------
# Mistakes

ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fb.low_rank([[1.0]]), TypeError, "expected a torch.Tensor, got list"),
        (lambda: fb.low_rank(torch.ones(2, 3, dtype=torch.int64)), TypeError, "got torch.int64"),
        (lambda: fb.low_rank(ONES[0]), ValueError, r"expected matrices .* shape \(3,\); try x\[None\]"),
        (lambda: fb.low_rank(ONES, "ls-9"), ValueError, "unknown scheme 'ls-9'"),
        (lambda: fb.low_rank(ONES, "fp", "row"), ValueError, "'fp' leaves a tensor float"),
        (lambda: fb.low_rank(ONES, "fp"), ValueError, "for ls-1, ls-2 and gf-k; got scheme 'fp'"),
        (lambda: fb.low_rank(ONES, "ls-T", 1), ValueError, "got scheme 'ls-T', which can share"),
        (lambda: fb.low_rank(ONES, "ls-3", 1), ValueError, "for ls-1, ls-2 and gf-k; got scheme 'ls-3'"),
        (lambda: fb.low_rank(ONES, "ls-1", 0), ValueError, "rank 0 does not fit .* 2×3: it is at least 1"),
        (lambda: fb.low_rank(ONES, "ls-1", 3), ValueError, "rank 3 does not fit a matrix of 2×3"),
        (lambda: fb.low_rank(torch.ones(0, 3), "ls-1", 1), ValueError, "rank 1 does not fit a matrix of 0×3"),
        (lambda: fb.low_rank(torch.ones(2, 0), "ls-1", "row"), ValueError, "nothing to solve for"),
        (lambda: fb.low_rank(ONES, "ls-1", True), TypeError, "a whole number, or a name; got True"),
        (lambda: fb.low_rank(ONES, "ls-1", 1.0), TypeError, "a whole number, or a name; got 1.0"),
        (lambda: fb.low_rank(ONES, "ls-1", "col"), ValueError, "'row', 'column'; got 'col'"),
        (lambda: fb.low_rank(ONES, "ls-1", "row", steps=1), ValueError, "of a row are solved at once"),
        (lambda: fb.low_rank(ONES, "gf-2", 1, steps=1), ValueError, "gf-2 keeps what it finds first"),
        (lambda: fb.low_rank(ONES, "ls-2", 1, steps=-1), ValueError, "at least 0; got -1"),
        (lambda: fb.low_rank(ONES, "ls-2", 1, steps=1.5), ValueError, "at least 0; got 1.5"),
        (lambda: low_rank.foldable_scales(ONES, "ls-T", 1), ValueError, "got scheme 'ls-T'"),
    ],
)  # fmt: skip
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
