"""Weights from elsewhere: names, what must fit, what a file may hold. tests/vision compares the networks."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import foldbit as fb
from foldbit import models
from foldbit.models import pretrained
from foldbit.models.pretrained import PretrainedError

WIDTHS = {"widths": [4, 4, 6, 8]}


def small(name="resnet18", **arguments):
    torch.manual_seed(0)
    return models.create(name, **{"block": "regular", "num_classes": 5, **WIDTHS, **arguments})


def torchvisions(model):
    """The state dict of one of our networks under torchvision's names, written down by hand."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts = [{"0": "conv1", "1": "bn1"}[parts[1]], *parts[2:]]
        elif parts[0] == "stages":
            inner = ["downsample" if part == "shortcut" else part for part in parts[3:]]
            parts = [f"layer{int(parts[1]) + 1}", parts[2], *inner]
        else:
            parts = ["fc", *parts[1:]]
        renamed[".".join(parts)] = torch.randn(tensor.shape).to(tensor.dtype)
    return renamed


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_names_become_ours(name):
    model = small(name)
    theirs = torchvisions(model)
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.bias"} <= set(theirs)
    assert "layer2.0.downsample.1.weight" in theirs
    ours = pretrained.adapt(theirs, model)
    model.load_state_dict(ours)
    assert torchvisions(model).keys() == theirs.keys()
    assert ours["stages.1.0.shortcut.0.weight"] is theirs["layer2.0.downsample.0.weight"]
    assert ours["stages.3.1.bn2.bias"] is theirs["layer4.1.bn2.bias"]
    assert ours["stem.0.weight"] is theirs["conv1.weight"] and ours["classifier.bias"] is theirs["fc.bias"]


def test_our_own_names_and_data_parallel_ones_stay():
    model = small()
    state = model.state_dict()
    assert pretrained.adapt(state, small()).keys() == state.keys()
    parallel = {f"module.{name}": tensor for name, tensor in state.items()}
    assert all(pretrained.adapt(parallel, small())[name] is tensor for name, tensor in state.items())


