"""Gradients through sign: windows, and the straight-through function that applies them."""

import pytest
import torch

import foldbit as fb
from foldbit.core import folding
from foldbit.nn import estimators
from foldbit.nn.estimators import straight_through

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-3"]


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
