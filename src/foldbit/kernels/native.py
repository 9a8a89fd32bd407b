"""The compiled core: which backends this machine has, which one runs, how to force one.

A backend is an instruction set of the compiled core (``portable``, ``avx2``, ``avx512``) or ``reference``,
the slow NumPy code. All give the same numbers. The best instruction set is chosen at import, unless the
environment variable ``FOLDBIT_ISA`` names another backend; ``reference`` runs only when it is asked for by
name::

    native.available()             # ['portable', 'avx2', 'reference']
    native.use("portable")         # from here on
    with native.use("reference"):  # in here only
        ...
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldbit.kernels import reference

Pair = tuple[int, int]

REFERENCE = "reference"
VARIABLE = "FOLDBIT_ISA"

#: Gradient estimators whose windows :func:`window_rows` knows.
ESTIMATORS = ("identity", "clipped", "scaled", "polynomial")

# Greedy schemes and their planes; the exact scale of one plane is the greedy one.
_GREEDY = {"ls-1": 1, **{f"gf-{k}": k for k in range(1, 9)}}


class NativeCoreMissing(RuntimeWarning):
    """The compiled core could not be loaded."""


class KernelUnavailable(RuntimeError):
    """A kernel was called, or a backend was asked for, that cannot run here."""


def available() -> list[str]:
    """Names of the backends that can run here: instruction sets, the best last, then ``reference``."""
    return [*(_native.isas() if _native else []), REFERENCE]


def current() -> str:
    """Name of the backend that runs."""
    backend = _backend()
    return REFERENCE if backend is reference else backend.current_isa()


class use:
    """Choose a backend by name: from now on or, in a ``with`` statement, until its end.

    The choice holds for the whole process, all threads included.
    """

    def __init__(self, name: str) -> None:
        self._before = (_active, _native.current_isa() if _native else None)
        _choose(name)

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active, isa = self._before
        if _native:
            _native.force_isa(isa)


def pack_activation(
    x: NDArray[np.float32],
    scales: NDArray[np.float32],
    groups: int = 1,
    segments: int = 1,
    threads: int = 1,
    thresholds: NDArray[np.float32] | None = None,
    flips: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """:func:`foldbit.kernels.reference.pack_activation` on the current backend."""
    return _backend().pack_activation(x, scales, groups, segments, threads, thresholds, flips)


def conv_integers(
    a: NDArray[np.uint32],
    w: NDArray[np.uint32],
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    out_size: Pair,
    in_channels_per_segment: int,
    out_channels: int,
    threads: int = 1,
) -> NDArray[np.int32]:
    """:func:`foldbit.kernels.reference.conv_integers` on the current backend."""
    return _backend().conv_integers(
        a,
        w,
        stride=stride,
        padding=padding,
        dilation=dilation,
        out_size=out_size,
        in_channels_per_segment=in_channels_per_segment,
        out_channels=out_channels,
        threads=threads,
    )


def conv(
    x: NDArray[np.float32],
    w: NDArray[np.uint32],
    weight_scales: NDArray[np.float32],
    activation_scales: NDArray[np.float32],
    bias: NDArray[np.float32] | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    out_size: Pair,
    thresholds: NDArray[np.float32] | None = None,
    flips: NDArray[np.uint32] | None = None,
    slopes: NDArray[np.float32] | None = None,
    residual: NDArray[np.float32] | None = None,
    out: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """:func:`foldbit.kernels.reference.conv` on the current backend."""
    return _backend().conv(
        x,
        w,
        weight_scales,
        activation_scales,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        out_size=out_size,
        thresholds=thresholds,
        flips=flips,
        slopes=slopes,
        residual=residual,
        out=out,
        threads=threads,
    )


def is_compiled() -> bool:
    """Whether the current backend is the compiled core."""
    return _active is not None and _active is _native


def prepare_conv(
    w: NDArray[np.uint32],
    weight_scales: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    thresholds: NDArray[np.float32] | None,
    flips: NDArray[np.uint32] | None,
    slopes: NDArray[np.float32] | None,
    activation_planes: int,
    in_channels: int,
) -> Any:
    """The compiled core's :func:`conv` with all that stays the same from call to call, checked once.

    The arrays are used as they lie, dense, and kept; but the words, thresholds and flips of a depthwise one
    are copied. The result's ``run_at(x, shape, strides, scales, scales_by_image, residual, out, out_size,
    threads)`` takes addresses of float32 memory, for which the caller vouches: x ``[N, C, H, W]``, strides
    in floats; scales ``[planes]``, or ``[N, planes]`` by image; residual (or 0) and out dense ``[N, OH, OW,
    out]``. It uses no more of the threads than have enough to do.
    """
    if _native is None:
        raise KernelUnavailable(_why_missing())
    return _native.PreparedConv(
        w,
        weight_scales,
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        thresholds=thresholds,
        flips=flips,
        slopes=slopes,
        activation_planes=activation_planes,
        in_channels=in_channels,
    )


def has_solvers() -> bool:
    """Whether the compiled solvers can run here."""
    return _native is not None


def solve_rows(
    x: NDArray[np.float32] | NDArray[np.float64],
    scheme: str,
    *,
    clamp: float | None = None,
    threads: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales of least squared error, row by row, in linear time; of ``gf-k``, the greedy ones.

    Args:
        x: float32 or float64 ``[rows, n]``, dense along n.
        scheme: ``ls-1``, ``ls-2``, ``ls-T`` or ``gf-1`` … ``gf-8``.
        clamp: x is clipped to [−clamp, clamp] as it is read; None for no clip.
        threads: how many threads share the rows. The numbers do not depend on it.

    Returns:
        Scales float64 ``[rows, k]``, and float64 ``[rows]`` the certificate: an upper bound on how far the
        squared error lies above the optimum, in units of ‖x‖². Nothing bounds ``gf-k`` of two planes or
        more: infinity. A row that holds NaN, or infinity within the clamp, has NaN for both.
    """
    if _native is None:
        raise KernelUnavailable(_why_missing())
    limit = math.inf if clamp is None else clamp
    planes = _GREEDY.get(scheme)
    if planes is None:
        if scheme not in ("ls-2", "ls-T"):
            raise ValueError(f"scheme must be ls-1, ls-2, ls-T or gf-1 to gf-8, got {scheme!r}")
        return _native.solve_rows(x, scheme, threads, clamp=limit)
    scales = _native.greedy_rows(x, planes, threads, limit)
    return scales, scales[:, 0] * 0 + (0 if planes == 1 else np.inf)


