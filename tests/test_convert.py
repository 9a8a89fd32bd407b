"""The verbs on whole models."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import foldbit as fb
from foldbit.kernels import native
from foldbit.packed.layers import PackedLayer

W1A2 = fb.QuantConfig("ls-1", "ls-2")
W2A2 = fb.QuantConfig("ls-2", "ls-2")
FLOAT = fb.QuantConfig("fp", "fp")


class Net(nn.Module):
    """Five layers to quantize, in blocks, and what lies between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1), "norm": nn.BatchNorm2d(8)})
            for _ in range(2)
        )
        self.along = nn.Conv1d(8, 8, 3)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block["norm"](block["conv"](x)).relu()
        return self.head(self.along(x.flatten(2)).mean(2))


NAMES = ["stem", "blocks.0.conv", "blocks.1.conv", "along", "head"]


def net():
    torch.manual_seed(0)
    return Net()


def quantized(model):
    return [
        n for n, m in model.named_modules() if isinstance(m, fb.QuantConv2d | fb.QuantConv1d | fb.QuantLinear)
    ]


def snapshot(model):
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    return modules, {name: t.clone() for name, t in model.state_dict().items()}, set(vars(model))


def assert_same(model, before):
    modules, state, attributes = snapshot(model)
    assert modules == before[0]
    assert attributes == before[2]
    assert list(state) == list(before[1])
    assert all(torch.equal(t, before[1][name]) for name, t in state.items())


# --- quantize_: which layers


def test_first_and_last_stay_float_by_default():
    model = net()
    assert fb.quantize_(model, W1A2) is model
    assert quantized(model) == NAMES[1:-1]
    assert type(model.blocks[0]["conv"]) is fb.QuantConv2d
    assert type(model.along) is fb.QuantConv1d
    assert type(model.stem) is nn.Conv2d
    report = fb.conversion_report(model)
    assert report.quantized == dict.fromkeys(NAMES[1:-1], W1A2)
    assert report.left_float == {
        "stem": "the first quantizable layer (skip='first-last')",
        "head": "the last quantizable layer (skip='first-last')",
    }


@pytest.mark.parametrize(
    "skip, left",
    [((), []), (("along",), ["along"]), (["stem", "along"], ["stem", "along"]), (tuple(NAMES), NAMES)],
)
def test_skip_names_the_layers_to_leave(skip, left):
    model = fb.quantize_(net(), W1A2, skip=skip)
    assert quantized(model) == [name for name in NAMES if name not in left]
    assert fb.conversion_report(model).left_float == dict.fromkeys(left, "named in skip")


@pytest.mark.parametrize("skip", ["stem", "first", ("stem", "stern"), ("blocks.0.norm",), ("blocks.*",)])
def test_an_unknown_skip_is_refused(skip):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"skip is 'first-last', or a tuple|skip names no quantizable layer"):
        fb.quantize_(model, W1A2, skip=skip)
    assert_same(model, before)


def test_a_filter_leaves_layers_float():
    seen = []

    def only_two_dimensional(module, name):
        seen.append(name)
        return isinstance(module, nn.Conv2d)

    model = fb.quantize_(net(), W1A2, filter_fn=only_two_dimensional, skip=())
    assert seen == NAMES
    assert quantized(model) == NAMES[:3]
    assert fb.conversion_report(model).left_float == {"along": "filter_fn", "head": "filter_fn"}


def test_overrides_by_name_and_pattern_first_match_decides():
    model = net()
    overrides = {"blocks.0.conv": None, "blocks.*": W2A2, "*conv": FLOAT, "head": W1A2, "al?ng": FLOAT}
    fb.quantize_(model, W1A2, overrides=overrides)
    report = fb.conversion_report(model)
    assert report.quantized == {"blocks.1.conv": W2A2, "head": W1A2}  # over skip, too
    assert report.left_float == {
        "stem": "the first quantizable layer (skip='first-last')",
        "blocks.0.conv": "override 'blocks.0.conv'",
        "along": "override 'al?ng'",
    }
    assert model.blocks[1]["conv"].config == W2A2
    assert fb.conversion_report(fb.quantize_(net(), W1A2, overrides={"*": None})).quantized == {}


