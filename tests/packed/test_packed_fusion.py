"""Fused networks against unfused ones, what fuses and what does not, and that nothing else changes."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit import storage
from foldbit.packed.absorbed import Absorbed, FoldedConv2d
from foldbit.packed.fusion import unfuse_
from foldbit.packed.layers import PackedLayer

STATIC = fb.QuantConfig(activation_scales="static", clamp=2.0)
DYNAMIC = fb.QuantConfig(activation_scales="dynamic", clamp=2.0)


def settled(model, x):
    """In evaluation, with statistics and parameters that matter."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


def both(model, shape, config=STATIC, **options):
    """The same network packed without and with fusion, and an input."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    settled(fb.quantize_(model, config, skip=(), **options), x)
    return fb.pack_(copy.deepcopy(model), fuse=False), fb.pack_(copy.deepcopy(model)), torch.randn(shape)


def conv(i, o, **options):
    return nn.Conv2d(i, o, 3, padding=1, **options)


SEQUENTIALS = {
    "before": lambda: [nn.BatchNorm2d(5), conv(5, 7)],
    "before and after": lambda: [nn.BatchNorm2d(5), nn.ReLU(), conv(5, 7), nn.BatchNorm2d(7), nn.PReLU(7)],
    "no bias": lambda: [conv(5, 7, bias=False), nn.BatchNorm2d(7), nn.ReLU()],
    "a chain": lambda: [
        conv(5, 33),
        nn.BatchNorm2d(33),
        nn.ReLU(),
        conv(33, 7),
        nn.LeakyReLU(0.2),
        conv(7, 2),
    ],
    "without parameters": lambda: [nn.BatchNorm2d(5, affine=False), conv(5, 7)],
    "strided and grouped": lambda: [nn.BatchNorm2d(6), conv(6, 9, stride=2, groups=3), nn.ReLU()],
    "padded with values": lambda: [nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1, padding_mode="reflect")],
    "nested": lambda: [nn.Sequential(nn.BatchNorm2d(5), nn.Sequential(conv(5, 7)), nn.ReLU6())],
}
SHAPES = {"strided and grouped": (4, 6, 9, 8)}


@pytest.mark.parametrize("config", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("activation", ["ls-1", "ls-T", "ls-2", "gf-4", "gf-5"])
@pytest.mark.parametrize("name", SEQUENTIALS)
@torch.no_grad()
def test_fused_networks_give_what_unfused_ones_give(name, activation, config):
    config = fb.QuantConfig(**{**config.to_dict(), "activation": activation, "weight": "ls-2"})
    plain, fused, x = both(nn.Sequential(*SEQUENTIALS[name]()), SHAPES.get(name, (4, 5, 9, 8)), config)
    y = plain(x)
    close = (fused(x) - y).abs() <= 1e-4 * y.abs().max()
    assert close.float().mean() > 0.999  # rounding after a batch norm may move a value across a threshold
    assert any(isinstance(m, Absorbed) for m in fused.modules()) == any(
        names for names in fb.conversion_report(fused).fusion.fused.values()
    )


@torch.no_grad()
def test_thresholds_are_exact():
    """Nothing but thresholds: then not even rounding differs."""
    plain, fused, x = both(nn.Sequential(nn.BatchNorm2d(40), conv(40, 7)), (4, 40, 9, 8))
    assert torch.equal(fused(x), plain(x))
    nhwc = x.to(memory_format=torch.channels_last)
    assert torch.equal(fused(nhwc), plain(nhwc))


@pytest.mark.parametrize("nonlinearity", ["relu", "prelu", "none"])
@torch.no_grad()
def test_xnor_blocks_fuse_whole(nonlinearity):
    torch.manual_seed(0)
    model = fb.models.create("resnet8-xnor", widths=(8, 12, 16), nonlinearity=nonlinearity)
    x = torch.randn(16, 1, 16, 16)
    fb.quantize_(model, STATIC, overrides=fb.models.float_layers(model))
    settled(model, x)
    fused = fb.pack_(copy.deepcopy(model))
    y = fb.pack_(model, fuse=False)(x)
    close = (fused(x) - y).abs().amax(1) <= 1e-4 * y.abs().max()
    assert close.float().mean() >= 0.9
    report = fb.conversion_report(fused).fusion
    packed = [name for name, m in fused.named_modules() if isinstance(m, PackedLayer)]
    assert all(len(report.fused[name]) == 2 for name in packed) and len(packed) == 6
    folded = [name for name, m in fused.named_modules() if isinstance(m, FoldedConv2d)]
    assert folded == ["stem.0", "stages.1.0.shortcut.0", "stages.2.0.shortcut.0"]
    assert "stages.0.0.conv1: does BatchNorm2d stages.0.0.bn1, " in str(fb.conversion_report(fused))


@pytest.mark.parametrize(
    "layers, shape",
    [
        ([nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.ReLU()], (3, 6, 11)),
        ([nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 3)], (30, 6)),
        ([nn.ReLU(), nn.Linear(6, 40), nn.LeakyReLU()], (30, 2, 6)),
    ],
)
@torch.no_grad()
def test_other_kinds_of_layers(layers, shape):
    plain, fused, x = both(nn.Sequential(*layers), shape)
    y = plain(x)
    assert ((fused(x) - y).abs() <= 1e-4 * y.abs().max()).float().mean() > 0.99
    assert any(isinstance(m, Absorbed) for m in fused.modules())


def test_a_linear_layer_with_channels_takes_vectors_only():
    _, fused, _ = both(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)), (30, 6))
    with pytest.raises(ValueError, match=r"\(3, 6, 6\); it does the work of a batch norm .* fuse=False"):
        fused(torch.randn(3, 6, 6))


class Awkward(nn.Module):
    """What must not fuse: results with two uses, shared modules, hooks, attributes."""

    def __init__(self):
        super().__init__()
        self.twice, self.shared, self.hooked = nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.BatchNorm2d(5)
        self.conv1, self.conv2, self.conv3, self.conv4 = (conv(5, 5) for _ in range(4))
        self.relu = nn.ReLU()
        self.hooked.register_forward_hook(lambda *_: None)

    def forward(self, x):
        y = self.twice(x)
        x = self.conv1(y) + y
        x = self.relu(self.conv2(self.shared(x)))
        x = self.relu(self.conv3(self.shared(x)))
        return self.conv4(self.hooked(x))


@torch.no_grad()
def test_what_cannot_fuse_stays_and_is_reported():
    plain, fused, x = both(Awkward(), (4, 5, 6, 6))
    assert torch.equal(fused(x), plain(x))
    assert not any(isinstance(m, Absorbed) for m in fused.modules())
    left = fb.conversion_report(fused).fusion.left
    assert left["conv1"] == ["BatchNorm2d twice: its result has another use"]
    assert left["conv2"] == [
        "BatchNorm2d shared: it is used in several places",
        "ReLU relu: it is used in several places",
    ]
    assert left["conv4"] == ["BatchNorm2d hooked: it has hooks"]


def test_dynamic_scales_need_their_input():
    _, fused, _ = both(nn.Sequential(nn.BatchNorm2d(5), conv(5, 7), nn.ReLU()), (4, 5, 6, 6), DYNAMIC)
    report = fb.conversion_report(fused).fusion
    assert report.fused["1"] == ["ReLU 2"] and "dynamic" in report.left["1"][0]
    assert "not BatchNorm2d 0: dynamic scales" in str(report)


class Branching(nn.Module):
    """Cannot be traced; its parts can."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(5), conv(5, 5))
        self.head = conv(5, 5)

    def forward(self, x):
        return self.head(self.body(x)) if x.sum() < 1e9 else x


