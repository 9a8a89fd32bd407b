"""The best split of magnitudes, found by histograms: no sorting, and no bin opened in vain.

Both ``ls-2`` and ``ls-T`` give the larger magnitudes of a row one level and the smaller ones another (for
``ls-T`` that is 0), so a solution is a split of them. Of n magnitudes let h be high, and let their deviations
from the mean of all add up to p. The squared error that a split saves is its gain,

    ls-2    p²·n / (h·(n − h))       over one level, the mean, for all
    ls-T    (p + h·mean)² / h        over zero for all

A histogram that counts and adds up magnitudes gives the gain exactly at the edges between its bins, and
bounds it inside a bin. Let the bin hold c magnitudes in [lower, upper) that add up to s. The t largest of
them add up to at most t·upper, and to at most s − (c − t)·lower. Either makes the numerator's root at most
linear in t, and the denominator is positive and concave, so the gain it allows is convex in t and largest at
an end: at an edge of the bin, or at the knee where the two bounds meet, t = (s − c·lower) / (upper − lower).
Only a bin whose knee promises more than the best edge can hide a better split.

A float's bits, read as an integer, grow with the float, and bins are ranges of such integers: as wide as
their magnitudes are large, with exact edges. An optimal split lies half-way between its two levels, so no
lower than half the mean: all below goes into one bin.

``csrc/solve.cpp`` works in the same way, with memory and branches of its own. Here every shape depends on
shapes alone and no value is looked at, so that torch.compile, torch.export and other devices can follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from foldbit.core.schemes import Scheme

_FIRST_BITS = 10  # a row's first histogram has 2^10 bins
_OPENED = 8  # of which the most promising are opened,
_REFINED_BITS = 8  # each into 2^8,
_REFINEMENTS = 2  # so many times

_MANTISSA = 52
_BIAS = 1023
_KEY_OF_ONE = _BIAS << _MANTISSA


@dataclass(frozen=True)
class Objective:
    """What a split saves.

    Attributes:
        scheme: ``ls-2`` or ``ls-T``.
        count: how many magnitudes there are, n: a number, or a tensor that broadcasts against the mean.
        mean: their mean ``[rows, 1]``.
    """

    scheme: Scheme
    count: int | Tensor
    mean: Tensor

    def gain(self, high: Tensor, deviation: Tensor) -> Tensor:
        """The squared error saved where ``high`` magnitudes are high and deviate by p from the mean."""
        if self.scheme.name == "ls-T":
            return torch.where(high > 0, (deviation + high * self.mean).square() / high, 0)
        low = self.count - high
        return torch.where((high > 0) & (low > 0), deviation.square() * (self.count / (high * low)), 0)

    def scales(self, high: Tensor, deviation: Tensor) -> Tensor:
        """The two scales ``[rows, 2]`` of a split ``[rows, 1]``."""
        above = deviation / high.clamp(min=1)
        if self.scheme.name == "ls-T":
            return ((self.mean + above) / 2).repeat(1, 2)
        below = deviation / (self.count - high).clamp(min=1)
        low = (self.mean - below).clamp(min=0)  # where it is 0, rounding may leave less
        top = self.mean + above
        return torch.cat([top + low, (top - low).clamp(min=0)], 1) / 2

    def excess(self, gain: Tensor, promised: Tensor) -> Tensor:
        """The certificate: a bound on (error reached − least error) / ‖x‖². What is saved is at most ‖x‖²."""
        saved = gain if self.scheme.name == "ls-T" else gain + self.count * self.mean.square()
        return (promised - gain).clamp(min=0) / torch.where(saved > 0, saved, 1)


class Split(NamedTuple):
    """One split a row: how many are high, what their deviations add up to, and the gain, ``[rows, 1]``."""

    high: Tensor
    deviation: Tensor
    gain: Tensor

    def or_better(self, other: Split) -> Split:
        better = other.gain > self.gain
        return Split(*(torch.where(better, b, a) for a, b in zip(self, other, strict=True)))


class Bins(NamedTuple):
    """Bins in rising order ``[rows, bins]``; deviations are magnitudes less their mean.

    Attributes:
        counts: magnitudes in the bin.
        sums: of their deviations.
        above: magnitudes above the bin.
        sums_above: of their deviations.
        lower, upper: bounds of the bin's deviations.
    """

    counts: Tensor
    sums: Tensor
    above: Tensor
    sums_above: Tensor
    lower: Tensor
    upper: Tensor

    def best_edge(self, objective: Objective) -> Split:
        """The best split between bins."""
        high, deviation = self.above + self.counts, self.sums_above + self.sums
        gain = objective.gain(high, deviation)
        place = gain.argmax(1, keepdim=True)
        return Split(high.gather(1, place), deviation.gather(1, place), gain.gather(1, place))

    def promises(self, objective: Objective) -> Tensor:
        """A bound ``[rows, bins]`` on the gain of the splits inside each bin that its edges do not have."""
        width = self.upper - self.lower
        knee = (self.sums - self.counts * self.lower) / width
        inside = (self.counts > 1) & (width > 0) & (knee > 0) & (knee < self.counts)
        knee = torch.where(inside, knee, 0)
        gain = objective.gain(self.above + knee, self.sums_above + knee * torch.where(inside, self.upper, 0))
        return torch.where(inside, gain, 0)


def solve_rows(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Solve ``ls-2`` or ``ls-T`` for every row, ``[rows, n]`` with n >= 1.

    Returns:
        Scales float64 ``[rows, 2]``, and the certificate float64 ``[rows]``: a bound, up to float64 rounding,
        on (squared error − least squared error) / ‖x‖². A row that holds NaN or infinity gets NaN.

    Cost: three times through the row; ten times the memory of a float32 one, and some 200 KB more each row.
    """
    magnitudes = rows.abs().double().contiguous()
    unit = magnitudes.amax(1, keepdim=True)
    # Squares of values up to 1 do not overflow, and those that vanish do not matter.
    magnitudes = magnitudes / torch.where(unit > 0, unit, 1)
    mean = magnitudes.mean(1, keepdim=True)
    objective = Objective(scheme, rows.shape[1], mean)
    deviations, keys = magnitudes - mean, _keys(magnitudes)

    bins, edge_keys, shift, index = _first_bins(keys, deviations, mean)
    best = bins.best_edge(objective)
    missed = torch.zeros_like(mean)
    for _ in range(_REFINEMENTS):
        promised, opened = bins.promises(objective).topk(_OPENED + 1, 1)
        missed = torch.maximum(missed, promised[:, _OPENED:])  # the best of those that stay shut
        opened = opened[:, :_OPENED]
        shift = shift - _REFINED_BITS
        bins, edge_keys, index = _opened_bins(bins, edge_keys, shift, index, opened, keys, deviations, mean)
        best = best.or_better(bins.best_edge(objective))
    missed = torch.maximum(missed, bins.promises(objective).amax(1, keepdim=True))

    known = torch.where(mean.isfinite(), 0, torch.nan)
    scales = objective.scales(best.high, best.deviation) * unit + known
    return scales, (objective.excess(best.gain, missed) + known)[:, 0]


