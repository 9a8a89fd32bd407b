"""A whole ResNet-18 at 224x224, one image: packed in torch, and in other people's engines.

    pip install foldbit[bench]
    python benchmarks/networks.py --json runs/bench/networks.json --plot runs/bench/networks.png

Random weights; batch norms and static scales have seen a few batches. Packed networks have XNOR blocks and a
float stem, shortcuts and classifier. Float and int8 engines run two networks of the same depth and widths:
the ordinary ResNet-18 of regular blocks, whose batch norms fold away, which is the fastest an engine could do
for its user, and the very same XNOR blocks. Outputs are checked before anything is timed, and all networks
take turns.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peers
import torch
from peers import Array, Runner, check
from results import Goal, cores, draw, load, native_calls, native_seconds, pin, show_goals, where, write
from torch import Tensor, nn

import foldbit as fb
from foldbit import models, timing
from foldbit.packed.absorbed import Absorbed
from foldbit.packed.layers import PackedLayer, affine
from foldbit.tables import table
from foldbit.timing import Timing

SCHEMES = {"W1A1": ("ls-1", "ls-1"), "W1A2": ("ls-1", "ls-2"), "W2A2": ("ls-2", "ls-2")}
BLOCKS = ("regular", "xnor")
CLAMP = 3.0
TURN = 4  # calls in a row: the first finds its weights driven out of the caches by the network before it

Calls = dict[str, Callable[[], object]]


class Size:
    """How large a network and image."""

    def __init__(self, quick: bool) -> None:
        self.arguments: dict[str, Any] = {"widths": (16, 16, 32, 32), "num_classes": 10} if quick else {}
        self.image = 64 if quick else 224
        self.batches, self.batch = (2, 2) if quick else (6, 8)

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Random ones."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, 3, self.image, self.image, generator=generator)

    def network(self, block: str) -> nn.Module:
        """A float ResNet-18."""
        torch.manual_seed(0)
        return models.create("resnet18", block=block, **self.arguments)


@torch.no_grad()
def settle(model: nn.Module, size: Size) -> nn.Module:
    """Show batch norms and static scales a few batches; batch norms keep the mean of what they saw."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()
    for i in range(size.batches):
        model(size.images(size.batch, seed=i + 1))
    return model.eval()


def quantized(scheme: str, size: Size) -> nn.Module:
    """The network of XNOR blocks with fake-quantized layers, which packing does not change."""
    weight, activation = SCHEMES[scheme]
    config = fb.QuantConfig(weight, activation, activation_scales="static", clamp=CLAMP)
    model = size.network("xnor")
    fb.quantize_(model, config, overrides=models.float_layers(model))
    return settle(model, size)


# Peers


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
        )
        logging.disable(logging.NOTSET)
    return exported.read_bytes(), int8.read_bytes()


def openvino_binary(model: nn.Module, x: Tensor, threads: int) -> Runner:
    """The packed network, of one weight plane and not fused, with OpenVINO's BinaryConvolution."""
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

    stem: Any = model.stem
    y = ops.relu(normalise(convolve(graph.input, stem[0]), stem[1]))
    y = ops.max_pool(y, [2, 2], [1, 1], [1, 1], [3, 3], "floor", None)
    for stage in model.stages:  # type: ignore[union-attr]
        for block in stage:
            shortcut = y
            if not isinstance(block.shortcut, nn.Identity):
                shortcut = normalise(convolve(y, block.shortcut[0]), block.shortcut[1])
            y = ops.add(ops.relu(bitwise(y, block.bn1, block.conv1)), shortcut)
            y = ops.add(ops.relu(bitwise(y, block.bn2, block.conv2)), y)
    y = ops.squeeze(ops.reduce_mean(y, ops.constant(np.array([2, 3])), True), ops.constant(np.array([2, 3])))
    classifier: Any = model.classifier
    y = ops.matmul(y, graph.constant(classifier.weight.detach().numpy()), False, True)
    y = ops.add(y, graph.constant(classifier.bias.detach().numpy()))
    return graph.runner(y, x.numpy(), threads)


# Candidates


