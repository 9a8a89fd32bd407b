"""Networks by name: shapes, what the registry refuses, what stays float."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit import models
from foldbit.models import registry


@pytest.mark.parametrize(
    "name, arguments, shape, classes",
    [
        ("lenet5", {}, (2, 1, 28, 28), 10),
        ("lenet5", {"num_classes": 3}, (1, 1, 28, 28), 3),
        ("resnet8-xnor", {}, (2, 1, 28, 28), 10),
        ("resnet8-xnor", {"widths": [4, 8, 8], "stem_stride": 1, "in_channels": 3}, (2, 3, 17, 9), 10),
        ("resnet8-xnor", {"widths": (4, 4, 4), "nonlinearity": "prelu", "num_classes": 1}, (0, 1, 8, 8), 1),
        ("resnet8-xnor", {"widths": (4, 4, 4), "nonlinearity": "none"}, (1, 1, 1, 1), 10),
        ("resnet18-cifar", {"widths": [4, 8, 8, 12]}, (2, 3, 32, 32), 100),
        ("resnet18", {"widths": [4, 8, 8, 12]}, (2, 3, 64, 96), 1000),
        ("resnet18-cifar", {"widths": [4, 8, 8, 12], "block": "regular", "num_classes": 7}, (1, 3, 8, 8), 7),
        ("resnet34", {"widths": [4, 4, 4, 4], "in_channels": 1}, (1, 1, 32, 32), 1000),
        ("resnet50", {"widths": [4, 4, 4, 4], "shortcut": "single"}, (2, 3, 33, 32), 1000),
        ("lenet5", {"in_channels": 3}, (2, 3, 32, 40), 10),
    ],
)
@torch.no_grad()
def test_shapes(name, arguments, shape, classes):
    model = models.create(name, **arguments).eval()
    assert model(torch.randn(shape)).shape == (shape[0], classes)


def test_names_are_sorted_and_known():
    assert list(models.names()) == sorted(models.names())
    assert {"lenet5", "resnet8-xnor", "resnet18", "resnet18-cifar"} <= set(models.names())


@pytest.mark.parametrize(
    "name, convolutions, parameters",
    [  # torchvision's, whose stem is one of 7x7
        ("resnet18", 20, 11_689_512),
        ("resnet18-cifar", 20, 11_689_512 - 64 * 3 * (49 - 9)),
        ("resnet34", 36, 21_797_672),
        ("resnet50", 53, 25_557_032),
    ],
)
def test_resnets_have_the_layers_of_resnets(name, convolutions, parameters):
    with torch.device("meta"):
        model = models.create(name, block="regular", num_classes=1000)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == convolutions
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_arguments_that_a_model_takes():
    assert models.arguments("lenet5") == ("num_classes", "in_channels")
    assert {"block", "shortcut", "num_classes"} <= set(models.arguments("resnet50"))
    with pytest.raises(ValueError, match="unknown model 'nope'; known are"):
        models.arguments("nope")


@torch.no_grad()
def test_lenet_pools_only_what_is_not_28_by_28():
    model = models.create("lenet5").eval()
    x = torch.randn(2, 50, 4, 4)
    assert torch.equal(model.fit(x), x)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("resnet", {}, "unknown model 'resnet'; known are .*lenet5"),
        ("", {}, "unknown model ''"),
        ("lenet5", {"classes": 3}, "'lenet5': got an unexpected keyword argument 'classes'"),
        ("lenet5", {"name": "x"}, "'lenet5': got an unexpected keyword argument 'name'"),
        ("lenet5", {"num_classes": 0}, "num_classes is a whole number from 1"),
        ("lenet5", {"num_classes": True}, "num_classes is a whole number from 1"),
        ("lenet5", {"num_classes": "10"}, "num_classes is a whole number from 1"),
        ("lenet5", {"num_classes": 10**9}, "num_classes is a whole number from 1"),
        ("lenet5", {"in_channels": 0}, "in_channels is a whole number from 1"),
        ("resnet8-xnor", {"widths": []}, "widths: expected a short sequence"),
        ("resnet8-xnor", {"widths": 64}, "widths: expected a short sequence"),
        ("resnet8-xnor", {"widths": [8, 8]}, "one width a stage"),
        ("resnet8-xnor", {"widths": [8, 8, 0]}, "widths: expected whole numbers"),
        ("resnet8-xnor", {"widths": [8, 8, 8.0]}, "widths: expected whole numbers"),
        ("resnet8-xnor", {"widths": [8, 8, True]}, "widths: expected whole numbers"),
        ("resnet8-xnor", {"widths": [8, 8, 10**6]}, "widths: expected whole numbers"),
        ("resnet8-xnor", {"in_channels": 10**6}, "in_channels.*expected whole numbers"),
        ("resnet8-xnor", {"stem_stride": 0}, "stem_stride.*expected whole numbers"),
        ("resnet8-xnor", {"nonlinearity": "gelu"}, "nonlinearity is 'relu', 'prelu' or 'none'; got 'gelu'"),
        ("resnet18-cifar", {"block": "bottleneck"}, "block is 'regular' or 'xnor'; got 'bottleneck'"),
        ("resnet18-cifar", {"num_classes": None}, "num_classes.*expected whole numbers"),
    ],
)
def test_mistakes_and_absurd_sizes_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **arguments)


def test_a_network_of_any_depth():
    model = models.resnet.ResNet((1, 3), (4, 8), block="regular", in_channels=2, num_classes=5)
    assert model(torch.randn(2, 2, 9, 9)).shape == (2, 5)
    with pytest.raises(ValueError, match="depths: expected whole numbers from 1 to 256"):
        models.resnet.ResNet((1, 1000), (4, 8))


def test_models_remember_how_they_were_built():
    arguments = {"widths": [4, 8, 8], "nonlinearity": "prelu"}
    model = models.create("resnet8-xnor", **arguments)
    assert models.architecture_of(model) == ("resnet8-xnor", arguments)
    assert json.loads(json.dumps(models.architecture_of(model))) == ["resnet8-xnor", arguments]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fb.quantize_(model)):
        assert models.architecture_of(other) == ("resnet8-xnor", arguments)
    rebuilt = models.create("resnet8-xnor", **arguments)
    assert [(n, p.shape) for n, p in rebuilt.named_parameters()] == [
        (n, p.shape) for n, p in model.named_parameters()
    ]
    assert models.architecture_of(nn.Linear(3, 3)) is None
    assert models.architecture_of(models.lenet.LeNet5()) is None


def test_users_register_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    @models.register("mlp")
    def mlp(width=8):
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))

    assert models.register("mlp")(mlp) is mlp  # again, as when a module is reloaded
    with pytest.raises(ValueError, match="a model named 'mlp' is registered already"):
        models.register("mlp")(lambda: nn.Sequential())
    assert "mlp" in models.names()

    model = fb.pack_(fb.quantize_(models.create("mlp", width=16)))
    fb.save_packed(model, tmp_path / "mlp.safetensors")
    x = torch.randn(3, 4)
    assert torch.equal(fb.load_packed(tmp_path / "mlp.safetensors")(x), model(x))


def test_shortcuts_are_left_float_as_the_author_wants():
    model = models.create("resnet8-xnor", widths=(4, 8, 8))
    assert models.float_layers(model) == {"*.shortcut.*": None}
    fb.quantize_(model, overrides=models.float_layers(model))
    report = fb.conversion_report(model)
    assert set(report.quantized) == {f"stages.{i}.0.conv{j}" for i in range(3) for j in (1, 2)}
    assert set(report.left_float) == {
        "stem.0",
        "stages.1.0.shortcut.0",
        "stages.2.0.shortcut.0",
        "classifier",
    }


def test_models_without_shortcuts_or_wishes_have_no_exceptions():
    assert models.float_layers(nn.Sequential(nn.Linear(3, 3))) == {}
    assert models.float_layers(models.create("lenet5")) == {}
    flat = models.resnet.ResNet((1,), (4,))  # its only shortcut is an identity
    fb.quantize_(flat, overrides=models.float_layers(flat))


@pytest.mark.parametrize(
    "name, arguments, shape",
    [
        ("lenet5", {}, (8, 1, 28, 28)),
        ("resnet8-xnor", {"widths": [8, 8, 8]}, (8, 1, 28, 28)),
        ("resnet8-xnor", {"widths": [8, 8, 8], "nonlinearity": "prelu"}, (8, 1, 28, 28)),
    ],
)
def test_what_is_quantized_has_both_signs(name, arguments, shape):
    """Behind a ReLU, with nothing that normalises, 1-bit activations would say nothing."""
    torch.manual_seed(0)
    model = models.create(name, **arguments)
    fb.quantize_(model, fb.QuantConfig("ls-1", "ls-1"), overrides=models.float_layers(model))
    seen = {}

    def look(layer, inputs):
        seen[layer] = (inputs[0] < 0).float().mean().item()

    layers = [m for m in model.modules() if isinstance(m, fb.QuantConv2d | fb.QuantLinear)]
    for layer in layers:
        layer.register_forward_pre_hook(look)
    model.train()(torch.rand(shape))
    assert layers and all(0.2 < seen[layer] < 0.8 for layer in layers)
