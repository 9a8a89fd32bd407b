"""Other people's engines on the layers that the benchmarks time: OpenVINO, ONNX Runtime, torch.

    pip install foldbit[bench]

What an engine takes for a layer inside a network is what counts, not what it takes to bring an image into its
own memory order and back. So a graph engine runs a *chain* of layers; a chain of three less a chain of one is
two layers. Every runner's output is checked before anything is timed.

What to know of OpenVINO's BinaryConvolution: the FakeQuantize before it must give 0 and 1, not ±1; weights
are 1 where they are positive, eight to a byte, the lowest bit first, and the memory behind a tensor must be
kept alive by whoever made it. A pad value of 0 leaves padded taps out, as zero padding does in float.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import foldbit as fb

Array = NDArray[Any]

PACKAGES = ("openvino", "onnxruntime", "onnx")


def missing() -> list[str]:
    """The packages of the extra ``bench`` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


class Wrong(RuntimeError):
    """A network or layer computes something else than it should: its time would mean nothing."""


@dataclass
class Runner:
    """Something to time: a call, and the output it leaves."""

    call: Callable[[], object]
    output: Callable[[], Array]
    kept: tuple[object, ...] = ()  # memory that an engine reads and does not own

    def __call__(self) -> None:
        self.call()


def relative_error(got: Array, expected: Array) -> float:
    """Relative error in the Euclidean norm, in float64; infinite for NaN or another shape."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    difference = np.linalg.norm(got.astype(np.float64) - expected)
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-300))


def check(name: str, got: Array, expected: Array, tolerance: float) -> float:
    """The relative error of what was computed.

    Raises:
        Wrong: where it exceeds the tolerance.
    """
    error = relative_error(got, expected)
    if not error <= tolerance:
        raise Wrong(
            f"{name} is off by {error:.2g} of the output's norm, more than {tolerance:g}, "
            f"in an output of shape {got.shape}, expected {expected.shape}: not timed"
        )
    return error


# A chain of layers, and what it should compute


@dataclass(frozen=True)
class Chain:
    """Random 3x3 layers one after another, of as many channels as they take, and an input.

    Binary layers compute relu(conv(signs) + bias) + y, as blocks with a shortcut around every convolution do;
    float and int8 ones relu(conv(y) + bias + y), which their engines do in one go.
    """

    weights: Tensor  # float32 [layers, C, C, k, k]
    biases: Tensor  # [layers, C]
    x: Tensor  # [1, C, H, W], of both signs
    scales: Tensor  # of the planes that y is folded into

    @property
    def signs(self) -> Tensor:
        """Whether a weight is negative."""
        return self.weights < 0

    @property
    def weight_scales(self) -> Tensor:
        """``[layers, C]``: the mean magnitude, which is the least-squares scale."""
        return self.weights.abs().mean((2, 3, 4))

    def planes(self, y: Tensor) -> list[Tensor]:
        """The scaled sign planes of y; their sum approximates it."""
        scales = self.scales.to(y.dtype)
        negative = fb.fold(y, scales, dim=None)
        return [torch.where(n, -v, v) for n, v in zip(negative, scales, strict=True)]

    def binary(self) -> Array:
        """The output of binary layers, in float64."""
        y = self.x.double()
        for weight, bias, scale in zip(self.weights, self.biases, self.weight_scales, strict=True):
            signed = torch.where(weight < 0, -1.0, 1.0).double() * scale.double()[:, None, None, None]
            folded = sum(self.planes(y))
            y = F.relu(F.conv2d(folded, signed, bias.double(), padding=self.padding)) + y
        return y.numpy()

    def floats(self) -> list[tuple[Array, Array]]:
        """Of each layer its convolution, before the residual, and its output, in float64."""
        y, found = self.x.abs().double(), []
        for weight, bias in zip(self.weights, self.biases, strict=True):
            z = F.conv2d(y, weight.double(), bias.double(), padding=self.padding)
            y = F.relu(z + y)
            found.append((z.numpy(), y.numpy()))
        return found

    @property
    def padding(self) -> int:
        """That keeps the image's size."""
        return self.weights.shape[-1] // 2


