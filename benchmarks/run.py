"""One run of the benchmark of kernels: its settings, its clock, and the numbers and goals it collects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peak import NoCompiler, peak_loop
from results import Goal

from foldbit import timing
from foldbit.timing import Timing

SHAPES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels, size: the 3x3 layers of ResNet-18

Times = dict[str, Timing]


class Run:
    """What was asked for, and what was found so far."""

    def __init__(self, *, seconds: float, quick: bool, with_peers: bool) -> None:
        self.seconds, self.quick, self.with_peers = seconds, quick, with_peers
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
