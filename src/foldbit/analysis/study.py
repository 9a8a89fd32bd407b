"""What quantization loses: relative squared error and angle, per scheme, over values that share scales.

Errors are ‖x − x̂‖² / ‖x‖², angles those between x and x̂ as vectors. Where the scales are the least-squares
ones for their signs, x̂ is a projection of x, and the error is the squared sine of the angle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foldbit.core import folding, low_rank, schemes, solvers

#: Values handled at a time: what bounds the memory that a large layer takes.
CHUNK = 1 << 20

#: Histograms go from −REACH to REACH times the root mean square of the values that share scales.
REACH = 4.0
BINS = 120

#: Values of a matrix for which scales of a rank are solved.
MOST_FOR_RANKS = 1 << 22

_MOST_ROWS = 512  # of a chunk, whose levels are remembered: enough for quantiles


@dataclass(frozen=True)
class Fit:
    """How well a scheme does: ‖x − x̂‖² / ‖x‖², and the angle between x and x̂ in degrees.

    All-zero values are met exactly: error and angle are 0.
    """

    error: float
    angle: float


@dataclass(frozen=True)
class Histogram:
    """Where values lie, and where each scheme puts its levels, in units of a row's root mean square.

    Attributes:
        density: of ``BINS`` equal bins over [−REACH, REACH].
        zeros: the share of values that are exactly 0.
        outside: the share of values beyond the bins.
        levels: of each scheme, ascending: the 10 %, 50 % and 90 % quantiles over the rows.
        lost: of each scheme, the density of its squared error over the same bins: the area under it is the
            mean over rows of their relative squared error, apart from the share beyond the bins.
        lost_outside: of each scheme, that share.
    """

    density: tuple[float, ...]
    zeros: float
    outside: float
    levels: dict[str, tuple[tuple[float, float, float], ...]]
    lost: dict[str, tuple[float, ...]]
    lost_outside: dict[str, float]


@dataclass(frozen=True)
class Point:
    """A way to scale sign planes, for the picture of error against cost.

    Attributes:
        scheme: how values become planes.
        scaling: which values share scales: ``tensor``, ``row``, or ``rank-r``, a matrix of scales of rank r.
        bits: stored per value, 32-bit scales included.
        xnor: binary operations per multiply-accumulate with 1-bit activations.
        error, angle: as in :class:`Fit`.
    """

    scheme: str
    scaling: str
    bits: float
    xnor: float
    error: float
    angle: float


class Tally:
    """Adds up what schemes lose, rows at a time, in memory that does not grow with their number.

    Args:
        names: the schemes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.schemes = [schemes.parse(name) for name in names]
        self.rows = 0
        self.values = 0
        self._energy = 0.0
        self._lost = dict.fromkeys(names, 0.0)
        self._dot = dict.fromkeys(names, 0.0)
        self._kept = dict.fromkeys(names, 0.0)
        self._counts = torch.zeros(BINS + 1, dtype=torch.float64)  # the last is for what lies outside
        self._lost_at = {name: torch.zeros(BINS + 1, dtype=torch.float64) for name in names}
        self._zeros = 0
        self._levels: dict[str, list[Tensor]] = {name: [] for name in names}

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Quantize rows ``[rows, n]`` of finite values by every scheme, scales for each row, and add up.

        Raises:
            ValueError: where a value is NaN or infinite.
        """
        if not rows.isfinite().all():
            raise ValueError("values hold NaN or infinity, which no scheme can quantize")
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            self._add(rows[start : start + step].contiguous())

    def fits(self) -> dict[str, Fit]:
        """The error and angle of each scheme over all that was added."""
        return {
            s.name: _fit(self._energy, self._lost[s.name], self._dot[s.name], self._kept[s.name])
            for s in self.schemes
        }

    def histogram(self) -> Histogram:
        """Where the values and the levels lie."""
        count = max(self.values, 1)
        width = 2 * REACH / BINS
        levels = {}
        for name, found in self._levels.items():
            quantiles = torch.quantile(torch.cat(found), torch.tensor([0.1, 0.5, 0.9]).double(), dim=0)
            levels[name] = tuple((_brief(a), _brief(b), _brief(c)) for a, b, c in quantiles.T.tolist())
        return Histogram(
            density=tuple(map(_brief, (self._counts[:BINS] / (count * width)).tolist())),
            zeros=_brief(self._zeros / count),
            outside=_brief(self._counts[BINS].item() / count),
            levels=levels,
            lost={
                name: tuple(map(_brief, (lost[:BINS] / (count * width)).tolist()))
                for name, lost in self._lost_at.items()
            },
            lost_outside={
                name: _brief(lost[BINS].item() / max(lost.sum().item(), 1e-300))
                for name, lost in self._lost_at.items()
            },
        )

    def _add(self, rows: Tensor) -> None:
        exact = rows.double()
        unit = exact.square().mean(1, keepdim=True).sqrt()
        unit = torch.where(unit > 0, unit, 1)
        self.rows += len(rows)
        self.values += rows.numel()
        self._energy += exact.square().sum().item()
        self._zeros += int((rows == 0).sum())
        places = ((exact / unit + REACH) * (BINS / (2 * REACH))).floor().flatten()
        places = torch.where((places < 0) | (places >= BINS), BINS, places).long()
        self._counts += torch.bincount(places, minlength=BINS + 1)
        shown = torch.linspace(0, len(rows) - 1, min(len(rows), _MOST_ROWS)).long()
        for scheme in self.schemes:
            quantized = folding.quantize(rows, scheme, 1)
            values = quantized.values().double()
            difference = exact - values
            self._lost[scheme.name] += difference.square().sum().item()
            self._lost_at[scheme.name] += torch.bincount(
                places, (difference / unit).square().flatten(), BINS + 1
            )
            self._dot[scheme.name] += (exact * values).sum().item()
            self._kept[scheme.name] += values.square().sum().item()
            self._levels[scheme.name].append(_levels(quantized.scales[shown].double() / unit[shown]))


def row_fits(matrix: Tensor, names: Sequence[str]) -> dict[str, Fit]:
    """The fit of each scheme with scales for each row of a matrix."""
    tally = Tally(names)
    tally.add(matrix)
    return tally.fits()


def in_units(x: Tensor) -> Tensor:
    """x over a power of two near its largest magnitude, in at least float32, so that squares stay in range.

    Errors, angles and histograms do not feel it.
    """
    largest = x.abs().max().double().item() if x.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return x if x.dtype == torch.float64 else x.float()
    unit = 2.0 ** math.floor(math.log2(largest))
    if 1e-6 < unit < 1e6:
        return x if x.dtype == torch.float64 else x.float()
    scaled = x.double() / unit
    return scaled if x.dtype == torch.float64 else scaled.float()


def layer_inputs(model: nn.Module, batches: Iterable[Tensor], names: Sequence[str]) -> dict[str, Tally]:
    """Run batches through a network in evaluation mode and tally the inputs of its layers, scales a sample.

    Inputs are taken as the network has them: of a quantized layer after its clamp, before its quantizer.

    Args:
        model: any network; convolutions (1-d, 2-d) and linear layers are looked at, quantized ones too.
        batches: tensors ``[N, ...]``.
        names: the schemes.

    Returns:
        A tally per layer that ran, in the model's order.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}
    tallies = {name: Tally(names) for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            clamp = getattr(getattr(layer, "config", None), "clamp", None)
            tallies[name].add((x if clamp is None else x.clamp(-clamp, clamp)).float().flatten(1))

        return look

    training = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            for x in batches:
                model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return {name: tally for name, tally in tallies.items() if tally.rows}


@torch.no_grad()
def one_scale_set(matrix: Tensor, scheme: str) -> Fit:
    """The fit of a foldable scheme with one set of scales for the whole matrix."""
    scales = solvers.solve(matrix, scheme, None)
    energy = lost = dot = kept = 0.0
    for chunk in _chunks(matrix):
        exact = chunk.double()
        values = folding.unfold(folding.fold(chunk, scales, None), scales, None).double()
        energy += exact.square().sum().item()
        lost += (exact - values).square().sum().item()
        dot += (exact * values).sum().item()
        kept += values.square().sum().item()
    return _fit(energy, lost, dot, kept)


def points(matrix: Tensor, row_fits: dict[str, Fit], ranks: Sequence[int] = (1, 4, 8)) -> list[Point]:
    """What error, bits and XNOR operations each way of scaling takes on a weight matrix ``[m, n]``.

    One bit with one scale, with one a row, and with scales that form a matrix of rank r
    (:func:`foldbit.core.low_rank.low_rank`); and every scheme of ``row_fits`` with its scales a row.

    A matrix of scales V = Σ a_i·b_iᵀ makes the product (V∘S)·x = Σ a_i ∘ (S·(b_i ∘ x)): r products, whose
    inputs b_i ∘ x differ and are quantized each for itself. So rank r takes r XNOR operations where one
    scale takes one; so does a second plane.

    Args:
        matrix: finite values, rows share scales. Of one beyond ``MOST_FOR_RANKS`` values, only the first rows
            serve for scales of a rank, whose solver takes ten copies of it in memory.
        row_fits: each scheme's fit with scales a row, as a :class:`Tally` of the rows has them.
        ranks: the ranks to try; where the matrix is too small for one, its full rank.
    """
    m, n = matrix.shape
    found = []
    for name in ("ls-1", "ls-2"):
        planes = schemes.parse(name).planes
        fit = one_scale_set(matrix, name)
        found.append(Point(name, "tensor", planes * (1 + 32 / (m * n)), planes, fit.error, fit.angle))
    for name, fit in row_fits.items():
        planes = schemes.parse(name).planes
        found.append(Point(name, "row", planes * (1 + 32 / n), planes, fit.error, fit.angle))
    part = matrix[: max(1, MOST_FOR_RANKS // n)]
    for rank in ranks:
        used = min(rank, *part.shape)
        scaled = low_rank.low_rank(part, "ls-1", used)
        fit = _fit_of(part, scaled.values())
        # Bits are the whole matrix's, whose rows share the right factor.
        bits = 1 + 32 * used * (m + n) / (m * n)
        found.append(Point("ls-1", f"rank-{rank}", bits, scaled.sign_products, fit.error, fit.angle))
    return found


def _fit_of(x: Tensor, values: Tensor) -> Fit:
    exact, values = x.double(), values.double()
    return _fit(
        exact.square().sum().item(),
        (exact - values).square().sum().item(),
        (exact * values).sum().item(),
        values.square().sum().item(),
    )


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    yield from matrix.split(max(1, CHUNK // max(1, matrix.shape[1])))


def _fit(energy: float, lost: float, dot: float, kept: float) -> Fit:
    if energy == 0:
        return Fit(0.0, 0.0)
    if kept == 0:
        return Fit(lost / energy, 90.0)
    # From the sine where the angle is small: there the cosine is 1 up to rounding.
    along = dot / math.sqrt(energy * kept)
    across = math.sqrt(max(0.0, energy - dot * dot / kept) / energy)
    return Fit(lost / energy, math.degrees(math.atan2(across, along)))


def _brief(number: float) -> float:
    """Five digits: a histogram needs no more, and a file of many is smaller for it."""
    return float(f"{number:.5g}")


def _levels(scales: Tensor) -> Tensor:
    """All sums ±v1 ±v2 …, ascending: scales ``[rows, k] -> [rows, 2^k]``."""
    sums = torch.zeros(len(scales), 1, dtype=scales.dtype)
    for scale in scales.unbind(1):
        sums = torch.cat([sums - scale[:, None], sums + scale[:, None]], 1)
    return sums.sort(1).values
