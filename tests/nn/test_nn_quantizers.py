"""Weight and activation quantizers: who shares scales with whom, and where scales come from."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import foldbit as fb
from foldbit.nn.quantizers import ActivationQuantizer, WeightQuantizer

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-3"]
SHAPES = [(6, 12), (6, 12, 5), (6, 12, 3, 3), (1, 12), (6, 12, 1, 1)]


def lattice(*shape, seed=0):
    """Sixty-fourths, whose sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).double() / 64


def static(scheme="ls-2", **fields):
    return fb.QuantConfig(activation=scheme, activation_scales="static", **fields)


# ---------------------------------------------------------------------------------------------------------
# Weights

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 12), ("group", 4), ("group", 1)]


def slices(weight, granularity, group_size):
    """The parts of a weight that share scales, as pairs of indices."""
    if granularity == "tensor":
        return [(slice(None), slice(None))]
    step = group_size or weight.shape[1]
    return [(o, slice(i, i + step)) for o in range(len(weight)) for i in range(0, weight.shape[1], step)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_slice_is_quantized_as_if_alone(scheme, granularity, group_size, shape):
    weight = lattice(*shape)
    quantizer = WeightQuantizer(
        fb.QuantConfig(weight=scheme, granularity=granularity, group_size=group_size), shape[1]
    )
    planes, scales = quantizer.codes(weight)
    count = 1 if group_size is None else shape[1] // group_size
    k = len(planes)
    assert planes.shape == (k, *shape) and planes.dtype == torch.bool
    assert scales.shape == (k, len(weight), count)
    values = quantizer(weight)
    assert values.shape == weight.shape and values.dtype == weight.dtype
    for out, channels in slices(weight, granularity, group_size):
        alone = fb.quantize(weight[out, channels].clone(), scheme, None)
        torch.testing.assert_close(values[out, channels], alone.values(), rtol=1e-12, atol=1e-12)
        segment = 0 if group_size is None else channels.start // group_size
        own = scales[:, out, segment].reshape(k, -1)
        torch.testing.assert_close(own, alone.scales[:, None].expand_as(own), rtol=1e-12, atol=1e-12)
    # What packing keeps is what training computes.
    segmented = planes.unflatten(2, (count, -1))
    signed = torch.where(segmented, -1.0, 1.0) * scales.reshape(
        k, len(weight), count, *[1] * (len(shape) - 1)
    )
    torch.testing.assert_close(signed.sum(0).flatten(1, 2), values, rtol=1e-12, atol=1e-12)


def test_finer_granularities_are_no_worse():
    weight = lattice(16, 32, 3, 3) * torch.logspace(-1, 1, 16)[:, None, None, None]
    for scheme in ["ls-1", "ls-2", "ls-T"]:
        errors = []
        for granularity, group_size in [*GRANULARITIES[:2], ("group", 8), ("group", 1)]:
            config = fb.QuantConfig(weight=scheme, granularity=granularity, group_size=group_size)
            errors.append(float((WeightQuantizer(config, 32)(weight) - weight).square().sum()))
        assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scheme", [*SCHEMES, "ls-3"])
def test_input_channels_share_scales_over_the_outputs_of_their_group(scheme, groups, shape):
    out = 6 if shape[0] > 1 else 3
    weight = lattice(out, *shape[1:])
    values = WeightQuantizer(fb.QuantConfig(scheme, granularity="input"), 12, groups)(weight)
    assert values.shape == weight.shape and values.dtype == weight.dtype
    step = out // groups
    for group in range(groups):
        for channel in range(12):
            part = (slice(group * step, (group + 1) * step), channel)
            alone = fb.quantize(weight[part].clone(), scheme, None).values()
            torch.testing.assert_close(values[part], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("scheme", ["ls-1", "ls-2", "gf-3"])
@pytest.mark.parametrize("shape", [(6, 12), (6, 4, 3, 3), (6, 1, 3, 3)])
def test_a_rank_is_that_of_the_weight_as_a_matrix(shape, scheme, rank, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantizer = WeightQuantizer(fb.QuantConfig(scheme, granularity="rank", rank=rank), shape[1])
    values = quantizer(weight)
    assert values.shape == weight.shape and values.dtype == dtype
    expected = fb.low_rank(weight.flatten(1), scheme, rank).values().reshape(shape)
    channel = WeightQuantizer(fb.QuantConfig(scheme), shape[1])(weight)
    errors = [float((v - weight).double().square().sum()) for v in (values, expected, channel)]
    if dtype != torch.bfloat16:  # where factors are rounded, and their products here
        torch.testing.assert_close(values, expected)
    eps = torch.finfo(dtype).eps
    energy = float(weight.double().square().sum())
    assert errors[0] == pytest.approx(errors[1], rel=8 * eps, abs=8 * eps * (errors[1] * energy) ** 0.5)
    assert errors[0] <= errors[2] or scheme.startswith("gf")


@pytest.mark.parametrize("fields", [{"granularity": "input"}, {"granularity": "rank", "rank": 1}])
def test_scales_along_the_sum_have_no_codes(fields):
    with pytest.raises(ValueError, match=r"varies along the sum of a dot product.*train with 'channel'"):
        WeightQuantizer(fb.QuantConfig(**fields), 4).codes(torch.randn(3, 4))


def test_a_rank_must_fit_the_matrix():
    config = fb.QuantConfig(granularity="rank", rank=4)
    quantizer = WeightQuantizer(config, 1)
    quantizer.check_fits(torch.empty(4, 1, 2, 2))
    with pytest.raises(ValueError, match=r"rank 4 does not fit a matrix of 8×3: .* at most the smaller side"):
        quantizer.check_fits(torch.empty(8, 1, 3))
    WeightQuantizer(fb.QuantConfig("fp", granularity="rank", rank=4), 1).check_fits(torch.empty(2, 1))


def test_float_weights_pass_untouched():
    weight = torch.randn(4, 6)
    assert WeightQuantizer(fb.QuantConfig(weight="fp"), 6)(weight) is weight


def test_groups_must_divide_the_channels():
    config = fb.QuantConfig(granularity="group", group_size=5)
    with pytest.raises(
        ValueError, match=r"group_size 5 does not divide the 12 input channels .*pick a divisor"
    ):
        WeightQuantizer(config, 12)
    assert WeightQuantizer(config, 15).segments == 3


@pytest.mark.parametrize(
    "fields",
    [
        *({"granularity": granularity, "group_size": size} for granularity, size in GRANULARITIES),
        {"granularity": "input"},
        {"granularity": "rank", "rank": 2},
        {"granularity": "rank", "rank": 1, "weight": "ls-2"},
    ],
)
def test_weights_get_their_estimators_gradient(fields):
    grad = lattice(6, 12, 3, 3, seed=1)
    for estimator in ["identity", "clipped"]:
        weight = lattice(6, 12, 3, 3).requires_grad_()
        config = fb.QuantConfig(**fields, weight_estimator=estimator, clamp=0.1)
        WeightQuantizer(config, 12)(weight).backward(grad)
        expected = grad if estimator == "identity" else grad * (weight.detach().abs() <= 1)
        assert torch.equal(weight.grad, expected)


def test_scaled_windows_use_the_slices_own_scale_and_no_clamp():
    weight = torch.tensor([[1.0, 1.0, 1.0, 13.0], [10.0, 10.0, 10.0, 13.0]], requires_grad=True)
    config = fb.QuantConfig(weight="ls-1", weight_estimator="scaled", clamp=0.5)
    WeightQuantizer(config, 4)(weight).sum().backward()  # v = 4 and 10.75
    assert weight.grad.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


# ---------------------------------------------------------------------------------------------------------
# Weights whose planes are not peeled


@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", None), ("channel", None), ("group", 4)])
@pytest.mark.parametrize("scheme", ["ls-3", "alt-4", "rg-2"])
def test_weights_that_do_not_fold_are_given_their_nearest_level(scheme, granularity, group_size):
    weight = torch.randn(4, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = fb.QuantConfig(weight=scheme, granularity=granularity, group_size=group_size)
    quantizer = WeightQuantizer(config, 12)
    values = quantizer(weight)
    for out, channels in slices(weight, granularity, group_size):
        alone = fb.quantize(weight[out, channels].clone(), scheme, None)
        torch.testing.assert_close(values[out, channels], alone.values(), rtol=1e-9, atol=1e-9)
        folded = fb.unfold(fb.fold(weight[out, channels], alone.scales, None), alone.scales, None)
        assert (weight - values)[out, channels].square().sum() <= (
            (weight[out, channels] - folded).square().sum() + 1e-9
        )
    planes, scales = quantizer.codes(weight)
    spread = scales.repeat_interleave(12 // scales.shape[-1], -1).unsqueeze(-1)
    torch.testing.assert_close(torch.where(planes, -spread, spread).sum(0), values)


@pytest.mark.parametrize("scheme", ["ls-3", "alt-3"])
def test_their_gradient_is_the_estimators(scheme):
    weight = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).mul_(3)
    grad = torch.randn(3, 20)
    limit = 3 * fb.solve(weight, scheme)[:, :1]
    windows = {"identity": weight == weight, "clipped": weight.abs() <= 1, "scaled": weight.abs() <= limit}
    for estimator, window in windows.items():
        leaf = weight.clone().requires_grad_()
        WeightQuantizer(fb.QuantConfig(weight=scheme, weight_estimator=estimator), 20)(leaf).backward(grad)
        assert torch.equal(leaf.grad, grad * window)
    with torch.no_grad():
        assert not WeightQuantizer(fb.QuantConfig(weight=scheme), 20)(leaf).requires_grad


def test_an_estimator_that_follows_peeling_is_refused_for_them():
    for scheme in ["ls-3", "alt-2", "rg-4"]:
        config = fb.QuantConfig(weight=scheme, weight_estimator="polynomial")
        with pytest.raises(
            ValueError, match=f"follows the residuals that peeling leaves, and scheme '{scheme}'"
        ):
            WeightQuantizer(config, 12)
    leaf = torch.randn(3, 20, requires_grad=True)
    WeightQuantizer(fb.QuantConfig(weight="lsf-3", weight_estimator="polynomial"), 20)(leaf).sum().backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any()


def test_a_layer_of_three_bits_trains_and_compiles():
    torch.manual_seed(0)
    layer = fb.QuantLinear(30, 4, config=fb.QuantConfig("ls-3", "ls-2"))
    x, y = torch.randn(64, 30), torch.randn(64, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))


# ---------------------------------------------------------------------------------------------------------
# Dynamic activation scales


@pytest.mark.parametrize("shape", [(4, 10), (4, 3, 8), (4, 3, 5, 6), (1, 3, 5, 6)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_per_sample(scheme, shape):
    quantizer = ActivationQuantizer(fb.QuantConfig(activation=scheme))
    x = lattice(*shape)
    expected = torch.stack([fb.quantize(sample, scheme, None).values() for sample in x])
    for mode in [True, False]:
        torch.testing.assert_close(quantizer.train(mode)(x), expected, rtol=1e-12, atol=1e-12)
    # An output depends on no other sample.
    crowd = torch.cat([100 * lattice(3, *shape[1:], seed=1), x])
    torch.testing.assert_close(quantizer(crowd)[3:], expected, rtol=1e-12, atol=1e-12)
    assert not list(quantizer.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scales_per_tensor(scheme):
    quantizer = ActivationQuantizer(fb.QuantConfig(activation=scheme, activation_granularity="tensor"))
    x = lattice(4, 3, 5, 6)
    expected = fb.quantize(x, scheme, None).values()
    for mode in [True, False]:
        assert torch.equal(quantizer.train(mode)(x), expected)
    assert not torch.equal(quantizer(torch.cat([x, 9 * x]))[:4], expected)


def test_channels_last_samples():
    quantizer = ActivationQuantizer(fb.QuantConfig())
    x = lattice(4, 3, 5, 6)
    assert torch.equal(quantizer(x.to(memory_format=torch.channels_last)), quantizer(x))


def test_float_activations_pass_untouched():
    x = torch.randn(4, 6)
    for scales in ["dynamic", "static"]:
        quantizer = ActivationQuantizer(fb.QuantConfig(activation="fp", activation_scales=scales, clamp=0.1))
        assert quantizer(x) is x and not list(quantizer.buffers())


@pytest.mark.parametrize("config", [fb.QuantConfig(activation_granularity="tensor"), static()])
def test_empty_batches(config):
    quantizer = ActivationQuantizer(config)
    assert quantizer(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert not quantizer.seen


# ---------------------------------------------------------------------------------------------------------
# Clamp


@pytest.mark.parametrize("granularity", ["sample", "tensor"])
def test_inputs_are_clamped_before_they_are_quantized(granularity):
    config = fb.QuantConfig(activation_granularity=granularity, clamp=1.0)
    free = fb.QuantConfig(activation_granularity=granularity)
    x = 3 * lattice(4, 50)
    expected = ActivationQuantizer(free)(x.clamp(-1, 1))
    assert torch.equal(ActivationQuantizer(config)(x), expected)
    assert not torch.equal(ActivationQuantizer(free)(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [2.0, 0.3])
def test_what_the_clamp_cuts_gets_no_gradient_and_all_else_does(limit, dtype):
    x = torch.tensor(
        [[-5.0, -limit, -limit / 2, 0.0, limit / 3, limit, 3.0]], dtype=dtype, requires_grad=True
    )
    ActivationQuantizer(fb.QuantConfig(clamp=limit, activation_estimator="scaled"))(x).sum().backward()
    inside = x.detach().abs() <= torch.tensor(limit, dtype=dtype)
    assert torch.equal(x.grad, inside.to(dtype))


def test_without_a_clamp_the_limit_is_three_first_scales():
    x = torch.tensor([[0.1, -0.2, 0.1, 0.2, -0.1, 0.1, 0.2, -8.0], [4.0] * 8], requires_grad=True)
    v = fb.solve(x, "ls-2")
    ActivationQuantizer(fb.QuantConfig(activation_estimator="scaled"))(x).sum().backward()
    assert torch.equal(x.grad, (x.abs() <= 3 * v[:, :1]).float())
    x = torch.tensor([[0.1] * 40 + [-8.0]], requires_grad=True)
    config = fb.QuantConfig(activation="ls-1", activation_estimator="scaled")
    ActivationQuantizer(config)(x).sum().backward()
    assert x.grad.tolist() == [[1.0] * 40 + [0.0]]


# ---------------------------------------------------------------------------------------------------------
# Static activation scales


@pytest.mark.parametrize("scheme", SCHEMES)
def test_running_scales(scheme):
    quantizer = ActivationQuantizer(static(scheme), momentum=0.25)
    first, second, third = (lattice(8, 5, seed=s).float() * (s + 1) for s in range(3))
    # Training uses the batch's own scales, over all samples together.
    assert torch.equal(quantizer(first), fb.quantize(first, scheme, None).values())
    running = fb.solve(first, scheme, None)
    torch.testing.assert_close(quantizer.running_scales, running, rtol=1e-6, atol=1e-7)  # taken over whole
    assert torch.equal(quantizer(second), fb.quantize(second, scheme, None).values())
    running = 0.75 * running + 0.25 * fb.solve(second, scheme, None)
    torch.testing.assert_close(quantizer.running_scales, running, rtol=1e-6, atol=1e-7)
    # Evaluation uses the running ones, and leaves them.
    before = quantizer.eval().running_scales.clone()
    expected = fb.unfold(fb.fold(third, before, None), before, None)
    torch.testing.assert_close(quantizer(third), expected)
    assert torch.equal(quantizer.running_scales, before)
    torch.testing.assert_close(quantizer(third[:1]), expected[:1])  # whoever else is in the batch
    assert not torch.equal(expected, fb.quantize(third, scheme, None).values())


def test_the_clamp_comes_before_the_running_scales():
    quantizer = ActivationQuantizer(static(clamp=0.5))
    x = lattice(8, 5).float()
    quantizer(x)
    torch.testing.assert_close(quantizer.running_scales, fb.solve(x.clamp(-0.5, 0.5), "ls-2", None))


def test_fresh_static_scales_are_the_inputs_own():
    quantizer = ActivationQuantizer(static()).eval()
    x = lattice(8, 5)
    assert not quantizer.seen and not quantizer.running_scales.any()
    assert torch.equal(quantizer(x), fb.quantize(x, "ls-2", None).values())
    assert not quantizer.seen and not quantizer.running_scales.any()


def test_static_scales_carry_no_gradient_and_let_the_inputs_through():
    quantizer = ActivationQuantizer(static(clamp=1.0, activation_estimator="scaled"))
    for mode in [True, False]:
        quantizer.train(mode)
        x = lattice(8, 5).requires_grad_()
        quantizer(x).sum().backward()
        assert torch.equal(x.grad, (x.abs() <= 1).double())
    assert not quantizer.running_scales.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_static_scales_of_other_dtypes(dtype):
    quantizer = ActivationQuantizer(static())
    x = lattice(8, 5).to(dtype)
    assert quantizer(x).dtype == dtype
    assert quantizer.running_scales.dtype == torch.float32
    assert quantizer.eval()(x).dtype == dtype
    quantizer.to(dtype).train()
    assert quantizer(x).dtype == quantizer.running_scales.dtype == dtype
    torch.testing.assert_close(quantizer.running_scales, fb.solve(x, "ls-2", None))


def test_saved_loaded_and_copied_scales_are_remembered():
    x = lattice(8, 5).float()
    quantizer = ActivationQuantizer(static())
    quantizer(x)
    quantizer.eval()
    assert list(quantizer.state_dict()) == ["running_scales"]
    loaded = ActivationQuantizer(static()).eval()
    loaded.load_state_dict(quantizer.state_dict())
    for other in [loaded, copy.deepcopy(quantizer)]:
        assert other.seen and torch.equal(other.running_scales, quantizer.running_scales)
        assert torch.equal(other(3 * x), quantizer(3 * x))
        other.train()(2 * x)  # averaged in, for it is not the first
        expected = 0.9 * quantizer.running_scales + 0.1 * fb.solve(2 * x, "ls-2", None)
        torch.testing.assert_close(other.running_scales, expected)
    # Unseen scales stay unseen.
    loaded.load_state_dict(ActivationQuantizer(static()).state_dict())
    assert not loaded.seen


def test_loading_inserts_nothing_into_the_callers_dict():
    empty = {}
    quantizer = ActivationQuantizer(static())
    quantizer(lattice(8, 5).float())
    quantizer.load_state_dict(empty)
    assert empty == {} and not quantizer.seen


def test_scales_of_another_scheme_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch for running_scales"):
        ActivationQuantizer(static("gf-3")).load_state_dict(ActivationQuantizer(static()).state_dict())


def test_reprs():
    assert "ls-2, dynamic per sample, clamp=None" in repr(ActivationQuantizer(fb.QuantConfig()))
    assert "ls-T, static, clamp=2.0" in repr(ActivationQuantizer(static("ls-T", clamp=2.0)))
    config = fb.QuantConfig(activation_granularity="tensor")
    assert "dynamic per tensor" in repr(ActivationQuantizer(config))
    assert "fp" in repr(ActivationQuantizer(fb.QuantConfig(activation="fp")))


def test_scales_that_an_average_of_models_writes_are_seen():
    model = fb.quantize_(nn.Sequential(nn.Linear(5, 5)), static(), skip=())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    copied = copy.deepcopy(model)
    for _ in range(3):
        model(torch.randn(4, 5))
        average.update_parameters(model)
    for theirs, mine in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
        theirs.copy_(mine)
    x = torch.randn(4, 5)
    for other in (average.module, copied):
        assert other.eval()[0].input_quantizer.seen
        torch.testing.assert_close(fb.pack_(copy.deepcopy(other))(x), other(x))
    torch.testing.assert_close(copied(x), model.eval()(x))


def test_scales_that_are_only_lent_or_have_no_values_are_not_seen():
    quantizer = ActivationQuantizer(static()).eval()
    x = torch.randn(4, 5)
    expected = quantizer(x)
    lent = torch.func.functional_call(quantizer, {"running_scales": torch.tensor([1.0, 0.5])}, (x,))
    assert not torch.equal(lent, expected) and torch.equal(quantizer(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not quantizer.train().eval().seen
    both = torch.zeros(2, 2)
    torch.func.vmap(lambda scales: torch.func.functional_call(quantizer, {"running_scales": scales}, (x,)))(
        both
    )

    @torch.compile(backend="eager", fullgraph=True)
    def modes(x):
        quantizer.eval()
        y = quantizer(x)
        quantizer.train()
        return y

    assert torch.equal(modes(x), expected)
