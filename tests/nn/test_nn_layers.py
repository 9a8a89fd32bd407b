"""Quantized layers against their torch.nn twins, fed and filled with what quantizing gives."""

import copy
import io

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit.nn import layers
from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLinear, from_float

STATIC = fb.QuantConfig(activation_scales="static")

# Float layers, and the shape of an input.
FLOATS = {
    "linear": (lambda **o: nn.Linear(12, 5, **o), (4, 12)),
    "linear, tokens": (lambda **o: nn.Linear(12, 5, bias=False, **o), (4, 7, 12)),
    "conv1d": (lambda **o: nn.Conv1d(6, 4, 3, padding=1, **o), (4, 6, 9)),
    "conv1d, all options": (
        lambda **o: nn.Conv1d(
            6, 4, 3, stride=2, padding=3, dilation=2, groups=2, padding_mode="circular", bias=False, **o
        ),
        (4, 6, 11),
    ),
    "conv2d": (lambda **o: nn.Conv2d(3, 4, 3, **o), (4, 3, 8, 7)),
    "conv2d, strided": (
        lambda **o: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), **o),
        (4, 4, 8, 7),
    ),
    "conv2d, same": (
        lambda **o: nn.Conv2d(4, 6, 4, padding="same", dilation=(1, 2), bias=False, **o),
        (4, 4, 8, 9),
    ),
    "conv2d, valid": (lambda **o: nn.Conv2d(4, 6, 2, padding="valid", **o), (4, 4, 8, 9)),
    "conv2d, reflect": (lambda **o: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", **o), (4, 4, 8, 9)),
    "conv2d, replicate": (
        lambda **o: nn.Conv2d(4, 6, 3, padding="same", padding_mode="replicate", **o),
        (4, 4, 8, 9),
    ),
    "conv2d, depthwise": (lambda **o: nn.Conv2d(6, 6, 3, groups=6, padding=1, **o), (4, 6, 8, 9)),
    "conv2d, groups": (lambda **o: nn.Conv2d(8, 4, 3, groups=2, padding=1, dilation=2, **o), (4, 8, 8, 9)),
    "conv2d, 1×1": (lambda **o: nn.Conv2d(8, 4, 1, **o), (4, 8, 3, 3)),
}


