"""What the benchmarks share: goals, the processor they run on, and the numbers on their way into a file."""

from __future__ import annotations

import ctypes
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from foldbit import timing
from foldbit.packed.ops import Constants
from foldbit.tables import table
from foldbit.timing import Timing


@dataclass(frozen=True)
class Goal:
    """A number, and what it should at least or at most be; and a note."""

    what: str
    value: float
    needed: float
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether it is; NaN never is."""
        return self.value <= self.needed if self.at_most else self.value >= self.needed

    def row(self) -> list[object]:
        """For the table of goals."""
        sign = "≤" if self.at_most else "≥"
        return [
            self.what,
            f"{self.value:.2f}",
            f"{sign} {self.needed:.2f}",
            "met" if self.met else "NOT MET",
            self.note,
        ]


def show_goals(goals: Iterable[Goal]) -> str:
    """The table of goals."""
    return table(["goal", "result", "needed", "", ""], [goal.row() for goal in goals])


def a_layer(times: Mapping[str, Timing], name: str, layers: int) -> Timing:
    """What one layer takes in a graph engine: a chain of `layers` less a chain of one.

    Expects ``"name ×1"`` and ``"name ×layers"`` among the times. The quartiles are those of the chains at
    their worst.
    """
    short, long, more = times[f"{name} ×1"], times[f"{name} ×{layers}"], layers - 1
    return Timing(
        (long.median - short.median) / more, (long.low - short.high) / more, (long.high - short.low) / more
    )


def fastest(candidates: Mapping[str, Timing]) -> str:
    """The name of the candidate with the smallest median."""
    return min(candidates, key=lambda name: candidates[name].median)


def pin(cores: Iterable[int]) -> bool:
    """Keep this thread, and all that it starts from here on, on these cores; whether the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, set(cores))
    return True


def cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def load() -> float:
    """How many threads have wanted to run in the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def where() -> dict[str, Any]:
    """The machine, how busy it is, and versions of what is compared."""
    versions = {}
    for name in ("foldbit", "torch", "openvino", "onnxruntime"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "processor": timing.processor(),
        "cores": len(cores()),
        "load before": round(load(), 2),
        "versions": versions,
    }


@contextmanager
def native_calls() -> Iterator[list[Callable[[], object]]]:
    """Convolutions that packed layers ask of the native core meanwhile, each to be repeated at will."""
    calls: list[Callable[[], object]] = []
    with _convolving_by(lambda prepared, channels: _Noting(prepared, channels, calls)):
        yield calls


@contextmanager
def native_seconds() -> Iterator[list[float]]:
    """What convolutions that packed layers ask of the native core meanwhile take, each."""
    seconds: list[float] = []
    with _convolving_by(lambda prepared, _: _Timed(prepared, seconds)):
        yield seconds


@contextmanager
def _convolving_by(instead: Callable[[Any, int], Any]) -> Iterator[None]:
    """Packed layers convolve by instead(their prepared convolution, its output channels)."""
    original = Constants.prepared

    def prepared(self: Constants, activation_planes: int, in_channels: int) -> Any:
        return instead(original(self, activation_planes, in_channels), self.weight_scales.shape[1])

    Constants.prepared = prepared  # type: ignore[method-assign]
    try:
        yield
    finally:
        Constants.prepared = original  # type: ignore[method-assign]


@dataclass
class _Timed:
    """A prepared convolution that says how long it takes, and no more: it runs inside other times."""

    prepared: Any
    seconds: list[float]

    def run_at(self, *arguments: Any) -> None:
        start = time.perf_counter()
        self.prepared.run_at(*arguments)
        self.seconds.append(time.perf_counter() - start)


@dataclass
class _Noting:
    """A prepared convolution that notes its calls, with memory of their own."""

    prepared: Any
    out_channels: int
    calls: list[Callable[[], object]]

    def run_at(
        self,
        x: int,
        shape: Sequence[int],
        strides: Sequence[int],
        scales: int,
        by_image: bool,
        residual: int,
        out: int,
        out_size: Sequence[int],
        threads: int,
    ) -> None:
        results = (shape[0], *out_size, self.out_channels)
        span = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        planes = self.prepared.activation_planes
        inputs = [_copy(x, span), _copy(scales, planes * (shape[0] if by_image else 1))]
        held = _copy(residual, math.prod(results)) if residual else None
        own = torch.empty(results)
        arguments = (shape, strides, inputs[1].data_ptr(), by_image)
        rest = (0 if held is None else held.data_ptr(), own.data_ptr(), out_size, threads)

        def again() -> Any:
            assert held is None or len(held)  # kept alive by this function, as the inputs are
            self.prepared.run_at(inputs[0].data_ptr(), *arguments, *rest)
            return own.numpy()

        self.calls.append(again)
        self.prepared.run_at(x, shape, strides, scales, by_image, residual, out, out_size, threads)


def _copy(address: int, count: int) -> torch.Tensor:
    """Floats at an address, in aligned memory."""
    there = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(there, dtype=torch.float32).clone()


def microseconds(time: Timing) -> str:
    """A time, for tables."""
    return f"{1e6 * time.median:.0f}"


def plain(value: Any) -> Any:
    """Times and goals as JSON knows them; times in microseconds."""
    if isinstance(value, Timing):
        parts = asdict(replace(value, **{k: 1e6 * v for k, v in asdict(value).items()}))
        return {k: round(v, 3) for k, v in parts.items()}
    if isinstance(value, Goal):
        return {**asdict(value), "met": value.met}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write the numbers as JSON, if anywhere."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain(results), indent=2) + "\n")
        print(f"\nnumbers: {path}")


def draw(path: Path | None, picture: Callable[[Any], None], size: tuple[float, float]) -> None:
    """Save a picture, if anywhere.

    Args:
        path: where to.
        picture: draws on a matplotlib figure.
        size: in inches.
    """
    if path is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=size, layout="constrained")
    picture(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"picture: {path}")
