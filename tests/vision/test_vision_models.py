"""torchvision's and timm's networks: ours with their weights, and theirs quantized, trained and packed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foldbit as fb
from foldbit import models
from foldbit.models import pretrained
from foldbit.packed.absorbed import Absorbed
from foldbit.packed.layers import PackedLayer

torchvision = pytest.importorskip("torchvision", reason="torchvision is in the vision environment only")
timm = pytest.importorskip("timm", reason="timm is in the vision environment only")

pytestmark = pytest.mark.vision


def unsettled(network):
    """A network whose weights and statistics all matter, as after training; libraries start some at zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            if not module.weight.any():
                nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return network


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
@torch.no_grad()
def test_our_resnets_compute_what_theirs_do(name, library, tmp_path, monkeypatch):
    torch.manual_seed(0)
    theirs = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)
    unsettled(theirs).eval()
    x = torch.randn(2, 3, 96, 100)
    expected = theirs(x)
    ours = models.create(name, block="regular").eval()
    path = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), path)
    assert pretrained.load_weights(ours, path) == ()
    assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()

    # By name: hub weights cannot be had where these tests run, so the library is asked and gives these.
    monkeypatch.setattr(timm, "create_model", lambda asked, pretrained: theirs)
    monkeypatch.setattr(torchvision.models, "get_model", lambda asked, weights: theirs)
    again = models.create(name, block="regular", num_classes=7)
    kept = pretrained.load_weights(again, f"{library}/{name}")
    assert kept == ("classifier.weight", "classifier.bias")
    same = [key for key in ours.state_dict() if not key.startswith("classifier")]
    assert all(torch.equal(again.state_dict()[key], ours.state_dict()[key]) for key in same)


def test_names_that_the_libraries_do_not_know():
    for library in pretrained.LIBRARIES:
        with pytest.raises(
            pretrained.PretrainedError, match=f"{library} gives no trained network 'resnet-18'"
        ):
            pretrained.weights_of(f"{library}/resnet-18")


NETWORKS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 64),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
        32,
    ),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=10),
        32,
    ),
    "timm resnet18": (lambda: timm.create_model("resnet18", num_classes=10), 64),
    "timm efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0", num_classes=10), 64),
    "timm mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_100", num_classes=10), 64),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10),
        32,
    ),
}

#: Layers that stay float beside the first and the last, in all of a network, and why.
LEFT = {
    "torchvision vit": {"MultiheadAttention reads its weight without calling it"},
    "torchvision swin": {"ShiftedWindowAttention reads its weight without calling it"},
    "timm mobilenetv3": {"Linear is a subclass with code, parameters or parts of its own"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_their_networks_quantize_train_calibrate_and_pack(name):
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    network = unsettled(make())
    logits = network.eval()(torch.randn(2, 3, side, side))
    assert logits.shape == (2, 10)
    fb.quantize_(network, fb.QuantConfig("ls-1", "ls-2", clamp=3.0))
    report = fb.conversion_report(network)
    reasons = {reason for reason in report.left_float.values() if "skip=" not in reason}
    assert reasons == LEFT.get(name, set())
    assert len(report.quantized) >= 4

    x, labels = torch.randn(8, 3, side, side), torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    loss = F.cross_entropy(network.train()(x), labels)
    loss.backward()
    weights = {layer: network.get_submodule(layer).weight for layer in report.quantized}
    assert loss.isfinite() and all(w.grad.isfinite().all() and w.grad.any() for w in weights.values())
    before = {layer: weight.detach().clone() for layer, weight in weights.items()}
    optimizer.step()
    assert not any(torch.equal(before[layer], weight) for layer, weight in weights.items())

    with torch.no_grad():
        for _ in range(3):
            network(x)  # batch norms get to know it
        agrees(network.eval(), x)  # with dynamic scales
        fb.calibrate(network, [x, torch.randn_like(x)])
        agrees(network, x)


def agrees(network, x):
    """Packed, fused or not, a network gives what it gave; a sign on its threshold may flip on few images."""
    expected = network(x)
    largest = expected.abs().max()
    for fuse in (False, True):
        packed = fb.pack_(copy.deepcopy(network), fuse=fuse)
        assert any(isinstance(module, PackedLayer) for module in packed.modules())
        assert fuse or not any(isinstance(module, Absorbed) for module in packed.modules())
        close = (packed(x) - expected).abs().amax(1) <= 1e-4 * largest
        assert close.float().mean() >= 0.75, (fuse, close)


@pytest.mark.parametrize("name", ["torchvision resnet18", "timm efficientnet_lite0"])
@torch.no_grad()
def test_fusion_reaches_their_layers(name):
    torch.manual_seed(0)
    make, side = NETWORKS[name]
    network = unsettled(make())
    fb.quantize_(network, fb.QuantConfig("ls-1", "ls-2", clamp=3.0))
    x = torch.randn(4, 3, side, side)
    network.train()(x)
    fb.calibrate(network.eval(), [x])
    fusion = fb.conversion_report(fb.pack_(network)).fusion
    doing = [layer for layer, names in fusion.fused.items() if names]
    assert len(doing) >= 19  # all of them; a batch norm behind a convolution at the least
    for reasons in fusion.left.values():
        assert all("used in several places" in r or "has another use" in r for r in reasons), reasons


def test_their_networks_go_through_files(tmp_path):
    torch.manual_seed(0)
    make, side = NETWORKS["timm vit"]
    network = fb.quantize_(unsettled(make()), fb.QuantConfig("ls-1", "ls-2")).eval()
    fb.pack_(network)
    fb.save_packed(network, tmp_path / "vit.safetensors")
    x = torch.randn(2, 3, side, side)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        loaded = fb.load_packed(tmp_path / "vit.safetensors", make())
        assert torch.equal(loaded(x), network(x))
    with pytest.raises(fb.PackedFileError, match="does not say which network it belongs to"):
        fb.load_packed(tmp_path / "vit.safetensors")
