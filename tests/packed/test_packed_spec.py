"""The record of a packed layer: what torch's layers become, and what plain values it accepts."""

import json

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit.packed.spec import LayerSpec

CONFIG = fb.QuantConfig()


@pytest.mark.parametrize(
    "layer, kernel, stride, padding, dilation",
    [
        (nn.Linear(4, 6), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=4), (1, 3), (1, 2), (0, 0, 1, 1), (1, 4)),
        (nn.Conv1d(4, 6, 4, padding="same"), (1, 4), (1, 1), (0, 0, 1, 2), (1, 1)),
        (nn.Conv2d(4, 6, (2, 5), (3, 1), (1, 2), (1, 2)), (2, 5), (3, 1), (1, 1, 2, 2), (1, 2)),
        (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4), (1, 1), (0, 1, 1, 2), (1, 1)),
        (nn.Conv2d(4, 6, 3, padding="valid"), (3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
    ],
)
def test_every_layer_is_a_two_dimensional_convolution(layer, kernel, stride, padding, dilation):
    spec = LayerSpec.of(layer, CONFIG)
    assert (spec.in_channels, spec.out_channels, spec.bias) == (4, 6, True)
    assert (spec.kernel_size, spec.stride, spec.padding, spec.dilation) == (kernel, stride, padding, dilation)
    if not isinstance(layer, nn.Linear):
        sizes = (20,) if isinstance(layer, nn.Conv1d) else (19, 20)
        out = layer(torch.zeros(1, 4, *sizes)).shape[2:]
        assert spec.out_size(*(1, *sizes)[-2:]) == (*(1,) * (2 - len(out)), *out)


def test_other_layers_have_no_spec():
    with pytest.raises(TypeError, match="expected a Linear, Conv1d or Conv2d layer, got ConvTranspose2d"):
        LayerSpec.of(nn.ConvTranspose2d(3, 3, 3), CONFIG)


def test_a_kernel_that_does_not_fit_has_no_output():
    spec = LayerSpec.of(nn.Conv2d(1, 1, 3, padding=(0, 1), dilation=2), CONFIG)
    assert spec.out_size(5, 3) == (1, 1)
    for size in ((4, 3), (5, 2)):
        with pytest.raises(ValueError, match=r"spans 5×5, but the input is only .*padding included"):
            spec.out_size(*size)


def test_what_a_layer_stores():
    config = fb.QuantConfig("ls-2", "gf-3", granularity="group", group_size=4, activation_scales="static")
    spec = LayerSpec.of(nn.Conv2d(24, 6, (3, 1), groups=2), config)
    assert (spec.channels, spec.segments, spec.weight_planes, spec.activation_planes) == (12, 3, 2, 3)
    assert spec.tensors() == {
        "planes": (torch.uint8, (2, 6, 3, 1, 2)),
        "scales": (torch.float32, (2, 6, 3)),
        "bias": (torch.float32, (6,)),
        "activation_scales": (torch.float32, (3,)),
    }
    weight_only = fb.QuantConfig("ls-1", "fp", activation_scales="static")
    assert set(LayerSpec.of(nn.Linear(3, 3, bias=False), weight_only).tensors()) == {"planes", "scales"}


@pytest.mark.parametrize(
    "config",
    [CONFIG, fb.QuantConfig("gf-8", "fp", "group", 2, clamp=0.1), fb.QuantConfig(activation_scales="static")],
)
def test_plain_values_come_back_through_json(config):
    spec = LayerSpec.of(nn.Conv2d(4, 6, (2, 4), padding="same", padding_mode="circular", bias=False), config)
    assert LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (fb.QuantConfig("ls-2", granularity="input"), (2, 8)),
        (fb.QuantConfig("ls-2", granularity="rank", rank=3), (2, 3, 6 + 4 * 6)),
    ],
)
def test_scales_along_the_sum_have_a_size_and_no_file(config, scales):
    spec = LayerSpec.of(nn.Conv2d(8, 6, (3, 2), groups=2), config)
    assert spec.tensors()["scales"] == (torch.float32, scales)
    with pytest.raises(ValueError, match="varies along the sum of a dot product"):
        LayerSpec.from_dict(json.loads(json.dumps(spec.to_dict())))


def test_a_long_value_is_cut_in_the_error():
    fields = LayerSpec.of(nn.Linear(3, 3), CONFIG).to_dict()
    with pytest.raises(ValueError, match="kind is one of") as caught:
        LayerSpec.from_dict(fields | {"kind": "x" * 10_000})
    assert len(str(caught.value)) < 400
