"""The kernels' operations in plain NumPy: slow, and as close to their definitions as code can be.

Every compiled kernel is held against this file, and it computes where the compiled core cannot, if asked to.
Layouts are described in :mod:`foldbit.kernels.layout`. A sign plane is a tensor of -1 and +1; a dot product
of signs that a bitwise kernel computes as ``K - 2 * popcount(a xor b)`` is a dot product here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldbit.kernels.layout import LANES, WORD_BITS, bits_to_words

Pair = tuple[int, int]


def pack_activation(
    x: NDArray[np.float32],
    scales: NDArray[np.float32],
    groups: int = 1,
    segments: int = 1,
    threads: int = 1,
    thresholds: NDArray[np.float32] | None = None,
    flips: NDArray[np.uint32] | None = None,
) -> NDArray[np.uint32]:
    """Fold values into sign planes, one bit a value.

    For one scale ``v`` after another: the bit is ``r < 0`` (so 0, -0 and NaN count as positive), then
    ``r -= -v if bit else v``, from ``r = x`` on, in float32.

    Args:
        x: ``float32 [N, C, H, W]``, any strides.
        scales: ``float32 [N, k]``, each sample's own.
        groups, segments: each of ``groups * segments`` runs of channels starts on a word of its own.
        threads: has no effect here.
        thresholds, flips: fold by thresholds instead of scales, of which only the number then matters:
            ``float32 [2^k - 1, groups * segments, 32 * words]`` and ``uint32 [groups * segments, words]``,
            k at most 4. A value walks down a binary tree from node 0: its bit is ``x < thresholds[node]``,
            and the next node ``2 node + 1`` if so, ``2 node + 2`` if not. In channels that ``flips`` marks
            the bits are inverted afterwards.

    Returns:
        ``uint32 [k, N, H, W, groups * segments, words]``, spare bits 0.
    """
    n, c, h, w = x.shape
    residual = x.transpose(0, 2, 3, 1).reshape(n, h, w, groups * segments, c // (groups * segments))
    planes = []
    if thresholds is not None:
        assert flips is not None, "thresholds and flips go together"
        channels = residual.shape[-1]
        flipped = _signs(flips, channels) < 0
        node = np.zeros(residual.shape, np.intp)
        for _ in range(scales.shape[1]):
            run, channel = np.indices(flipped.shape)
            below = residual < thresholds[node, run, channel]
            planes.append(bits_to_words(below ^ flipped))
            node = 2 * node + np.where(below, 1, 2)
        return np.stack(planes)
    for v in scales.T[..., None, None, None, None]:
        negative = residual < 0
        planes.append(bits_to_words(negative))
        with np.errstate(invalid="ignore", over="ignore"):
            residual = residual - np.where(negative, -v, v)
    return np.stack(planes)


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
    """Convolve every activation plane with every weight plane, segment by segment.

    A tap outside the image adds nothing: zero padding, exactly. The padding given is that at the top and the
    left; how much there is at the bottom and the right follows from ``out_size``.

    Args:
        a: ``uint32 [ka, N, H, W, groups * segments, words]``, as :func:`pack_activation` gives it.
        w: ``uint32 [kw, groups, blocks, segments, kernel_h, kernel_w, words, LANES]``.

    Returns:
        ``int32 [kw, ka, segments, N, OH, OW, out_channels]``.
    """
    weight_planes, groups, _, segments, kernel_h, kernel_w, _, _ = w.shape
    planes, n, height, width, _, _ = a.shape
    channels = in_channels_per_segment
    signs = _signs(a, channels).reshape(planes, n, height, width, groups, segments, channels)
    weights = _weight_signs(w, channels, out_channels)
    out_h, out_w = out_size
    out = np.zeros(
        (weight_planes, planes, segments, n, out_h, out_w, groups, out_channels // groups), np.int32
    )
    for ky in range(kernel_h):
        ys = np.arange(out_h) * stride[0] - padding[0] + ky * dilation[0]
        for kx in range(kernel_w):
            xs = np.arange(out_w) * stride[1] - padding[1] + kx * dilation[1]
            inside_y, inside_x = (ys >= 0) & (ys < height), (xs >= 0) & (xs < width)
            values = signs[:, :, ys[inside_y]][:, :, :, xs[inside_x]]
            products = np.einsum("anyxgsc,igosc->iasnyxgo", values, weights[:, :, :, ky, kx])
            out[:, :, :, :, inside_y.nonzero()[0][:, None], inside_x.nonzero()[0]] += products
    return out.reshape(*out.shape[:-2], out_channels)


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
    """Fold a float input, convolve it with folded weights, and scale the result back to floats.

    ``y[n, :, :, o] = bias[o] + sum over segments s, weight planes i, activation planes j of
    (weight_scales[i, o, s] * activation_scales[n, j]) * integers[i, j, s, n, :, :, o]``,
    added up in that order in float32: every backend gives these very numbers.

    Args:
        x: ``float32 [N, C, H, W]``, any strides.
        w: ``uint32 [kw, groups, blocks, segments, kernel_h, kernel_w, words, LANES]``.
        weight_scales: ``float32 [kw, out_channels, segments]``.
        activation_scales: ``float32 [N, ka]``.
        bias: ``float32 [out_channels]``.
        stride, padding, dilation, out_size: as in :func:`conv_integers`.
        thresholds, flips: as in :func:`pack_activation`.
        slopes: ``float32 [out_channels]``: where y is negative it is multiplied by its channel's slope.
            All 0, that is ReLU: it is 0 there, for minus infinity as well.
        residual: ``float32 [N, OH, OW, out_channels]``, added last.
        out: where to write the result; a new array by default.

    Returns:
        ``float32 [N, OH, OW, out_channels]``.
    """
    groups, segments = w.shape[1], w.shape[3]
    out_channels = weight_scales.shape[1]
    integers = conv_integers(
        pack_activation(x, activation_scales, groups, segments, thresholds=thresholds, flips=flips),
        w,
        stride=stride,
        padding=padding,
        dilation=dilation,
        out_size=out_size,
        in_channels_per_segment=x.shape[1] // (groups * segments),
        out_channels=out_channels,
    ).astype(np.float32)
    if out is None:
        out = np.empty((x.shape[0], *out_size, out_channels), np.float32)
    out[...] = 0 if bias is None else bias
    for s in range(segments):
        for i, weight_scale in enumerate(weight_scales[:, :, s]):
            for j, activation_scale in enumerate(activation_scales.T[..., None, None, None]):
                with np.errstate(invalid="ignore", over="ignore"):
                    out += (weight_scale * activation_scale) * integers[i, j, s]
    if slopes is not None:
        negative = out < 0
        if slopes.any():
            np.multiply(out, slopes, out=out, where=negative)
        else:
            out[negative] = 0
    if residual is not None:
        out += residual
    return out


def approximate_rows(
    x: NDArray[Any], scales: NDArray[Any], out: NDArray[Any], clamp: float = np.inf, threads: int = 1
) -> None:
    """Write x̂ = Σ v_i·s_i for x clipped to [−clamp, clamp]: fold and unfold at once.

    Every step is made in the dtype of the arrays, in the order of :func:`pack_activation`.

    Args:
        x: float32 or float64 ``[rows, n]``, dense along n.
        scales: of x's dtype ``[rows, k]``, k = 1…8, C-contiguous.
        out: where x̂ goes: of x's dtype and shape, dense along n.
        clamp: positive; infinite for no clip.
        threads: has no effect here.
    """
    total: Any = None
    for _, signed in _walk(x, scales, clamp):
        with np.errstate(invalid="ignore", over="ignore"):
            total = signed if total is None else total + signed
    out[...] = total


def window_rows(
    grad: NDArray[Any],
    x: NDArray[Any],
    scales: NDArray[Any],
    estimator: str,
    out: NDArray[Any],
    clamp: float = np.inf,
    threads: int = 1,
) -> None:
    """Write how much of the gradient passes x: grad times the estimator's window.

    Where the clip, if there is one, cuts x, and where x is NaN, 0.

    The windows are those of :mod:`foldbit.nn.estimators`. Arguments as in :func:`approximate_rows`; ``grad``
    has x's dtype and shape and is dense along n.
    """
    one = x.dtype.type(1)
    clipped = np.clip(x, -x.dtype.type(clamp), x.dtype.type(clamp))
    window: Any
    if estimator == "identity":
        window = one
    elif estimator == "clipped":
        window = np.where(np.abs(clipped) <= 1, one, 0 * one)
    elif estimator == "scaled":
        limit = 3 * scales[:, :1] if clamp == np.inf else x.dtype.type(clamp)
        window = np.where(np.abs(clipped) <= limit, one, 0 * one)
    elif estimator == "polynomial":
        window = np.zeros_like(x)
        for v, (residual, _) in zip(scales.T[..., None], _walk(x, scales, clamp), strict=True):
            reach = np.where(v > 0, 2 * v, one)
            with np.errstate(invalid="ignore", over="ignore"):
                triangle = one - np.abs(residual) / reach
            window = window + np.where(v > 0, np.where(triangle < 0, 0 * one, triangle), 0 * one)
    else:
        raise ValueError(f"estimator must be identity, clipped, scaled or polynomial, got {estimator!r}")
    with np.errstate(invalid="ignore", over="ignore"):
        passed = grad * window
    out[...] = passed if clamp == np.inf else np.where(np.abs(x) <= x.dtype.type(clamp), passed, 0 * one)


def _walk(x: NDArray[Any], scales: NDArray[Any], clamp: float) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Peel clipped rows plane by plane: what the earlier planes left, and the plane's scaled signs."""
    residual = np.clip(x, -x.dtype.type(clamp), x.dtype.type(clamp))
    for v in scales.T[..., None]:
        signed = np.where(residual < 0, -v, v)
        yield residual, signed
        with np.errstate(invalid="ignore", over="ignore"):
            residual = residual - signed


def _signs(words: NDArray[np.uint32], channels: int) -> NDArray[np.int32]:
    """Words ``[..., words]`` to signs -1 and +1 ``[..., channels]``."""
    bits = (words[..., None] >> np.arange(WORD_BITS, dtype=np.uint32)) & np.uint32(1)
    bits = bits.reshape(*words.shape[:-1], words.shape[-1] * WORD_BITS)[..., :channels]
    return 1 - 2 * bits.astype(np.int32)


def _weight_signs(w: NDArray[np.uint32], channels: int, out_channels: int) -> NDArray[np.int32]:
    """Kernel-layout weights to signs ``[k, groups, out_channels / groups, kh, kw, segments, channels]``."""
    k, groups, blocks, segments, kernel_h, kernel_w, _, _ = w.shape
    signs = _signs(w.transpose(0, 1, 2, 7, 4, 5, 3, 6), channels)
    signs = signs.reshape(k, groups, blocks * LANES, kernel_h, kernel_w, segments, channels)
    return signs[:, :, : out_channels // groups]