@pytest.mark.parametrize("pattern", ["blocks.2.*", "conv", "HEAD", "", "blocks.0.norm"])
def test_an_override_that_matches_nothing_is_refused(pattern):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"matches no quantizable layer; there are: stem, blocks\.0\.conv"):
        fb.quantize_(model, W1A2, overrides={"head": W2A2, pattern: None})
    assert_same(model, before)


@pytest.mark.parametrize("wrong", ["ls-1", {"weight": "ls-1"}, 1, fb.QuantConfig])
def test_what_is_no_config_is_refused(wrong):
    model = net()
    before = snapshot(model)
    with pytest.raises(TypeError, match="override 'head' is a QuantConfig or None"):
        fb.quantize_(model, W1A2, overrides={"head": wrong})
    with pytest.raises(TypeError, match="config is a QuantConfig"):
        fb.quantize_(model, wrong)
    assert_same(model, before)


def test_a_float_config_leaves_everything_float():
    model = fb.quantize_(net(), FLOAT, skip=())
    assert quantized(model) == []
    reason = "its config is fp for weight and activation"
    assert fb.conversion_report(model).left_float == dict.fromkeys(NAMES, reason)


def test_half_float_configs_quantize():
    for config in (fb.QuantConfig("fp", "ls-2"), fb.QuantConfig("ls-1", "fp")):
        assert quantized(fb.quantize_(net(), config, skip=())) == NAMES


def test_unsupported_layers_are_reported_with_the_reason():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
            "volume": nn.Conv3d(8, 8, 3),
            "bilinear": nn.Bilinear(8, 8, 8),
            "recurrent": nn.LSTM(8, 8),
            "cell": nn.GRUCell(8, 8),
            "own": Own(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "lazy": nn.LazyLinear(8),
        }
    )
    fb.quantize_(model, W1A2, skip=())
    assert quantized(model) == ["plain"]
    assert fb.conversion_report(model).left_float == {
        "transposed": "ConvTranspose2d has no quantized twin",
        "volume": "Conv3d has no quantized twin",
        "bilinear": "Bilinear has no quantized twin",
        "recurrent": "LSTM has no quantized twin",
        "cell": "GRUCell has no quantized twin",
        "own": "Own is a subclass with code, parameters or parts of its own",
        "attention.out_proj": "MultiheadAttention reads its weight without calling it",
        "normed": "its weight is computed from other parameters, as weight_norm does",
        "lazy": "LazyLinear is a subclass with code, parameters or parts of its own",
    }


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 8)))
    prune.random_unstructured(model[0], "weight", 0.5)
    fb.quantize_(model, W1A2, skip=())
    reason = "its weight is computed from other parameters, as weight_norm does"
    assert fb.conversion_report(model).left_float == {"0": reason, "1": reason}


@torch.no_grad()
def test_layers_whose_weights_are_read_past_them_are_left_alone():
    """Quantized, they would be skipped by the fast path in evaluation, and not skipped in training."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    model = nn.Sequential(encoder, nn.TransformerDecoderLayer(16, 2, 32), nn.Linear(16, 16)).eval()
    x = torch.randn(2, 5, 16)
    y = encoder(x)
    fb.quantize_(model, W1A2, skip=())
    assert torch.equal(encoder(x), y)
    assert quantized(model) == ["1.linear1", "1.linear2", "2"]
    assert "without calling it" in fb.conversion_report(model).left_float["0.layers.1.linear2"]


class Windowed(nn.Module):
    """Reads the weight of one child, as windowed attention does, and calls the others."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.shared = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return self.shared(self.proj(y.to(self.proj.weight.dtype)))


