"""Timing that survives a shared machine: candidates in turn, round after round, medians and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from foldbit.packed.layers import PackedLayer


@dataclass(frozen=True)
class Timing:
    """Seconds a call takes: the median of the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleaved(candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0) -> dict[str, Timing]:
    """Time each candidate once a round, for about so many seconds, at least seven rounds.

    Whatever else the machine does hits all candidates alike, so their ratios can be trusted where their
    times cannot.
    """
    repeats = {name: _repeats(call) for name, call in candidates.items()}  # warms up, too
    rounds: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(rounds.values()))) < 7:
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            rounds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _timing(times) for name, times in rounds.items()}


@torch.no_grad()
def bitwise_share(model: nn.Module, x: Tensor, *, runs: int = 15) -> float:
    """The share of a packed model's time that its packed layers take: all else is ordinary float work.

    Packing the activations and applying the scales count as bitwise work, for it takes them; batch norm,
    nonlinearities, shortcuts, the float layers and the framework do not.
    """
    inside, starts = 0.0, [0.0]

    def begin(*_: object) -> None:
        starts[0] = time.perf_counter()

    def end(*_: object) -> None:
        nonlocal inside
        inside += time.perf_counter() - starts[0]

    handles = []
    for layer in model.modules():
        if isinstance(layer, PackedLayer):
            handles += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    shares = []
    try:
        for _ in range(runs):
            inside, start = 0.0, time.perf_counter()
            model(x)
            shares.append(inside / (time.perf_counter() - start))
    finally:
        for handle in handles:
            handle.remove()
    return median(shares)


def sensible_threads(step: Callable[[], object]) -> int:
    """How many threads torch had better use for such a step: all it would, or one.

    On a machine where others keep a core busy, torch's threads wait for each other, and two of them can be
    ten times slower than one. The number is set, and returned.
    """
    many = torch.get_num_threads()
    if many == 1:
        return 1

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    timings = interleaved({"many": lambda: on(many), "one": lambda: on(1)}, seconds=1.0)
    threads = 1 if timings["many"].median > 1.1 * timings["one"].median else many
    torch.set_num_threads(threads)
    return threads


def machine() -> str:
    """The processor's name, for captions."""
    info = Path("/proc/cpuinfo")
    names = []
    if info.exists():
        names = [
            line.split(":")[1] for line in info.read_text().splitlines() if line.startswith("model name")
        ]
    return f"{names[0].strip() if names else 'an unnamed processor'}, {torch.get_num_threads()} thread(s)"


def _repeats(call: Callable[[], object]) -> int:
    """Calls that take about ten milliseconds together: short ones drown in the clock's resolution."""
    call()
    start = time.perf_counter()
    call()
    return max(1, round(0.01 / max(time.perf_counter() - start, 1e-7)))


def _timing(times: list[float]) -> Timing:
    low, middle, high = quantiles(times, n=4)
    return Timing(middle, low, high)
