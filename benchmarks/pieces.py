"""A packed network in pieces: its bitwise layers on their own, and where its time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from results import native_calls, native_seconds
from torch import Tensor, nn

from foldbit.packed.absorbed import Absorbed
from foldbit.packed.layers import PackedLayer

Calls = dict[str, Callable[[], object]]


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
    return {"modules": partial(call_all, inside), "native calls": partial(call_all, bare)}, len(inside)


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


def call_all(calls: Sequence[Callable[[], object]]) -> None:
    """One after another."""
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