def test_a_forward_pass_that_reads_a_weight_is_noticed():
    model = nn.Sequential(type("Inheriting", (Windowed,), {})(), nn.Linear(4, 4))
    fb.quantize_(model, W1A2, skip=())
    assert quantized(model) == ["0.proj", "0.shared", "1"]
    assert fb.conversion_report(model).left_float == {
        "0.qkv": "Inheriting reads its weight without calling it"
    }


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 3),
        nn.Conv2d(3, 3, 1),
        fb.QuantLinear(3, 3),
        nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3),
    ],
)
def test_a_bare_layer_is_refused(layer):
    with pytest.raises(TypeError, match=f"{type(layer).__name__}"):
        fb.quantize_(layer, W1A2)


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            fb.QuantConfig(granularity="group", group_size=5),
            r"layer blocks\.1\.conv: group_size 5 does not divide",
        ),
        (
            fb.QuantConfig(granularity="rank", rank=50),
            r"layer blocks\.1\.conv: rank 50 does not fit a matrix of",
        ),
        (
            fb.QuantConfig(activation_estimator="magic"),
            r"layer blocks\.1\.conv: unknown gradient estimator 'magic'",
        ),
    ],
)
def test_nothing_is_half_converted_on_an_error(bad, message):
    model = net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fb.quantize_(model, W1A2, overrides={"blocks.1.conv": bad})
    assert_same(model, before)

    def faulty(module, name):
        if name == "along":
            raise RuntimeError("mine")
        return True

    with pytest.raises(RuntimeError, match="mine"):
        fb.quantize_(model, W1A2, filter_fn=faulty)
    assert_same(model, before)
    with pytest.raises(ValueError, match="no report"):
        fb.conversion_report(model)


# --- quantize_: what it keeps


def test_parameters_are_the_same_objects_so_optimizers_stay_valid():
    model = net().train()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fb.quantize_(model, W1A2, skip=())
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    model(torch.randn(4, 3, 7, 7)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{name}.weight" for name in NAMES} <= changed


def test_modes_and_state_dict_names_are_kept():
    model = net()
    model.along.eval()
    names = list(model.state_dict())
    fb.quantize_(model, W1A2, skip=())
    assert list(model.state_dict()) == names
    assert model.training
    assert not model.along.training
    assert model.head.training
    model.load_state_dict(net().state_dict())


def test_quantizing_twice_keeps_what_is_quantized():
    model = fb.quantize_(net(), W1A2)
    layers = {name: model.get_submodule(name) for name in NAMES[1:-1]}
    fb.quantize_(model, W2A2, skip=())
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    report = fb.conversion_report(model)
    assert report.quantized == dict.fromkeys(NAMES[1:-1], W1A2) | {"stem": W2A2, "head": W2A2}
    assert report.left_float == {}
    again = fb.conversion_report(fb.quantize_(model, W2A2))
    assert again == report


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(8, 8))
    fb.quantize_(model, W1A2, skip=())
    assert model[0] is model[1][1]
    assert type(model[0]) is fb.QuantLinear
    fb.pack_(model)
    assert model[0] is model[1][1]
    assert isinstance(model[0], PackedLayer)


def test_the_report_as_text():
    model = fb.quantize_(net(), W1A2, overrides={"along": None})
    assert str(fb.conversion_report(model)).splitlines() == [
        "quantized 2 layers, left 3 float",
        "  blocks.0.conv: W1A2 (ls-1 weight, ls-2 input)",
        "  blocks.1.conv: W1A2 (ls-1 weight, ls-2 input)",
        "  stem: float, the first quantizable layer (skip='first-last')",
        "  along: float, override 'along'",
        "  head: float, the last quantizable layer (skip='first-last')",
    ]
    assert fb.conversion_report(copy.deepcopy(model)) == fb.conversion_report(model)


def test_a_model_without_layers_has_an_empty_report():
    report = fb.conversion_report(fb.quantize_(nn.Sequential(nn.ReLU()), W1A2))
    assert str(report) == "quantized 0 layers, left 0 float"


# --- pack_