@pytest.fixture(params=FLOATS)
def case(request):
    """A float layer and an input, in float64."""
    torch.manual_seed(0)
    build, shape = FLOATS[request.param]
    return build(dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


def approximated(layer, scheme):
    """The float layer with its weight replaced by what quantizing each output channel gives."""
    twin = copy.deepcopy(layer)
    if scheme != "fp":
        weights = [fb.quantize(w, scheme, None).values() for w in layer.weight.detach()]
        twin.weight = nn.Parameter(torch.stack(weights))
    return twin


def quantized(x, scheme):
    return x if scheme == "fp" else torch.stack([fb.quantize(s, scheme, None).values() for s in x])


# ---------------------------------------------------------------------------------------------------------
# Forward


@pytest.mark.parametrize(
    ("weight", "activation"),
    [("ls-1", "ls-2"), ("ls-T", "ls-T"), ("ls-2", "ls-1"), ("gf-3", "fp"), ("fp", "ls-2"), ("fp", "fp")],
)
def test_outputs_are_the_float_layers_of_quantized_weights_and_inputs(case, weight, activation):
    """Padding included: a padded zero adds nothing, other modes repeat quantized values."""
    layer, x = case
    twin = from_float(layer, fb.QuantConfig(weight=weight, activation=activation))
    expected = approximated(layer, weight)(quantized(x, activation))
    torch.testing.assert_close(twin(x), expected, rtol=1e-10, atol=1e-10)


def test_zero_padding_adds_nothing():
    layer = QuantConv2d(2, 3, 3, padding=1, bias=False, config=fb.QuantConfig(activation="ls-1"))
    x = torch.ones(1, 2, 1, 1)
    torch.testing.assert_close(layer(x)[0, :, 0, 0], layer.weight_quantizer(layer.weight)[:, :, 1, 1].sum(1))


def test_batches_of_one_equal_batches_of_many(case):
    layer, x = case
    twin = from_float(layer, fb.QuantConfig())
    crowd = torch.cat([x, 100 * x, x.flip(0)])
    one_by_one = torch.cat([twin(sample[None]) for sample in crowd])
    torch.testing.assert_close(twin(crowd), one_by_one, rtol=1e-10, atol=1e-10)


def test_a_bad_sample_spoils_no_other():
    layer = QuantConv2d(3, 4, 3)
    x = torch.randn(3, 3, 8, 8)
    expected = layer(x)
    x[1, 0, 0, 0] = torch.nan
    got = layer(x)
    assert torch.equal(got[[0, 2]], expected[[0, 2]]) and got[1].isnan().all()


@pytest.mark.parametrize(
    "config", [fb.QuantConfig(), STATIC, fb.QuantConfig(activation_granularity="tensor")]
)
def test_inputs_without_a_batch_are_batches_of_one(config):
    for layer, shape in [
        (QuantLinear(12, 5, config=config), (12,)),
        (QuantConv1d(6, 4, 3, config=config), (6, 9)),
        (QuantConv2d(3, 4, 3, config=config), (3, 8, 7)),
    ]:
        x = torch.randn(shape)
        for mode in [True, False]:
            layer.train(mode)
            got = layer(x)
            assert got.ndim == x.ndim
            torch.testing.assert_close(got, layer(x[None])[0])


@pytest.mark.parametrize(
    "config", [fb.QuantConfig(), STATIC, fb.QuantConfig(activation_granularity="tensor")]
)
def test_empty_batches(config, case):
    layer, x = case
    twin = from_float(layer, config)
    for mode in [True, False]:
        assert twin.train(mode)(x[:0]).shape == layer(x[:0]).shape


def test_channels_last_inputs_and_weights():
    layer = QuantConv2d(4, 6, 3, padding=1, config=fb.QuantConfig("ls-2", "ls-2"))
    x = torch.randn(2, 4, 8, 8)
    expected = layer(x)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(layer(x.transpose(2, 3)), layer(x.transpose(2, 3).contiguous()))


@pytest.mark.parametrize("config", [fb.QuantConfig("ls-T", "ls-2", clamp=2.0), STATIC])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, config):
    torch.manual_seed(0)
    for layer, shape in [
        (QuantConv2d(4, 6, 3, padding=1, config=config), (3, 4, 8, 8)),
        (QuantConv1d(4, 6, 3, config=config), (3, 4, 8)),
        (QuantLinear(12, 5, config=config), (3, 12)),
    ]:
        layer.to(dtype)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
        assert x.grad.dtype == layer.weight.grad.dtype == dtype and layer.weight.grad.isfinite().all()
        wide = copy.deepcopy(layer).float()
        # A value on a threshold may fall to the other side, so that only the whole can be compared.
        expected = wide(x.float())
        assert (y.float() - expected).norm() < 0.1 * expected.norm()
        assert layer.eval()(x).dtype == dtype


def test_autocast():
    layer = QuantConv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("edit", ["in place", "data", "parameter", "load", "optimizer"])
def test_edited_weights_take_effect_at_once(edit):
    layer = QuantLinear(12, 5, bias=False).eval()
    x = torch.randn(3, 12)
    layer(x)
    new = 3 * layer.weight.detach().clone() + 1
    with torch.no_grad():
        if edit == "in place":
            layer.weight.copy_(new)
        elif edit == "data":
            layer.weight.data = new
        elif edit == "parameter":
            layer.weight = nn.Parameter(new)
        elif edit == "load":
            layer.load_state_dict({"weight": new})
    if edit == "optimizer":
        layer.weight.grad = layer.weight.detach() - new
        torch.optim.SGD([layer.weight], lr=1.0).step()
    fresh = QuantLinear(12, 5, bias=False).eval()
    fresh.load_state_dict({"weight": new})
    torch.testing.assert_close(layer(x), fresh(x))


# ---------------------------------------------------------------------------------------------------------
# Gradients


def test_gradients_reach_inputs_weights_and_biases(case):
    """Those of the float layer of approximations, through the windows."""
    layer, x = case
    config = fb.QuantConfig("ls-2", "ls-2", activation_estimator="clipped", weight_estimator="identity")
    twin = from_float(copy.deepcopy(layer), config)
    x = x.requires_grad_()
    y = twin(x)
    grad = torch.randn_like(y)
    y.backward(grad)

    reference = approximated(layer, "ls-2")
    z = quantized(x.detach(), "ls-2").requires_grad_()
    reference(z).backward(grad)
    torch.testing.assert_close(twin.weight.grad, reference.weight.grad)
    torch.testing.assert_close(x.grad, z.grad * (x.abs() <= 1))
    assert x.grad.any() and twin.weight.grad.any()
    if layer.bias is not None:
        torch.testing.assert_close(twin.bias.grad, reference.bias.grad)
        assert twin.bias.grad.any()


INPUT = fb.QuantConfig("ls-2", granularity="input")
RANK_2 = fb.QuantConfig("ls-2", granularity="rank", rank=2)


