"""What is measured of quantized layers is right, costs nothing between looks, and says what is wrong."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from foldbit import QuantConfig, models, quantize_
from foldbit.core import folding
from foldbit.nn.layers import QuantConv2d, QuantLinear
from foldbit.training import loop
from foldbit.training.loop import Habits
from foldbit.training.monitor import Monitor, complaints
from foldbit.training.recipes import DataConfig


def small(config=None):
    """A network of six quantized layers."""
    model = models.create("resnet8-xnor", widths=[8, 8, 8])
    return quantize_(model, config or QuantConfig(), overrides=models.float_layers(model))


def measured(layer, x):
    """What is measured of a layer on its own."""
    model = nn.Sequential(layer).train()
    monitor = Monitor(model, 1)
    with monitor.watching():
        model(x)
    return monitor.take()["0"]


@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("weight", ["ls-1", "gf-3"])
def test_scales_and_errors_are_those_of_the_approximation(scales, weight):
    torch.manual_seed(0)
    config = QuantConfig(weight, "ls-2", activation_scales=scales, clamp=1.5)
    layer = QuantConv2d(6, 10, 3, config=config)
    x = torch.randn(40, 6, 8, 8)
    found = measured(layer, x)
    w = folding.quantize(layer.weight.detach(), weight, (1, 2, 3))
    for i in range(w.scales.shape[-1]):
        assert found[f"weight scale {i + 1}"] == pytest.approx(float(w.scales[:, i].mean()), rel=1e-5)
        assert found[f"weight negative {i + 1}"] == pytest.approx(float(w.planes[i].double().mean()))
    weight = layer.weight.detach()
    lost = (weight - w.values()).square().sum() / weight.square().sum()
    assert found["weight error"] == pytest.approx(float(lost), rel=1e-5)
    seen = x[:32]  # the first images
    a = folding.quantize(seen.clamp(-1.5, 1.5), "ls-2", (1, 2, 3) if scales == "dynamic" else None)
    for i in range(2):
        assert found[f"activation scale {i + 1}"] == pytest.approx(float(a.scales[..., i].mean()), rel=1e-5)
        assert found[f"activation negative {i + 1}"] == pytest.approx(float(a.planes[i].double().mean()))
    lost = (seen - a.values()).square().sum() / seen.square().sum()
    assert found["activation error"] == pytest.approx(float(lost), rel=1e-5)


def test_dead_shares_are_those_of_the_gradients_that_training_gets():
    torch.manual_seed(0)
    config = QuantConfig(
        "ls-1", "ls-1", clamp=1.0, activation_estimator="clipped", weight_estimator="clipped"
    )
    layer = QuantLinear(50, 4, bias=False, config=config)
    layer.weight.data *= 12  # uniform up to 1.7
    x = torch.randn(30, 50, requires_grad=True)
    found = measured(layer, x)
    layer(x).sum().backward()
    assert found["weight dead"] == pytest.approx(float((layer.weight.grad == 0).double().mean()))
    assert found["activation dead"] == pytest.approx(float((x.grad == 0).double().mean()))
    assert 0.2 < found["activation dead"] < 0.5 and 0.2 < found["weight dead"] < 0.6


def test_flips_are_since_the_last_look():
    model = nn.Sequential(QuantLinear(10, 10, config=QuantConfig("ls-1", "fp")))
    monitor = Monitor(model, 1)
    flips = []
    for changed in (0, 7, 0):
        model[0].weight.data.view(-1)[:changed] *= -1
        with monitor.watching():
            model(torch.randn(2, 10))
        flips.append(monitor.take()["0"].get("weight flips"))
    assert flips == [None, pytest.approx(0.07), 0.0]


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("ls-1", "ls-2", activation_scales="static"),
        QuantConfig("alt-2", "gf-3"),
        QuantConfig("fp", "ls-T", activation_granularity="tensor"),
        QuantConfig("ls-T", "fp", granularity="tensor"),
        QuantConfig("ls-2", "gf-4", granularity="group", group_size=4),
        QuantConfig("ls-1", "ls-1", granularity="rank", rank=2),
        QuantConfig("ls-2", "ls-1", granularity="input"),
    ],
    ids=lambda c: f"{c.weight} {c.activation} {c.granularity}",
)
def test_measuring_changes_nothing(config):
    torch.manual_seed(0)
    model = small(config).train()
    x = torch.randn(5, 1, 28, 28).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    monitor = Monitor(model, 1)
    state = torch.get_rng_state()
    for _ in range(2):
        with monitor.watching():
            out = model(x)
        out.square().mean().backward()
        twin(x).square().mean().backward()
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and p.requires_grad, name
    for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c), name
    found = monitor.take()
    assert len(found) == 6 and not monitor.take()
    for values in found.values():
        assert all(0 <= values[key] < 1.5 for key in values if "error" in key or "dead" in key)
        assert any("activation" in key for key in values) == (config.activation != "fp")
        assert any("weight" in key for key in values) == (config.weight != "fp")


def test_half_precision_and_empty_inputs_are_measured_or_left():
    layer = QuantConv2d(4, 4, 3, config=QuantConfig("ls-1", "ls-2"))
    assert measured(layer.bfloat16(), torch.randn(2, 4, 5, 5).bfloat16())["activation error"] < 0.5
    assert "activation error" not in measured(layer, torch.randn(0, 4, 5, 5).bfloat16())


def test_hooks_are_there_only_while_watching():
    model = small()
    monitor = Monitor(model, 1)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    with pytest.raises(RuntimeError), monitor.watching():
        assert hooks() == 6
        model(torch.randn(2, 5, 28, 28))
    assert hooks() == 0


def test_when_it_looks():
    model = small()
    due = [s for s in range(1, 50) if Monitor(model, 20).due(s, ends_epoch=s % 16 == 0)]
    assert due == [1, 16, 20, 32, 40, 48]
    assert not any(Monitor(model, 0).due(s, True) for s in range(1, 5))
    assert not any(Monitor(nn.Linear(1, 1), 1).due(s, True) for s in range(1, 5))


def said(layer, x):
    return {kind: text for (_, kind), text in complaints({"0": measured(layer, x)}).items()}


def test_inputs_behind_a_relu_waste_a_plane():
    layer = QuantConv2d(4, 4, 3, config=QuantConfig("ls-1", "ls-2"))
    found = said(layer, torch.randn(3, 4, 9, 9).relu())
    assert list(found) == ["activation, constant 1"]
    assert (
        "positive throughout" in found["activation, constant 1"] and "ReLU" in found["activation, constant 1"]
    )
    found = said(layer, -torch.rand(3, 4, 9, 9) - 0.1)
    assert "negative throughout" in found["activation, constant 1"]


def test_weights_of_one_bit_starve_a_second():
    layer = QuantConv2d(4, 4, 3, config=QuantConfig("ls-2", "ls-2"))
    layer.weight.data = layer.weight.data.sign()
    assert list(said(layer, torch.randn(3, 4, 9, 9))) == ["weight, starved 2"]


def test_nothing_passes_zeros():
    layer = QuantLinear(8, 8, config=QuantConfig("ls-T", "ls-2"))
    assert list(said(layer, torch.zeros(3, 8))) == ["activation, zero"]
    layer.weight.data.zero_()
    assert list(said(layer, torch.randn(3, 8))) == ["weight, zero"]


def test_activations_outside_the_window_are_dead():
    config = QuantConfig("ls-1", "ls-1", activation_estimator="clipped")
    found = said(QuantLinear(8, 8, config=config), 100 * torch.randn(30, 8))
    assert list(found) == ["activation, dead"] and "clamp" in found["activation, dead"]


@pytest.mark.parametrize("activation", ["ls-1", "ls-T", "gf-3", "ls-2"])
def test_a_healthy_network_gets_no_warning(tmp_path, tiny, digits, activation):
    data = DataConfig(name="digits", train_images=192)
    recipe = dataclasses.replace(tiny, quant=QuantConfig("ls-1", activation, clamp=3.0), data=data)
    assert not loop.train(recipe, tmp_path / "run", images=digits, threads=1).warnings


def test_a_training_says_each_warning_once_and_draws_curves(tmp_path, tiny, digits, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    models.register("behind-a-relu")(
        lambda: nn.Sequential(
            *[nn.Conv2d(1, 8, 5, stride=3), nn.BatchNorm2d(8), nn.ReLU()],
            *[nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 10)],
        )
    )
    recipe = dataclasses.replace(
        tiny,
        model="behind-a-relu",
        model_args={},
        quant=QuantConfig("ls-1", "ls-2"),
        data=DataConfig(name="digits", train_images=192),
    )
    outcome = loop.train(recipe, tmp_path / "run", images=digits, threads=1, habits=Habits(watch_every=2))
    assert [(w["step"], w["about"]) for w in outcome.warnings] == [(1, "3, activation, constant 1")]
    assert capsys.readouterr().out.count("warning, step 1: layer 3: plane 1 of its inputs is positive") == 1
    lines = (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == outcome.warnings
    curves = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    curves.Reload()
    tags = curves.Tags()["scalars"]
    assert {"loss", "test_accuracy", "lr", "images per second", "weight flips/3", "activation scale 2/3"} <= {
        *tags
    }
    assert [event.step for event in curves.Scalars("weight error/3")] == [1, 2, 3, 4, 6]
    assert [event.step for event in curves.Scalars("weight flips/3")] == [2, 3, 4, 6]