@pytest.mark.parametrize("backend", native.available())
def test_a_packed_model_is_in_evaluation_mode_and_says_the_same(backend):
    model = fb.quantize_(net(), W1A2).train()
    x = torch.randn(4, 3, 7, 7)
    model(x)
    with torch.no_grad():
        y = copy.deepcopy(model).eval()(x)
        with native.use(backend):
            assert fb.pack_(model) is model
            assert not any(m.training for m in model.modules())
            # Here rounding may move a value across a threshold of the next layer: rarely, and not far.
            torch.testing.assert_close(model(x), y, atol=1e-3, rtol=0)
    assert sum(isinstance(m, PackedLayer) for m in model.modules()) == 3


def test_packing_twice_changes_nothing():
    model = fb.pack_(fb.quantize_(net(), W1A2))
    before = snapshot(model)
    fb.pack_(model.train())
    assert_same(model, before)


def test_packing_leaves_the_float_layers_and_their_parameters():
    model = fb.quantize_(net(), W1A2)
    stem = model.stem
    fb.pack_(model)
    assert model.stem is stem
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"stem", "blocks", "head"}


def damaged(model):
    model.head.weight.data[0, 0] = torch.nan
    return model


STATIC = fb.QuantConfig(activation_scales="static")
RANK_1 = fb.QuantConfig(granularity="rank", rank=1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: net(), "nothing to pack.*quantize_ first"),
        (lambda: fb.quantize_(net(), STATIC), r"layer blocks\.0\.conv cannot be packed.*never seen data"),
        (
            lambda: fb.quantize_(net(), W1A2, overrides={"along": fb.QuantConfig("fp", "ls-2")}),
            "layer along cannot be packed: its weight is float",
        ),
        (lambda: damaged(fb.quantize_(net(), W1A2, skip=())), "layer head cannot be packed.*NaN"),
        (
            lambda: fb.quantize_(net(), W1A2, overrides={"along": fb.QuantConfig(granularity="input")}),
            "layer along cannot be packed: with granularity 'input' .* along the sum .*train with 'channel'",
        ),
        (
            lambda: fb.quantize_(net(), W1A2, overrides={"along": RANK_1}),
            "layer along cannot be packed: with granularity 'rank' .* along the sum .*train with 'channel'",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_and_unchanged(make, message):
    model = make().train()
    before = [(name, id(m), m.training) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        fb.pack_(model)
    assert [(name, id(m), m.training) for name, m in model.named_modules()] == before


def test_a_bare_quantized_layer_is_refused():
    with pytest.raises(TypeError, match=r"wrap this QuantLinear in nn\.Sequential"):
        fb.pack_(fb.QuantLinear(3, 3))


# --- whole networks


def settled(model, x):
    """A quantized network in evaluation, whose batch normalisation has seen data."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


@pytest.mark.parametrize("scales", ["dynamic", "static"])
@pytest.mark.parametrize("activation", ["ls-1", "ls-2", "ls-T"])
@pytest.mark.parametrize(
    "name, arguments, shape",
    [
        ("resnet8-xnor", {"widths": (8, 12, 16), "nonlinearity": "prelu"}, (16, 1, 16, 16)),
        ("lenet5", {}, (8, 1, 28, 28)),
    ],
)
@torch.no_grad()
def test_registered_networks_layer_by_layer(name, arguments, shape, activation, scales):
    """Every packed layer of a network agrees with its twin on the input that it gets there."""
    torch.manual_seed(0)
    model = fb.models.create(name, **arguments)
    config = fb.QuantConfig("ls-1", activation, activation_scales=scales, clamp=3.0)
    fb.quantize_(model, config, overrides=fb.models.float_layers(model))
    x = torch.randn(shape)
    settled(model, x)
    packed = fb.pack_(copy.deepcopy(model), fuse=False)
    calls = {}

    def remember(module, arguments, output):
        calls[module] = arguments[0], output

    layers = {n: m for n, m in model.named_modules() if isinstance(m, fb.QuantConv2d | fb.QuantLinear)}
    hooks = [layer.register_forward_hook(remember) for layer in layers.values()]
    y = model(x)
    for hook in hooks:
        hook.remove()
    assert len(calls) == (6 if name == "resnet8-xnor" else 2)
    for layer_name, layer in layers.items():
        given, expected = calls[layer]
        got = packed.get_submodule(layer_name)(given)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Rounding between the layers may move a value across a threshold: rarely, and the logits hardly move.
    for network in (packed, fb.pack_(copy.deepcopy(model))):
        close = (network(x) - y).abs().amax(1) <= 1e-4 * y.abs().max()
        assert close.float().mean() >= 0.75


@torch.no_grad()
def test_a_network_of_ones_own_with_a_module_in_several_places():
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    block = nn.Sequential(shared, nn.BatchNorm2d(8), nn.Hardtanh())
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), block, nn.Sequential(block, nn.Sequential(shared)), nn.Flatten(2)
    )
    x = torch.randn(4, 3, 6, 6)
    settled(fb.quantize_(model, W1A2, skip=()), x)
    y = model(x)
    fb.pack_(model)
    assert sum(isinstance(m, PackedLayer) for m in model.modules()) == 2
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-3 * float(y.abs().max()))


class Renamed(nn.Conv2d):
    """Is only set up otherwise."""

    groups: int

    def reset_parameters(self):
        super().reset_parameters()


class Scaled(nn.Conv2d):
    """Computes something else, below its forward pass."""

    def _conv_forward(self, x, weight, bias):
        return 2 * super()._conv_forward(x, weight, bias)


class Called(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class More(nn.Conv2d):
    """Has a parameter that others use."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


def test_subclasses_that_are_only_set_up_otherwise_are_quantized():
    replaced = nn.Conv2d(4, 4, 1)
    replaced.forward = lambda x: x
    model = nn.Sequential(*(kind(4, 4, 1) for kind in (Renamed, Scaled, Called, More)), replaced)
    model[0].rate = 0.1
    fb.quantize_(model, W1A2, skip=())
    assert quantized(model) == ["0"] and type(model[0]) is fb.QuantConv2d and model[0].rate == 0.1
    left = fb.conversion_report(model).left_float
    assert [left[name].split()[0] for name in "123"] == ["Scaled", "Called", "More"]
    assert left["4"] == "its forward pass has been replaced"


class Helped(Windowed):
    """Reads the weight in a method that the forward pass calls; others read weights, too."""

    def __init__(self):
        super().__init__()
        nn.init.ones_(self.shared.weight)

    def scale(self):
        self.proj.weight.data.mul_(2)

    def project(self, x):
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias)

    def forward(self, x):
        return self.shared(self.proj(self.project(x)))


class Decorated(Windowed):
    @torch.no_grad()
    def forward(self, x):
        return self.shared(self.proj(nn.functional.linear(x, self.qkv.weight)))


class Variable(Windowed):
    def forward(self, x):
        qkv = self.qkv
        return self.shared(self.proj(nn.functional.linear(x, qkv.weight, qkv.bias)))


class Inner(Windowed):
    @property
    def matrices(self):
        return [module.weight for module in (self.qkv,)] + [(lambda: self.qkv.weight)()]

    def forward(self, x):
        return self.shared(self.proj(nn.functional.linear(x, self.matrices[0])))


@pytest.mark.parametrize("kind", [Helped, Decorated, Variable, Inner])
def test_what_the_forward_pass_reads_by_way_of_others_is_noticed(kind):
    model = nn.Sequential(kind(), nn.Linear(4, 4))
    fb.quantize_(model, W1A2, skip=())
    assert quantized(model) == ["0.proj", "0.shared", "1"]


@torch.no_grad()
def test_hooks_stay_and_can_be_removed():
    seen = []
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    x = torch.randn(2, 4)
    fb.quantize_(model, W1A2, skip=())(x)
    fb.pack_(model)(x)
    assert seen == ["before", "after"] * 2
    handle.remove()
    model(x)
    assert seen[4:] == ["before"]