@torch.no_grad()
def test_parts_of_a_network_that_cannot_be_traced_fuse():
    plain, fused, x = both(Branching(), (4, 5, 6, 6))
    assert torch.equal(fused(x), plain(x))
    report = fb.conversion_report(fused).fusion
    assert report.fused["body.1"] == ["BatchNorm2d body.0"]
    assert "cannot trace" in report.left["head"][0]


@torch.no_grad()
def test_state_files_copies_and_unfusing(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(5), conv(5, 7), nn.BatchNorm2d(7), nn.PReLU(7))
    plain, fused, x = both(model, (4, 5, 6, 6))
    y = fused(x)
    state = plain.state_dict()
    assert state.keys() == fused.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in fused.state_dict().items())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), y)
        other.load_state_dict({key: torch.zeros_like(t) for key, t in state.items()})
        assert not other(x).any()
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
    assert torch.equal(fused(x), y)
    fb.save_packed(fused, tmp_path / "fused.safetensors")
    fb.save_packed(plain, tmp_path / "plain.safetensors")
    assert (tmp_path / "fused.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
    for target in (copy.deepcopy(fused), copy.deepcopy(plain)):
        assert torch.equal(fb.load_packed(tmp_path / "plain.safetensors", target)(x), y)
        assert torch.equal(fb.load_packed(tmp_path / "plain.safetensors", target, fuse=False)(x), plain(x))
    unfuse_(fused)
    assert torch.equal(fused(x), plain(x)) and type(fused[0]) is nn.BatchNorm2d
    assert fb.pack_(fused) is fused and torch.equal(fused(x), y)


def test_the_weight_is_the_layers_own():
    plain, fused, _ = both(nn.Sequential(conv(5, 7), nn.BatchNorm2d(7)), (4, 5, 6, 6))
    assert torch.equal(fused[0].weight(), plain[0].weight())


def test_an_absorbed_batch_norm_does_not_learn_silently():
    _, fused, x = both(nn.Sequential(nn.BatchNorm2d(5), conv(5, 7)), (4, 5, 6, 6))
    with pytest.raises(RuntimeError, match="this BatchNorm2d is part of the layer next to it"):
        fused.train()(x)


def test_no_gradient_ends_silently():
    _, fused, x = both(nn.Sequential(conv(5, 7)), (4, 5, 6, 6))
    residual = torch.randn(4, 7, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="packed layers are for inference and pass no gradient on"):
        fused[0](x, residual).sum().backward()
    torch.manual_seed(0)
    model = nn.Sequential(conv(5, 8), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))
    fb.quantize_(model, STATIC, skip=("0",))
    folded = fb.pack_(settled(model, x))[0]
    assert isinstance(folded, FoldedConv2d)
    with pytest.raises(RuntimeError, match=r"passes no gradient on; .* fuse=False"):
        folded(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(folded(x), folded(x.clone())) and not folded(x).requires_grad


@torch.no_grad()
def test_a_residual_is_added_in_any_memory_order_and_rank():
    _, fused, x = both(nn.Sequential(conv(5, 7)), (4, 5, 6, 6))
    layer = fused[0]
    assert isinstance(layer, PackedLayer)
    y, residual = layer(x), torch.randn(4, 7, 6, 6)
    for added in (residual, residual.to(memory_format=torch.channels_last)):
        assert torch.equal(layer(x, added), y + residual)
    assert torch.equal(layer(x[0], residual[0]), (y + residual)[0])
    with pytest.raises(ValueError, match="residual must be"):
        layer(x, residual[:, :3])


@torch.no_grad()
def test_export_and_compile_see_fused_layers():
    _, fused, x = both(nn.Sequential(nn.BatchNorm2d(5), conv(5, 7), nn.PReLU(7), conv(7, 3)), (4, 5, 6, 6))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(fused, (x,), dynamic_shapes=({0: batch},)).module()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for images in (x, torch.randn(2, 5, 6, 6)):
        assert torch.equal(exported(images), fused(images))
        assert torch.equal(compiled(images), fused(images))


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_float_convolutions_take_the_batch_norm_behind_them(bias, tmp_path):
    torch.manual_seed(0)
    layers = [
        conv(5, 8, bias=bias),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 3, 1),
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm2d(6),
    ]
    model, x = nn.Sequential(*layers), torch.randn(4, 5, 6, 6)
    settled(fb.quantize_(model, STATIC, skip=("0", "3")), x)
    plain, fused = fb.pack_(copy.deepcopy(model), fuse=False), fb.pack_(copy.deepcopy(model))
    y = fused(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    assert [type(m) for m in fused][:2] == [FoldedConv2d, Absorbed] and type(fused[3]) is FoldedConv2d
    assert fb.conversion_report(fused).fusion.fused["0"] == ["BatchNorm2d 1"]
    state = plain.state_dict()
    assert state.keys() == fused.state_dict().keys()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        other.load_state_dict({key: torch.zeros_like(t) for key, t in state.items()})
        assert not other[0](x).any()
        other.load_state_dict(state)
        assert torch.equal(other(x), y)
        assert torch.equal(other.double()(x.double()).float(), fused.double()(x.double()).float())
        fused.float()
    assert storage.packed_size(fused) == storage.packed_size(plain)
    fb.save_packed(fused, tmp_path / "model.safetensors")
    assert torch.equal(fb.load_packed(tmp_path / "model.safetensors", model)(x), y)
    unfuse_(fused)
    assert torch.equal(fused(x), plain(x)) and type(fused[0]) is nn.Conv2d


class InPlace(nn.Module):
    """A shortcut that reads what an activation changes in place."""

    def __init__(self, relu):
        super().__init__()
        self.relu, self.conv = relu, conv(5, 5)

    def forward(self, x):
        return x + self.conv(self.relu(x))


class Later(nn.Module):
    """What a batch norm reads is changed in place before the layer behind it runs."""

    def __init__(self, change):
        super().__init__()
        self.a, self.b, self.norm, self.change = conv(5, 5), conv(5, 5), nn.BatchNorm2d(5), change

    def forward(self, x):
        x = self.a(x)
        y = self.norm(x)
        x = self.change(x)
        return x + self.b(y)


def behind_a_layer(part):
    """A network: nothing else reads what the layer gives. Those who take arguments are called by nobody."""
    return part if isinstance(part, Optional | Arguments) else nn.Sequential(conv(5, 5), part)


def plus_one(x):
    x += 1
    return x


class Optional(nn.Module):
    """Takes another way where it gets no second argument."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu = conv(5, 5), nn.ReLU()

    def forward(self, x, shortcut=None):
        y = self.conv(x)
        if shortcut is None:
            y = y + x
        return self.relu(y)


class Alike(Optional):
    """Takes optional arguments that change nothing."""

    def forward(self, x, mask=None, verbose=False):
        return self.relu(self.conv(x))


@pytest.mark.parametrize(
    "part, fused_into, why_not",
    [
        (lambda: InPlace(nn.ReLU(inplace=True)), [], "it works in place"),
        (lambda: InPlace(nn.Sequential(nn.Identity(), nn.Hardtanh(inplace=True))), [], "it works in place"),
        (
            lambda: InPlace(nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(inplace=True))),
            ["BatchNorm2d", "ReLU"],
            "",
        ),
        (
            lambda: InPlace(nn.Sequential(nn.BatchNorm2d(5), nn.Dropout(), nn.ReLU(inplace=True))),
            ["ReLU"],
            "",
        ),
        (lambda: InPlace(nn.ReLU()), ["ReLU"], ""),
        (lambda: Later(plus_one), [], "something is changed in place between"),
        (lambda: Later(torch.relu_), [], "something is changed in place between"),
        (lambda: Later(lambda x: x.mul_(2)), [], "something is changed in place between"),
        (lambda: Later(lambda x: nn.functional.relu(x, True)), [], "something is changed in place between"),
        (lambda: Later(lambda x: torch.neg(x, out=x)), [], "something is changed in place between"),
        (lambda: Later(nn.ReLU6(inplace=True)), [], "something is changed in place between"),
        (lambda: Later(lambda x: x * 2), ["BatchNorm2d"], ""),
        (lambda: Later(lambda x: (x * 2).add_(1)), ["BatchNorm2d"], ""),
        (Optional, [], ""),
        (Alike, ["ReLU"], ""),
    ],
)
@torch.no_grad()
def test_what_is_changed_in_place_or_depends_on_arguments_fuses_only_where_it_can(part, fused_into, why_not):
    plain, fused, x = both(behind_a_layer(part()), (4, 5, 6, 6))
    y = plain(x)
    close = (fused(x) - y).abs() <= 1e-4 * y.abs().max()
    assert close.float().mean() > 0.99
    report = fb.conversion_report(fused).fusion
    found = [entry.split()[0] for name, entries in report.fused.items() if name != "0" for entry in entries]
    assert found == fused_into
    assert why_not in str(report)


@pytest.mark.parametrize(
    "before, after",
    [((), nn.BatchNorm1d(3)), ((), nn.PReLU(3)), ((), nn.PReLU()), ((nn.BatchNorm1d(3),), nn.Identity())],
)
@torch.no_grad()
def test_channels_that_are_not_the_layers_stay(before, after):
    """A linear layer's channels are the last dim, a batch norm's are dim 1."""
    plain, fused, x = both(nn.Sequential(*before, nn.Linear(6, 6), after), (4, 3, 6))
    torch.testing.assert_close(fused(x), plain(x))
    assert ("its 3 channels are not the layer's 6" in str(fb.conversion_report(fused))) == (
        "3" in repr([*before, after])
    )


@torch.no_grad()
def test_what_hooks_see_stays_what_it_was():
    seen = []
    model = nn.Sequential(conv(5, 5), nn.BatchNorm2d(5), conv(5, 5), nn.ReLU())
    for i in (0, 2):
        model[i].register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, 6)
    settled(fb.quantize_(model, DYNAMIC, overrides={"0": None}, skip=()), x)
    seen.clear()
    model(x)
    fb.pack_(model)(x)
    assert len(seen) == 4
    torch.testing.assert_close(seen[2:], seen[:2])
    assert fb.conversion_report(model).fusion.left["2"] == ["its neighbours: it has hooks"]


class Remembering(nn.Module):
    """Keeps what it computes, counts its calls."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([conv(5, 5), nn.ReLU()])
        self.register_buffer("calls", torch.zeros(()))
        self.all = []

    def forward(self, x):
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        self.last = x
        self.all.append(x)
        return x


@torch.no_grad()
def test_tracing_leaves_no_trace():
    model, seen = nn.Sequential(Remembering(), conv(5, 5)), []
    model[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    x = torch.randn(4, 5, 6, 6)
    fb.quantize_(model, DYNAMIC, skip=()).eval()(x)
    fb.pack_(model)
    assert model[0].calls == 1 and len(model[0].all) == len(seen) == 1
    assert type(model[0].last) is torch.Tensor
    assert fb.conversion_report(model).fusion.fused["0.blocks.0"] == ["ReLU 0.blocks.1"]
    pickle.dumps(model[0].last)


@torch.no_grad()
def test_packing_a_fused_network_again_changes_nothing():
    model = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), conv(5, 5), nn.ReLU())
    _, fused, x = both(model, (4, 5, 6, 6), overrides={"0": None})
    y, report = fused(x), str(fb.conversion_report(fused).fusion)
    assert "cannot trace" not in report
    assert torch.equal(fb.pack_(fused)(x), y) and "cannot trace" not in str(
        fb.conversion_report(fused).fusion
    )


