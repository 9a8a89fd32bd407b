"""Tables of foldbit's layers against the same layers in other people's engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import peers
import torch
from cases import Case, Layer
from peers import Runner, check
from results import a_layer, fastest, microseconds
from run import Run, Times

import foldbit as fb
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec
from foldbit.tables import table

CHAIN = 3  # layers of the graph engines' longer chain
INT8 = ("OpenVINO int8", "ONNX Runtime int8")


def whole_layers(run: Run) -> None:
    """Whole layers against the peers."""
    rows, found = [], {}
    for channels, size in run.shapes:
        times = _layer_against_peers(run, channels, size)
        found[f"{size}×{size}×{channels}"] = times
        name = f"{size}×{size}×{channels}"
        for peer in times:
            ours = [times[f"foldbit W1A{planes}"].median for planes in (1, 2)]
            t = times[peer]
            ratios = [f"{t.median / mine:.2f}" for mine in ours]
            rows.append([name, peer, microseconds(t), f"{1e6 * t.low:.0f} - {1e6 * t.high:.0f}", *ratios])
        _layer_goals(run, name, times)
    run.results["layers"] = found
    print("\nWhole layers, packing, scale, bias, residual and ReLU included")
    header = ["3×3 layer", "engine", "µs", "quartiles", "time over\nour W1A1", "time over\nour W1A2"]
    print(table(header, rows))


def depthwise(run: Run) -> None:
    """Depthwise layers against torch's in float."""
    rows, found = [], {}
    for channels, size in run.shapes[:3]:
        layers = {p: Layer(Case(channels, channels, size, groups=channels), p) for p in (1, 2)}
        ours = layers[1]
        assert ours.layer.bias is not None
        convolve = partial(torch.conv2d, bias=ours.layer.bias, padding=1, groups=channels)
        weight = ours.layer.weight().contiguous(memory_format=torch.channels_last)
        for planes, layer in layers.items():
            folded = fb.quantize(layer.x, f"ls-{planes}", dim=None).values()
            expected = torch.relu(convolve(folded, weight)) + layer.residual
            check(f"foldbit depthwise W1A{planes}", layer.module()().numpy(), expected.numpy(), 1e-5)
        candidates: dict[str, Callable[[], object]] = {
            f"foldbit W1A{p}": layer.module() for p, layer in layers.items()
        }
        candidates["torch float32"] = lambda x=ours, f=convolve, w=weight: f(x.x, w).relu_().add_(x.residual)
        times = run.time(candidates)
        name = f"{size}×{size}×{channels}"
        found[name] = times
        for engine, t in times.items():
            over = [f"{t.median / times[f'foldbit W1A{p}'].median:.2f}" for p in (1, 2)]
            rows.append([name, engine, microseconds(t), *over])
    run.results["depthwise"] = found
    print("\nDepthwise 3×3 layers, scale, bias, residual and ReLU included")
    print(table(["layer", "engine", "µs", "time over\nour W1A1", "time over\nour W1A2"], rows))


def linear(run: Run) -> None:
    """A linear layer against torch's dynamic int8."""
    width = 64 if run.quick else 4096
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, width, generator=generator) / width**0.5
    bias = torch.randn(width, generator=generator)
    rows, found = [], {}
    for batch in (1, 64):
        x = torch.randn(batch, width, generator=generator)
        scales = fb.solve(x, "ls-1", dim=None)
        config = fb.QuantConfig("ls-1", "ls-1", activation_scales="static")
        spec = LayerSpec.of(torch.nn.Linear(width, width), config)
        magnitude = weight.abs().mean(1)
        ours = PackedLayer.from_codes(spec, (weight < 0)[None], magnitude.reshape(1, -1, 1), bias, scales)
        signs = torch.where(x < 0, -scales, scales).double()
        signed = torch.where(weight < 0, -magnitude[:, None], magnitude[:, None]).double()
        check("foldbit linear", ours(x).numpy(), (signs @ signed.T + bias).numpy(), 1e-5)
        candidates: dict[str, Callable[[], object]] = {"foldbit W1A1": partial(ours, x)}
        if run.with_peers:
            int8 = peers.torch_dynamic_int8(weight, bias, x)
            exact = (x.double() @ weight.double().T + bias).numpy()
            check("torch dynamic int8", int8.output(), exact, 0.05)
            candidates["torch dynamic int8"] = int8
        times = run.time(candidates)
        name = f"{width}×{width}, batch {batch}"
        found[name] = times
        for engine, t in times.items():
            ratio = t.median / times["foldbit W1A1"].median
            rows.append([name, engine, microseconds(t), f"{ratio:.2f}"])
        if run.with_peers:
            gain = times["torch dynamic int8"].median / times["foldbit W1A1"].median
            run.goal(f"linear W1A1 over torch dynamic int8, {name}", gain, 4.0)
    run.results["linear"] = found
    print("\nLinear layers")
    print(table(["layer", "engine", "µs", "time over\nours"], rows))