def chain(channels: int, size: int, layers: int, planes: int, *, kernel: int = 3, seed: int = 0) -> Chain:
    """Layers whose outputs stay of the order of their input, so that 8 bits serve them well."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, channels, channels, kernel, kernel)
    weights = torch.randn(shape, generator=generator) * 0.3 / (channels * kernel**2) ** 0.5
    biases = 0.1 * torch.randn(layers, channels, generator=generator)
    x = torch.randn(1, channels, size, size, generator=generator)
    scales = fb.solve(x, f"ls-{planes}", dim=None)
    # What lies on a threshold, rounding decides: one engine's sign would be another one's opposite.
    for threshold in (0.0, float(scales[0])):
        near = (x.abs() - threshold).abs() < 1e-4
        x[near] = threshold + 1e-2
    return Chain(weights, biases, x, scales)


# OpenVINO


@lru_cache(maxsize=1)
def _core() -> Any:
    import openvino

    return openvino.Core()


def openvino(model: Any, x: Array, threads: int) -> Runner:
    """A model of OpenVINO, or the bytes or path of an ONNX file, on one input."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # or it would compute in bfloat16 where the processor can
        "ENABLE_CPU_PINNING": False,
    }
    core = _core()
    compiled = core.compile_model(
        core.read_model(model) if isinstance(model, bytes) else model, "CPU", settings
    )
    request = compiled.create_infer_request()
    x = np.ascontiguousarray(x)
    tensor = ov.Tensor(x)
    request.set_input_tensor(tensor)

    def output() -> Array:
        request.infer()
        return request.get_output_tensor().data.copy()

    return Runner(request.infer, output, (x, tensor, model, compiled))


