"""What a quantized training step costs: forward, backward and optimizer, against the same step in float.

    python benchmarks/training_step.py --threads 1

Two networks: the demo's, at its batch of 128 with its static scales and clamp, and a CIFAR ResNet-18 of XNOR
blocks with scales solved for every sample. Weights are 1-bit; the columns differ in the activations' scheme.
Candidates take turns, so that whatever else the machine does hits all alike, and their ratios can be trusted
where their times cannot.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from torch.nn import functional as F

from foldbit import QuantConfig, convert, models, timing
from foldbit.tables import table

SCHEMES = ("ls-1", "ls-T", "ls-2", "gf-2")

# name: model, its arguments, batch, image, how activations are quantized
NETWORKS = {
    "demo": ("resnet8-xnor", 128, (1, 28, 28), {"activation_scales": "static", "clamp": 3.0}),
    "resnet18": ("resnet18-cifar", 16, (3, 32, 32), {"clamp": 2.0}),
}


def training_step(
    model: str, batch: int, image: tuple[int, ...], quant: QuantConfig | None
) -> Callable[[], None]:
    """One step of Adam on random images, as :mod:`foldbit.training.loop` takes it."""
    torch.manual_seed(0)
    network = models.create(model)
    if quant is not None:
        convert.quantize_(network, quant, overrides=models.float_layers(network))
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, labels = torch.randn(batch, *image), torch.randint(10, (batch,))

    def step() -> None:
        loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure(network: str, seconds: float) -> list[list[object]]:
    """Rows of the table: scheme, time against float, time against ls-1, and its quartiles."""
    model, batch, image, options = NETWORKS[network]
    steps = {"float": training_step(model, batch, image, None)}
    for scheme in SCHEMES:
        quant = QuantConfig("ls-1", scheme, **options)
        steps[scheme] = training_step(model, batch, image, quant)
    times = timing.interleaved(steps, seconds=seconds)
    unit, one_bit = times["float"].median, times["ls-1"].median
    return [
        [
            name,
            f"{t.median / unit:.2f}",
            f"{t.median / one_bit:.2f}",
            f"{t.low / one_bit:.2f} - {t.high / one_bit:.2f}",
            f"{1e3 * t.median:.0f}",
        ]
        for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each network")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for network in arguments.networks:
        model, batch, image, options = NETWORKS[network]
        rows = measure(network, arguments.seconds)
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        print(
            f"\n{network}: {model}, batch {batch} of {'×'.join(map(str, image))}, {shown}\n"
            f"{timing.machine()}, load {os.getloadavg()[0]:.1f}"
        )
        print(table(["activations", "time / float", "time / ls-1", "quartiles / ls-1", "ms"], rows))


if __name__ == "__main__":
    main()
