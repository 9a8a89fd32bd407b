"""Fused operators: the numbers and gradients of the plain torch code, eager and compiled."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foldbit as fb
from foldbit.core import axes, folding, fused
from foldbit.kernels import native
from foldbit.nn import estimators
from foldbit.nn.layers import QuantConv2d

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = (torch.float16, torch.bfloat16)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def plain(x, scales, dim, estimator, clamp):
    """The readable code, which needs its own clamp."""
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    spread = axes.spread(scales, x.shape, tuple(dim))
    return estimators.straight_through(x, spread, estimators.get(estimator), clamp)


def forward_and_gradient(function, x, scales, dim, estimator, clamp, grad):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x, scales, dim, estimator, clamp)
    y.backward(grad)
    return y.detach(), x.grad


def same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~got.isnan()
    assert torch.equal(got.signbit() & numbers, expected.signbit() & numbers)  # −0 is not 0


MEMORY = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "every other sample": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "flipped": lambda x: x.flip(2),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_and_gradients_are_those_of_the_plain_code(dtype, memory):
    x = MEMORY[memory]((2 * torch.randn(4, 6, 5, 3, generator=generator())).to(dtype))
    grad = torch.randn(x.shape, generator=generator(1)).to(dtype)
    grads = [grad.contiguous(memory_format=torch.channels_last), grad[:, :1, :1].expand_as(x)]
    for scheme, dim, clamp in itertools.product(
        ["ls-1", "ls-2", "gf-3"], [(1, 2, 3), (0, 1, 2, 3), (0, 2)], [None, 0.7]
    ):
        scales = fb.solve(x, scheme, dim, clamp=clamp)
        for estimator in fused.ESTIMATORS:
            for grad in grads:
                arguments = (x, scales, dim, estimator, clamp, grad)
                got, got_gradient = forward_and_gradient(fused.approximate, *arguments)
                expected, gradient = forward_and_gradient(plain, *arguments)
                same(got, expected)
                if dtype in HALVES:  # through float32, rounded once
                    limit = None if clamp is None else float(torch.tensor(clamp, dtype=dtype))
                    wide = (x.float(), scales.float(), dim, estimator, limit, grad.float())
                    gradient = forward_and_gradient(plain, *wide)[1].to(dtype)
                same(got_gradient, gradient)


def test_dense_memory_is_read_and_written_in_its_order():
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    scales = fb.solve(x, "ls-2", (1, 2, 3))
    y = fused.approximate(x, scales, (1, 2, 3), "polynomial")
    assert y.stride() == x.stride()
    y.sum().backward()
    assert x.grad.stride() == x.stride()


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-30, -1e30, 0.5, -0.5]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_nasty_values(data):
    seed = data.draw(st.integers(0, 2**31))
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    x = torch.randn(3, data.draw(st.sampled_from([1, 2, 9, 40])), dtype=dtype, generator=generator(seed))
    some = torch.rand(x.shape, generator=generator(seed)) < 0.3
    x[some] = data.draw(st.sampled_from(SPECIAL))
    scheme, estimator = (
        data.draw(st.sampled_from(["ls-1", "ls-2", "ls-T", "gf-3"])),
        data.draw(st.sampled_from(fused.ESTIMATORS)),
    )
    clamp = data.draw(st.sampled_from([None, 0.5, 2.0]))
    scales = fb.solve(x, scheme, clamp=clamp)
    if data.draw(st.booleans()):  # static ones know nothing of this x
        scales = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3)))
        scales = scales.to(dtype).expand(3, -1)
    grad = torch.randn(x.shape, dtype=dtype, generator=generator(seed + 1))
    arguments = (x, scales, (1,), estimator, clamp, grad)
    got, expected = (forward_and_gradient(f, *arguments) for f in (fused.approximate, plain))
    same(got[0], expected[0])
    same(got[1], expected[1])


@pytest.mark.parametrize("dim", [(0,), (0, 1), (1,)])
def test_empty_tensors(dim):
    x = torch.empty(0, 3, requires_grad=True)
    scales = torch.empty(*axes.kept_shape(x.shape, dim), 2)
    y = fused.approximate(x, scales, dim, "scaled", 1.0)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_scalars_and_scales_that_want_a_gradient():
    x = torch.tensor(-2.5, requires_grad=True)
    scales = torch.tensor([2.0, 1.0], requires_grad=True)
    y = fused.approximate(x, scales, (), "polynomial")
    y.backward()
    assert y == -3 and scales.grad is None and x.grad == pytest.approx(1 - 2.5 / 4 + 1 - 0.5 / 2)


def test_solved_scales_are_constants():
    rows = torch.randn(2, 9, requires_grad=True)
    scales, excess = fused.solve_rows(rows, "ls-2")
    assert not scales.requires_grad and not excess.requires_grad
    assert torch.equal(scales.float(), fb.solve(rows, "ls-2"))
    assert fused.solve_rows(rows, "gf-2")[1].isinf().all()


@pytest.mark.parametrize("scheme", fused.SCHEMES[:5])
def test_vmap_solves_all_rows_at_once(scheme):
    x = torch.randn(3, 5, 7, 11)
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)  # which would solve them one by one, with a warning
    try:
        got = torch.vmap(torch.vmap(lambda x: fb.solve(x, scheme, 0, clamp=1.0), 1), 2)(x)
        nothing = torch.vmap(lambda x: fb.solve(x, scheme))(torch.empty(0, 4, 9))
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(before)
    assert torch.equal(got, fb.solve(x.permute(2, 1, 0, 3), scheme, 2, clamp=1.0))
    assert nothing.shape == (0, 4, got.shape[-1])


# ---------------------------------------------------------------------------------------------------------
# Gradients of gradients


def test_the_gradient_has_no_gradient_and_says_so():
    x = torch.randn(20, requires_grad=True)
    y = fused.approximate(x, fb.solve(x, "ls-2"), (0,), "polynomial")
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"differentiable once\. For gradients of gradients use .*plain torch"
    ):
        torch.autograd.grad(first.sum(), x)


def test_an_identity_window_is_no_obstacle():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    y = fused.approximate(x, fb.solve(x, "ls-1"), (0,), "identity")
    (first,) = torch.autograd.grad((x * y).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2))


# ---------------------------------------------------------------------------------------------------------
# What torch asks of an operator


@pytest.mark.parametrize(
    ("memory", "dtype"),
    [("contiguous", torch.float32), ("channels last", torch.bfloat16), ("sliced", torch.float64)],
)
def test_operators_are_well_formed(memory, dtype):
    x = MEMORY[memory](torch.randn(2, 4, 3, 5, generator=generator())).to(dtype)
    scales = fb.solve(x, "ls-2", (1, 2, 3))
    ops = torch.ops.foldbit
    leaf = x.detach().requires_grad_()
    torch.library.opcheck(ops.approximate.default, (leaf, scales, [1, 2, 3], "polynomial", 1.0))
    torch.library.opcheck(ops.approximate.default, (leaf, scales, [1, 2, 3], "scaled"))
    torch.library.opcheck(ops.window.default, (x, x, scales, [1, 2, 3], "polynomial", 1.0))
    for scheme in ["ls-1", "ls-2", "gf-3"]:
        torch.library.opcheck(ops.solve_rows.default, (x.reshape(2, 60), scheme, 1.0))


CONFIGS = [
    fb.QuantConfig("ls-1", "ls-2", clamp=2.0),
    fb.QuantConfig("ls-2", "ls-T", activation_scales="static", clamp=1.5, weight_estimator="polynomial"),
    fb.QuantConfig("gf-2", "ls-1", activation_granularity="tensor", activation_estimator="clipped"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compiled_layers_are_eager_ones(config):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = QuantConv2d(4, 6, 3, padding=1, config=config)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for memory in [torch.contiguous_format, torch.channels_last]:
        x = torch.randn(3, 4, 8, 8).contiguous(memory_format=memory)
        results = []
        for f in [layer, compiled]:
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            layer.zero_grad()
            y = f(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, layer.weight.grad.clone()))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


def test_compiled_with_inductor():
    torch.compiler.reset()
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=torch.channels_last)

    def loss(x):
        scales = fb.solve(2 * x, "ls-2", (1, 2, 3), clamp=1.0)
        return fused.approximate(2 * x, scales, (1, 2, 3), "polynomial", 1.0).square().sum()

    gradients = []
    for f in [loss, torch.compile(loss, fullgraph=True)]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        try:
            f(leaf).backward()
        except torch._inductor.exc.InductorError as error:
            pytest.skip(f"inductor cannot compile here: {error}")
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------------------------------------------------
# Where they run


def test_tensors_without_memory_and_builds_without_a_core_keep_to_plain_torch(monkeypatch):
    x = torch.randn(3, 8)

    class Special(torch.Tensor):
        pass

    assert fused.runs(x) and fused.runs(torch.nn.Parameter(x)) and fused.runs(x.half())
    assert not fused.runs(x.to("meta")) and not fused.runs(x.as_subclass(Special))
    scales = fb.solve(x, "ls-2")
    expected = estimators.approximate(x, scales, (1,), "scaled", 1.0)
    assert estimators.approximate(x.to("meta"), scales.to("meta"), (1,), "scaled", 1.0).shape == x.shape
    monkeypatch.setattr(native, "_native", None)
    assert not fused.runs(x)
    assert torch.equal(estimators.approximate(x, scales, (1,), "scaled", 1.0), expected)
    assert torch.equal(folding.approximate(x.clamp(-1, 1), scales.T[..., None]), expected)


def test_the_slow_backend_gives_the_same():
    x = torch.randn(3, 8, requires_grad=True)
    scales = fb.solve(x, "gf-3")
    results = []
    for backend in ["reference", native.current()]:
        with native.use(backend):
            y = fused.approximate(x, scales, (1,), "polynomial", 1.0)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: fused.approximate(x, torch.ones(4, 2), (1,), "scaled"),
            ValueError,
            r"expected \(3, 'k'\)",
        ),
        (
            lambda x: fused.approximate(x, torch.ones(3), (1,), "scaled"),
            ValueError,
            r"scales of shape \(3,\) do",
        ),
        (lambda x: fused.approximate(x, torch.ones(3, 9), (1,), "scaled"), ValueError, "1 to 8"),
        (
            lambda x: fused.approximate(x, torch.ones(3, 2), (1,), "ste"),
            ValueError,
            "unknown .*'ste'; known are",
        ),
        (
            lambda x: fused.approximate(x, torch.ones(3, 2), (1,), "scaled", -1.0),
            ValueError,
            "must be positive",
        ),
        (lambda x: fused.solve_rows(x, "fp"), ValueError, "scheme must be ls-1, ls-2, ls-T or gf-1 to gf-8"),
        (
            lambda x: estimators.approximate(x, torch.ones(3, 2), (1,), "ste"),
            ValueError,
            "unknown gradient est",
        ),
    ],
)
def test_mistakes_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 8))
