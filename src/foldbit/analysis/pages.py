"""The page of an analysis: what was measured of one or more sources, in pictures and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from foldbit.analysis import error_pictures, looks, report, value_pictures
from foldbit.analysis.looks import Row
from foldbit.analysis.study import Fit, Histogram, Point
from foldbit.core import schemes

Part = report.Text | report.Table | report.Picture


@dataclass(frozen=True)
class Layer:
    """What was measured of one tensor, a weight or a layer's input.

    Attributes:
        name: of the layer.
        kind: what it does.
        shape: of its weight; of an input, that of all samples seen together: ``[samples, values]``.
        fits: each scheme's.
        histogram: of the values, and the levels.
        points: ways of scaling; of weights only.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    fits: dict[str, Fit]
    histogram: Histogram
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """What was measured of a source.

    Attributes:
        name, description: of the source.
        weights, activations: layer by layer.
        inputs: what ran through the network, or why nothing did.
        notes: what was left out, and why.
        one_scale_set: whether it is a sample, all of which shares scales.
    """

    name: str
    description: str
    weights: list[Layer]
    activations: list[Layer]
    inputs: str
    notes: list[str]
    one_scale_set: bool


def means(layers: Sequence[Layer], what: str = "kind") -> dict[str, dict[str, Fit]]:
    """The mean over layers of each scheme's error and angle, kind by kind: ``[kind][scheme]``."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind if what == "kind" else what, []).append(layer)
    return {
        kind: {
            name: Fit(fmean(x.fits[name].error for x in some), fmean(x.fits[name].angle for x in some))
            for name in some[0].fits
        }
        for kind, some in kinds.items()
    }


def mean_points(layers: Sequence[Layer]) -> list[Point]:
    """Each way of scaling over all layers: means over their values, in which large layers count for more."""
    total = sum(size(layer) for layer in layers)
    merged = []
    for same in zip(*(layer.points for layer in layers), strict=True):
        weights = [size(layer) / total for layer in layers]
        merged.append(
            Point(
                same[0].scheme,
                same[0].scaling,
                sum(w * p.bits for w, p in zip(weights, same, strict=True)),
                sum(w * p.xnor for w, p in zip(weights, same, strict=True)),
                sum(w * p.error for w, p in zip(weights, same, strict=True)),
                sum(w * p.angle for w, p in zip(weights, same, strict=True)),
            )
        )
    return merged


def sections(studies: Sequence[Study]) -> list[report.Section]:
    """Everything that is on the page."""
    found = []
    if len(studies) > 1:
        found.append(_comparison(studies))
    for study in studies:
        found.append(report.Section(study.name, [report.Text(study.description), *_weights(study)]))
        if not study.one_scale_set:
            found.append(report.Section(f"{study.name}: activations", _activations(study)))
    found.append(report.Section("How to read this page", _glossary(studies)))
    return found


def lead(studies: Sequence[Study]) -> str:
    """The page in a few sentences, with its numbers."""
    first = studies[0]
    overall = means(first.weights, "all")["all"]
    what = "is lost" if first.one_scale_set else "is lost, in the mean over its layers' weights"
    words = [f"{fit.error:.1%} by {looks.plain_name(name)}" for name, fit in overall.items()]
    return (
        "Quantization replaces a tensor x by an approximation x̂ of a few levels. The less of x's squared "
        f"length is lost, the better. Of {first.name} {what}: {'; '.join(words)}."
    )


def _comparison(studies: Sequence[Study]) -> report.Section:
    fits = {
        (s.name if s.one_scale_set else f"{s.name}\n({len(s.weights)} weights)"): means(s.weights, "all")[
            "all"
        ]
        for s in studies
    }
    return report.Section(
        "All of them, side by side",
        [
            report.Picture(
                error_pictures.groups("What each scheme loses", fits),
                "Shorter is better. Of a network, the mean over its layers' weights.",
            )
        ],
    )


def _weights(study: Study) -> list[Part]:
    layers = study.weights
    values = "values" if study.one_scale_set else "weights"
    shown = _typical(layers)
    parts: list[Part] = [report.Text(" ".join(study.notes))] if study.notes else []
    where = "" if len(layers) == 1 else f", layer {_row(shown).name}"
    bands = (
        ""
        if study.one_scale_set
        else " Every output channel has scales of its own: a line is the median of a level over the "
        "channels, the band around it spans 80% of them, and the area is the mean of their errors."
    )
    parts.append(
        report.Picture(
            value_pictures.levels(
                f"Where {values} lie and where levels go: {study.name}{where}", shown.histogram, shown.fits
            ),
            "Above, grey: how often a value occurs; lines: the levels that values are rounded to. Below: the "
            "values that the squared error comes from; the coloured area is the error. Two bits have four "
            f"levels, so more values find one nearby; least squares puts them where they lose least.{bands}",
        )
    )
    if len(layers) > 1:
        parts.append(
            report.Picture(
                error_pictures.groups(
                    f"What each scheme loses of the {values}: {study.name}", _grouped(layers)
                ),
                "Shorter is better: the mean over layers of each kind.",
            )
        )
    points = mean_points(layers)
    if points:
        parts.append(_pareto(study, points))
    if len(layers) > 1:
        parts += _layer_by_layer(layers, "weights", study.name)
    parts.append(_table(layers, study.one_scale_set, "weight"))
    return parts


def _activations(study: Study) -> list[Part]:
    if not study.activations:
        return [report.Text(f"Not measured: {study.inputs}.")]
    layers = study.activations
    shown = _typical(layers)
    only_weights = [name for name in study.weights[0].fits if name not in layers[0].fits]
    return [
        report.Text(
            f"The inputs of its layers for {study.inputs}. Every sample has scales of its own. An input "
            "behind a ReLU is never negative: there half of all levels lie idle, and schemes differ the most."
            + (f" Schemes for weights only are left out: {', '.join(only_weights)}." if only_weights else "")
        ),
        report.Picture(
            value_pictures.levels(
                f"Where activations lie and where levels go: {study.name}, input of {shown.name}",
                shown.histogram,
                shown.fits,
            ),
            "As above, for a layer's input. A line is the median of a level over the samples, the band spans "
            "80% of them.",
        ),
        report.Picture(
            error_pictures.groups(
                f"What each scheme loses of the activations: {study.name}", _grouped(layers)
            ),
            "Shorter is better: the mean over layers of each kind.",
        ),
        *_layer_by_layer(layers, "activations", study.name),
        _table(layers, True, "input"),
    ]


def _layer_by_layer(layers: Sequence[Layer], what: str, name: str) -> list[Part]:
    rows = [_row(layer) for layer in layers]
    parts: list[Part] = [
        report.Picture(
            figure,
            "Further left is better. A line a layer, from the network's input at the top to its output; a "
            "mark a scheme.",
        )
        for figure in error_pictures.layers(f"Layer by layer, {what}: {name}", rows)
    ]
    for bits in range(2, schemes.MAX_PLANES + 1):
        greedy, best = f"gf-{bits}", f"ls-{bits}"
        if not {greedy, best} <= set(rows[0].fits):
            continue
        optimum = "the optimum" if bits == 2 else "the best that is found"
        parts += [
            report.Picture(
                figure,
                f"The line at 0 is {optimum} for {bits} bits. A bar says how much more squared error the "
                "greedy scales leave, which spend the same bits and the same operations.",
            )
            for figure in error_pictures.excess(
                f"What greedy scales lose on top of {optimum}, {what}: {name}", rows, greedy, best
            )
        ]
    chosen = _spread(layers, 6)
    parts.append(
        report.Picture(
            value_pictures.histograms(
                f"Values and levels, {what}: {name}",
                [(_row(layer), layer.histogram) for layer in chosen],
            ),
            "Grey: how often a value occurs. Below it, a line a scheme with a mark at each level; the bar "
            "through a mark spans 80% of the sets of scales. Layers are chosen evenly from first to last.",
        )
    )
    return parts


def _pareto(study: Study, points: Sequence[Point]) -> Part:
    caption = (
        "Lower left is better; the dotted line joins what nothing else beats in both. A row is an output "
        "channel; scales of rank r are a matrix of them, one for every value, made of r columns times r rows."
    )
    one_bit = [p for p in points if p.scheme == "ls-1"]
    two_bits = [p for p in points if p.scheme == "ls-2" and p.scaling == "row"]
    if one_bit and two_bits:
        best, second = min(one_bit, key=lambda p: p.error), two_bits[0]
        caption += (
            f" All scales tried with one bit leave {best.error:.3f} or more, at {best.bits:.2f} bits and "
            f"{best.xnor:.1f} operations; a second bit leaves {second.error:.3f} at {second.bits:.2f} bits "
            f"and {second.xnor:.0f} operations."
        )
    if len(study.weights) > 1:
        caption += " All are means over the weights, so that large layers count for more."
    return report.Picture(
        error_pictures.pareto(f"A second bit, or more scales? {study.name}", points), caption
    )


def _table(layers: Sequence[Layer], one_scale_set: bool, what: str) -> report.Table:
    names = list(layers[0].fits)
    return report.Table(
        ["layer" if len(layers) > 1 else what, "kind", "shape", *[f"{n}\nerror, angle" for n in names]],
        [
            [
                layer.name,
                layer.kind,
                "×".join(map(str, layer.shape)),
                *[f"{layer.fits[n].error:.4f}, {layer.fits[n].angle:.1f}°" for n in names],
            ]
            for layer in layers
        ],
        summary=f"Table: error and angle of every {what}" if len(layers) > 1 else "",
    )


def _glossary(studies: Sequence[Study]) -> list[Part]:
    names = list(studies[0].weights[0].fits)
    return [
        report.Text(
            "Relative squared error is ‖x − x̂‖² / ‖x‖²: 0 is exact, 1 is as bad as replacing x by zeros. The "
            "angle is the one between x and x̂ as vectors; with least-squares scales the error is the square "
            "of its sine."
        ),
        report.Text(
            "All schemes write x ≈ v1·s1 + v2·s2 + …, with signs s and scales v. One bit has the levels ±v; "
            "two bits have ±v1 ± v2; ternary has −2v, 0 and 2v. Least squares means that no other scales "
            "(and signs) have less squared error. Greedy fits the first plane as if it were alone "
            "and the second to what is left; more planes go on likewise. For 3 and 4 bits, least squares is "
            "the best that a search finds."
        ),
        report.Table(
            ["scheme", "in words", "bits a value"],
            [[n, looks.plain_name(n).rpartition(" (")[0], schemes.parse(n).planes] for n in names],
            "Scales (32 bits each) come on top: one set for each output channel of a weight, or sample of an "
            "activation.",
        ),
        report.Text(
            "XNOR operations: a product of sign planes is XNOR and bit counting. Counted are binary "
            "operations per multiply-accumulate with 1-bit activations: one a plane. Scales that form a "
            "matrix of rank r take r: each of its terms scales the inputs differently, and needs their "
            "signs anew."
        ),
    ]


def _grouped(layers: Sequence[Layer]) -> dict[str, dict[str, Fit]]:
    count = {kind: sum(layer.kind == kind for layer in layers) for kind in {x.kind for x in layers}}
    return {f"{kind}\n({_layers(count[kind])})": fits for kind, fits in means(layers).items()}


def _row(layer: Layer) -> Row:
    # That it is a weight goes without saying; names are long enough.
    return Row(layer.name.removesuffix(".weight"), layer.fits)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _typical(layers: Sequence[Layer]) -> Layer:
    """The middle layer, by error, of the most common kind."""
    kind = Counter(layer.kind for layer in layers).most_common(1)[0][0]
    some = sorted((x for x in layers if x.kind == kind), key=lambda x: next(reversed(x.fits.values())).error)
    return some[len(some) // 2]


def _spread(layers: Sequence[Layer], most: int) -> list[Layer]:
    if len(layers) <= most:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most)]


def size(layer: Layer) -> int:
    """How many values a layer has."""
    size = 1
    for extent in layer.shape:
        size *= extent
    return size