@pytest.mark.parametrize(
    "config", [fb.QuantConfig(clamp=2.0), STATIC, fb.QuantConfig("ls-T", "ls-T"), INPUT, RANK_2]
)
def test_a_layer_learns(config):
    torch.manual_seed(0)
    layer = nn.Sequential(QuantLinear(16, 32, config=config), nn.Linear(32, 1))
    x = torch.randn(64, 16)
    target = x[:, :1].sign()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


# ---------------------------------------------------------------------------------------------------------
# Construction


def test_the_constructors_take_their_twins_arguments():
    linear = QuantLinear(12, 5, False, config=STATIC, dtype=torch.float64)
    assert isinstance(linear, nn.Linear) and linear.bias is None and linear.weight.dtype == torch.float64
    conv = QuantConv2d(8, 6, (3, 1), 2, (1, 0), groups=2, padding_mode="reflect")
    assert isinstance(conv, nn.Conv2d) and conv.stride == (2, 2) and conv.weight.shape == (6, 4, 3, 1)
    assert conv.config == layers.DEFAULT_CONFIG == fb.QuantConfig()
    assert isinstance(QuantConv1d(4, 2, 3), nn.Conv1d)


def test_from_float_keeps_all_but_the_type(case):
    layer, _ = case
    names = [
        *["in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding"],
        *["dilation", "groups", "padding_mode"],
    ]
    for mode in [True, False]:
        twin = from_float(layer.train(mode), STATIC)
        assert type(twin) is layers.TWINS[type(layer)] and twin.config is STATIC
        assert twin.weight is layer.weight and twin.bias is layer.bias
        for name in names:
            assert getattr(twin, name, None) == getattr(layer, name, None)
        assert all(module.training is mode for module in twin.modules())
        assert [*twin.parameters()] == [*layer.parameters()]


def test_from_float_leaves_frozen_parameters_frozen():
    layer = nn.Linear(3, 2).requires_grad_(False)
    twin = from_float(layer, fb.QuantConfig())
    assert not any(p.requires_grad for p in twin.parameters())
    assert not twin(torch.randn(4, 3)).requires_grad


def test_running_scales_live_where_the_weight_does():
    assert from_float(nn.Linear(3, 2), STATIC).input_quantizer.running_scales.device.type == "cpu"
    for layer in [
        QuantConv2d(3, 2, 1, config=STATIC, device="meta"),
        from_float(nn.Linear(3, 2, device="meta"), STATIC),
        QuantConv1d(3, 2, 1, config=STATIC).to("meta"),
    ]:
        assert layer.input_quantizer.running_scales.device.type == "meta"


@pytest.mark.parametrize(
    "layer", [nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ReLU(), QuantLinear(2, 2), nn.Identity()]
)
def test_layers_without_a_twin_are_refused(layer):
    name = type(layer).__name__
    with pytest.raises(
        TypeError, match=f"{name} has no quantized twin; those that do: Conv2d, Conv1d, Linear"
    ):
        from_float(layer, fb.QuantConfig())


def test_subclasses_that_compute_something_else_have_no_twin():
    class Special(nn.Linear):
        def forward(self, x):
            return x

    with pytest.raises(TypeError, match="Special has no quantized twin"):
        from_float(Special(2, 2), fb.QuantConfig())


def test_configs_that_do_not_fit_are_refused():
    grouped = fb.QuantConfig(granularity="group", group_size=8)
    # With 2 groups, an output channel sees 8 of 16 input channels.
    assert QuantConv2d(16, 4, 3, groups=2, config=grouped).weight_quantizer.segments == 1
    with pytest.raises(ValueError, match="group_size 8 does not divide the 4 input channels"):
        QuantConv2d(16, 4, 3, groups=4, config=grouped)
    with pytest.raises(ValueError, match="group_size 8 does not divide the 12"):
        from_float(nn.Linear(12, 4), grouped)
    with pytest.raises(ValueError, match="rank 2 does not fit a matrix of 1×12"):
        from_float(nn.Linear(12, 1), RANK_2)
    for field in ["weight_estimator", "activation_estimator"]:
        with pytest.raises(ValueError, match="unknown gradient estimator 'ste'"):
            QuantLinear(4, 4, config=fb.QuantConfig(**{field: "ste"}))


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


def test_state_dicts_are_the_float_layers(case):
    layer, x = case
    twin = from_float(copy.deepcopy(layer), fb.QuantConfig("ls-2", "ls-T", clamp=1.0))
    assert list(twin.state_dict()) == list(layer.state_dict())
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    other = copy.deepcopy(layer)
    other.load_state_dict(twin.state_dict())
    assert torch.equal(other.weight, twin.weight) and other(x).shape == twin(x).shape