class OpenVinoGraph:
    """What binary networks need of OpenVINO's operations, and the memory behind their bits."""

    def __init__(self, shape: Sequence[int]) -> None:
        from openvino import opset1

        self.ops = opset1
        self.input = opset1.parameter(list(shape), np.float32)
        self.kept: list[object] = []

    def constant(self, value: Any) -> Any:
        """A float constant."""
        return self.ops.constant(np.asarray(value, np.float32))

    def by_channel(self, values: Tensor) -> Any:
        """A constant for every channel of an image."""
        return self.constant(values.detach().reshape(1, -1, 1, 1).numpy())

    def signs(self, x: Any, thresholds: Any = None, flipped: Any = None) -> Any:
        """1 where x exceeds the threshold, 0 elsewhere; or the reverse where `flipped` is 1."""
        zero, one = self.constant(0), self.constant(1)
        at = zero if thresholds is None else thresholds
        low, high = (zero, one) if flipped is None else flipped
        return self.ops.fake_quantize(x, at, at, low, high, 2)

    def binary_convolution(self, bits: Any, negative: Tensor, stride: int = 1) -> Any:
        """The integers; `negative` is boolean ``[out, in, k, k]``."""
        import openvino as ov

        packed = np.packbits((~negative).numpy().reshape(-1), bitorder="little")
        tensor = ov.Tensor(packed, ov.Shape(list(negative.shape)), ov.Type.u1)
        self.kept.append((packed, tensor))
        weight = ov.op.Constant(tensor, shared_memory=True)
        strides, pads = [stride, stride], [negative.shape[-1] // 2] * 2
        return self.ops.binary_convolution(
            bits, weight, strides, pads, pads, [1, 1], "xnor-popcount", 0.0, auto_pad="EXPLICIT"
        )

    def second_plane(self, x: Any, scale: float, how: str) -> Any:
        """x less its first scaled sign: its sign is the second plane. No one operation does it."""
        ops = self.ops
        if how == "sign":
            first = ops.multiply(ops.sign(x), self.constant(scale))
        else:  # steep enough that all but numbers next to 0 are at an end
            first = ops.clamp(ops.multiply(x, self.constant(1e30)), -scale, scale)
        return ops.subtract(x, first)

    def runner(self, output: Any, x: Array, threads: int) -> Runner:
        """Compile the graph that ends there."""
        import openvino as ov

        runner = openvino(ov.Model([self.ops.result(output)], [self.input]), x, threads)
        runner.kept += tuple(self.kept)
        return runner


SECOND_PLANE = ("sign", "clamp")  # ways to the second plane: which one is faster depends on the shape


def openvino_binary(layers: Chain, threads: int, how: str = "clamp") -> Runner:
    """BinaryConvolution, one for each plane of the input."""
    graph = OpenVinoGraph(layers.x.shape)
    ops, y = graph.ops, graph.input
    scales = [float(v) for v in layers.scales]
    for negative, weight_scale, bias in zip(layers.signs, layers.weight_scales, layers.biases, strict=True):
        plane = [y] if len(scales) == 1 else [y, graph.second_plane(y, scales[0], how)]
        total = None
        for part, scale in zip(plane, scales, strict=True):
            integers = graph.binary_convolution(graph.signs(part), negative)
            term = ops.multiply(integers, graph.by_channel(weight_scale * scale))
            total = term if total is None else ops.add(total, term)
        y = ops.add(ops.relu(ops.add(total, graph.by_channel(bias))), y)
    return graph.runner(y, layers.x.numpy(), threads)


# ONNX, which both ONNX Runtime and OpenVINO read


class _OnnxGraph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def quantized(self, x: str, low: float, high: float) -> str:
        """x through 8 unsigned bits that cover [low, high], which contains 0."""
        step = max((high - low) / 255, 1e-12)
        pair = self.constant(np.float32(step)), self.constant(np.uint8(round(-low / step)))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *pair), *pair)

    def weights(self, values: Array, steps: Array, dtype: type) -> str:
        """A constant of integers, a step for each output channel."""
        limit = 127 if dtype is np.int8 else 2**31 - 1
        column = steps.reshape(-1, *[1] * (values.ndim - 1))
        integers = np.clip(np.round(values / column), -limit, limit).astype(dtype)
        zeros = self.constant(np.zeros(len(steps), dtype))
        return self.node(
            "DequantizeLinear",
            self.constant(integers),
            self.constant(steps.astype(np.float32)),
            zeros,
            axis=0,
        )

    def serialize(self, output: str, shape: Sequence[int]) -> bytes:
        from onnx import TensorProto, checker, helper

        inputs, outputs = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", output))
        graph = helper.make_graph(self.nodes, "chain", [inputs], [outputs], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        checker.check_model(model)
        return model.SerializeToString()


def onnx_chain(layers: Chain, *, int8: bool, requantize: bool = True) -> bytes:
    """The chain in float, or in static int8: of every input and, as asked, of convolutions' outputs."""
    graph, y = _OnnxGraph(), "x"
    known = layers.floats()
    largest = [float(layers.x.abs().max()), *(float(out.max()) for _, out in known)]
    pad = layers.padding
    for i, (weight, bias) in enumerate(zip(layers.weights.numpy(), layers.biases.numpy(), strict=True)):
        if int8:
            y = graph.quantized(y, 0.0, largest[i])
            steps = np.abs(weight).max((1, 2, 3)) / 127
            w = graph.weights(weight, steps, np.int8)
            b = graph.weights(bias, steps * largest[i] / 255, np.int32)
        else:
            w, b = graph.constant(weight), graph.constant(bias)
        z = graph.node("Conv", y, w, b, kernel_shape=weight.shape[2:], pads=[pad] * 4)
        if int8 and requantize:
            z = graph.quantized(z, float(known[i][0].min()), float(known[i][0].max()))
        y = graph.node("Relu", graph.node("Add", z, y))
    if int8 and requantize:
        y = graph.quantized(y, 0.0, largest[-1])
    return graph.serialize(y, layers.x.shape)


def onnx_runtime(model: bytes, x: Array, threads: int) -> Runner:
    """The bytes of an ONNX file, on one input."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Its threads must not keep spinning while others are being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: np.ascontiguousarray(x)}
    return Runner(lambda: session.run(None, inputs), lambda: session.run(None, inputs)[0], (session,))


# torch


def torch_float(layers: Chain) -> Runner:
    """Layers of torch, channels-last."""
    order = torch.channels_last
    weights = [w.contiguous(memory_format=order) for w in layers.weights]
    x = layers.x.abs().contiguous(memory_format=order)

    @torch.no_grad()
    def call() -> Tensor:
        y = x
        for weight, bias in zip(weights, layers.biases, strict=True):
            y = F.conv2d(y, weight, bias, padding=layers.padding).add_(y).relu_()
        return y

    return Runner(call, lambda: call().numpy())


def torch_dynamic_int8(weight: Tensor, bias: Tensor, x: Tensor) -> Runner:
    """torch's own int8 linear layer, which quantizes its input at every call."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import default_dynamic_qconfig

    layer = torch.nn.Linear(*weight.shape[::-1])
    layer.load_state_dict({"weight": weight, "bias": bias})
    layer.qconfig = default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a later torch will not have it any more
        quantized = Linear.from_float(layer)

    @torch.no_grad()
    def call() -> Tensor:
        return quantized(x)

    return Runner(call, lambda: call().numpy())