class Hooked(nn.Module):
    """A part whose hook changes what goes in, or what comes out."""

    def __init__(self, *parts, hooked, before=False):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        if before:
            parts[hooked].register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2 + 0.3,))
        else:
            parts[hooked].register_forward_hook(lambda _module, _inputs, output: output * 2 + 0.3)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Arguments(nn.Module):
    """Goes other ways with other arguments."""

    def __init__(self, decide):
        super().__init__()
        self.relu, self.conv, self.decide = nn.ReLU(), conv(5, 5), decide

    def forward(self, x, a=None, b=None, **rest):
        y = self.relu(x + 0.1)  # nothing before it that could do its work
        return self.conv(y) if self.decide(a, b, rest) else self.conv(y) + y


class Given(nn.Module):
    """Its layer is given a residual."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(5, 5), nn.BatchNorm2d(5)

    def forward(self, x):
        y = self.conv(x, x) if isinstance(self.conv, PackedLayer) else self.conv(x) + x
        return self.norm(y)


class Keeping(nn.Module):
    """Keeps what goes into its layer."""

    def __init__(self, keep):
        super().__init__()
        self.relu, self.conv, self.keep, self.kept = nn.ReLU(), conv(5, 5), keep, []

    def forward(self, x):
        y = self.relu(x + 0.1)  # nothing before it that could do its work
        self.keep(self, y)
        return self.conv(y)

    def keep_last(self, y):
        self.last = y

    def keep_all(self, y):
        self.kept.append({"y": y})


def helper(x):
    return x.mul_(2)


torch.fx.wrap("helper")


class Shared(nn.Module):
    """Holds what cannot be copied, its parts in a list, and a method of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.lock = conv(5, 5), nn.ReLU(), threading.Lock()
        self.order, self.step = [self.relu], self.run
        self.loss = self.conv.weight.sum()  # no leaf

    def run(self, x):
        x = self.conv(x)
        for part in self.order:
            x = part(x)
        return x

    def forward(self, x):
        return self.step(x)