@pytest.mark.parametrize("config", [fb.QuantConfig(), STATIC])
def test_float_checkpoints_load_strictly(case, config):
    layer, x = case
    twin = nn.Sequential(from_float(copy.deepcopy(layer), config))
    checkpoint = nn.Sequential(layer).state_dict()
    keys = list(checkpoint)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    report = twin.load_state_dict(checkpoint)
    assert not report.missing_keys and not report.unexpected_keys
    assert list(checkpoint) == keys  # nothing was inserted
    expected = from_float(layer, config).eval()(x)
    assert torch.equal(twin.eval()(x), expected) and expected.any()


def test_static_checkpoints_have_one_key_more():
    layer = QuantLinear(12, 5, config=STATIC)
    assert list(layer.state_dict()) == ["weight", "bias", "input_quantizer.running_scales"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_scales"):
        nn.Linear(12, 5).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*running_scales"):
        QuantLinear(12, 5).load_state_dict(layer.state_dict())
    assert nn.Linear(12, 5).load_state_dict(layer.state_dict(), strict=False).unexpected_keys == [
        "input_quantizer.running_scales"
    ]


def test_broken_checkpoints_are_still_refused():
    layer = QuantLinear(12, 5, config=STATIC)
    with pytest.raises(RuntimeError, match=r'Missing key.*"bias"'):
        layer.load_state_dict({"weight": layer.weight})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        layer.load_state_dict({**layer.state_dict(), "input_quantizer.scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(13, 5).state_dict())


def trained(config=STATIC):
    model = nn.Sequential(QuantConv2d(3, 4, 3, config=config), nn.ReLU(), QuantConv2d(4, 4, 3, config=config))
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def test_running_scales_survive_files_and_copies():
    model = trained()
    x = torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = nn.Sequential(
        QuantConv2d(3, 4, 3, config=STATIC), nn.ReLU(), QuantConv2d(4, 4, 3, config=STATIC)
    )
    loaded.load_state_dict(torch.load(file))
    for other in [loaded.eval(), copy.deepcopy(model)]:
        assert torch.equal(other(x), model(x))
        assert all(other[i].input_quantizer.seen for i in (0, 2))
        for p in other.parameters():
            assert all(p is not q for q in model.parameters())


def test_whole_layers_can_be_pickled():
    model, x = trained(), torch.randn(2, 3, 8, 8)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_a_float_checkpoint_over_a_trained_layer_forgets_its_running_scales():
    layer = trained()[0]
    layer.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())
    assert not layer.input_quantizer.seen and not layer.input_quantizer.running_scales.any()


@pytest.mark.parametrize("config", [fb.QuantConfig(), STATIC])
def test_layers_without_memory_are_filled_by_assignment(config):
    with torch.device("meta"):
        layer = QuantLinear(12, 5, config=config)
    float_layer = nn.Linear(12, 5)
    layer.load_state_dict(float_layer.state_dict(), assign=True)
    x = torch.randn(3, 12)
    assert torch.equal(layer.eval()(x), from_float(float_layer, config).eval()(x))
    assert layer.train()(x).isfinite().all()


# ---------------------------------------------------------------------------------------------------------
# Tracing


@pytest.mark.parametrize("config", [fb.QuantConfig("ls-2", "ls-2", clamp=2.0), STATIC])
def test_compile_and_export_in_evaluation(config):
    model = trained(config)
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(exported(x[:3]), model(x[:3]))


@pytest.mark.parametrize(
    "config",
    [
        fb.QuantConfig("ls-T", "ls-2", activation_estimator="polynomial"),
        fb.QuantConfig("ls-1", "ls-1", "input"),
        fb.QuantConfig("ls-1", "ls-1", "rank", rank=2),
    ],
    ids=lambda config: config.granularity,
)
def test_compile_in_training(config):
    layer = QuantConv2d(3, 4, 3, config=config)
    x = torch.randn(4, 3, 8, 8)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    torch.compiler.reset()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_arguments_that_are_mistaken_or_named():
    config = fb.QuantConfig("ls-2", "ls-1")
    for kind, arguments in [
        (fb.QuantLinear, (3, 4)),
        (fb.QuantConv1d, (3, 4, 1)),
        (fb.QuantConv2d, (3, 4, 1)),
    ]:
        with pytest.raises(TypeError, match=f"{kind.__name__} takes its config by name"):
            kind(*arguments, config)
        with pytest.raises(TypeError, match="config is a QuantConfig; got NoneType"):
            kind(*arguments, config=None)
    assert fb.QuantLinear(3, 4)(input=torch.randn(2, 3)).shape == (2, 4)
