"""How fast the bitwise kernels are: against the machine's limit, and against other people's engines.

    pip install foldbit[bench]
    python benchmarks/kernels.py --json runs/bench/kernels.json --plot runs/bench/kernels.png

One thread, pinned to one core, unless a table says otherwise. All candidates of a row take turns, so that
whatever else the machine does hits all alike: trust the ratios, not the times. Peers are checked against a
float reference before they are timed (benchmarks/peers.py). Times are medians; the JSON has quartiles, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from cases import Case, Layer
from peak import BITS, ROUNDS, NoCompiler, peak_loop, share_of_peak
from peers import Runner, check
from results import (
    Goal,
    a_layer,
    cores,
    draw,
    fastest,
    load,
    microseconds,
    pin,
    show_goals,
    where,
    write,
)

import foldbit as fb
from foldbit import timing
from foldbit.kernels import native
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec
from foldbit.tables import table
from foldbit.timing import Timing

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, size: the 3x3 layers of ResNet-18
CHAIN = 3  # layers of the graph engines' longer chain
INT8 = ("OpenVINO int8", "ONNX Runtime int8")

Times = dict[str, Timing]


class Benchmark:
    """One run: its settings, numbers and goals."""

    def __init__(
        self, *, seconds: float, quick: bool, with_peers: bool, two: list[int], one: list[int]
    ) -> None:
        self.seconds, self.quick, self.with_peers = seconds, quick, with_peers
        self.two, self.one = two, one
        self.shapes = ((32, 6), (48, 5)) if quick else SHAPES
        self.goals: list[Goal] = []
        self.results: dict[str, Any] = {}
        self.timed = self.unsteady = 0
        try:
            self.peak = peak_loop()
            self.why_no_peak = "this machine has no AVX-512 VPOPCNTDQ"
        except NoCompiler as error:
            self.peak, self.why_no_peak = None, str(error)

    def time(self, candidates: dict[str, Callable[[], object]], share: float = 1.0) -> Times:
        """All candidates in turn."""
        rounds = 3 if self.quick else 9
        times = timing.interleaved(candidates, seconds=self.seconds * share, rounds=rounds)
        self.timed += len(times)
        self.unsteady += sum(t.spread > timing.UNSTEADY for t in times.values())
        return times

    def goal(self, what: str, value: float, needed: float, note: str = "") -> None:
        """Note a goal, in a real run."""
        if not self.quick:
            self.goals.append(Goal(what, value, needed, note=note))

    def threads(self) -> None:
        """Two threads against one."""
        rows, found = [], {}
        for channels, size in self.shapes[:2]:
            for planes in (1, 2):
                layer = Layer(Case(channels, channels, size), planes)
                times = self.time({"one": layer.kernel(1), "two": layer.kernel(2)}, 0.5)
                gain = times["one"].median / times["two"].median
                name = f"{size}×{size}×{channels} W1A{planes}"
                found[name] = times
                rows.append([name, microseconds(times["one"]), microseconds(times["two"]), f"{gain:.2f}"])
                self.goal(f"two threads over one, {name}", gain, 1.5)
        self.results["threads"] = found
        print("\nThreads: whole layers, µs")
        print(table(["3×3 layer", "1 thread", "2 threads", "gain"], rows))

    def layers(self) -> None:
        """Whole layers against the peers."""
        rows, found = [], {}
        for channels, size in self.shapes:
            times = self._layer_against_peers(channels, size)
            found[f"{size}×{size}×{channels}"] = times
            name = f"{size}×{size}×{channels}"
            for peer in times:
                ours = [times[f"foldbit W1A{planes}"].median for planes in (1, 2)]
                t = times[peer]
                ratios = [f"{t.median / mine:.2f}" for mine in ours]
                rows.append([name, peer, microseconds(t), f"{1e6 * t.low:.0f} - {1e6 * t.high:.0f}", *ratios])
            self._layer_goals(name, times)
        self.results["layers"] = found
        print("\nWhole layers, packing, scale, bias, residual and ReLU included")
        header = ["3×3 layer", "engine", "µs", "quartiles", "time over\nour W1A1", "time over\nour W1A2"]
        print(table(header, rows))

    def _layer_against_peers(self, channels: int, size: int) -> Times:
        candidates: dict[str, Callable[[], object]] = {}
        for planes in (1, 2):
            one = peers.chain(channels, size, 1, planes)
            ours = Layer(Case(channels, channels, size), planes, one)
            name = f"foldbit W1A{planes}"
            check(name, ours.module()().numpy(), one.binary(), 1e-5)
            check(f"{name}, native call", np.moveaxis(ours.kernel()(), 3, 1), one.binary(), 1e-5)
            candidates |= {name: ours.module(), f"{name}, native call": ours.kernel()}
        if not self.with_peers:
            return self.time(candidates)
        groups: dict[str, list[str]] = {}
        for layers in (1, CHAIN):
            # Where its memory comes to lie can make one and the same network half as slow again: two tries.
            for attempt in ("", ", again"):
                for name, kind, runner in _peer_builds(channels, size, layers):
                    candidates[f"{name}{kind} ×{layers}{attempt}"] = runner
                    if name + kind not in groups.setdefault(name, []):
                        groups[name].append(name + kind)
        candidates["torch float32"] = _torch_float(channels, size)
        times = self.time(candidates)
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
        self.results.setdefault("chains", {})[f"{size}×{size}×{channels}"] = chains
        return found

    def _layer_goals(self, name: str, times: Times) -> None:
        if not self.with_peers:
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
            self.goal(f"{what}, {name}", peer / ours, needed, f"native call {peer / call:.2f}")

    def core(self) -> None:
        """The integers alone, against the peak loop."""
        if self.peak is None:
            print(f"\nCore: no peak to measure against: {self.why_no_peak}")
            return
        rows, found = [], {}
        for channels, size in self.shapes:
            case = Case(channels, channels, size)
            for planes in (1, 2):
                layer = Layer(case, planes)
                times = self.time(
                    {
                        "core": layer.core(),
                        "packing": layer.packing(),
                        "native call": layer.kernel(),
                        "module": layer.module(),
                        "peak": self.peak,
                    },
                    0.5,
                )
                peak = times["peak"].median
                strict, padded = (
                    share_of_peak(case, planes, times["core"].median, peak, padded_taps=p)
                    for p in (False, True)
                )
                name = f"{size}×{size}×{channels} W1A{planes}"
                found[name] = {**times, "share": strict, "share, padded taps counted": padded}
                pieces = [microseconds(times[k]) for k in ("packing", "core", "native call", "module")]
                rows.append([name, *pieces, f"{strict:.0%}", f"{padded:.0%}"])
                self.goal(f"core over peak, {name}", strict, 0.85 if channels >= 128 else 0.75)
        rows.append(self._gemm(found))
        self.results["core"] = found
        bits = ROUNDS * BITS / self.time({"peak": self.peak}, 0.2)["peak"].median
        print(f"\nCore: the integers alone; the peak loop does {bits / 1e9:.0f} Gbit/s. Times in µs")
        header = [
            "3×3 layer",
            "packing",
            "core",
            "native\ncall",
            "module",
            "core / peak",
            "padded taps\ncounted",
        ]
        print(table(header, rows))

    def _gemm(self, found: dict[str, Any]) -> list[object]:
        width, batch = (64, 4) if self.quick else (4096, 64)
        rng = np.random.default_rng(0)
        a = rng.integers(0, 1 << 32, (1, batch, 1, 1, 1, width // 32), np.uint32)
        w = rng.integers(0, 1 << 32, (1, 1, width // 16, 1, 1, 1, width // 32, 16), np.uint32)
        assert self.peak is not None
        call = partial(
            native.conv_integers, a, w, out_size=(1, 1), in_channels_per_segment=width, out_channels=width
        )
        times = self.time({"core": call, "peak": self.peak}, 0.5)
        share = (batch * width**2 / times["core"].median) / (ROUNDS * BITS / times["peak"].median)
        name = f"GEMM {width}×{width}, batch {batch}"
        found[name] = {**times, "share": share}
        self.goal(f"core over peak, {name}", share, 0.92)
        return [name, "", microseconds(times["core"]), "", "", f"{share:.0%}", ""]

    def other_shapes(self) -> None:
        """Other kernels, strides and channels: the efficiency per MAC, relative to a 3x3 layer's."""
        if self.quick:
            pairs = [(Case(48, 48, 5), Case(32, 32, 6)), (Case(32, 32, 5, 5), Case(32, 32, 6))]
        else:
            base = {size: Case(channels, channels, size) for channels, size in SHAPES}
            pairs = [
                (Case(256, 256, 14, 1), base[14]),
                (Case(128, 128, 28, 1), base[28]),
                (Case(256, 256, 14, 5), base[14]),
                (Case(128, 128, 28, 5), base[28]),
                (Case(64, 128, 56, 3, 2), base[56]),
                (Case(128, 256, 28, 3, 2), base[28]),
                (Case(256, 512, 14, 3, 2), base[14]),
                (Case(96, 96, 14), base[14]),
                (Case(48, 48, 28), base[28]),
            ]
        rows, found = [], {}
        for case, like in pairs:
            for planes in (1, 2):
                mine, theirs = Layer(case, planes), Layer(like, planes)
                times = self.time(
                    {
                        "core": mine.core(),
                        "layer": mine.module(),
                        "core like": theirs.core(),
                        "layer like": theirs.module(),
                    },
                    0.4,
                )
                work = case.macs() / like.macs()
                relative = {k: work * times[f"{k} like"].median / times[k].median for k in ("core", "layer")}
                name = f"{case.name} W1A{planes}"
                found[name] = {**times, "like": like.name, "relative efficiency": relative}
                rows.append(
                    [
                        name,
                        like.name,
                        *(microseconds(times[k]) for k in ("core", "layer")),
                        *(f"{relative[k]:.2f}" for k in ("core", "layer")),
                    ]
                )
                self.goal(f"core, efficiency per MAC of {like.name}: {name}", relative["core"], 0.75)
                self.goal(f"layer, efficiency per MAC of {like.name}: {name}", relative["layer"], 0.75)
        self.results["other shapes"] = found
        print("\nOther shapes: efficiency per word-padded MAC inside the image, relative to a 3×3 layer's")
        print(table(["layer", "relative to", "core, µs", "layer, µs", "core", "layer"], rows))

    def depthwise(self) -> None:
        """Depthwise layers against torch's in float."""
        rows, found = [], {}
        for channels, size in self.shapes[:3]:
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
            candidates["torch float32"] = lambda x=ours, f=convolve, w=weight: (
                f(x.x, w).relu_().add_(x.residual)
            )
            times = self.time(candidates)
            name = f"{size}×{size}×{channels}"
            found[name] = times
            for engine, t in times.items():
                over = [f"{t.median / times[f'foldbit W1A{p}'].median:.2f}" for p in (1, 2)]
                rows.append([name, engine, microseconds(t), *over])
        self.results["depthwise"] = found
        print("\nDepthwise 3×3 layers, scale, bias, residual and ReLU included")
        print(table(["layer", "engine", "µs", "time over\nour W1A1", "time over\nour W1A2"], rows))

    def linear(self) -> None:
        """A linear layer against torch's dynamic int8."""
        width = 64 if self.quick else 4096
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
            if self.with_peers:
                int8 = peers.torch_dynamic_int8(weight, bias, x)
                exact = (x.double() @ weight.double().T + bias).numpy()
                check("torch dynamic int8", int8.output(), exact, 0.05)
                candidates["torch dynamic int8"] = int8
            times = self.time(candidates)
            name = f"{width}×{width}, batch {batch}"
            found[name] = times
            for engine, t in times.items():
                ratio = t.median / times["foldbit W1A1"].median
                rows.append([name, engine, microseconds(t), f"{ratio:.2f}"])
            if self.with_peers:
                gain = times["torch dynamic int8"].median / times["foldbit W1A1"].median
                self.goal(f"linear W1A1 over torch dynamic int8, {name}", gain, 4.0)
        self.results["linear"] = found
        print("\nLinear layers")
        print(table(["layer", "engine", "µs", "time over\nours"], rows))

    def instruction_sets(self) -> None:
        """Each instruction set, forced."""
        names = [name for name in native.available() if name != native.REFERENCE]
        best = names[-1]
        rows, found = [], {}
        for channels, size in self.shapes:
            for planes in (1, 2):
                layer = Layer(Case(channels, channels, size), planes)
                calls = {"core": layer.core(), "layer": layer.kernel()}
                candidates = {
                    f"{isa} {what}": partial(_forced, isa, call)
                    for isa in names
                    for what, call in calls.items()
                }
                times = self.time(candidates, 0.5)
                name = f"{size}×{size}×{channels} W1A{planes}"
                found[name] = times
                row: list[object] = [name]
                for isa in names:
                    row.append(microseconds(times[f"{isa} core"]))
                    speeds = [
                        times[f"{best} {what}"].median / times[f"{isa} {what}"].median for what in calls
                    ]
                    row.append(" / ".join(f"{speed:.2f}" for speed in speeds))
                    if isa == "avx2" and best == "avx512":
                        self.goal(f"avx2 over avx512, core, {name}", speeds[0], 0.3)
                rows.append(row)
        self.results["instruction sets"] = found
        print(f"\nInstruction sets, forced: the core's µs, and the speed of core / layer relative to {best}")
        print(table(["3×3 layer", *(title for isa in names for title in (isa, "relative"))], rows))

    def picture(self, figure: Any) -> None:
        """Layers against the peers, and shares of the peak."""
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        layers = self.results["layers"]
        engines = [name for name in next(iter(layers.values())) if "native" not in name]
        width = 0.8 / len(engines)
        for i, engine in enumerate(engines):
            at = [j + (i - (len(engines) - 1) / 2) * width for j in range(len(layers))]
            heights = [1e6 * times[engine].median for times in layers.values()]
            left.bar(at, heights, width, label=engine)
        left.set(yscale="log", ylabel="µs a layer, one thread", title="3×3 layers: a lower bar is faster")
        left.set_xticks(range(len(layers)), list(layers))
        left.legend(fontsize=8, ncols=2)
        left.set_ylim(bottom=min(10.0, left.get_ylim()[0]), top=left.get_ylim()[1] * 4)  # room for the legend
        core = {k: v["share"] for k, v in self.results.get("core", {}).items()}
        right.barh(list(core), [100 * share for share in core.values()])
        right.invert_yaxis()
        right.set(
            xlim=(0, 105), xlabel="% of the xor, popcount, add peak", title="Core against the peak loop"
        )
        figure.suptitle(f"foldbit's kernels, {self.results['machine']['processor']}")


