"""Tables of foldbit alone: its kernels against the machine's limit, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from cases import Case, Layer
from peak import BITS, ROUNDS, share_of_peak
from results import microseconds
from run import SHAPES, Run

from foldbit.kernels import native
from foldbit.tables import table


def threads(run: Run) -> None:
    """Two threads against one."""
    rows, found = [], {}
    for channels, size in run.shapes[:2]:
        for planes in (1, 2):
            layer = Layer(Case(channels, channels, size), planes)
            times = run.time({"one": layer.kernel(1), "two": layer.kernel(2)}, 0.5)
            gain = times["one"].median / times["two"].median
            name = f"{size}×{size}×{channels} W1A{planes}"
            found[name] = times
            rows.append([name, microseconds(times["one"]), microseconds(times["two"]), f"{gain:.2f}"])
            run.goal(f"two threads over one, {name}", gain, 1.5)
    run.results["threads"] = found
    print("\nThreads: whole layers, µs")
    print(table(["3×3 layer", "1 thread", "2 threads", "gain"], rows))


def core(run: Run) -> None:
    """The integers alone, against the peak loop."""
    if run.peak is None:
        print(f"\nCore: no peak to measure against: {run.why_no_peak}")
        return
    rows, found = [], {}
    for channels, size in run.shapes:
        case = Case(channels, channels, size)
        for planes in (1, 2):
            layer = Layer(case, planes)
            times = run.time(
                {
                    "core": layer.core(),
                    "packing": layer.packing(),
                    "native call": layer.kernel(),
                    "module": layer.module(),
                    "peak": run.peak,
                },
                0.5,
            )
            peak = times["peak"].median
            strict, padded = (
                share_of_peak(case, planes, times["core"].median, peak, padded_taps=p) for p in (False, True)
            )
            name = f"{size}×{size}×{channels} W1A{planes}"
            found[name] = {**times, "share": strict, "share, padded taps counted": padded}
            pieces = [microseconds(times[k]) for k in ("packing", "core", "native call", "module")]
            rows.append([name, *pieces, f"{strict:.0%}", f"{padded:.0%}"])
            run.goal(f"core over peak, {name}", strict, 0.85 if channels >= 128 else 0.75)
    rows.append(_gemm(run, found))
    run.results["core"] = found
    bits = ROUNDS * BITS / run.time({"peak": run.peak}, 0.2)["peak"].median
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


def other_shapes(run: Run) -> None:
    """Other kernels, strides and channels: the efficiency per MAC, relative to a 3x3 layer's."""
    if run.quick:
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
            times = run.time(
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
            run.goal(f"core, efficiency per MAC of {like.name}: {name}", relative["core"], 0.75)
            run.goal(f"layer, efficiency per MAC of {like.name}: {name}", relative["layer"], 0.75)
    run.results["other shapes"] = found
    print("\nOther shapes: efficiency per word-padded MAC inside the image, relative to a 3×3 layer's")
    print(table(["layer", "relative to", "core, µs", "layer, µs", "core", "layer"], rows))


def instruction_sets(run: Run) -> None:
    """Each instruction set, forced."""
    names = [name for name in native.available() if name != native.REFERENCE]
    best = names[-1]
    rows, found = [], {}
    for channels, size in run.shapes:
        for planes in (1, 2):
            layer = Layer(Case(channels, channels, size), planes)
            calls = {"core": layer.core(), "layer": layer.kernel()}
            candidates = {
                f"{isa} {what}": partial(_forced, isa, call) for isa in names for what, call in calls.items()
            }
            times = run.time(candidates, 0.5)
            name = f"{size}×{size}×{channels} W1A{planes}"
            found[name] = times
            row: list[object] = [name]
            for isa in names:
                row.append(microseconds(times[f"{isa} core"]))
                speeds = [times[f"{best} {what}"].median / times[f"{isa} {what}"].median for what in calls]
                row.append(" / ".join(f"{speed:.2f}" for speed in speeds))
                if isa == "avx2" and best == "avx512":
                    run.goal(f"avx2 over avx512, core, {name}", speeds[0], 0.3)
            rows.append(row)
    run.results["instruction sets"] = found
    print(f"\nInstruction sets, forced: the core's µs, and the speed of core / layer relative to {best}")
    print(table(["3×3 layer", *(title for isa in names for title in (isa, "relative"))], rows))


def _gemm(run: Run, found: dict[str, Any]) -> list[object]:
    width, batch = (64, 4) if run.quick else (4096, 64)
    rng = np.random.default_rng(0)
    a = rng.integers(0, 1 << 32, (1, batch, 1, 1, 1, width // 32), np.uint32)
    w = rng.integers(0, 1 << 32, (1, 1, width // 16, 1, 1, 1, width // 32, 16), np.uint32)
    assert run.peak is not None
    call = partial(
        native.conv_integers, a, w, out_size=(1, 1), in_channels_per_segment=width, out_channels=width
    )
    times = run.time({"core": call, "peak": run.peak}, 0.5)
    share = (batch * width**2 / times["core"].median) / (ROUNDS * BITS / times["peak"].median)
    name = f"GEMM {width}×{width}, batch {batch}"
    found[name] = {**times, "share": share}
    run.goal(f"core over peak, {name}", share, 0.92)
    return [name, "", microseconds(times["core"]), "", "", f"{share:.0%}", ""]


def _forced(isa: str, call: Callable[[], object]) -> None:
    with native.use(isa):
        call()
