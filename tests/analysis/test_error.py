"""The errors of a model's layers: what they are beyond the plain case, and that the model stays as it was."""

import math

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit.analysis import error


def quantized(*layers):
    return fb.quantize_(nn.Sequential(*layers), fb.QuantConfig("ls-1", "ls-2"), skip=())


def relative(x, approximation):
    return float((x - approximation).square().sum() / x.square().sum())


def test_every_module_keeps_its_own_mode():
    model = quantized(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)).train()
    model[1].eval()  # frozen
    modes = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 8, 8)
    error.layer_errors(model, x)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        error.layer_errors(model, x[:, :2])
    assert [module.training for module in model.modules()] == modes


def test_a_layer_that_is_not_called_has_no_input_to_measure():
    class Detour(nn.Sequential):
        def forward(self, x):
            return self[1](x)

    model = Detour(*quantized(nn.Linear(3, 3), nn.Linear(3, 3)))
    skipped, called = error.layer_errors(model, torch.randn(4, 3))
    assert math.isnan(skipped.activation) and 0 < skipped.weight < 1
    assert 0 < called.activation < 1


def test_all_calls_of_a_layer_count():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](self[0](x))

    model = Twice(*quantized(nn.Linear(6, 6)))
    x = torch.randn(4, 6)
    (found,) = error.layer_errors(model, x)
    both = torch.cat([x, model[0](x)])
    assert found.activation == pytest.approx(
        relative(both.detach(), fb.quantize(both, "ls-2").values()), rel=1e-5
    )


def test_zeros_are_without_error():
    model = quantized(nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    assert error.layer_errors(model, torch.zeros(4, 3)) == [error.LayerError("0", 0, 0)]


def test_compiled_networks_are_measured():
    model = quantized(nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 3)
    with torch.no_grad():
        compiled(x)  # from here on there is code that calls no hooks
        assert all(layer.activation < 1 for layer in error.layer_errors(compiled, x))
