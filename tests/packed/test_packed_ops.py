"""The custom operator: what torch asks of one, and that export and compile see through packed layers."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import foldbit as fb
from foldbit.kernels import layout, native
from foldbit.packed import ops


def problem(x_shape, out, kernel=(1, 1), *, groups=1, segments=1, planes=(1, 2), bias=True, **geometry):
    """The operator's arguments."""
    torch.manual_seed(0)
    channels = x_shape[1] // groups
    disk = layout.pack_bits((torch.rand(planes[0], out, *kernel, channels) < 0.5).numpy())
    words = layout.disk_to_kernel(disk, channels, groups=groups, segments=segments)
    geometry = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]} | geometry
    return (
        torch.randn(x_shape),
        torch.from_numpy(words.view("int32")),
        torch.rand(planes[0], out, segments),
        torch.rand(x_shape[0], planes[1]),
        torch.randn(out) if bias else None,
        *geometry.values(),
    )


PROBLEMS = {
    "conv": problem((2, 20, 6, 7), 5, (3, 3), padding=[1, 1], out_size=[6, 7]),
    "strided": problem((1, 8, 9, 9), 17, (3, 2), stride=[2, 3], dilation=[2, 1], out_size=[3, 3], bias=False),
    "grouped": problem((2, 12, 4, 4), 6, (2, 2), groups=3, segments=2, planes=(2, 3), out_size=[3, 3]),
    "linear": problem((3, 33, 1, 1), 4, out_size=[1, 1]),
    "one of each": problem((1, 1, 1, 1), 1, out_size=[1, 1]),
    "empty": problem((0, 8, 4, 4), 3, out_size=[4, 4]),
}


def convolve(x, words, weight_scales, activation_scales, bias, stride, padding, dilation, out_size):
    """The operator's arguments, as a layer passes them."""
    constants = ops.Constants(words, weight_scales, bias, stride, padding, dilation)
    return ops.packed_conv(x, constants, activation_scales, out_size)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_operator_is_a_good_citizen(name):
    torch.library.opcheck(torch.ops.foldbit.packed_conv.default, PROBLEMS[name])


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", native.available())
def test_the_output_is_channels_last_float32_of_the_shape_asked_for(name, backend):
    arguments = PROBLEMS[name]
    with native.use(backend):
        y = convolve(*arguments)
    assert y.dtype == torch.float32
    assert y.shape == (len(arguments[0]), arguments[2].shape[1], *arguments[-1])
    assert y.is_contiguous(memory_format=torch.channels_last)
    fake = convolve(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


def test_inputs_are_not_changed_and_may_have_any_strides():
    x, *rest = PROBLEMS["conv"]
    y = convolve(x, *rest)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in (x, *rest)]
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(convolve(other, *rest), y)
    scales = rest[2].t().contiguous().t()
    assert torch.equal(convolve(x, *rest[:2], scales, *rest[3:]), y)
    for a, b in zip(before, (x, *rest), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_scales_may_be_those_of_all_images():
    x, words, weight_scales, scales, *rest = PROBLEMS["conv"]
    alike = scales[:1].expand(len(x), -1)
    expected = convolve(x, words, weight_scales, alike.contiguous(), *rest)
    for given in (scales[:1], alike):
        assert torch.equal(convolve(x, words, weight_scales, given, *rest), expected)


def test_what_is_not_float32_or_of_another_size_is_refused_before_memory_is_touched():
    x, words, weight_scales, scales, *rest = PROBLEMS["grouped"]
    with pytest.raises(ValueError, match="must be float32"):
        convolve(x.double(), words, weight_scales, scales, *rest)
    with pytest.raises(ValueError, match="must be float32"):
        convolve(x, words, weight_scales, scales.half(), *rest)
    with pytest.raises(ValueError, match=r"scales \[2, planes\] or \[1, planes\]"):
        convolve(x, words, weight_scales, scales.repeat(2, 1), *rest)
    with pytest.raises(ValueError, match="must divide the channels of x, got 11"):
        convolve(x[:, :11], words, weight_scales, scales, *rest)
    constants = ops.Constants(words, weight_scales, *rest[:-1])
    residual = torch.zeros(2, 6, 3, 3)
    with pytest.raises(ValueError, match="must be float32"):
        ops.packed_conv(x, constants, scales, rest[-1], residual.double())
    with pytest.raises(ValueError, match="of the output's shape"):
        ops.packed_conv(x, constants, scales, rest[-1], residual[:1])


def test_values_that_are_yet_to_be_negated_are():
    x, *rest = PROBLEMS["conv"]
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, x)
    assert torch.equal(convolve(lazy, *rest), convolve(x, *rest))
    words, weight_scales, scales, *geometry, out_size = rest
    constants = ops.Constants(words, weight_scales, *geometry)
    residual = torch.randn(2, 5, 6, 7)
    lazy = torch.complex(torch.zeros_like(residual), -residual).conj().imag
    expected = ops.packed_conv(x, constants, scales, out_size, residual)
    assert torch.equal(ops.packed_conv(x, constants, scales, out_size, lazy), expected)