def _keys(magnitudes: Tensor) -> Tensor:
    """Integers in the order of the magnitudes: their bits."""
    return magnitudes.view(torch.int64)


def _magnitudes(keys: Tensor) -> Tensor:
    """The magnitudes, at most 1, of such integers."""
    return keys.clamp(0, _KEY_OF_ONE).view(torch.float64)


def _first_bins(keys: Tensor, deviations: Tensor, mean: Tensor) -> tuple[Bins, Tensor, Tensor, Tensor]:
    """Equal ranges of keys between half the mean and 1, above a bin for all below.

    Returns the bins, the key each starts at ``[rows, bins]``, the binary logarithm of their width in keys
    ``[rows, 1]``, and the bin that each magnitude is in.
    """
    count = 1 << _FIRST_BITS
    lowest = _keys(mean * (0.5 - 2**-40))  # somewhat below, for the mean is rounded
    # The least power of two of which less than count - 2 reach from half the mean to 1.
    shift = (_keys((_KEY_OF_ONE - lowest).double() / (count - 2)) >> _MANTISSA) - (_BIAS - 1)
    shift = shift.clamp(0, _MANTISSA)
    before = (lowest >> shift) - 1
    index = ((keys >> shift).sub_(before)).clamp_(0, count - 1)
    counts, sums = _count_and_add(index, deviations, count)
    edge_keys = (torch.arange(count + 1, device=keys.device) + before) << shift
    edges = _magnitudes(edge_keys) - mean
    bins = Bins(counts, sums, *_above(counts, sums), edges[:, :-1], edges[:, 1:])
    return bins, edge_keys[:, :-1], shift, index


def _opened_bins(
    bins: Bins,
    edge_keys: Tensor,
    shift: Tensor,
    index: Tensor,
    opened: Tensor,
    keys: Tensor,
    deviations: Tensor,
    mean: Tensor,
) -> tuple[Bins, Tensor, Tensor]:
    """Equal ranges of keys inside the bins ``opened [rows, k]``, one bin after the other.

    Magnitudes of other bins go to places behind those of all the opened, spread out like them.
    """
    slots, inner = opened.shape[1], 1 << _REFINED_BITS
    slot_of = index.new_full((index.shape[0], bins.counts.shape[1] + inner), slots)
    slot_of = slot_of.scatter(1, opened, torch.arange(slots, device=keys.device).expand_as(opened))
    index = slot_of.gather(1, index).mul_(inner).add_((keys >> shift).bitwise_and_(inner - 1))
    counts, sums = _count_and_add(index, deviations, (slots + 1) * inner)
    counts, sums = (t.unflatten(1, (slots + 1, inner))[:, :slots] for t in (counts, sums))
    starts = edge_keys.gather(1, opened).unsqueeze(2)
    edge_keys = starts + (torch.arange(inner + 1, device=keys.device) << shift.unsqueeze(2))
    edges = _magnitudes(edge_keys) - mean.unsqueeze(2)
    above, sums_above = (
        inside + outside.gather(1, opened).unsqueeze(2)
        for inside, outside in zip(_above(counts, sums), (bins.above, bins.sums_above), strict=True)
    )
    parts = (counts, sums, above, sums_above, edges[..., :-1], edges[..., 1:])
    return Bins(*(part.flatten(1) for part in parts)), edge_keys[..., :-1].flatten(1), index


def _count_and_add(index: Tensor, values: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """How many values have each index, and their sums, float64 ``[rows, bins]``."""
    empty = values.new_zeros(values.shape[0], bins)
    return empty.scatter_add(1, index, values.new_ones(()).expand_as(values)), empty.scatter_add(
        1, index, values
    )


def _above(counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """What lies in later bins of the last dim."""
    flipped = torch.stack([counts, sums]).flip(-1)
    above = (flipped.cumsum(-1) - flipped).flip(-1)
    return above[0], above[1]
