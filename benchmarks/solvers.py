"""How fast are exact scales? Our solvers against sorting, one pass over the data, and other libraries.

    python benchmarks/solvers.py                             # torchao too, where it is installed
    python benchmarks/solvers.py --ml-quant PATH             # the paper's code, from a checkout of it
    python benchmarks/solvers.py --traced                    # sort or histogram, without the native core

Two inputs: activations 32x64x56x56, scales for each sample; and the sixteen 3x3 weights of a ResNet-18,
scales for each output channel. All candidates take turns in one process on one thread, so that other work on
the machine hits all alike; what counts are ratios of medians. Each is first checked against the optimum: the
excess is the squared error above the least possible, relative to it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foldbit
from foldbit import timing
from foldbit.core.solvers import Method
from foldbit.kernels import native
from foldbit.tables import table

Inputs = list[Tensor]  # matrices [rows, n]
Solver = Callable[[Tensor], Tensor]  # [rows, n] -> what it approximates the rows by

SCHEMES = ("ls-2", "ls-T")
ONE_PASS = "ls-1: mean|x| in one pass"


def activations() -> Inputs:
    """Normal, as batch normalisation leaves them."""
    return [torch.randn(32, 64 * 56 * 56)]


def weights() -> Inputs:
    """The sixteen 3x3 convolutions of a ResNet-18, normal."""
    shapes = [(64, 64)] * 4
    for narrow, wide in [(64, 128), (128, 256), (256, 512)]:
        shapes += [(wide, narrow), *[(wide, wide)] * 3]
    return [torch.randn(out, channels * 9) / (channels * 9) ** 0.5 for out, channels in shapes]


def approximate(x: Tensor, scales: Tensor) -> Tensor:
    """What scales ``[rows, k]`` make of rows, plane by plane."""
    residual = x.double()
    for v in scales.double().unbind(1):
        residual = residual - torch.where(residual < 0, -v[:, None], v[:, None])
    return x - residual


def native_scales(scheme: str, threads: int = 1) -> Solver:
    return lambda x: torch.from_numpy(native.solve_rows(x.numpy(), scheme, threads=threads)[0])


@cache
def lsb_quantizer() -> Any | None:
    """torchao's, set to what it calls optimal; None where torchao cannot be imported, which is said."""
    try:
        torchao = importlib.import_module("torchao.prototype.parq.quant")
    except ImportError as error:
        print(f"torchao is left out: {error}", file=sys.stderr)
        return None
    return torchao.LSBQuantizer(center=False, optimal=True)


def peers(scheme: str, ml_quant: Path | None) -> Iterator[tuple[str, Solver, bool]]:
    """Name, solver, and whether that gives approximations (or else scales)."""
    quantizer = lsb_quantizer()
    if quantizer is not None:
        bits = 2 if scheme == "ls-2" else 0
        yield f"torchao {scheme}", lambda x: quantizer.quantize(x, bits, dim=-1)[0], True
    if ml_quant is not None:
        sys.path.insert(0, str(ml_quant))
        opt_v1 = importlib.import_module("quant.binary.optimal").opt_v1

        def solve(x: Tensor) -> Tensor:
            v1 = opt_v1(x, ternary=scheme == "ls-T", skip=3)  # its default: every third value
            v2 = v1 if scheme == "ls-T" else (x.abs() - v1).abs().mean(1, keepdim=True)
            return torch.cat([v1, v2], 1)

        yield f"ml-quant {scheme}", solve, False


def excess(inputs: Inputs, scheme: str, solver: Solver, approximates: bool) -> float:
    """Squared error above the least possible, relative to it, over all inputs."""
    reached = least = 0.0
    for x in inputs:
        best = foldbit.solve(x.double(), scheme, method="sort")
        least += float((x - approximate(x, best)).square().sum())
        found = solver(x)
        reached += float((x - (found if approximates else approximate(x, found))).double().square().sum())
    return reached / least - 1