def test_forward_mode_differentiation_is_refused():
    x, *rest = PROBLEMS["conv"]
    with forward_ad.dual_level():
        assert torch.equal(convolve(x, *rest), convolve(x.clone(), *rest)), "no tangent: nothing to refuse"
        with pytest.raises(RuntimeError, match="pass no gradient on"):
            convolve(forward_ad.make_dual(x, torch.ones_like(x)), *rest)
    with pytest.raises(RuntimeError, match="pass no gradient on"):
        torch.func.jvp(lambda x: convolve(x, *rest), (x,), (torch.ones_like(x),))


def test_constants_may_change_in_place_and_be_copied():
    x, words, weight_scales, scales, bias, *geometry, out_size = PROBLEMS["conv"]
    constants = ops.Constants(words.clone(), weight_scales.clone(), bias.clone(), *geometry)
    before = ops.packed_conv(x, constants, scales, out_size)
    for other in (copy.deepcopy(constants), pickle.loads(pickle.dumps(constants))):
        other.bias.add_(1)
        torch.testing.assert_close(ops.packed_conv(x, other, scales, out_size), before + 1)
        other.bias.sub_(bias + 1)
        other.weight_scales.mul_(2)
        expected = 2 * (before - bias[:, None, None])
        torch.testing.assert_close(ops.packed_conv(x, other, scales, out_size), expected)
    assert torch.equal(ops.packed_conv(x, constants, scales, out_size), before)


def test_without_a_backend_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "_active", None)
    with pytest.raises(native.KernelUnavailable, match="FOLDBIT_ISA=reference"):
        convolve(*PROBLEMS["conv"])


# --- export and compile