def test_another_number_of_classes_keeps_the_classifier(tmp_path):
    source = tmp_path / "trained.pth"
    torch.save(torchvisions(small(num_classes=9)), source)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert pretrained.load_weights(model, source) == ("classifier.weight", "classifier.bias")
    after = model.state_dict()
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert not torch.equal(after["stages.0.0.conv1.weight"], before["stages.0.0.conv1.weight"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("layer1.0.conv1.weight"), r"another network: stages.0.0.conv1.weight is missing$"),
        (lambda w: w.update(more=torch.zeros(1)), "more is not the model's"),
        (
            lambda w: w.update({"conv1.weight": torch.zeros(4, 3, 3, 3)}),
            r"\[4, 3, 3, 3\], in the model \[4, 3, 7, 7\]",
        ),
        (lambda w: w.update({"bn1.bias": torch.zeros(4, dtype=torch.int64)}), "stem.1.bias is torch.int64"),
        (lambda w: w.update({"fc.weight": torch.zeros(9, 3)}), r"classifier.weight is \[9, 3\]"),
        (lambda w: w.pop("fc.bias"), "classifier.bias is missing"),
        (lambda w: [w.pop(n) for n in list(w) if "layer3" in n], "and 21 more$"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path, change, message):
    model = small()
    weights = torchvisions(model)
    change(weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PretrainedError, match=message):
        pretrained.adapt(weights, model)
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(PretrainedError, match=r"w.pt: these weights are of another network"):
        pretrained.load_weights(model, tmp_path / "w.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_differences_can_be_allowed_by_name():
    model = small()
    weights = torchvisions(model)
    del weights["layer1.0.conv1.weight"]
    weights["more"] = torch.zeros(1)
    fitting = pretrained.adapt(weights, model, allow=("more", "stages.0.0.conv?.weight"))
    assert torch.equal(fitting["stages.0.0.conv1.weight"], model.stages[0][0].conv1.weight)
    model.load_state_dict(fitting)


def test_xnor_blocks_refuse_weights_of_regular_ones():
    with pytest.raises(PretrainedError, match="A ResNet of XNOR blocks normalises elsewhere"):
        pretrained.adapt(torchvisions(small()), small(block="xnor"))


@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_quantized_networks_take_float_weights(scales):
    weights = torchvisions(small())
    for name in [n for n in weights if n.endswith("num_batches_tracked")]:
        del weights[name]  # checkpoints of old have none
    model = small()
    config = fb.QuantConfig(activation_scales=scales)
    fb.quantize_(model, config, overrides=models.float_layers(model))
    model.load_state_dict(pretrained.adapt(weights, model))
    assert torch.equal(model.stages[0][1].conv2.weight, weights["layer1.1.conv2.weight"])
    assert not model.stages[0][1].conv2.input_quantizer.seen


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_files_of_weights(tmp_path, nested):
    state = small().state_dict()
    held = state if nested is None else {"epoch": 3, nested: state}
    for name in ("w.pth", "w.pt", "w.ckpt", "w.bin"):
        torch.save(held, tmp_path / name)
        assert all(torch.equal(t, state[n]) for n, t in pretrained.weights_of(tmp_path / name).items())
    save_file(state, tmp_path / "w.safetensors")
    assert pretrained.weights_of(str(tmp_path / "w.safetensors")).keys() == state.keys()


class Hostile:
    def __reduce__(self):
        return (sys.exit, (3,))


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("a.pth", lambda p: None, "there is no file"),
        ("a.pth", lambda p: p.write_bytes(b"not one"), "not a state dict of tensors|not a readable PyTorch"),
        ("a.safetensors", lambda p: p.write_bytes(b"not one"), "not a readable safetensors file"),
        ("a.pt", lambda p: torch.save({"w": Hostile()}, p), "could run code"),
        ("a.pt", lambda p: torch.save([1, 2], p), "holds no state dict but a list"),
        ("a.pt", lambda p: torch.save({}, p), "holds no state dict but a dict"),
        (
            "a.pt",
            lambda p: torch.save({"epoch": 3, "w": torch.zeros(2)}, p),
            "'epoch', which is no tensor, beside 1",
        ),
        ("a.pt", lambda p: torch.save({0: torch.zeros(2)}, p), "holds 0, which is no tensor"),
        ("a.h5", lambda p: p.write_bytes(b""), r"torchvision/NAME, timm/NAME or a file \(.pt"),
    ],
)
def test_files_of_anything_else(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(PretrainedError, match=message):
        pretrained.weights_of(tmp_path / name)


def test_packed_files_have_no_weights_to_give(tmp_path):
    model = fb.pack_(fb.quantize_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))))
    fb.save_packed(model, tmp_path / "p.safetensors")
    with pytest.raises(PretrainedError, match="is a packed file, whose weights are bits"):
        pretrained.weights_of(tmp_path / "p.safetensors")


@pytest.mark.parametrize(
    "text, yes",
    [
        ("torchvision/resnet18", True),
        ("timm/vit_tiny_patch16_224.augreg_in21k", True),
        ("weights/mine.pth", True),
        ("mine.SAFETENSORS", True),
        ("torchvision/", False),
        ("torchvision", False),
        ("runs/float", False),
        ("keras/resnet18", False),
    ],
)
def test_what_names_weights(text, yes):
    assert pretrained.is_source(text) is yes


def test_a_missing_library_and_an_unknown_network_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(PretrainedError, match=r"timm/resnet18 takes timm, .*pip install 'foldbit\[vision\]'"):
        pretrained.weights_of("timm/resnet18")

    def create_model(name, pretrained):
        if name != "resnet18" or not pretrained:
            raise RuntimeError(f"Unknown model ({name})\nand more")
        return small().train()

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    with pytest.raises(
        PretrainedError, match=r"timm gives no trained network 'nope': Unknown model \(nope\)\. Its"
    ):
        pretrained.weights_of("timm/nope")
    assert pretrained.weights_of("timm/resnet18").keys() == small().state_dict().keys()
    assert not pretrained.network("timm", "resnet18").training
