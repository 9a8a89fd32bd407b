"""A packed network against its float and its unpacked twin: the same network, timed in turn."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from foldbit import convert, models, timing
from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLinear
from foldbit.packed.layers import PackedLayer
from foldbit.summary import try_input
from foldbit.tables import table


@torch.no_grad()
def against_twins(
    model: nn.Module, input_size: tuple[int, ...], *, threads: int = 1, seconds: float = 3.0
) -> str:
    """Time a network packed, unpacked and in float, and tell the result as a table.

    Args:
        model: a quantized or packed network that :mod:`foldbit.models` built.
        input_size: shape of one input, batch included.
        threads: torch's threads.
        seconds: how long to measure.

    Raises:
        ValueError: for a network without quantized layers, one that no registered model describes, or fewer
            than one thread.
        RuntimeError: where the network does not take such an input.
    """
    if threads < 1:
        raise ValueError(f"threads is a whole number, at least 1; got {threads}")
    packed = copy.deepcopy(model)
    if any(isinstance(m, QuantConv2d | QuantConv1d | QuantLinear) for m in packed.modules()):
        convert.pack_(packed)
    specs = {name: m.spec for name, m in packed.named_modules() if isinstance(m, PackedLayer)}
    architecture = models.architecture_of(model)
    if not specs:
        raise ValueError("this network has no quantized layers: there is nothing to compare")
    if architecture is None:
        raise ValueError("this network is none of foldbit.models, so its float twin cannot be built")
    name, arguments = architecture
    # Times do not depend on the weights: the twins' are random.
    float_twin = models.create(name, **arguments).eval()
    configs = {layer: spec.config for layer, spec in specs.items()}
    unpacked = convert.quantize_(
        models.create(name, **arguments),
        filter_fn=lambda _, layer: layer in specs,
        overrides=configs,
        skip=(),
    ).train()
    x = torch.randn(*input_size)
    try_input(float_twin, x)
    unpacked(x.expand(2, *x.shape[1:]) if len(x) == 1 else x)  # static scales must have seen something
    unpacked.eval()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        candidates = {"float": float_twin, "unpacked": unpacked, "packed": packed}
        times = timing.interleaved({k: partial(m, x) for k, m in candidates.items()}, seconds=seconds)
        share = timing.bitwise_share(packed, x)
        where = timing.machine()
    finally:
        torch.set_num_threads(before)
    base = times["float"].median
    rows = [
        [k, f"{base / t.median:.2f}", f"{base / t.high:.2f} - {base / t.low:.2f}"] for k, t in times.items()
    ]
    lines = [
        f"{name}, input {'×'.join(map(str, input_size))}, {where}",
        table(["network", "speed-up\nover float", "quartiles"], rows),
        f"packed over unpacked: {times['unpacked'].median / times['packed'].median:.2f}",
        f"{1 - share:.0%} of the packed network's time is not bitwise: float layers and framework",
        timing.warning(times),
    ]
    return "\n".join(filter(None, lines))
