"""The same ResNet-18 in other people's engines: torch, ONNX Runtime and OpenVINO, in float, int8 and bits."""

from __future__ import annotations

import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from peers import Array, Runner, check
from resnet import CLAMP, Packed, Size, settle, without_gradients
from torch import Tensor, nn

from foldbit.packed.layers import PackedLayer, affine

BLOCKS = ("regular", "xnor")


@torch.no_grad()
def peer_networks(
    packed: Packed, size: Size, threads: int, compiled: bool
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Checked runners, and why others are missing."""
    x, order = size.images(1), torch.channels_last
    found: dict[str, Runner] = {}
    skipped: dict[str, str] = {}
    for block in BLOCKS:
        model = settle(size.network(block), size).to(memory_format=order)
        expected = model(x).numpy()
        images = x.contiguous(memory_format=order)
        runs = {"torch eager": model}
        if compiled:
            torch._dynamo.reset()  # what was compiled for other numbers of threads
            runs["torch.compile"] = torch.compile(model, options={"freezing": True})  # weights are constants
        for name, module in runs.items():
            call = partial(without_gradients, module, images)
            try:
                check(name, call().numpy(), expected, 1e-3)
            except peers.Wrong:
                raise
            except Exception as error:  # whatever a compiler has to say
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            found[f"{name}, {block}"] = Runner(call, lambda call=call: call().numpy())
        with tempfile.TemporaryDirectory() as folder:
            float32, int8 = onnx_files(model, size, Path(folder))
        for engine, build in (("ONNX Runtime", peers.onnx_runtime), ("OpenVINO", peers.openvino)):
            for kind, file, tolerance in (("float32", float32, 1e-3), ("int8", int8, 0.25)):
                name = f"{engine} {kind}, {block}"
                found[name] = build(file, x.numpy(), threads)
                check(name, found[name].output(), expected, tolerance)
    for scheme in ("W1A1", "W1A2"):
        plain = packed[scheme][1]
        name = f"OpenVINO BinaryConvolution {scheme}"
        found[name] = openvino_binary(plain, x, threads)
        check(name, found[name].output(), plain(x).numpy(), 0.05)
    return found, skipped


def onnx_files(model: nn.Module, size: Size, folder: Path) -> tuple[bytes, bytes]:
    """The network as ONNX in float32, and in static int8 (QDQ) calibrated on random images."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            batches = range(1, size.batches + 1)
            self.batches = iter([{"x": size.images(1, seed=i).numpy()} for i in batches])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.batches, None)

    exported, prepared, int8 = (folder / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter would need one more package
        logging.disable(logging.WARNING)  # scales and shifts of batch norms have no channels to tell apart
        torch.onnx.export(
            model, (size.images(1),), exported, dynamo=False, input_names=["x"], opset_version=17
        )
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            int8,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=not _has_vnni(),  # without it, sums of two products overflow 16 bits
        )
        logging.disable(logging.NOTSET)
    return exported.read_bytes(), int8.read_bytes()


def _has_vnni() -> bool:
    flags = Path("/proc/cpuinfo")
    return not flags.exists() or "vnni" in flags.read_text()


def openvino_binary(model: nn.Module, x: Tensor, threads: int) -> Runner:
    """The packed network, of one weight plane and not fused, with OpenVINO's BinaryConvolution."""
    net: Any = model
    graph = peers.OpenVinoGraph(x.shape)
    ops = graph.ops

    def convolve(y: Any, conv: nn.Module) -> Any:
        assert isinstance(conv, nn.Conv2d)
        weight = graph.constant(conv.weight.detach().numpy())
        strides, pads = list(conv.stride), list(conv.padding)
        y = ops.convolution(y, weight, strides, pads, pads, [1, 1])
        return y if conv.bias is None else ops.add(y, graph.by_channel(conv.bias))

    def normalise(y: Any, norm: nn.Module) -> Any:
        assert isinstance(norm, nn.BatchNorm2d)
        gain, shift = affine(norm)
        return ops.add(ops.multiply(y, graph.by_channel(gain)), graph.by_channel(shift))

    def bitwise(y: Any, norm: nn.BatchNorm2d, layer: PackedLayer) -> Any:
        scales = layer.activation_scales
        assert layer.spec.weight_planes == 1 and scales is not None and float(scales[0]) < CLAMP
        negative = layer.weight() < 0
        terms = []
        if len(scales) == 1:  # the sign of a normalised value is a comparison with a threshold
            gain, shift = affine(norm)
            low, high = graph.by_channel((gain < 0).float()), graph.by_channel((gain >= 0).float())
            flipped = (low, high) if bool((gain < 0).any()) else None
            bits = [graph.signs(y, graph.by_channel(-shift / gain), flipped)]
        else:
            z = normalise(y, norm)
            bits = [graph.signs(z), graph.signs(graph.second_plane(z, float(scales[0]), "clamp"))]
        for bit, scale in zip(bits, scales, strict=True):
            integers = graph.binary_convolution(bit, negative, layer.spec.stride[0])
            terms.append(ops.multiply(integers, graph.by_channel(layer.scales[0] * scale)))
        total = terms[0] if len(terms) == 1 else ops.add(*terms)
        return total if layer.bias is None else ops.add(total, graph.by_channel(layer.bias))

    y = ops.relu(normalise(convolve(graph.input, net.stem[0]), net.stem[1]))
    y = ops.max_pool(y, [2, 2], [1, 1], [1, 1], [3, 3], "floor", None)
    for stage in net.stages:
        for block in stage:
            shortcut = y
            if not isinstance(block.shortcut, nn.Identity):
                shortcut = normalise(convolve(y, block.shortcut[0]), block.shortcut[1])
            y = ops.add(ops.relu(bitwise(y, block.bn1, block.conv1)), shortcut)
            y = ops.add(ops.relu(bitwise(y, block.bn2, block.conv2)), y)
    y = ops.squeeze(ops.reduce_mean(y, ops.constant(np.array([2, 3])), True), ops.constant(np.array([2, 3])))
    y = ops.matmul(y, graph.constant(net.classifier.weight.detach().numpy()), False, True)
    y = ops.add(y, graph.constant(net.classifier.bias.detach().numpy()))
    return graph.runner(y, x.numpy(), threads)
