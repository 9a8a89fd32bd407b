"""Scales for more values than memory holds: a growing histogram of magnitudes, and the optimum of all it saw.

Bins are ranges of float64 bit patterns (:mod:`foldbit.core.histograms`), 1024 to an octave, hence 0.1 % wide
or less, over the 24 octaves below the largest magnitude seen. A larger one moves the window up; what it
leaves behind merges into the lowest bin. Counts and sums thus remain those of everything seen: the split
found between bins gets its exact levels, and what bins hide is bounded by the certificate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foldbit.core import axes, schemes, solvers
from foldbit.core.histograms import Bins, Objective
from foldbit.core.schemes import Scheme

_OCTAVES = 24
_PER_OCTAVE = 1024
_BINS = _OCTAVES * _PER_OCTAVE
_SHIFT = 52 - 10  # bits of a float64's fraction that do not tell bins apart
_QUANTILES = 1 << 16
_SQUARED = (1e-120, 1e120)  # float64 holds the squares of these, and of their sums


@dataclass(frozen=True)
class PooledScales:
    """What :meth:`Pool.solve` finds.

    Attributes:
        scales: float64 ``[k]``.
        error: their squared error on all values, relative to the values' squares.
        excess: how much of that is above the least possible, at most; None where nothing bounds it.
    """

    scales: Tensor
    error: float
    excess: float | None


class Pool:
    """A histogram of the magnitudes of everything that is added to it, in 400 KB.

    Nothing waits for the device until :meth:`solve` is called.

    Example:
        >>> import torch
        >>> from foldbit.core.pooled import Pool
        >>> pool = Pool()
        >>> for part in torch.tensor([[-3.0, -1.0], [1.0, 3.0]]):
        ...     pool.add(part)
        >>> pool.solve("ls-2").scales.tolist()
        [2.0, 1.0]
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._counts, self._sums = zero.repeat(_BINS), zero.repeat(_BINS)
        self._before = _prefix(zero) - (_BINS - 1)  # of the lowest bin
        self._largest, self._squares = zero, zero
        self._count = 0

    @property
    def count(self) -> int:
        """How many values were added."""
        return self._count

    def add(self, x: Tensor) -> None:
        """Add the values of a float tensor of any shape. NaN or infinity among them shows in :meth:`broken`.

        Cost: some ten elementwise passes; eight times the memory of a float32 x, for a moment.
        """
        axes.check_float(x)
        if x.numel() == 0:
            return
        magnitudes = x.detach().abs().double().flatten()
        self._largest = torch.maximum(self._largest, magnitudes.amax())
        before = torch.maximum(self._before, _prefix(self._largest) - (_BINS - 1))
        moved = (torch.arange(_BINS, device=x.device) + (self._before - before)).clamp(min=0)
        self._counts, self._sums = (
            torch.zeros_like(old).scatter_add_(0, moved, old) for old in (self._counts, self._sums)
        )
        self._before = before
        index = _prefix(magnitudes).sub_(before).clamp_(0, _BINS - 1)
        self._counts.scatter_add_(0, index, magnitudes.new_ones(()).expand_as(magnitudes))
        self._sums.scatter_add_(0, index, magnitudes)
        self._squares = self._squares + magnitudes.square().sum()
        self._count += x.numel()

    def broken(self) -> Tensor:
        """Whether NaN or infinity was added, as a boolean ``[]`` on the device."""
        return ~self._largest.isfinite()

    def solve(self, scheme: str | Scheme) -> PooledScales:
        """The scales of least squared error over everything added, as one row.

        ``ls-1`` is exact; ``ls-2`` and ``ls-T`` are optimal up to the certificate; ``gf-k`` takes each bin
        for as many values at the bin's mean, which is exact but for the bins that a threshold cuts. Other
        schemes are solved on 65,536 quantiles.

        Raises:
            ValueError: for ``fp``, where nothing was added, where NaN or infinity was, or where the largest
                magnitude is not within 1e-120 … 1e120, nor 0.
        """
        scheme = schemes.parse(scheme)
        if scheme.is_float:
            raise ValueError("scheme 'fp' leaves a tensor float and has no scales")
        if self._count == 0:
            raise ValueError("nothing to solve for: no values were added")
        if self.broken():
            raise ValueError("NaN or infinity is among the values")
        self._check_squares()
        excess: Tensor | None = None
        if scheme.name in ("ls-2", "ls-T"):
            scales, excess = self._split(scheme)
        elif scheme.planes == 1:
            scales = self._mean().reshape(1)
            excess = torch.zeros_like(scales)
        elif scheme.name.startswith("gf-"):
            scales = self._greedy(scheme.planes)
        else:
            scales = solvers.solve(self._quantiles(), scheme, 0)
        return PooledScales(scales, self.error(scales), None if excess is None else float(excess))

    def error(self, scales: Tensor) -> float:
        """The squared error of x ≈ Σ v_i·s_i on everything added, relative to Σ x².

        Exact but for the bins that a threshold cuts, which count as values at their means.

        Raises:
            ValueError: where the largest magnitude is not within 1e-120 … 1e120, nor 0.
        """
        self._check_squares()
        if not self._squares > 0:
            return 0.0
        residual = means = self._means()
        for v in scales.to(means):
            residual = residual - torch.where(residual < 0, -v, v)
        approximation = means - residual
        saved = 2 * self._sums @ approximation - self._counts @ approximation.square()
        return max(0.0, 1 - float(saved / self._squares))

    def _check_squares(self) -> None:
        least, most = _SQUARED
        if self._largest != 0 and not least <= self._largest <= most:
            raise ValueError(
                f"the largest magnitude is {float(self._largest):.3g}, and float64 cannot hold the squares "
                f"of values so far from 1; scale them into {least} … {most}"
            )

    def _mean(self) -> Tensor:
        return self._sums.sum() / self._count

    def _means(self) -> Tensor:
        return self._sums / self._counts.clamp(min=1)

    def _split(self, scheme: Scheme) -> tuple[Tensor, Tensor]:
        mean = self._mean().reshape(1, 1)
        starts = (torch.arange(_BINS, device=mean.device) + self._before).clamp(min=0) << _SHIFT
        lower = starts.view(torch.float64)[None]
        lower[:, 0] = 0
        upper = torch.cat([lower[:, 1:], self._largest.reshape(1, 1)], 1)
        bins = Bins.of(self._counts[None], self._sums[None] - self._counts * mean, lower - mean, upper - mean)
        objective = Objective(scheme, self._count, mean)
        best = bins.best_edge(objective)
        scales = objective.scales(best.high, best.deviation)
        return scales[0], objective.excess(best.gain, bins.promises(objective).amax(1, keepdim=True))

    def _greedy(self, planes: int) -> Tensor:
        residual, scales = self._means(), []
        for _ in range(planes):
            scales.append(self._counts @ residual / self._count)
            residual = (residual - scales[-1]).abs()
        return torch.stack(scales)

    def _quantiles(self) -> Tensor:
        """Magnitudes at equal steps of the distribution: each the mean of the bin it falls into."""
        ranks = (torch.arange(_QUANTILES, dtype=torch.float64, device=self._counts.device) + 0.5) / _QUANTILES
        return self._means()[torch.searchsorted(self._counts.cumsum(0), ranks * self._count)]


def _prefix(magnitudes: Tensor) -> Tensor:
    """The number of the bin that magnitudes fall into, counted from 0.0 up."""
    return magnitudes.view(torch.int64) >> _SHIFT
