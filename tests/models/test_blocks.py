"""Residual blocks: what they compute, and that packed they compute the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foldbit as fb
from foldbit import models
from foldbit.models import blocks
from foldbit.models.resnet import ResNet

KINDS = [
    *[("xnor", bottleneck, shortcut) for bottleneck in (False, True) for shortcut in ("double", "single")],
    *[("regular", bottleneck, "double") for bottleneck in (False, True)],
]


def unsettled(module):
    """In evaluation, with batch norms that do something."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.eval()


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_what_a_basic_xnor_block_computes(stride):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 9)
    for shortcut in ("double", "single"):
        b = unsettled(blocks.XnorBlock(6, 8, stride, "prelu", shortcut))
        first = F.prelu(b.conv1(b.bn1(x)), b.act1.weight)
        if shortcut == "double":
            first = first + b.shortcut(x)
            expected = F.prelu(b.conv2(b.bn2(first)), b.act2.weight) + first
        else:
            expected = F.prelu(b.conv2(b.bn2(first)) + b.shortcut(x), b.act2.weight)
        assert torch.equal(b(x), expected)


@torch.no_grad()
def test_what_an_xnor_bottleneck_computes():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 9)
    double = unsettled(blocks.XnorBottleneck(6, 4, 2, "relu", "double"))
    single = blocks.XnorBottleneck(6, 4, 2, "relu", "single").eval()
    single.load_state_dict(double.state_dict())
    b = double
    y = F.relu(b.conv1(b.bn1(x)))
    inner = F.relu(b.conv2(b.bn2(y)))
    assert b.inner(y).shape == inner.shape == (2, 4, 4, 5)
    assert torch.allclose(b.inner(y)[..., 0, 0], y[..., :2, :2].mean((-2, -1)), atol=1e-6)
    last = b.bn3(inner + b.inner(y))
    assert torch.equal(double(x), F.relu(b.conv3(last)) + b.shortcut(x))
    assert torch.equal(single(x), F.relu(b.conv3(b.bn3(inner)) + b.shortcut(x)))
    same = blocks.XnorBottleneck(16, 4, 1)
    assert isinstance(same.inner, nn.Identity) and isinstance(same.shortcut, nn.Identity)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (8, 5)])
@pytest.mark.parametrize("block, bottleneck, shortcut", KINDS)
@torch.no_grad()
def test_strides_round_sizes_up(block, bottleneck, shortcut, size):
    model = ResNet((1, 1), (4, 6), block, shortcut=shortcut, bottleneck=bottleneck).eval()
    features = model.stages(torch.randn(2, 4, *size))
    assert features.shape == (2, 24 if bottleneck else 6, (size[0] + 1) // 2, (size[1] + 1) // 2)


def test_two_shortcuts_or_one():
    with pytest.raises(ValueError, match="shortcut is 'double' or 'single'; got 'triple'"):
        models.create("resnet18", shortcut="triple")
    double = models.create("resnet18-cifar", widths=[4, 4, 4, 4])
    single = models.create("resnet18-cifar", widths=[4, 4, 4, 4], shortcut="single")
    assert double.state_dict().keys() == single.state_dict().keys()


@pytest.mark.parametrize(
    "block, bottleneck, shortcut, nonlinearity",
    [
        (*kind, nonlinearity)
        for kind in KINDS
        for nonlinearity in (("relu", "prelu", "none") if kind[0] == "xnor" else ("relu",))
    ],
)
@torch.no_grad()
def test_packed_networks_of_every_block_give_the_same(block, bottleneck, shortcut, nonlinearity):
    torch.manual_seed(0)
    model = ResNet((1, 2), (8, 12), block, nonlinearity, shortcut=shortcut, bottleneck=bottleneck)
    config = fb.QuantConfig(activation_scales="static", clamp=2.0)
    fb.quantize_(model, config, overrides=models.float_layers(model))
    x = torch.randn(8, 3, 15, 13)
    unsettled(model)
    for _ in range(3):
        model.train()(x)
    model.eval()
    y = model(x)
    plain, fused = fb.pack_(copy.deepcopy(model), fuse=False), fb.pack_(copy.deepcopy(model))
    for packed in (plain, fused):
        # Rounding may flip a later sign that sits on its threshold: few images, if any.
        close = (packed(x) - y).abs().amax(1) <= 1e-4 * y.abs().max()
        assert close.float().mean() >= 0.8
    report = fb.conversion_report(fused)
    convolutions = (3 if bottleneck else 2) * 3
    assert len(report.quantized) == convolutions
    assert all(report.fusion.fused[name] for name in report.quantized)
    names = [name for absorbed in report.fusion.fused.values() for name in absorbed]
    # Every batch norm is part of a convolution: those before and behind packed layers, and behind float ones.
    norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(name.split()[1] for name in names if name.startswith("BatchNorm2d")) == sorted(norms)


def test_the_stem_pools_before_it_cuts_off():
    torch.manual_seed(0)
    model = models.create("resnet18", widths=[4, 4, 4, 4])
    assert [type(m) for m in model.stem] == [nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.ReLU]
    x = torch.randn(2, 3, 33, 40)
    conv, norm, pool, relu = model.stem.train()
    torch.manual_seed(1)
    usual = pool(relu(norm(conv(x))))
    assert torch.equal(model.stem(x), usual)
    gradients = [torch.autograd.grad(y.square().sum(), conv.weight)[0] for y in (usual, model.stem(x))]
    assert torch.equal(*gradients)
