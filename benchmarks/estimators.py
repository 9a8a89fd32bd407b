"""Which gradient estimator? Trains one network with each, over seeds, on Fashion-MNIST, and prints a table.

    python benchmarks/estimators.py --runs runs/estimators

Each quantized network starts from the float weights of its seed, so differences are paired. Finished runs are
kept: interrupt it and call it again. About twenty minutes on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch

from foldbit import QuantConfig
from foldbit.tables import table
from foldbit.training import loop
from foldbit.training.recipes import Recipe

FLOAT = Recipe(model_args={"widths": [16, 32, 64]}, epochs=2, lr=1e-2)
QUANTIZED = dataclasses.replace(FLOAT, epochs=1, lr=5e-3)

# activation estimator, weight estimator, clamp
VARIANTS = [
    ("clipped", "identity", None),
    ("scaled", "identity", None),
    ("scaled", "identity", 2.0),
    ("scaled", "identity", 3.0),
    ("scaled", "polynomial", 3.0),
    ("polynomial", "identity", None),
    ("polynomial", "identity", 3.0),
    ("polynomial", "polynomial", None),
    ("polynomial", "polynomial", 3.0),
]


def accuracies(folder: Path, activation: str, seeds: int) -> Iterator[list[float]]:
    """Test accuracies in percent, a list over seeds for each variant."""
    for estimator, weight_estimator, clamp in VARIANTS:
        quant = QuantConfig(
            "ls-1",
            activation,
            activation_scales="static",
            clamp=clamp,
            activation_estimator=estimator,
            weight_estimator=weight_estimator,
        )
        yield [
            100
            * _train(
                folder / f"{activation}-{estimator}-{weight_estimator}-{clamp}-{seed}",
                dataclasses.replace(QUANTIZED, seed=seed, quant=quant, init=str(folder / f"float-{seed}")),
            )
            for seed in range(seeds)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    float_accuracies = [
        100 * _train(arguments.runs / f"float-{seed}", dataclasses.replace(FLOAT, seed=seed))
        for seed in range(arguments.seeds)
    ]
    columns = {a: list(accuracies(arguments.runs, a, arguments.seeds)) for a in ("ls-2", "ls-1")}
    rows = [
        [estimator, weight_estimator, clamp or "none", *(_spread(column[i]) for column in columns.values())]
        for i, (estimator, weight_estimator, clamp) in enumerate(VARIANTS)
    ]
    print(f"float {_spread(float_accuracies)}")
    print(table(["activations", "weights", "clamp", *(f"W1 {a}" for a in columns)], rows))


def _train(run: Path, recipe: Recipe) -> float:
    return loop.train(recipe, run).metrics[-1]["test_accuracy"]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


if __name__ == "__main__":
    main()