def compare(inputs: Inputs, seconds: float, ml_quant: Path | None) -> dict[str, dict[str, float | None]]:
    """Times and excess of every candidate."""
    candidates: dict[str, tuple[Solver, float | None]] = {
        "torch.sort": (lambda x: x.sort(1).values, None),
        ONE_PASS: (native_scales("ls-1"), None),
        "torch x.abs().mean(1)": (lambda x: x.abs().mean(1), None),
    }
    for scheme in SCHEMES:
        ours = native_scales(scheme)
        candidates[scheme] = ours, excess(inputs, scheme, ours, False)
        candidates[f"{scheme}, 2 threads"] = native_scales(scheme, threads=2), candidates[scheme][1]
        for name, solver, approximates in peers(scheme, ml_quant):
            candidates[name] = solver, excess(inputs, scheme, solver, approximates)

    def over_all(solver: Solver) -> Callable[[], object]:
        return lambda: [solver(x) for x in inputs]

    times = timing.interleaved({name: over_all(s) for name, (s, _) in candidates.items()}, seconds=seconds)
    return {
        name: {"median": t.median, "low": t.low, "high": t.high, "excess": candidates[name][1]}
        for name, t in times.items()
    }


def show(name: str, inputs: Inputs, results: dict[str, dict[str, Any]]) -> str:
    elements = sum(x.numel() for x in inputs)
    base = {key: results[key]["median"] for key in ("torch.sort", ONE_PASS)}
    rows = [
        [
            candidate,
            f"{1e9 * r['median'] / elements:.2f}",
            f"{1e9 * r['low'] / elements:.2f} - {1e9 * r['high'] / elements:.2f}",
            f"{base['torch.sort'] / r['median']:.1f}",
            f"{r['median'] / base[ONE_PASS]:.1f}",
            "" if r["excess"] is None else f"{r['excess']:.1e}",
        ]
        for candidate, r in results.items()
    ]
    header = ["candidate", "ns a value", "quartiles", "faster than\ntorch.sort", "times\none pass", "excess"]
    return f"{name}\n{table(header, rows)}"


def scratch(scheme: str) -> int | None:
    """Bytes that a process grows by while it solves for the activations on one thread; None but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    code = f"""
import re, torch
from pathlib import Path
from foldbit.kernels import native

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

native.solve_rows(torch.randn(4, 10).numpy(), {scheme!r})
x = torch.randn(32, 64 * 56 * 56)
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
before = peak()
native.solve_rows(x.numpy(), {scheme!r})
print(peak() - before)
"""
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


class _Exported(torch.nn.Module):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return foldbit.solve(x, "ls-2", method=self.method)


def traced(lengths: Sequence[int], seconds: float, *, compiled: bool) -> list[dict[str, float]]:
    """Sort against histogram in exported graphs of any batch, or through torch.compile, by length of row."""
    results = []
    for n in lengths:
        x = torch.randn(max(2, 2**20 // n), n)
        torch.compiler.reset()
        runs: dict[str, Callable[[], object]] = {}
        for method in ("sort", "histogram"):
            graph: Callable[[Tensor], Tensor]
            if compiled:
                graph = torch.compile(_Exported(method), fullgraph=True, dynamic=False)
            else:
                shapes = ({0: torch.export.Dim("rows")},)
                graph = torch.export.export(_Exported(method), (x,), dynamic_shapes=shapes).module()
            runs[method] = partial(graph, x)
        with torch.no_grad():
            times = timing.interleaved(runs, seconds=seconds)
        results.append({"length": n, **{method: t.median / x.numel() for method, t in times.items()}})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each table")
    parser.add_argument("--ml-quant", type=Path, metavar="PATH", help="a checkout of the paper's code")
    parser.add_argument("--traced", action="store_true", help="compare sort and histogram in exported graphs")
    parser.add_argument("--compile", action="store_true", help="with --traced: through torch.compile instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = f"{timing.machine()}; load before the start {os.getloadavg()[0]:.1f}"
    print(where)
    results: dict[str, Any] = {"machine": where}
    if arguments.traced:
        lengths = (512, 2048, 4608, 8192, 16384, 50176, 200704)
        found = traced(lengths, arguments.seconds / len(lengths), compiled=arguments.compile)
        results["traced"] = found
        rows = [
            [
                r["length"],
                f"{1e9 * r['sort']:.1f}",
                f"{1e9 * r['histogram']:.1f}",
                f"{r['sort'] / r['histogram']:.2f}",
            ]
            for r in found
        ]
        print(table(["row length", "sort, ns a value", "histogram", "sort / histogram"], rows))
    else:
        for name, make in [
            ("activations 32x64x56x56, per sample", activations),
            ("weights, per channel", weights),
        ]:
            inputs = make()
            results[name] = compare(inputs, arguments.seconds, arguments.ml_quant)
            print("\n" + show(name, inputs, results[name]))
        results["scratch bytes a thread"] = {scheme: scratch(scheme) for scheme in SCHEMES}
        print(f"\nmemory beyond the input, bytes a thread: {results['scratch bytes a thread']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
