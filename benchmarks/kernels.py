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

import own_tables
import peer_tables
import peers
import torch
from results import cores, draw, load, pin, show_goals, where, write
from run import Run

from foldbit import timing
from foldbit.kernels import native

TABLES: dict[str, Callable[[Run], None]] = {  # in the order they are shown
    "threads": own_tables.threads,
    "layers": peer_tables.whole_layers,
    "core": own_tables.core,
    "other_shapes": own_tables.other_shapes,
    "depthwise": peer_tables.depthwise,
    "linear": peer_tables.linear,
    "instruction_sets": own_tables.instruction_sets,
}


def picture(run: Run, figure: Any) -> None:
    """Layers against the peers, and shares of the peak where they were measured."""
    layers, core = run.results["layers"], run.results.get("core", {})
    left, *rest = figure.subplots(1, 2, width_ratios=(2, 1)) if core else [figure.subplots()]
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
    for right in rest:
        shares = {name: 100 * found["share"] for name, found in core.items()}
        right.barh(list(shares), list(shares.values()))
        right.invert_yaxis()
        right.set_xlim(0, max(105, *shares.values()))
        right.set(xlabel="% of the xor, popcount, add peak", title="Core against the peak loop")
    figure.suptitle(f"foldbit's kernels, {run.results['machine']['processor']}")


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
    run = Run(
        seconds=0.02 if arguments.quick else arguments.seconds,
        quick=arguments.quick,
        with_peers=not arguments.no_peers,
    )
    run.results["machine"] = where()
    shown = f"{timing.processor()}, {native.current()} kernels, load before the start {load():.1f}"
    print(shown)
    if "threads" in arguments.only:
        if len(allowed) > 1:
            TABLES["threads"](run)  # first: what the pool starts now may run on all cores
        else:
            print("Threads: only one core to run on, not measured")
    pinned = pin([core])
    print(f"\nFrom here on one thread, {f'on core {core}' if pinned else 'not pinned: this system cannot'}")
    for name, show in TABLES.items():
        if name in arguments.only and name != "threads":
            show(run)
    run.results |= {"goals": run.goals, "load after": round(load(), 2), "unsteady": run.unsteady}
    if run.goals:
        print(f"\n{show_goals(run.goals)}")
        print(f"{sum(goal.met for goal in run.goals)} of {len(run.goals)} met")
    print(f"load at the end {load():.1f}")
    print(
        f"{run.unsteady} of {run.timed} times have quartiles more than {timing.UNSTEADY:.0%} of the "
        "median apart: of those, ratios say little"
    )
    write(arguments.json, run.results)
    if arguments.plot and "layers" in run.results:
        draw(arguments.plot, partial(picture, run), (13, 5.5))


if __name__ == "__main__":
    main()
