"""Analyses by name: finds what the user points at, measures it, and writes a page and a JSON file."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from foldbit import models
from foldbit.analysis import onnx_file, pages, pretrained, report, sources, study
from foldbit.analysis.pages import Layer, Study
from foldbit.analysis.sources import Source, SourceError
from foldbit.core import schemes
from foldbit.packed import files

T = TypeVar("T")

#: What is compared unless the user says otherwise: 1 bit, ternary, and 2 bits, greedy and optimal.
SCHEMES = ("ls-1", "ls-T", "gf-2", "ls-2")
VERSION = 1
_BATCH = 32


def run(
    what: Sequence[str],
    out: str | Path = "analysis.html",
    *,
    compared: Sequence[str] = SCHEMES,
    images: int = 128,
    data: str | None = None,
    seed: int = 0,
) -> Path:
    """Measure what quantization loses, and write a page about it, with its numbers as JSON beside it.

    Args:
        what: distributions, files, run folders and networks by name (:func:`find`).
        out: the page; the numbers go to the same name with ``.json``. Both are written whole or not at all.
        compared: the schemes.
        images: how many of the data set's images run through the network of a run folder.
        data: a folder with that data set's files, where they are not found by themselves.
        seed: of samples, of random weights and of noise.

    Returns:
        The page's path.

    Raises:
        ValueError: where there is nothing to analyze under a name, or the schemes or the page's name do not
            serve, or a package is missing (:class:`MissingPackage`).
    """
    out = Path(out)
    names = _check(what, out, compared, images)
    found = [find(name, images=images, data=data, seed=seed) for name in what]  # all mistakes first
    taken = Counter(source.name for source in found)
    found = [
        dataclasses.replace(source, name=given) if taken[source.name] > 1 else source
        for source, given in zip(found, what, strict=True)
    ]
    studies = [measure(source, names) for source in found]
    sections = pages.sections(studies)
    count = sum(isinstance(part, report.Picture) for section in sections for part in section.parts)
    report.write_page(out, "What quantization loses", pages.lead(studies), sections)
    record = {
        "version": VERSION,
        "schemes": names,
        "pictures": count,
        "studies": [_record(found) for found in studies],
    }
    files.write(out.with_suffix(".json"), json.dumps(record, allow_nan=False, indent=1).encode())
    return out


def find(what: str, *, images: int = 128, data: str | None = None, seed: int = 0) -> Source:
    """The source of a name: a file or run folder where there is one, else a distribution or a network.

    Raises:
        SourceError: where it is neither, cannot be used, or takes a package that is missing.
    """
    path = Path(what)
    if path.is_dir():
        return _run_folder(path, images, data)
    if path.is_file():
        kinds = {".safetensors": sources.safetensors_file, ".onnx": onnx_file.onnx_file}
        kinds |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), sources.checkpoint)
        if path.suffix.lower() not in kinds:
            raise SourceError(
                f"{path} is of a kind that foldbit does not know by its name; known are {', '.join(kinds)}, "
                "and run folders"
            )
        return kinds[path.suffix.lower()](path)
    if what in sources.distributions():
        return sources.distribution(what, seed)
    source = pretrained.by_name(what, seed)
    if source is None:
        raise SourceError(
            f"{what!r} is neither a file nor a run folder, nor a name. Distributions are "
            f"{', '.join(sources.distributions())}. Trained networks are {', '.join(pretrained.PACKAGED)}, "
            f"torchvision/NAME and timm/NAME; models of foldbit, with random weights, "
            f"{', '.join(models.names())}"
        )
    return source


def measure(source: Source, names: Sequence[str]) -> Study:
    """Measure a source's weights one by one, and its activations where it has inputs.

    Memory holds one weight at a time (of a network, the network), and one batch of activations.
    """
    weights, notes = [], []
    for weight in _progress(source.weights, f"{source.name}: weights"):
        x = study.in_units(weight.load())
        if not x.isfinite().all():
            notes.append(f"Left out, for it holds NaN or infinity: {weight.name}.")
            continue
        matrix = x.reshape(x.shape[0], -1)
        tally = study.Tally(names)
        tally.add(matrix.reshape(1, -1) if source.one_scale_set else matrix)
        fits = tally.fits()
        row_fits = study.row_fits(matrix, names) if source.one_scale_set else fits
        weights.append(
            Layer(
                weight.name,
                weight.kind,
                weight.shape,
                fits,
                tally.histogram(),
                study.points(matrix, row_fits),
            )
        )
    if not weights:
        raise SourceError(f"{source.name}: every weight holds NaN or infinity; nothing is left to analyze")
    if source.left_out:
        kinds = "; ".join(f"{count} × {why}" for why, count in source.left_out.items())
        notes.append(f"Tensors that are not looked at: {kinds}.")
    large = sum(pages.size(layer) > study.MOST_FOR_RANKS for layer in weights)
    if large:
        notes.append(
            f"Scales of a rank are those of the first {study.MOST_FOR_RANKS:,} values only, where a weight "
            f"has more (here {large})."
        )
    activations, inputs = _activations(source, names)
    return Study(source.name, source.description, weights, activations, inputs, notes, source.one_scale_set)


def _activations(source: Source, names: Sequence[str]) -> tuple[list[Layer], str]:
    """What was measured of the layers' inputs, and of which inputs, or why nothing was."""
    if source.model is None or source.batches is None:
        return [], source.inputs
    # Activations are peeled as they come, so schemes that are not foldable have no code for them.
    foldable = [name for name in names if schemes.parse(name).foldable]
    if not foldable:
        return [], "none of the schemes is foldable, as schemes of activations are"
    batches = _progress(list(source.batches()), f"{source.name}: activations")
    try:
        tallies = study.layer_inputs(source.model, batches, foldable)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        return [], f"the network does not take {source.inputs}, or not to finite values ({reason})"
    kinds = {name: sources.kind_of(module) for name, module in source.model.named_modules()}
    return [
        Layer(name, kinds[name], (tally.rows, tally.values // tally.rows), tally.fits(), tally.histogram())
        for name, tally in tallies.items()
    ], source.inputs


def _run_folder(path: Path, count: int, data: str | None) -> Source:
    from foldbit.training import evaluate, runs
    from foldbit.training.images import batches

    model, recipe = runs.load_run(path)
    images = evaluate.load_data(recipe, data)
    chosen = images.test[:count]

    def inputs() -> Iterator[Tensor]:
        normalize = (images.mean, images.std)
        for x, _ in batches(chosen, _BATCH, shuffle=False, normalize=normalize):
            yield x

    how = "float" if recipe.quant is None else recipe.quant.name
    return sources.network(
        path.resolve().name,
        f"{recipe.model}, trained by foldbit ({how}) on {images.name}, in {path}; latent (float) weights, "
        "scales for each output channel.",
        model,
        inputs,
        f"the first {len(chosen)} test images of {images.name} ({images.source})",
    )


def _check(what: Sequence[str], out: Path, compared: Sequence[str], images: int) -> list[str]:
    """The schemes' names, after refusing what cannot be done."""
    if not what:
        raise ValueError("name at least one thing to analyze, such as normal or efficientnet-lite0")
    names = [schemes.parse(name).name for name in dict.fromkeys(compared)]
    if not names or "fp" in names:
        raise ValueError(f"schemes to compare have scales; got {', '.join(names) or 'none'}")
    if images < 1:
        raise ValueError(f"images must be at least 1; got {images}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page's name ends in .html; got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} for the page; make it first")
    return names


def _progress(items: Sequence[T], title: str) -> Iterable[T]:
    """A progress bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=title, disable=None, leave=False)


def _record(found: Study) -> dict[str, Any]:
    record = dataclasses.asdict(found)
    record["means"] = {
        what: {
            kind: {name: dataclasses.asdict(fit) for name, fit in fits.items()}
            for kind, fits in pages.means(getattr(found, what)).items()
        }
        for what in ("weights", "activations")
    }
    record["points"] = [dataclasses.asdict(point) for point in pages.mean_points(found.weights)]
    return record