@pytest.mark.parametrize(
    "part",
    [
        lambda: Hooked(nn.Sequential(nn.BatchNorm2d(5), nn.Hardtanh()), conv(5, 5), hooked=0),
        lambda: Hooked(nn.BatchNorm2d(5), nn.Sequential(conv(5, 5)), hooked=1, before=True),
        lambda: Hooked(nn.Sequential(conv(5, 5)), nn.BatchNorm2d(5), hooked=0),
        lambda: Arguments(lambda a, b, rest: rest.get("raw") is not None),
        lambda: Arguments(lambda a, b, rest: a is not None and b is None),
        Given,
        lambda: Keeping(Keeping.keep_last),
        lambda: Keeping(Keeping.keep_all),
        lambda: Later(lambda x: (torch._foreach_mul_([x], 2), x)[1]),
        lambda: Later(lambda x: helper(x)),
        lambda: Later(lambda x: torch.sort(x, out=(x, torch.zeros((), dtype=torch.int64)))[0]),
    ],
)
@torch.no_grad()
def test_nothing_that_others_see_changes(part):
    plain, fused, x = both(behind_a_layer(part()), (4, 5, 6, 6))
    y = plain(x)
    assert ((fused(x) - y).abs() <= 1e-4 * y.abs().max()).float().mean() > 0.99
    for name in ("last", "kept"):
        kept = [
            [getattr(m, name) for m in network.modules() if hasattr(m, name)] for network in (fused, plain)
        ]
        torch.testing.assert_close(*kept)