def _forced(isa: str, call: Callable[[], object]) -> None:
    with native.use(isa):
        call()


def _torch_float(channels: int, size: int) -> Runner:
    layers = peers.chain(channels, size, 1, 1)
    runner = peers.torch_float(layers)
    check("torch float32", runner.output(), layers.floats()[-1][1], 1e-4)
    return runner


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for the candidates of a row")
    parser.add_argument("--core", type=int, help="the core to pin to; by default the last")
    parser.add_argument("--only", nargs="+", metavar="TABLE", choices=TABLES, default=list(TABLES))
    parser.add_argument("--no-peers", action="store_true", help="foldbit alone")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, no goals: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture there")
    arguments = parser.parse_args()
    missing = [] if arguments.no_peers else peers.missing()
    if missing:
        parser.error(
            f"not installed: {', '.join(missing)}; pip install 'foldbit[bench]', or run with --no-peers"
        )
    if arguments.core is not None and arguments.core not in cores():
        parser.error(f"--core {arguments.core}: this process may use {', '.join(map(str, cores()))}")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    allowed = cores()
    core = allowed[-1] if arguments.core is None else arguments.core
    bench = Benchmark(
        seconds=0.02 if arguments.quick else arguments.seconds,
        quick=arguments.quick,
        with_peers=not arguments.no_peers,
        two=allowed,
        one=[core],
    )
    bench.results["machine"] = where()
    shown = f"{timing.processor()}, {native.current()} kernels, load before the start {load():.1f}"
    print(shown)
    if "threads" in arguments.only:
        if len(allowed) > 1:
            bench.threads()  # first: what the pool starts now may run on all cores
        else:
            print("Threads: only one core to run on, not measured")
    pinned = pin(bench.one)
    print(f"\nFrom here on one thread, {f'on core {core}' if pinned else 'not pinned: this system cannot'}")
    for name in TABLES:
        if name in arguments.only and name != "threads":
            getattr(bench, name)()
    bench.results |= {"goals": bench.goals, "load after": round(load(), 2), "unsteady": bench.unsteady}
    if bench.goals:
        print(f"\n{show_goals(bench.goals)}")
        print(f"{sum(goal.met for goal in bench.goals)} of {len(bench.goals)} met")
    print(f"load at the end {load():.1f}")
    print(
        f"{bench.unsteady} of {bench.timed} times have quartiles more than {timing.UNSTEADY:.0%} of the "
        "median apart: of those, ratios say little"
    )
    write(arguments.json, bench.results)
    if arguments.plot and "layers" in bench.results:
        draw(arguments.plot, bench.picture, (13, 5.5))


TABLES = ("threads", "layers", "core", "other_shapes", "depthwise", "linear", "instruction_sets")

if __name__ == "__main__":
    main()
