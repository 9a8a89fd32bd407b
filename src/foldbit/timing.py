"""Timing that survives a shared machine: candidates in turn, round after round, medians and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

    @property
    def spread(self) -> float:
        """The distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, rounds: int = 7
) -> dict[str, Timing]:
    """Time each candidate once a round, for about so many seconds, and at least so many rounds.

    Whatever else the machine does hits all candidates alike, so their ratios can be trusted where their
    times cannot.
    """
    repeats = {name: _repeats(call) for name, call in candidates.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < rounds:
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _timing(taken) for name, taken in times.items()}


#: Quartiles further apart than this share of the median say more of the machine than of the candidate.
UNSTEADY = 0.3


def warning(times: Mapping[str, Timing]) -> str:
    """What to tell whoever reads ratios of these times: nothing, unless some are too unsteady to trust."""
    unsteady = [name for name, t in times.items() if t.spread > UNSTEADY]
    if not unsteady:
        return ""
    worst = max(times[name].spread for name in unsteady)
    return (
        f"DO NOT TRUST THESE RATIOS: the quartiles of {', '.join(unsteady)} are up to {worst:.0%} of the "
        "median apart. Other work keeps this machine busy; measure again when it is quiet, or for longer"
    )


@torch.no_grad()
def bitwise_share(model: nn.Module, x: Tensor, *, runs: int = 15) -> float:
    """The share of a packed model's time that its packed layers take: all else is ordinary float work.

    Packing the activations, applying the scales and what a packed layer does for its neighbours count as
    bitwise work, for it takes them; the float layers, what stands alone and the framework do not.
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
    """How many threads torch had better use for such a step: all it would, or one. None is set.

    On a machine where others keep a core busy, torch's threads wait for each other, and two of them can be
    ten times slower than one.
    """
    many = torch.get_num_threads()
    if many == 1:
        return 1

    def on(threads: int) -> None:
        torch.set_num_threads(threads)
        step()

    try:
        times = interleaved({"many": lambda: on(many), "one": lambda: on(1)}, seconds=1.0, rounds=3)
    finally:
        torch.set_num_threads(many)
    return 1 if times["many"].median > 1.1 * times["one"].median else many


@contextmanager
def threads(
    asked: int | None, step: Callable[[], object], say: Callable[[str], object] = print
) -> Iterator[int]:
    """Run on as many of torch's threads as are asked for, or else as are sensible for such a step just now.

    The number is said, and given; afterwards all is as before.

    Raises:
        ValueError: where fewer than one are asked for.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"threads is a whole number, at least 1; got {asked}")
    before = torch.get_num_threads()
    count = sensible_threads(step) if asked is None else asked
    why = "as asked"
    if asked is None:
        why = "all there are" if count == before else f"{before} are slower just now, by other work perhaps"
    say(f"  on {threads_in_words(count)}: {why}")
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def threads_in_words(count: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{count} thread{'s' if count != 1 else ''}"


def processor() -> str:
    """The processor's name, for captions."""
    info = Path("/proc/cpuinfo")
    names = []
    if info.exists():
        names = [
            line.split(":")[1] for line in info.read_text().splitlines() if line.startswith("model name")
        ]
    return names[0].strip() if names else "an unnamed processor"


def machine() -> str:
    """The processor's name and torch's threads, for captions."""
    return f"{processor()}, {threads_in_words(torch.get_num_threads())}"


def _repeats(call: Callable[[], object]) -> int:
    """Calls that take about ten milliseconds together: short ones drown in the clock's resolution."""
    call()
    start = time.perf_counter()
    call()
    return max(1, round(0.01 / max(time.perf_counter() - start, 1e-7)))


def _timing(times: list[float]) -> Timing:
    low, middle, high = quantiles(times, n=4)
    return Timing(middle, low, high)