@torch.no_grad()
def test_calls_with_some_of_the_optional_arguments_give_what_they_gave():
    plain, fused, x = both(Arguments(lambda a, b, rest: not (a is not None and b is None)), (4, 5, 6, 6))
    for arguments in ({}, {"a": 1}, {"b": 1}, {"a": 1, "b": 1}):
        torch.testing.assert_close(fused(x, **arguments), plain(x, **arguments))


@torch.no_grad()
def test_what_cannot_be_copied_fuses():
    model = nn.Sequential(Shared(), conv(5, 5))
    x = torch.randn(4, 5, 6, 6)
    y = fb.quantize_(model, DYNAMIC, skip=()).eval()(x)
    torch.testing.assert_close(fb.pack_(model)(x), y)
    assert fb.conversion_report(model).fusion.fused["0.conv"] == ["ReLU 0.relu"]


@torch.no_grad()
def test_a_replaced_forward_pass_stays():
    model = nn.Sequential(nn.ReLU(), conv(5, 5), nn.ReLU())
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, 6)
    settled(fb.quantize_(model, STATIC, skip=()), x)
    model[0].forward = model[2].forward = lambda x: x.sin()
    y = model(x)
    torch.testing.assert_close(fb.pack_(model)(x), y)
    assert "its forward pass has been replaced" in str(fb.conversion_report(model).fusion)
