"""A packed layer against its quantized twin: the same signs, hence the same numbers up to float rounding."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import foldbit as fb
from foldbit.core import axes, folding, schemes
from foldbit.kernels import layout, native
from foldbit.nn import layers as quant
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec

BACKENDS = native.available()
# Searches for 3 and 4 bits take a second here and there: they have tests of their own below.
SEARCHED = ["ls-3", "ls-4", "lsf-3", "lsf-4"]
SCHEMES = [name for name in schemes.names() if name not in ("fp", *SEARCHED)]
FOLDABLE = [name for name in SCHEMES if schemes.parse(name).foldable]
CHANNELS = [1, 3, 31, 32, 33, 64, 100]


def twins(layer, config):
    """A quantized layer in evaluation mode and its packed twin."""
    model = nn.Sequential(quant.from_float(layer, config)).eval()
    return model[0], fb.pack_(copy.deepcopy(model))[0]


def term_size(layer, x):
    """What an output comes to when all its terms have random signs: the measure of rounding errors."""
    if x.numel() == 0:
        return 0.0
    layer = copy.deepcopy(layer).float()
    _, scales = layer.weight_quantizer.codes(layer.weight)
    quantizer, x = layer.input_quantizer, x.float()
    if not quantizer.scheme.is_float:
        batch = x if x.ndim >= layer.weight.ndim else x[None]
        activation_scales, dims = quantizer._scales(batch)
        x = axes.spread(activation_scales, batch.shape, dims).sum(0).expand(batch.shape).reshape(x.shape)
    bias = 0.0 if layer.bias is None else layer.bias.abs().max()
    plain = fb.QuantConfig(weight="fp", activation="fp")
    layer.config, layer.bias = plain, None
    quant._add_quantizers(layer, plain)
    sizes = scales.sum(0).amax(-1).square()
    layer.weight.copy_(sizes.reshape(-1, *[1] * (layer.weight.ndim - 1)).expand_as(layer.weight))
    return layer(x.square()).max().sqrt() + bias


@torch.no_grad()
def assert_twins_agree(layer, packed, x, tolerance=1e-5):
    expected = layer(x)
    outputs = []
    for backend in BACKENDS:
        with native.use(backend):
            outputs.append(packed(x))
    for got in outputs:
        assert got.dtype == x.dtype
        assert got.shape == expected.shape
        assert torch.equal(got, outputs[0])
    atol = float(tolerance * term_size(layer, x))
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=atol)


# --- random layers


def normal(shape, rng):
    return torch.randn(shape, generator=rng)


def with_zeros(shape, rng):
    x = torch.randn(shape, generator=rng)
    x[torch.rand(shape, generator=rng) < 0.3] = 0.0
    x[torch.rand(shape, generator=rng) < 0.3] = -0.0
    return x


def grid(shape, rng):  # few magnitudes: they meet their thresholds exactly
    return torch.randint(-3, 4, shape, generator=rng) / 2


def constant(shape, rng):  # ls-1: every value is ± the scale, and the residual an exact zero
    return torch.full(shape, 0.1) * (1 - 2 * torch.randint(0, 2, shape, generator=rng))


def nothing(shape, rng):
    return torch.zeros(shape)


VALUES = [normal, normal, with_zeros, grid, constant, nothing]


def dense(x):
    return x


def last_dim_first(x):  # channels-last where there are four dims
    order = (0, *range(2, x.ndim), 1) if x.ndim > 1 else (0,)
    return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])


def sliced(x):
    room = torch.full([2 * size + 1 for size in x.shape], torch.nan)
    window = room[(slice(1, None, 2),) * x.ndim]
    window.copy_(x)
    return window


def transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x


MEMORY = [dense, dense, last_dim_first, sliced, transposed]


@st.composite
def configs(draw, channels, activations=(*FOLDABLE, "ls-2", "fp")):
    divisors = [d for d in range(1, channels + 1) if channels % d == 0]
    granularity = draw(st.sampled_from(["tensor", "channel", "channel", "group"]))
    return fb.QuantConfig(
        weight=draw(st.sampled_from(["ls-1", *SCHEMES])),
        activation=draw(st.sampled_from(activations)),
        granularity=granularity,
        group_size=draw(st.sampled_from(divisors)) if granularity == "group" else None,
        activation_scales=draw(st.sampled_from(["dynamic", "static"])),
        activation_granularity=draw(st.sampled_from(["sample", "tensor"])),
        clamp=draw(st.sampled_from([None, None, 0.5, 2])),
    )


@st.composite
def geometries(draw, dims):
    """Arguments of a convolution and a size of images that they allow."""
    each = lambda strategy: draw(st.tuples(*[strategy] * dims))  # noqa: E731
    kernel, dilation = each(st.integers(1, 7)), each(st.integers(1, 2))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    stride = (1,) * dims if padding == "same" else each(st.integers(1, 3))
    if padding == "numbers":
        padding = widest = each(st.integers(0, 4))
    else:
        widest = spans if padding == "same" else (0,) * dims
    # Room for the kernel, and for values to pad with.
    sizes = [max(s, p + 1) + draw(st.integers(0, 4)) for s, p in zip(spans, widest, strict=True)]
    if mode == "zeros" and isinstance(padding, tuple):  # the kernel may see more padding than image
        sizes = [max(1, s - 2 * p) + draw(st.integers(0, 4)) for s, p in zip(spans, padding, strict=True)]
    arguments = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode)
    return arguments, sizes


@st.composite
def problems(draw, config_strategy=configs):
    """A float layer, how to quantize it, and an input."""
    kind = draw(st.sampled_from([nn.Conv2d, nn.Conv2d, nn.Conv1d, nn.Linear]))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    samples = draw(st.sampled_from([0, 1, 1, 2, 3, None]))  # None: unbatched
    lead = () if samples is None else (samples,)
    bias = draw(st.booleans())
    channels = draw(st.sampled_from(CHANNELS))
    if kind is nn.Linear:
        out = draw(st.sampled_from([1, 5, 16, 33]))
        layer = nn.Linear(channels, out, bias)
        middle = draw(st.sampled_from([(), (4,), (2, 3), (1, 1), (0,)])) if lead else ()
        shape = (*lead, *middle, channels)
    else:
        groups, each = draw(st.sampled_from([(1, 1), (1, 5), (1, 17), (2, 3), (7, 1), (33, 2), (33, 1)]))
        if groups == 33:
            channels = 1  # depthwise, with more outputs and without
        elif groups > 1:
            channels = min(channels, 33)
        arguments, sizes = draw(geometries(2 if kind is nn.Conv2d else 1))
        layer = kind(channels * groups, each * groups, groups=groups, bias=bias, **arguments)
        shape = (*lead, channels * groups, *sizes)
    with torch.no_grad():
        layer.weight.copy_(draw(st.sampled_from(VALUES))(layer.weight.shape, rng))
        if bias:
            layer.bias.copy_(normal(layer.bias.shape, rng))
    x = draw(st.sampled_from(MEMORY))(draw(st.sampled_from(VALUES))(shape, rng))
    return layer, draw(config_strategy(channels)), x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(deadline=None, max_examples=150)
@given(problems())
def test_packed_layers_compute_what_their_twins_compute(problem):
    layer, config, x = problem
    torch.manual_seed(0)
    twin = quant.from_float(layer, config)
    if twin.input_quantizer.static:
        with torch.no_grad():
            twin.input_quantizer.train()(torch.randn(100))
    model = nn.Sequential(twin).eval()
    packed = fb.pack_(copy.deepcopy(model))[0]
    assert isinstance(packed, PackedLayer)
    assert not packed.training
    assert_twins_agree(twin, packed, x)


POWERS = {"ls-T": (0.5, 0.5)} | {f"gf-{k}": tuple(2.0**-i for i in range(k)) for k in range(1, 5)}


def exact_configs(channels):
    """Weights that are their own approximation, and inputs of dyadic static scales."""
    return st.builds(
        fb.QuantConfig,
        weight=st.sampled_from(["ls-1", "ls-T"]),
        activation=st.sampled_from(list(POWERS)),
        granularity=st.sampled_from(["tensor", "channel"]),
        activation_scales=st.just("static"),
        clamp=st.sampled_from([None, 0.75]),
    )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(deadline=None, max_examples=120)
@given(problems(exact_configs), st.integers(0, 2**32 - 1))
def test_the_integers_are_exact(problem, seed):
    """Weights of ±1, or −2, 0, 2, and scales that are powers of two: nothing rounds, nothing may differ."""
    layer, config, x = problem
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if config.weight == "ls-1":
            layer.weight.copy_(torch.randint(0, 2, layer.weight.shape, generator=rng) * 2 - 1)
        else:
            layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape, generator=rng) * 2)
        if layer.bias is not None:
            layer.bias.copy_(torch.randint(-9, 9, layer.bias.shape, generator=rng))
    twin = quant.from_float(layer, config).eval()
    twin.input_quantizer.running_scales.copy_(torch.tensor(POWERS[config.activation]))
    packed = fb.pack_(nn.Sequential(copy.deepcopy(twin)))[0]
    with torch.no_grad():
        expected = twin(x)
    for backend in BACKENDS:
        with native.use(backend):
            assert torch.equal(packed(x), expected), backend


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_planes_and_dyadic_scales_give_exact_sums(data):
    """Codes that no solver chose, up to eight planes, several segments: against float64."""
    segments, run = data.draw(st.sampled_from([(1, 1), (1, 33), (3, 2), (2, 32)]))
    groups, out = data.draw(st.sampled_from([(1, 3), (2, 17)]))
    weight_planes = data.draw(st.sampled_from([1, 2, 3, 8]))
    activation_planes = data.draw(st.integers(1, 3 if weight_planes == 8 else 8))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    channels = segments * run
    config = fb.QuantConfig(
        weight=f"gf-{weight_planes}",
        activation=f"gf-{activation_planes}",
        granularity="group",
        group_size=run,
        activation_scales="static",
    )
    conv = nn.Conv2d(channels * groups, out * groups, (2, 3), padding=(1, 2), groups=groups)
    planes = torch.randint(0, 2, (weight_planes, *conv.weight.shape), generator=rng).bool()
    scales = 2.0 ** torch.randint(0, 4, (weight_planes, out * groups, segments), generator=rng)
    activation_scales = 2.0 ** -torch.arange(activation_planes)
    bias = torch.randint(-9, 9, (out * groups,), generator=rng).float()
    packed = PackedLayer.from_codes(LayerSpec.of(conv, config), planes, scales, bias, activation_scales)
    x = torch.randn(2, channels * groups, 4, 5, generator=rng)

    spread = scales.repeat_interleave(run, 2)[..., None, None]
    weight = torch.where(planes, -spread, spread).sum(0)
    assert torch.equal(packed.weight(), weight)
    x_hat = folding.unfold(folding.fold(x, activation_scales, None), activation_scales, None)
    expected = F.conv2d(x_hat.double(), weight.double(), bias.double(), padding=(1, 2), groups=groups)
    for backend in BACKENDS:
        with native.use(backend):
            assert torch.equal(packed(x).double(), expected), backend


# --- particular geometries


@pytest.mark.parametrize("scales", ["per sample", "per tensor", "static"])
@pytest.mark.parametrize("activation", [*FOLDABLE, "fp"])
def test_every_scheme_on_every_kind(activation, scales):
    torch.manual_seed(0)
    for weight, layer, shape in [
        ("ls-1", nn.Conv2d(9, 4, 3, padding=1), (3, 9, 6, 5)),
        ("ls-2", nn.Conv1d(9, 4, 3, stride=2), (3, 9, 8)),
        (activation if activation != "fp" else "gf-8", nn.Linear(20, 4), (3, 20)),
        ("ls-T", nn.Linear(20, 4), (3, 2, 4, 20)),
    ]:
        config = fb.QuantConfig(
            weight,
            activation,
            activation_scales="static" if scales == "static" else "dynamic",
            activation_granularity="tensor" if scales == "per tensor" else "sample",
        )
        twin = quant.from_float(layer, config)
        twin.input_quantizer.train()(torch.randn(1, 99))
        packed = fb.pack_(nn.Sequential(copy.deepcopy(twin)))[0]
        x = torch.randn(shape) * torch.tensor([1.0, 3.0, 0.2]).reshape(3, *[1] * (len(shape) - 1))
        assert_twins_agree(twin.eval(), packed, x)


@pytest.mark.parametrize("activation", ["ls-2", "lsf-3", "fp"])
@pytest.mark.parametrize("weight", [*SEARCHED, "alt-3", "rg-4"])
def test_weights_of_three_and_four_bits_whether_they_fold_or_not(weight, activation):
    torch.manual_seed(0)
    for layer, shape, fields in [
        (nn.Conv2d(9, 4, 3, padding=1), (2, 9, 6, 5), {}),
        (nn.Conv2d(8, 4, 3, groups=2), (2, 8, 6, 5), {"granularity": "tensor"}),
        (nn.Linear(40, 3), (2, 40), {"granularity": "group", "group_size": 20}),
    ]:
        config = fb.QuantConfig(weight, activation, **fields)
        twin, packed = twins(layer, config)
        assert packed.spec.weight_planes == int(weight[-1])
        # The weight that comes out of the bits is the one that trained, and 2 bits would be far from it.
        torch.testing.assert_close(
            packed.weight().reshape(layer.weight.shape), twin.weight_quantizer(layer.weight)
        )
        left = (packed.weight().reshape(layer.weight.shape) - layer.weight).square().sum()
        assert left < 0.09 * layer.weight.square().sum()
        assert_twins_agree(twin, packed, torch.randn(shape))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
def test_channels_and_kernels(channels, kernel):
    torch.manual_seed(channels)
    conv = nn.Conv2d(channels, 9, kernel, padding=kernel // 2)
    layer, packed = twins(conv, fb.QuantConfig("ls-1", "ls-2"))
    assert_twins_agree(layer, packed, torch.randn(2, channels, 7, 8))


@pytest.mark.parametrize("kernel", [(2, 4), (4, 3), (1, 6)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_same_padding_of_even_kernels_has_the_odd_row_below_and_right(kernel, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 4, kernel, padding="same", padding_mode=mode)
    layer, packed = twins(conv, fb.QuantConfig("ls-1", "ls-2"))
    x = torch.randn(2, 5, 7, 8)
    assert packed(x).shape == (2, 4, 7, 8)
    assert packed.spec.padding[1] - packed.spec.padding[0] == (kernel[0] + 1) % 2
    assert_twins_agree(layer, packed, x)


@pytest.mark.parametrize("activation", ["ls-2", "fp"])
def test_a_kernel_larger_than_the_padded_input_is_refused(activation):
    _, packed = twins(nn.Conv2d(3, 4, 3, stride=2), fb.QuantConfig(activation=activation))
    for size in (1, 2):
        with pytest.raises((ValueError, RuntimeError), match=r"kernel spans 3×3.*input is only|Kernel size"):
            packed(torch.randn(1, 3, size, size))


@pytest.mark.parametrize("granularity", ["sample", "tensor"])
@pytest.mark.parametrize("scales", ["dynamic", "static"])
@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Conv2d(3, 4, 3), (0, 3, 5, 5), (0, 4, 3, 3)),
        (nn.Conv1d(3, 4, 3, padding=1), (0, 3, 5), (0, 4, 5)),
        (nn.Linear(3, 4), (0, 3), (0, 4)),
        (nn.Linear(3, 4), (2, 0, 3), (2, 0, 4)),
    ],
)
def test_empty_inputs(layer, shape, expected, scales, granularity):
    config = fb.QuantConfig(activation_scales=scales, activation_granularity=granularity)
    twin = quant.from_float(layer, config)
    twin.input_quantizer.train()(torch.randn(1, 9))
    model = nn.Sequential(twin).eval()
    for backend in BACKENDS:
        with native.use(backend):
            assert fb.pack_(copy.deepcopy(model))(torch.empty(shape)).shape == expected


def test_a_sample_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    layer, packed = twins(nn.Conv2d(33, 4, 3), fb.QuantConfig())
    x = torch.randn(5, 33, 6, 6) * torch.tensor([1, 10, 0.1, 0, 3]).reshape(5, 1, 1, 1)
    together = packed(x)
    for i in range(5):
        assert torch.equal(packed(x[i]), together[i])
        assert torch.equal(packed(x[i : i + 1])[0], together[i])
    assert_twins_agree(layer, packed, x)


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_nan_and_infinity_stay_in_their_sample(scales):
    torch.manual_seed(0)
    twin = quant.from_float(nn.Conv2d(8, 4, 3), fb.QuantConfig(activation_scales=scales))
    twin.input_quantizer.train()(torch.randn(1, 99))
    packed = fb.pack_(nn.Sequential(copy.deepcopy(twin)))[0]
    x = torch.randn(3, 8, 5, 5)
    clean = packed(x)
    x[0, 0, 2, 2], x[1, 3, 1, 1] = torch.nan, -torch.inf
    with torch.no_grad():
        torch.testing.assert_close(packed(x), twin.eval()(x), equal_nan=True)
    assert torch.equal(packed(x)[2], clean[2])


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)]
)
@pytest.mark.parametrize("activation", ["ls-2", "ls-T", "gf-4", "fp"])
def test_other_float_dtypes(dtype, tolerance, activation):
    torch.manual_seed(0)
    config = fb.QuantConfig("ls-2", activation, clamp=2.0)
    for layer, shape in [
        (nn.Conv2d(33, 6, 3, padding=1), (2, 33, 5, 5)),
        (nn.Conv1d(8, 6, 3), (2, 8, 9)),
        (nn.Linear(40, 6), (3, 40)),
    ]:
        twin, packed = twins(layer.to(dtype), config)
        x = torch.randn(shape).to(dtype)
        assert_twins_agree(twin, packed, x, tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_the_result(dtype):
    torch.manual_seed(0)
    twin = quant.from_float(nn.Linear(64, 8), fb.QuantConfig(activation_scales="static"))
    twin.input_quantizer.train()(torch.randn(1, 99))
    packed = fb.pack_(nn.Sequential(twin))[0]
    x = torch.randn(4, 64).to(dtype)
    assert torch.equal(packed(x), packed(x.float()).to(dtype))


def test_wrong_inputs_are_refused_with_the_shape_that_is_expected():
    for layer, shapes, message in [
        (nn.Conv2d(3, 4, 1), [(3,), (4, 5, 5), (1, 2, 5, 5), (1, 1, 3, 5, 5)], r"\[N, C, H, W\].*C = 3"),
        (nn.Conv1d(3, 4, 1), [(3,), (4, 5), (1, 2, 5), (1, 3, 5, 5)], r"\[N, C, L\].*C = 3"),
        (nn.Linear(3, 4), [(), (4,), (3, 2)], r"\[N, \.\.\., C\].*C = 3"),
    ]:
        _, packed = twins(layer, fb.QuantConfig())
        for shape in shapes:
            with pytest.raises(ValueError, match=message):
                packed(torch.ones(shape))
        with pytest.raises(TypeError, match="float32"):
            packed(torch.ones((2, 3, *[4] * {nn.Conv2d: 2, nn.Conv1d: 1, nn.Linear: 0}[type(layer)])).int())


# --- what a packed layer holds


@settings(deadline=None, max_examples=50)
@given(problems())
def test_the_layout_bit_by_bit(problem):
    layer, config, _ = problem
    twin = quant.from_float(layer, config)
    if twin.input_quantizer.static:
        twin.input_quantizer.train()(torch.randn(1, 9))
    packed = fb.pack_(nn.Sequential(twin))[0]
    codes, scales = twin.weight_quantizer.codes(twin.weight)
    k, out = codes.shape[:2]
    kernel = (1,) * (2 - len(layer.weight.shape[2:])) + tuple(layer.weight.shape[2:])
    channels = layer.weight.shape[1]
    assert packed.planes.dtype == torch.uint8
    assert packed.planes.shape == (k, out, *kernel, -(-channels // 8))
    assert packed.scales.dtype == torch.float32
    assert packed.scales.shape[:2] == (k, out)
    assert torch.equal(packed.scales.reshape(scales.shape), scales)

    codes = codes.reshape(k, out, channels, *kernel)
    bits = torch.zeros(k, out, *kernel, 8 * packed.planes.shape[-1], dtype=torch.bool)
    for c in range(bits.shape[-1]):
        bits[..., c] = (packed.planes[..., c // 8].int() >> (c % 8)) & 1
    assert torch.equal(bits[..., :channels], codes.movedim(2, -1))
    assert not bits[..., channels:].any()


def test_the_layout_of_one_row_by_hand():
    linear = nn.Linear(11, 1, bias=False)
    signs = torch.tensor([[-1, 1, 1, -1, 1, 1, 1, 1, -1, 0, -1]])  # 0 is positive
    linear.weight = nn.Parameter(signs.float())
    _, packed = twins(linear, fb.QuantConfig("ls-1"))
    assert packed.planes.flatten().tolist() == [0b00001001, 0b00000101]
    assert packed.scales.flatten().tolist() == pytest.approx([10 / 11])


@pytest.mark.parametrize("channels", [64, 96, 256])
def test_one_bit_weights_cost_little_more_than_one_bit(channels):
    conv = nn.Conv2d(channels, channels, 3, bias=False)
    _, packed = twins(conv, fb.QuantConfig("ls-1", "ls-1"))
    stored = 8 * sum(t.numel() * t.element_size() for t in packed.state_dict().values())
    assert stored <= 1.06 * conv.weight.numel()


def test_the_approximated_weight_is_the_twins():
    torch.manual_seed(0)
    for config in (fb.QuantConfig("ls-2"), fb.QuantConfig("ls-T", granularity="group", group_size=5)):
        conv = nn.Conv2d(30, 6, 3, groups=2)
        layer, packed = twins(conv, config)
        torch.testing.assert_close(packed.weight(), layer.weight_quantizer(layer.weight).detach())


# --- a packed layer among torch's verbs


def some_packed(**changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 6, 3, padding=1, bias=True), nn.BatchNorm2d(6), nn.Conv1d(6, 2, 1))
    model[2] = nn.Conv2d(6, 2, 1)
    fb.quantize_(model, fb.QuantConfig(**changes), skip=())
    model(torch.randn(4, 20, 5, 5))
    return fb.pack_(model, fuse=False), torch.randn(2, 20, 5, 5)


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_copies_and_pickles_compute_the_same(scales):
    model, x = some_packed(activation_scales=scales)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        other[0].load_state_dict({name: torch.zeros_like(t) for name, t in other[0].state_dict().items()})
        assert not other[0](x).any()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_a_loaded_state_reaches_the_kernels(scales):
    model, x = some_packed(activation_scales=scales)
    other, _ = some_packed(activation_scales=scales)
    with torch.no_grad():
        before = other(x)
    flipped = copy.deepcopy(model.state_dict())
    flipped["0.planes"] ^= 255
    flipped["0.planes"][..., -1] &= 0b1111  # 20 channels
    flipped["0.scales"] *= 2
    other.load_state_dict(flipped)
    bias = model[0].bias.reshape(-1, 1, 1)
    torch.testing.assert_close(other[0](x) - bias, -2 * (model[0](x) - bias))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), before)


def test_conversions_of_the_model_leave_packed_layers_alone():
    model, x = some_packed()
    y = model(x)
    state = {name: t.clone() for name, t in model[0].state_dict().items()}
    converted = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(converted(x.to(memory_format=torch.channels_last)), y)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        converted = copy.deepcopy(model).to(dtype)
        got = converted(x.to(dtype))
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), y, atol=0.3 if dtype != torch.float64 else 1e-4, rtol=0)
        for name, t in converted[0].state_dict().items():
            assert torch.equal(t, state[name])
            assert t.dtype == state[name].dtype


def test_nothing_in_a_packed_layer_is_trainable():
    model, _ = some_packed()
    assert list(model[0].parameters()) == []
    assert set(model[0].state_dict()) == {"planes", "scales", "bias"}


def test_a_gradient_is_refused_in_training_and_never_silently_wrong():
    model, x = some_packed()
    x.requires_grad_()
    model.train()
    with pytest.raises(RuntimeError, match=r"packed layers are for inference.*eval\(\)"):
        model[0](x)
    with torch.no_grad():
        model[0](x)
    model.eval()
    with pytest.raises(RuntimeError, match=r"pass no gradient on; .* before foldbit\.pack_"):
        model[0](x).sum().backward()
    y = model[0](x.detach())
    assert not y.requires_grad


def test_weight_only_layers_pass_gradients_to_their_input():
    layer, packed = twins(nn.Linear(20, 3), fb.QuantConfig("ls-2", "fp"))
    x = torch.randn(2, 20, requires_grad=True)
    packed(x).sum().backward()
    expected = layer.weight_quantizer(layer.weight).sum(0).detach().expand(2, -1)
    torch.testing.assert_close(x.grad, expected)


def test_the_representation_says_how_the_layer_is_quantized():
    _, packed = twins(nn.Conv2d(20, 6, 3), fb.QuantConfig("ls-1", "ls-2"))
    assert repr(packed).startswith("PackedConv2d(W1A2, 20, 6, kernel_size=(3, 3)")


def test_disk_and_kernel_layouts_agree_with_the_layer():
    _, packed = twins(nn.Conv2d(40, 6, 3, groups=2), fb.QuantConfig("ls-2"))
    words = layout.disk_to_kernel(packed.planes.numpy(), 20, groups=2)
    assert (packed.words.numpy().view("uint32") == words).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.complex64])
@pytest.mark.parametrize("config", [fb.QuantConfig(), fb.QuantConfig(activation_scales="static")])
def test_what_is_not_float_is_refused(dtype, config):
    twin = quant.from_float(nn.Linear(3, 4), config).eval()
    if config.activation_scales == "static":
        twin.input_quantizer.set_scales(torch.tensor([1.0, 0.5]))
    packed = fb.pack_(nn.Sequential(twin))[0]
    with pytest.raises(TypeError, match=f"PackedLinear got an input of {dtype}; expected float32"):
        packed(torch.ones(2, 3).to(dtype))


@pytest.mark.parametrize("activation", ["ls-2", "fp"])
@torch.no_grad()
def test_a_residual_of_another_shape_is_refused(activation):
    _, packed = twins(nn.Linear(8, 4), fb.QuantConfig(activation=activation))
    x = torch.randn(2, 3, 5, 8)
    for shape in [(2, 5, 3, 4), (2, 15, 4), (1, 1, 1, 4)]:
        with pytest.raises(ValueError, match=r"output's shape \(2, 3, 5, 4\); got"):
            packed(x, torch.zeros(shape))
    assert torch.equal(packed(x, torch.zeros(2, 3, 5, 4)), packed(x))
    assert packed(torch.zeros(0, 3, 8), torch.zeros(0, 3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 4), nn.Conv1d(8, 4, 3, stride=2), nn.Conv2d(8, 4, (3, 1), groups=2)]
)
def test_forward_passes_can_ask_for_what_torchs_layers_have(layer):
    names = (
        "in_features out_features in_channels out_channels kernel_size stride dilation groups padding_mode"
    )
    _, packed = twins(layer, fb.QuantConfig())
    for name in names.split():
        assert getattr(packed, name, None) == getattr(layer, name, None), name
    for name in ("shape", "ndim", "dtype", "device"):
        assert getattr(packed.weight, name) == getattr(packed.weight(), name) == getattr(layer.weight, name)
    assert not packed.weight.requires_grad


@torch.no_grad()
def test_other_default_dtypes_and_devices_change_nothing():
    x = torch.randn(3, 8)
    expected = None
    for dtype, device in [(torch.float32, None), (torch.float64, None), (torch.float32, "meta")]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LeakyReLU()).eval()
        fb.quantize_(model, fb.QuantConfig(activation_scales="static"), skip=())
        model[0].input_quantizer.set_scales(torch.tensor([1.0, 0.5]))
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            y = fb.pack_(model)(x)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        expected = y if expected is None else expected
        assert torch.equal(y, expected)
