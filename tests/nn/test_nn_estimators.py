"""Gradients through sign: windows, and the straight-through function that applies them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import foldbit as fb
from foldbit.core import encoding, folding, fused
from foldbit.kernels import native
from foldbit.nn import estimators
from foldbit.nn.estimators import straight_through
from foldbit.nn.layers import QuantConv2d, QuantLinear

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-3"]


@pytest.fixture(params=["core", "plain torch"])
def core(request, monkeypatch):
    if request.param == "plain torch":
        monkeypatch.setattr(native, "_native", None)


def scales(*v, dtype=torch.float64):
    """Scales ``[k, 1]`` for a row."""
    return torch.tensor(v, dtype=dtype)[:, None]


def window(name, x, v, clamp=None):
    x = torch.as_tensor(x, dtype=torch.float64)
    return estimators.get(name)(x, v, clamp).expand(x.shape).double().tolist()


# ---------------------------------------------------------------------------------------------------------
# Windows, by hand


def test_identity_lets_everything_through():
    assert window("identity", [-100.0, 0.0, 3.0], scales(1, 1)) == [1, 1, 1]


def test_clipped_is_absolute():
    assert window("clipped", [-1.5, -1.0, -0.2, 0.0, 1.0, 1.001], scales(50, 5)) == [0, 1, 1, 1, 1, 0]
    assert window("clipped", [-1.5, 1.0], scales(0.1), clamp=3.0) == [0, 1]


def test_scaled_follows_the_clamp_or_else_the_first_scale():
    assert window("scaled", [-6.1, -6.0, 0.0, 5.9, 7.0], scales(2, 1)) == [0, 1, 1, 1, 0]
    assert window("scaled", [-6.1, -4.0, 4.5], scales(2, 1), clamp=4.0) == [0, 1, 0]


def test_polynomial_adds_a_triangle_for_each_plane():
    # One plane: 1 − |x|/2v inside ±2v.
    assert window("polynomial", [-4.0, -2.0, 0.0, 1.0, 3.0, 5.0], scales(2)) == [0, 0.5, 1, 0.75, 0.25, 0]
    # Two: x = 3 leaves 1 to the second plane, x = −0.5 leaves 1.5, x = 0 leaves −2, x = 9 leaves 7.
    expected = [1 - 3 / 4 + 1 - 1 / 2, 1 - 0.5 / 4 + 1 - 1.5 / 2, 1 + 0, 0]
    assert window("polynomial", [3.0, -0.5, 0.0, 9.0], scales(2, 1)) == pytest.approx(expected)


def test_polynomial_is_bi_reals_at_one_half():
    x = torch.linspace(-1.5, 1.5, 301, dtype=torch.float64)
    bi_real = (2 - 2 * x.abs()).clamp(min=0) * 0.5
    torch.testing.assert_close(estimators.polynomial(x, scales(0.5), None), bi_real)


def test_polynomial_is_the_slope_of_the_published_quadratic():
    # Bi-Real's ApproxSign, stretched: runs from −v to v over [−2v, 2v].
    v = 1.5
    x = torch.linspace(-4, 4, 200, dtype=torch.float64, requires_grad=True)
    u = (x / (2 * v)).clamp(-1, 1)
    (v * torch.where(u < 0, 2 * u + u**2, 2 * u - u**2)).sum().backward()
    torch.testing.assert_close(estimators.polynomial(x.detach(), scales(v), None), x.grad)


@pytest.mark.parametrize("v", [(0.0,), (0.0, 0.0), (1.0, 0.0), (0.5, 0.5)])
def test_ternary_and_zero_scales_are_finite(v):
    x = [-2.0, -1.0, -0.0, 0.0, 0.25, 1.0]
    for name in estimators.ESTIMATORS:
        values = torch.tensor(window(name, x, scales(*v)))
        assert values.isfinite().all() and (values >= 0).all()
    if not any(v):
        assert window("polynomial", x, scales(*v)) == [0] * 6
    if v == (1.0, 0.0):
        assert window("polynomial", x, scales(*v)) == window("polynomial", x, scales(1.0))


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"estimator 'ste'; known are identity, clipped, scaled, polynomial"):
        estimators.get("ste")


# ---------------------------------------------------------------------------------------------------------
# straight_through


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_forward_approximates_and_backward_is_the_gradient_times_the_window(name, scheme, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(7, 40, generator=generator)).to(dtype).requires_grad_()
    spread = fb.solve(x, scheme).T[..., None].clone().requires_grad_()
    estimator = estimators.get(name)
    y = straight_through(x, spread, estimator, 3.0)
    assert y.dtype == dtype and torch.equal(y, folding.approximate(x, spread))
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(grad)
    assert spread.grad is None  # scales are constants
    assert x.grad.dtype == dtype and x.grad.any()
    expected = grad * estimator(x.detach(), spread.detach(), 3.0)
    torch.testing.assert_close(x.grad, expected.to(dtype))


def test_without_a_gradient_to_carry_nothing_is_recorded():
    x, spread = torch.randn(3, 8), torch.ones(1, 3, 1)
    assert straight_through(x, spread, estimators.identity).grad_fn is None
    with torch.no_grad():
        assert straight_through(x.requires_grad_(), spread, estimators.identity).grad_fn is None


def test_gradients_of_gradients():
    """Windows that are steps add nothing to them."""
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    y = straight_through(x, scales(0.8), estimators.scaled)
    (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    inside = estimators.scaled(x.detach(), scales(0.8), None).double()
    torch.testing.assert_close(second, 2 * inside)


def test_gradients_of_polynomial_gradients_are_finite_where_a_scale_is_zero():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.3, 1.0], requires_grad=True)
    y = straight_through(x, scales(1.0, 0.0, dtype=torch.float32), estimators.polynomial)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all() and second.any()


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_clamp_beyond_the_dtype_is_none(dtype, name, core):
    x, given = torch.tensor([-3e4, 0.5, 2.0], dtype=dtype), torch.tensor([1.0, 0.5], dtype=dtype)
    results = []
    for clamp in [None, 2.0 * torch.finfo(dtype).max]:
        leaf = x.clone().requires_grad_()
        y = estimators.approximate(leaf, given, (0,), name, clamp)
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


# ---------------------------------------------------------------------------------------------------------
# Forward mode, and the transforms of torch.func

CONFIGS = [
    fb.QuantConfig("ls-1", "ls-2", clamp=1.0, weight_estimator="polynomial"),
    fb.QuantConfig("ls-3", "gf-2", weight_estimator="scaled"),
    fb.QuantConfig("ls-1", "ls-T", granularity="rank", rank=2, activation_estimator="scaled"),
    fb.QuantConfig("lsf-3", "ls-1", granularity="group", group_size=3, activation_granularity="tensor"),
]


@pytest.mark.parametrize("name", estimators.ESTIMATORS)
def test_tangents_go_through_the_window(name, core):
    x, v = torch.tensor([0.3, -0.7, 2.0, -9.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    given = torch.tensor([1.0, 0.5])
    for clamp in [None, 1.5]:

        def quantize(x, clamp=clamp):
            return estimators.approximate(x, given, (0,), name, clamp)

        value, tangent = jvp(quantize, (x,), (v,))
        assert torch.equal(value, quantize(x))
        torch.testing.assert_close(tangent, vjp(quantize, x)[1](v)[0])  # the Jacobian is diagonal
        assert tangent.any()
        with forward_ad.dual_level():
            for leaf in [x.clone(), x.clone().requires_grad_()]:
                y = quantize(forward_ad.make_dual(leaf, v))
                torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, tangent)
            assert torch.equal(quantize(x), value)  # has no tangent


@pytest.mark.parametrize("values", [folding.approximate, encoding.nearest])
def test_tangents_of_the_plain_function(values):
    x, v = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    spread = fb.solve(x, "gf-2").T[..., None]

    def quantize(x, spread):
        return straight_through(x, spread, estimators.polynomial, values=values)

    y, tangent = jvp(quantize, (x, spread), (v, torch.ones_like(spread)))  # scales are constants
    assert torch.equal(y, values(x, spread))
    torch.testing.assert_close(tangent, v * estimators.polynomial(x, spread, None))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_transforms_of_layers_are_their_gradients(config, core):
    torch.manual_seed(0)
    layer, x = QuantLinear(6, 5, config=config), torch.randn(4, 6)
    parameters = dict(layer.named_parameters())

    def f(p, x):
        return functional_call(layer, p, (x,))

    gradients = grad(lambda p: f(p, x).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, p in parameters.items():
        torch.testing.assert_close(gradients[name], p.grad)

    loss = grad(lambda p, x: f(p, x[None]).square().sum())
    together = vmap(loss, (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        for name, gradient in loss(parameters, sample).items():
            torch.testing.assert_close(together[name][i], gradient)

    tangents, v = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)
    _, tangent = jvp(f, (parameters, x), (tangents, v))
    of_parameters, of_x = jacrev(f, (0, 1))(parameters, x)
    expected = (of_x * v).sum((2, 3))
    for name, jacobian in of_parameters.items():
        expected = expected + (jacobian * tangents[name]).flatten(2).sum(2)
    torch.testing.assert_close(tangent, expected)


def test_an_ensemble_of_convolutions():
    layers = [QuantConv2d(3, 4, 3) for _ in range(3)]
    x = torch.randn(2, 3, 6, 6)
    parameters, buffers = torch.func.stack_module_state(layers)
    together = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


def test_hessians_are_gradients_of_gradients():
    x, given = torch.randn(9, dtype=torch.float64), torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = hessian(lambda x: estimators.approximate(x, given, (0,), "polynomial").square().sum())(x)
    leaf = x.requires_grad_()
    y = straight_through(leaf, given[:, None], estimators.polynomial)
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaf)
    torch.testing.assert_close(found, second.diag())


def test_the_fused_pass_has_no_tangent_and_says_so():
    """Also where torch.compile takes it, which does not tell Python of forward mode."""
    x, layer = torch.randn(4, 3), QuantLinear(3, 2)
    scales = fb.solve(x, "ls-2")
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*straight_through"):
        jvp(lambda x: fused.approximate(x, scales, (1,), "polynomial"), (x,), (x,))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: jvp(layer, (x,), (x,))[1], backend="aot_eager")
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        compiled(x)


def test_ordinary_training_is_fused():
    x = torch.randn(4, 3, requires_grad=True)
    y = estimators.approximate(x, fb.solve(x, "ls-2"), (1,), "polynomial")
    assert "foldbit_approximate" in y.grad_fn.name()
    torch.compiler.reset()
    layer = QuantLinear(3, 2, config=fb.QuantConfig("ls-3", "ls-2"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(layer(x).sum(), x)
    )