@torch.no_grad()
def packed_networks(size: Size) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Fused and unfused packed networks, checked against their fake-quantized twins."""
    x, found = size.images(1), {}
    for scheme in SCHEMES:
        twin = quantized(scheme, size)
        expected = twin(x).numpy()
        fused, plain = fb.pack_(copy.deepcopy(twin)), fb.pack_(twin, fuse=False)
        for name, model in (("fused", fused), ("not fused", plain)):
            # Rounding may flip a sign that lies on its threshold, and that sign others.
            check(f"foldbit {scheme}, {name}", model(x).numpy(), expected, 0.05)
        found[scheme] = fused, plain
    return found


@torch.no_grad()
def peer_networks(
    packed: dict[str, tuple[nn.Module, nn.Module]], size: Size, threads: int, compiled: bool
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
            call = partial(_no_grad, module, images)
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


def _no_grad(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return module(x)


@torch.no_grad()
def bitwise_layers(model: nn.Module, x: Tensor) -> tuple[Calls, int]:
    """All packed layers of a network, one after another, each on the input it gets inside: whole, and bare.

    Returns:
        Two calls, of the modules and of the native calls they make; and how many layers there are.
    """
    inside: list[Callable[[], object]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: inside.append(partial(layer, *args, **kwargs)), with_kwargs=True
        )
        for layer in model.modules()
        if isinstance(layer, PackedLayer)
    ]
    try:
        with native_calls() as bare:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {"modules": partial(_all, inside), "native calls": partial(_all, bare)}, len(inside)


def _all(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()


@contextmanager
def _stopwatch(modules: dict[str, list[nn.Module]], taken: dict[str, float]) -> Iterator[None]:
    handles = []
    for name, group in modules.items():
        for module in group:

            def begin(*_: object, name: str = name) -> None:
                taken[name] -= time.perf_counter()

            def end(*_: object, name: str = name) -> None:
                taken[name] += time.perf_counter()

            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def where_time_goes(model: nn.Module, x: Tensor, runs: int) -> dict[str, float]:
    """Seconds that each kind of work takes in a packed network: medians of several runs."""
    net: Any = model
    loose = (nn.BatchNorm2d, nn.ReLU, nn.Identity, Absorbed)
    parts: dict[str, list[nn.Module]] = {
        "stem": [net.stem],
        "shortcuts": [m for n, m in model.named_modules() if n.endswith("shortcut") and len(m._modules)],
        "pooling, classifier": [net.pool, net.classifier],
        "other modules": [
            m for n, m in net.stages.named_modules() if isinstance(m, loose) and "shortcut." not in n
        ],
    }
    layers, kernels = "bitwise layers", "bitwise layers: native calls"
    watched = {**parts, layers: [m for m in model.modules() if isinstance(m, PackedLayer)]}
    found: dict[str, list[float]] = {}
    for _ in range(runs + 1):
        taken = dict.fromkeys(watched, 0.0)
        with _stopwatch(watched, taken), native_seconds() as inside:
            start = time.perf_counter()
            model(x)
            whole = time.perf_counter() - start
        between = whole - sum(taken.values())
        around = taken.pop(layers) - sum(inside)
        split = {kernels: sum(inside), "bitwise layers: around them": around}
        for name, seconds in {**split, **taken, "framework between them": between}.items():
            found.setdefault(name, []).append(seconds)
    return {name: median(seconds[1:]) for name, seconds in found.items()}


# One number of threads


def run(
    packed: dict[str, tuple[nn.Module, nn.Module]],
    size: Size,
    threads: int,
    *,
    seconds: float,
    with_peers: bool,
    compiled: bool,
    quick: bool,
) -> dict[str, Any]:
    """Everything at so many threads: prints its tables, returns its numbers and goals."""
    torch.set_num_threads(threads)
    x = size.images(1)
    candidates: Calls = {f"foldbit {s}": partial(_no_grad, fused, x) for s, (fused, _) in packed.items()}
    sums = {}
    for scheme, (fused, _) in packed.items():
        calls, count = bitwise_layers(fused, x)
        sums[scheme] = count
        candidates |= {
            f"{scheme}, its {count} bitwise {k}": partial(_quiet, call) for k, call in calls.items()
        }
    skipped: dict[str, str] = {} if with_peers else {"peers": "--no-peers"}
    if with_peers:
        found, skipped = peer_networks(packed, size, threads, compiled)
        candidates |= found
    if threads > 1:  # spinning threads of one engine must not sit on the next one's core
        candidates = {
            k: v for name, call in candidates.items() for k, v in ((name, call), (f"pause {name}", _pause))
        }
    turns = {name: partial(_all, [call] * TURN) for name, call in candidates.items()}
    found_times = timing.interleaved(turns, seconds=seconds, rounds=3 if quick else 9)
    times = {
        name: Timing(t.median / TURN, t.low / TURN, t.high / TURN)
        for name, t in found_times.items()
        if not name.startswith("pause ")
    }
    int8 = min((t.median for name, t in times.items() if "OpenVINO int8" in name), default=float("nan"))
    rows = []
    for name, t in times.items():
        milliseconds = [f"{1e3 * value:.2f}" for value in (t.median, t.low, t.high)]
        rows.append([name, milliseconds[0], " - ".join(milliseconds[1:]), f"{t.median / int8:.2f}"])
    print(f"\nResNet-18, {size.image}×{size.image}, batch 1, {timing.threads_in_words(threads)}")
    print(table(["network", "ms", "quartiles", "over OpenVINO\nint8"], rows))
    if not quick and timing.warning(times):
        print(timing.warning(times))
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    shares = {s: where_time_goes(fused, x, 3 if quick else 31) for s, (fused, _) in packed.items()}
    parts = list(next(iter(shares.values())))
    print("\nWhere a packed network's time goes, ms")
    print(table(["", *shares], [[part, *(f"{1e3 * shares[s][part]:.2f}" for s in shares)] for part in parts]))
    goals = [] if quick or not with_peers else goals_of(times, sums, int8, threads)
    results = {"times": times, "where time goes, µs": _in_microseconds(shares), "not measured": skipped}
    return {**results, "goals": goals}


def goals_of(times: dict[str, Timing], layers: dict[str, int], int8: float, threads: int) -> list[Goal]:
    """The packed networks' goals."""
    found, on = [], timing.threads_in_words(threads)
    for scheme, limit in (("W1A1", 0.23), ("W1A2", 0.40)):
        modules, bare = (
            times[f"{scheme}, its {layers[scheme]} bitwise {k}"].median / int8
            for k in ("modules", "native calls")
        )
        what = f"{layers[scheme]} bitwise layers of {scheme} over OpenVINO int8, {on}"
        found.append(Goal(what, modules, limit, at_most=True, note=f"native calls {bare:.2f}"))
    runtime = {n: t.median for n, t in times.items() if "ONNX Runtime int8" in n}
    name = min(runtime, key=lambda n: runtime[n])
    found.append(
        Goal(f"W1A2 over {name}, {on}", times["foldbit W1A2"].median / runtime[name], 1.0, at_most=True)
    )
    return found