class Net(nn.Module):
    """Two- and one-dimensional convolutions and a linear layer, one of them for weights only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 3, padding="same", padding_mode="circular")
        self.norm = nn.BatchNorm2d(20)
        self.along = nn.Conv1d(20, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2)
        return self.head(self.linear(self.along(x).mean(2)).relu())


def packed_net(**changes):
    torch.manual_seed(0)
    config = fb.QuantConfig(**changes)
    weight_only = fb.QuantConfig("ls-2", "fp")
    model = fb.quantize_(Net(), config, skip=(), overrides={"head": weight_only})
    with torch.no_grad():
        model(torch.randn(8, 3, 6, 6))
    return fb.pack_(model)


CONFIGS = {
    "dynamic ls-1": dict(activation="ls-1"),
    "dynamic ls-2": dict(activation="ls-2", clamp=1.5),
    "dynamic ls-T per tensor": dict(activation="ls-T", activation_granularity="tensor"),
    "static gf-3": dict(activation="gf-3", activation_scales="static"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_export_with_any_batch(name):
    model, x = packed_net(**CONFIGS[name]), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        targets = [str(node.target) for node in exported.graph.nodes]
        assert targets.count("foldbit.packed_conv.default") == 3
        for samples in (2, 3, 9):
            other = torch.randn(samples, 3, 6, 6)
            torch.testing.assert_close(exported.module()(other), model(other), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layer, shape, other",
    [
        (nn.Conv2d(8, 3, 3, padding=1), (2, 8, 9, 9), (5, 8, 7, 13)),
        (nn.Conv1d(8, 3, 3, padding=1), (2, 8, 9), (5, 8, 13)),
        (nn.Linear(8, 3), (2, 9, 8), (5, 13, 8)),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
def test_export_with_any_size(layer, shape, other):
    model = fb.pack_(fb.quantize_(nn.Sequential(layer), skip=()))
    dynamic = {i: torch.export.Dim.AUTO for i, (a, b) in enumerate(zip(shape, other, strict=True)) if a != b}
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(shape),), dynamic_shapes=(dynamic,)).module()
        x = torch.randn(other)
        torch.testing.assert_close(exported(x), model(x), atol=1e-4, rtol=1e-4)


def test_an_exported_model_can_be_saved_and_loaded(tmp_path):
    model, x = packed_net(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
        loaded = torch.export.load(tmp_path / "net.pt2").module()
        torch.testing.assert_close(loaded(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_compile_without_graph_breaks(name):
    model = packed_net(**CONFIGS[name])
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for samples in (2, 2, 5):
            x = torch.randn(samples, 3, 6, 6)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(33, 11, (2, 4), padding="same", groups=11, bias=False), (2, 33, 5, 6)),
        (nn.Conv2d(8, 8, 3, padding=1), (8, 5, 6)),
        (nn.Conv1d(8, 8, 3, padding=2, padding_mode="reflect"), (2, 8, 9)),
        (nn.Linear(20, 8), (2, 3, 20)),
        (nn.Linear(20, 8), (20,)),
    ],
    ids=str,
)
def test_compile_and_export_of_a_layer(layer, shape):
    model = fb.pack_(fb.quantize_(nn.Sequential(copy.deepcopy(layer)), skip=()))
    x = torch.randn(shape)
    torch._dynamo.reset()
    with torch.no_grad():
        y = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), y, atol=1e-4, rtol=1e-4)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile generates C++")
def test_compile_with_the_default_backend():
    model = fb.pack_(fb.quantize_(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), skip=()))
    x = torch.randn(2, 8, 9, 9)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), atol=1e-4, rtol=1e-4)


def test_whoever_watches_operators_sees_this_one():
    """Plain inference goes past the dispatcher; modes, tracers and autograd do not miss it."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    arguments = PROBLEMS["conv"]
    y = convolve(*arguments)
    with Seen():
        assert torch.equal(convolve(*arguments), y)
    assert "foldbit.packed_conv.default" in names
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = convolve(mode.from_tensor(arguments[0]), *arguments[1:])
    assert isinstance(fake, FakeTensor) and fake.shape == y.shape and fake.stride() == y.stride()
    traced = make_fx(lambda x: convolve(x, *arguments[1:]))(arguments[0])
    assert "packed_conv" in traced.code
    watched = convolve(arguments[0].clone().requires_grad_(), *arguments[1:])
    assert watched.requires_grad and torch.equal(watched, y)


def test_the_default_dtype_is_no_matter():
    arguments = PROBLEMS["conv"]
    y = convolve(*arguments)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(convolve(*arguments), y)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_other_default_devices_see_memory_that_exists():
    x, words, weight_scales, scales, *rest = PROBLEMS["grouped"]
    constants = ops.Constants(words, weight_scales, *rest[:-1])

    def convolution(x):
        return ops.packed_conv(x, constants, scales, rest[-1])

    expected = convolution(x)
    assert torch.equal(torch.func.functionalize(convolution)(x), expected)
    assert torch.equal(torch.vmap(convolution)(x[None])[0], expected)
    with torch.device("meta"):
        assert torch.equal(convolution(x), expected)
        assert torch.equal(convolve(x, words, weight_scales, scales, *rest), expected)
