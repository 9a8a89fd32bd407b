"""The demo: the whole path on real images, from a float network to packed bits, and a page about it."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from foldbit import convert, storage, timing
from foldbit.analysis import error, report
from foldbit.core.config import QuantConfig
from foldbit.packed import files
from foldbit.packed.layers import PackedLayer
from foldbit.summary import summary
from foldbit.tables import nbytes, table
from foldbit.training import data as datasets
from foldbit.training import evaluate, loop
from foldbit.training.images import ImageData, batches
from foldbit.training.recipes import DataConfig, Recipe

FLOAT = Recipe(model="resnet8-xnor", epochs=2, lr=1e-2)

#: Training from the float network's weights, which is the best recipe for a small budget.
QUANTIZED = dataclasses.replace(FLOAT, epochs=1, lr=5e-3)

SCHEMES = {
    "W1A2": QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0),
    "W1AT": QuantConfig("ls-1", "ls-T", activation_scales="static", clamp=3.0),
    "W1A1": QuantConfig("ls-1", "ls-1", activation_scales="static", clamp=3.0),
}

_BATCH = 64  # images a timed batch, beside single ones


@dataclass(frozen=True)
class Result:
    """What the table says of one network.

    Attributes:
        accuracy: on the test images, by the packed network where there is one.
        agreement: test images on which packed and unpacked network give the same class.
        file_bytes: of the packed file; of the float network's file.
        compression: the float network's tensors over the file, as :func:`foldbit.summary` has it.
        bits: stored per quantized weight, scales included.
        against_float, against_unpacked: time of the float network, and of the unpacked quantized one,
            divided by the packed one's: ``{batch size: ratio}``.
        not_bitwise: share of the packed network's time outside packed layers, ``{batch size: share}``.
        steady: whether the times were steady enough for their ratios to be trusted.
    """

    accuracy: float
    agreement: float
    file_bytes: int
    compression: float
    bits: float
    against_float: dict[int, float]
    against_unpacked: dict[int, float]
    not_bitwise: dict[int, float]
    steady: bool = True


def run(
    folder: str | Path = "runs/demo", *, data: str | None = None, download: bool = True, seed: int = 0
) -> Path:
    """Train, pack, check, time and report.

    Args:
        folder: where everything goes. What an earlier, interrupted call trained is taken up; a finished one
            is done again.
        data: a folder with Fashion-MNIST's files; None looks for them.
        download: whether they may be downloaded where they cannot be found.
        seed: of initial weights and of the order of the images.

    Returns:
        The page's path.
    """
    began = time.monotonic()
    folder = Path(folder)
    if (folder / "results.json").exists() and (folder / "float" / "config.yaml").exists():
        shutil.rmtree(folder)  # an earlier demo's, finished
    images = datasets.load("fashion-mnist", data, download=download, fall_back=True)
    print(f"data      {images.name}: {len(images.train):,} + {len(images.test):,} images, {images.source}")
    source = DataConfig(name=images.name, folder=data, download=download)  # type: ignore[arg-type]
    recipe = dataclasses.replace(FLOAT, data=source, seed=seed)
    print(f"machine   {timing.processor()}")

    outcomes = {"float": _train("float", recipe, folder, images)}
    for name, quant in SCHEMES.items():
        recipe = dataclasses.replace(
            QUANTIZED, data=source, seed=seed, quant=quant, init=str(folder / "float")
        )
        outcomes[name] = _train(name, recipe, folder, images)
        if not outcomes[name].finished:
            break
    if not all(outcome.finished for outcome in outcomes.values()):
        raise KeyboardInterrupt

    print("\npacking, checking and timing ...")
    networks = {name: outcome.model for name, outcome in outcomes.items()}
    results, guesses = {}, {}
    for name, network in networks.items():
        results[name], guesses[name] = _measure(name, network, networks["float"], images, folder)
    threads = _threads_in_words(outcomes)
    print(f"\n{table(_HEADER, _rows(results))}\n{textwrap.fill(_note(results, threads), 110)}")
    page = folder / "report.html"
    _write_report(page, images, networks, outcomes, results, guesses, _note(results, threads))
    records = {name: dataclasses.asdict(result) for name, result in results.items()}
    files.write(folder / "results.json", json.dumps(records, indent=2).encode())
    print(f"\ndone in {time.monotonic() - began:.0f} s: open {page}")
    return page


def _train(name: str, recipe: Recipe, folder: Path, images: ImageData) -> loop.Outcome:
    start = "" if recipe.init is None else ", from the float weights"
    print(f"\ntraining {name} ({recipe.epochs} epochs{start})".replace("1 epochs", "1 epoch"), flush=True)
    return loop.train(recipe, folder / name, images=images)


@torch.no_grad()
def _measure(
    name: str, network: nn.Module, float_network: nn.Module, images: ImageData, folder: Path
) -> tuple[Result, Tensor]:
    normalize = (images.mean, images.std)
    guesses = evaluate.predictions(network, images.test, normalize)
    correct = (guesses == images.test.labels).double().mean().item()
    if name == "float":
        size = storage.packed_size(network)
        return Result(correct, 1.0, size, 1.0, 32.0, {}, {}, {}), guesses
    packed = convert.pack_(copy.deepcopy(network))
    path = folder / f"{name}.safetensors"
    storage.save_packed(packed, path)
    packed = storage.load_packed(path)  # what is measured from here on is what the file holds
    packed_guesses = evaluate.predictions(packed, images.test, normalize)
    x, _ = next(iter(batches(images.test, _BATCH, shuffle=False, normalize=normalize)))
    against_float, against_unpacked, not_bitwise, steady = {}, {}, {}, True
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the field reports; and two on a busy machine wait for each other
    for batch in (1, _BATCH):
        candidates = {"packed": packed, "float": float_network, "unpacked": network}
        inputs = x[:batch]
        times = timing.interleaved({key: partial(m, inputs) for key, m in candidates.items()})
        against_float[batch] = times["float"].median / times["packed"].median
        against_unpacked[batch] = times["unpacked"].median / times["packed"].median
        not_bitwise[batch] = 1 - timing.bitwise_share(packed, inputs)
        steady = steady and not timing.warning(times)
    torch.set_num_threads(threads)
    size = path.stat().st_size
    return (
        Result(
            accuracy=(packed_guesses == images.test.labels).double().mean().item(),
            agreement=(packed_guesses == guesses).double().mean().item(),
            file_bytes=size,
            compression=summary(packed, x[:1]).compression,
            bits=_bits_per_weight(packed),
            against_float=against_float,
            against_unpacked=against_unpacked,
            not_bitwise=not_bitwise,
            steady=steady,
        ),
        packed_guesses,
    )


def _bits_per_weight(packed: nn.Module) -> float:
    layers = [m for m in packed.modules() if isinstance(m, PackedLayer)]
    stored = sum(8 * m.planes.nbytes + 8 * m.scales.nbytes for m in layers)
    return stored / sum(m.weight().numel() for m in layers)


_HEADER = [
    "scheme", "test\naccuracy", "same as\nunpacked", "on disk", "com-\npression", "bits per\nweight",
    "speed-up over float\nbatch 1 / 64", "over unpacked\nbatch 1 / 64", "time not bitwise\nbatch 1 / 64",
]  # fmt: skip

_NOTE = (
    "Speed-ups are time ratios of whole networks in torch on one thread, medians of interleaved runs. "
    "Not bitwise are the stem, the shortcuts' convolutions, the classifier and the framework. Bits per "
    "weight count the quantized layers, scales included; compression counts the whole file. One seed: "
    "accuracies that differ by 0.3 points or less do not differ."
)


def _note(results: dict[str, Result], threads: str) -> str:
    unsteady = [name for name, result in results.items() if not result.steady]
    doubt = (
        f"DO NOT TRUST THE SPEED-UPS of {', '.join(unsteady)}: other work kept this machine busy while they "
        "were timed. "
        if unsteady
        else ""
    )
    return f"{doubt}{_NOTE} Machine: {timing.processor()}; trained on {threads}, timed on 1 thread."


def _threads_in_words(outcomes: dict[str, loop.Outcome]) -> str:
    taken = sorted({int(record["threads"]) for outcome in outcomes.values() for record in outcome.metrics})
    return (
        " or ".join(map(str, taken[:-1]))
        + (" or " if taken[:-1] else "")
        + timing.threads_in_words(taken[-1])
    )


def _rows(results: dict[str, Result]) -> list[list[str]]:
    def pair(values: dict[int, float], form: str) -> str:
        return " / ".join(format(value, form) for value in values.values()) or "-"

    return [
        [
            name,
            f"{r.accuracy:.2%}",
            f"{r.agreement:.2%}" if r.against_float else "-",
            nbytes(r.file_bytes),
            f"{r.compression:.1f}×",
            f"{r.bits:.2f}",
            pair(r.against_float, ".2f"),
            pair(r.against_unpacked, ".2f"),
            pair(r.not_bitwise, ".0%"),
        ]
        for name, r in results.items()
    ]


def _write_report(
    page: Path,
    images: ImageData,
    networks: dict[str, nn.Module],
    outcomes: dict[str, loop.Outcome],
    results: dict[str, Result],
    guesses: dict[str, Tensor],
    note: str,
) -> None:
    normalize = (images.mean, images.std)
    x, _ = next(iter(batches(images.test, 500, shuffle=False, normalize=normalize)))
    errors = {name: error.layer_errors(networks[name], x) for name in SCHEMES}
    curves = {"float": _curve(outcomes["float"])}
    curves |= {name: _curve(outcomes[name], after=curves["float"]) for name in SCHEMES}
    wrong_somewhere = torch.stack([g != images.test.labels for g in guesses.values()]).any(0)
    shown = torch.cat([(~wrong_somewhere).nonzero()[:6], wrong_somewhere.nonzero()[:6]]).flatten()
    classes = images.classes
    lead = (
        f"A small residual network of XNOR blocks on {images.name} ({images.source}): trained in float, then "
        "from those weights with 1-bit weights and activations of 2 bits (W1A2), ternary (W1AT) and 1 bit "
        "(W1A1), and packed into bits. All scales minimise the squared error of what they approximate."
    )
    report.write_page(
        page,
        "foldbit demo: from a float network to bits",
        lead,
        [
            report.Section(
                "Results",
                [
                    report.Table(_HEADER, _rows(results), note),
                    report.Picture(
                        report.accuracy_against_size(
                            {name: (r.file_bytes / 1024, r.accuracy) for name, r in results.items()}
                        ),
                        "Accuracy against size. A second bit for the activations costs no size, for only "
                        "weights are stored; it costs time.",
                    ),
                ],
            ),
            report.Section(
                "Training",
                [
                    report.Picture(
                        report.training_curves(curves),
                        "The quantized networks start from the float network's weights, so their lines are "
                        "drawn from where its line ends. (Just quantized, before any training, they classify "
                        "worse; that is not drawn.)",
                    )
                ],
            ),
            report.Section(
                "Quantization error, layer by layer",
                [
                    report.Picture(
                        report.error_bars(
                            {n: {e.name: e.activation for e in per_layer} for n, per_layer in errors.items()},
                            "‖x − x̂‖² / ‖x‖² of the input",
                        ),
                        f"What a layer loses of its input, on {len(x)} test images: 0 is perfect, 1 no "
                        "better than zeros. Of normally distributed values 1 bit loses .363, ternary .190, "
                        "2 bits .117.",
                    ),
                    report.Picture(
                        report.error_bars(
                            {n: {e.name: e.weight for e in per_layer} for n, per_layer in errors.items()},
                            "‖w − ŵ‖² / ‖w‖² of the weight",
                        ),
                        "What it loses of its weights: 0 is perfect, and 1 bit loses .363 of normally "
                        "distributed ones. All three networks store one bit each, and a scale per output "
                        "channel.",
                    ),
                ],
            ),
            report.Section(
                "Some test images",
                [
                    report.Picture(
                        report.image_grid(
                            [picture[0].numpy() for picture in images.test.pixels(shown)],
                            [classes[images.test.labels[i]] for i in shown],
                            {name: [classes[g[i]] for i in shown] for name, g in guesses.items()},
                        ),
                        "Six that all networks classify right and six that at least one does not (in red).",
                    )
                ],
            ),
            report.Section("The packed W1A2 network", [_summary_table(networks["W1A2"], x[:1])]),
        ],
    )


def _curve(outcome: loop.Outcome, after: report.Curve | None = None) -> report.Curve:
    """A training's curve; after another one, its accuracy starts where the other's ends."""
    start = [] if after is None else [after.accuracy[-1]]
    before = start[0][0] if start else 0
    steps_an_epoch = outcome.losses[-1]["step"] / outcome.metrics[-1]["epoch"]
    return report.Curve(
        start + [(before + r["epoch"], r["test_accuracy"]) for r in outcome.metrics],
        [(before + r["step"] / steps_an_epoch, r["loss"]) for r in outcome.losses],
    )


def _summary_table(network: nn.Module, x: Tensor) -> report.Table:
    found = summary(network, x)
    rows = [
        [
            layer.name,
            layer.kind,
            "float" if set(layer.parameters) == {32} else "bits",
            layer.input_bits,
            "×".join(map(str, layer.output_shape)),
            nbytes(layer.memory),
            f"{layer.macs.total():,}",
        ]
        for layer in found.layers
    ]
    return report.Table(
        ["layer", "kind", "weights", "input\nbits", "output shape", "memory", "MACs"],
        rows,
        f"{found.bitwise_share:.1%} of {found.macs.total():,} multiply-accumulates are bitwise. The file has "
        f"{found.file_bytes:,} bytes, header included; the float network's tensors take "
        f"{found.compression:.1f} times that. Layers whose weights are float stay as they were.",
    )