def _layer_against_peers(run: Run, channels: int, size: int) -> Times:
    candidates: dict[str, Callable[[], object]] = {}
    for planes in (1, 2):
        one = peers.chain(channels, size, 1, planes)
        ours = Layer(Case(channels, channels, size), planes, one)
        name = f"foldbit W1A{planes}"
        check(name, ours.module()().numpy(), one.binary(), 1e-5)
        check(f"{name}, native call", np.moveaxis(ours.kernel()(), 3, 1), one.binary(), 1e-5)
        candidates |= {name: ours.module(), f"{name}, native call": ours.kernel()}
    if not run.with_peers:
        return run.time(candidates)
    groups: dict[str, list[str]] = {}
    for layers in (1, CHAIN):
        # Where its memory comes to lie can make one and the same network half as slow again: two tries.
        for attempt in ("", ", again"):
            for name, kind, runner in _peer_builds(channels, size, layers):
                candidates[f"{name}{kind} ×{layers}{attempt}"] = runner
                if name + kind not in groups.setdefault(name, []):
                    groups[name].append(name + kind)
    candidates["torch float32"] = _torch_float(channels, size)
    times = run.time(candidates)
    found = {name: t for name, t in times.items() if " ×" not in name}
    chains = {name: t for name, t in times.items() if " ×" in name}
    best = {
        name: chains[fastest({n: chains[n] for n in (name, f"{name}, again")})]
        for name in chains
        if not name.endswith(", again")
    }
    for name, kinds in groups.items():
        each = {kind: a_layer(best, kind, CHAIN) for kind in kinds}
        found[name] = each[fastest(each)]
    run.results.setdefault("chains", {})[f"{size}×{size}×{channels}"] = chains
    return found


def _peer_builds(channels: int, size: int, count: int) -> list[tuple[str, str, Runner]]:
    """Name, way to build, and the checked chain of so many layers, of each graph engine."""
    found = []
    for planes, name in ((1, "OpenVINO BinaryConvolution"), (2, "OpenVINO BinaryConvolution, two")):
        layers = peers.chain(channels, size, count, planes)
        expected = layers.binary()
        for how in peers.SECOND_PLANE[:planes]:
            runner = peers.openvino_binary(layers, 1, how)
            check(name, runner.output(), expected, 1e-5)
            found.append((name, f" by {how}" if planes == 2 else "", runner))
    layers = peers.chain(channels, size, count, 1)
    x, expected = layers.x.abs().numpy(), layers.floats()[-1][1]
    float32 = peers.onnx_chain(layers, int8=False)
    int8 = {
        ", outputs in int8": peers.onnx_chain(layers, int8=True),
        ", outputs in float": peers.onnx_chain(layers, int8=True, requantize=False),
    }
    builds = [("OpenVINO float32", "", peers.openvino(float32, x, 1), 1e-4)]
    # Without int8 outputs ONNX Runtime falls back to float convolutions.
    builds += [("OpenVINO int8", how, peers.openvino(model, x, 1), 0.02) for how, model in int8.items()]
    builds += [("ONNX Runtime int8", "", peers.onnx_runtime(int8[", outputs in int8"], x, 1), 0.02)]
    for name, how, runner, tolerance in builds:
        check(name, runner.output(), expected, tolerance)
        found.append((name, how, runner))
    return found


def _torch_float(channels: int, size: int) -> Runner:
    layers = peers.chain(channels, size, 1, 1)
    runner = peers.torch_float(layers)
    check("torch float32", runner.output(), layers.floats()[-1][1], 1e-4)
    return runner


def _layer_goals(run: Run, name: str, times: Times) -> None:
    if not run.with_peers:
        return
    int8 = min(times[peer].median for peer in INT8)
    binary = [times[f"OpenVINO BinaryConvolution{more}"].median for more in ("", ", two")]
    for planes, what, peer, needed in (
        (1, "W1A1 over OpenVINO BinaryConvolution", binary[0], 1.0),
        (2, "W1A2 over two of them", binary[1], 1.3),
        (1, "W1A1 over the faster int8", int8, 3.1),
        (2, "W1A2 over the faster int8", int8, 2.1),
    ):
        ours, call = (times[f"foldbit W1A{planes}{more}"].median for more in ("", ", native call"))
        run.goal(f"{what}, {name}", peer / ours, needed, f"native call {peer / call:.2f}")