def _in_microseconds(shares: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {s: {part: round(1e6 * t, 1) for part, t in parts.items()} for s, parts in shares.items()}


def _quiet(call: Callable[[], object]) -> None:
    with torch.no_grad():
        call()


def _pause() -> None:
    time.sleep(0.004)


def picture(results: dict[str, Any], figure: Any) -> None:
    """Whole networks, and where the packed ones' time goes, at the fewest threads."""
    threads, found = next(iter(sorted(results["threads"].items())))
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    times = {n: t for n, t in found["times"].items() if "bitwise" not in n}
    colours = ["tab:blue" if n.startswith("foldbit") else "tab:gray" for n in times]
    bars = left.barh(list(times), [1e3 * t.median for t in times.values()], color=colours)
    left.bar_label(bars, fmt="%.1f", padding=3)
    left.invert_yaxis()
    left.set(xlabel="ms an image", title=f"ResNet-18, batch 1, {timing.threads_in_words(int(threads))}")
    left.margins(x=0.1)
    shares = found["where time goes, µs"]
    bottom = dict.fromkeys(shares, 0.0)
    for part in next(iter(shares.values())):
        heights = {s: shares[s][part] / 1e3 for s in shares}
        right.bar(list(shares), list(heights.values()), bottom=list(bottom.values()), label=part)
        bottom = {s: bottom[s] + heights[s] for s in shares}
    right.set(ylabel="ms", title="Where the packed network's time goes")
    right.set_ylim(top=1.4 * max(bottom.values()))
    right.legend(fontsize=8)
    figure.suptitle(results["machine"]["processor"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of threads")
    parser.add_argument("--no-peers", action="store_true", help="foldbit alone")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--quick", action="store_true", help="a tiny network, no goals: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture there")
    arguments = parser.parse_args()
    missing = [] if arguments.no_peers else peers.missing()
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; pip install 'foldbit[bench]', or use --no-peers")
    allowed = cores()
    if min(arguments.threads) < 1:
        parser.error(f"--threads takes numbers of at least 1; got {arguments.threads}")
    counts = [n for n in arguments.threads if n <= len(allowed)]
    for n in set(arguments.threads) - set(counts):
        print(f"not measured: {n} threads, for this process may use {len(allowed)} cores only")
    size = Size(arguments.quick)
    results: dict[str, Any] = {"machine": where(), "threads": {}}
    print(f"{timing.processor()}, load before the start {load():.1f}")
    packed = packed_networks(size)
    goals: list[Goal] = []
    # Most threads first: those that engines start now may run on all cores, whatever this one does later.
    for threads in sorted(set(counts), reverse=True):
        pin(allowed[-threads:])
        found = run(
            packed,
            size,
            threads,
            seconds=0.1 if arguments.quick else arguments.seconds,
            with_peers=not arguments.no_peers,
            compiled=not arguments.no_compile,
            quick=arguments.quick,
        )
        goals += found.pop("goals")
        results["threads"][threads] = found
    results |= {"goals": goals, "load after": round(load(), 2)}
    if goals:
        print(f"\n{show_goals(goals)}")
    print(f"load at the end {load():.1f}")
    write(arguments.json, results)
    if results["threads"]:
        draw(arguments.plot, partial(picture, results), (13, 6))


if __name__ == "__main__":
    main()