def approximate_rows(
    x: NDArray[Any],
    scales: NDArray[Any],
    clamp: float | None = None,
    *,
    out: NDArray[Any],
    threads: int = 1,
) -> None:
    """:func:`foldbit.kernels.reference.approximate_rows` on the current backend."""
    limit = math.inf if clamp is None else clamp
    _backend().approximate_rows(x, scales, out, limit, threads)


def window_rows(
    grad: NDArray[Any],
    x: NDArray[Any],
    scales: NDArray[Any],
    estimator: str,
    clamp: float | None = None,
    *,
    out: NDArray[Any],
    threads: int = 1,
) -> None:
    """:func:`foldbit.kernels.reference.window_rows` on the current backend."""
    limit = math.inf if clamp is None else clamp
    _backend().window_rows(grad, x, scales, estimator, out, limit, threads)


def _backend() -> ModuleType:
    if _active is None:
        raise KernelUnavailable(_why_missing())
    return _active


def _choose(name: str) -> None:
    global _active
    if name == REFERENCE:
        _active = reference
    elif _native and name in _native.isas():
        _native.force_isa(name)
        _active = _native
    else:
        why = "" if _native else f" {_why_missing()}"
        raise KernelUnavailable(
            f"the backend {name!r} cannot run here; there are {', '.join(available())}.{why}"
        )


def _why_missing() -> str:
    return (
        f"foldbit's compiled core could not be loaded ({_load_error}). Reinstall foldbit with a C++17 "
        f"compiler at hand, or choose the slow NumPy kernels with {VARIABLE}={REFERENCE}."
    )


# Loaded once, here. The build may lack the core or have one for another machine; that is said aloud, unless
# the slow path was asked for.
_native: ModuleType | None = None
_load_error: ImportError | None = None
try:
    _native = importlib.import_module("foldbit._native")
except ImportError as error:
    _load_error = error

_active: ModuleType | None = _native
_wanted = os.environ.get(VARIABLE)
if _load_error and _wanted != REFERENCE:
    warnings.warn(_why_missing(), NativeCoreMissing, stacklevel=2)
if _wanted:
    try:
        _choose(_wanted)
    except KernelUnavailable as error:
        raise KernelUnavailable(f"{VARIABLE}={_wanted}: {error}") from None
