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
import time
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from pieces import Calls, bitwise_layers, call_all, where_time_goes
from resnet import Packed, Size, packed_networks, without_gradients
from resnet_peers import peer_networks
from results import Goal, cores, draw, load, pin, show_goals, where, write

from foldbit import timing
from foldbit.tables import table
from foldbit.timing import Timing

TURN = 4  # calls in a row: the first finds its weights driven out of the caches by the network before it


def run(
    packed: Packed,
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
    candidates: Calls = {
        f"foldbit {s}": partial(without_gradients, fused, x) for s, (fused, _) in packed.items()
    }
    sums = {}
    for scheme, (fused, _) in packed.items():
        calls, count = bitwise_layers(fused, x)
        sums[scheme] = count
        candidates |= {
            f"{scheme}, its {count} bitwise {k}": partial(without_gradients, call)
            for k, call in calls.items()
        }
    skipped: dict[str, str] = {} if with_peers else {"peers": "--no-peers"}
    if with_peers:
        found, skipped = peer_networks(packed, size, threads, compiled)
        candidates |= found
    if threads > 1:  # spinning threads of one engine must not sit on the next one's core
        candidates = {
            k: v for name, call in candidates.items() for k, v in ((name, call), (f"pause {name}", _pause))
        }
    turns = {name: partial(call_all, [call] * TURN) for name, call in candidates.items()}
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
