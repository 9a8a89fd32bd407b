"""The oracle itself, against float arithmetic written as loops over sign tensors."""

import numpy as np
import pytest

from foldbit.kernels import layout, reference


def fold(x, scales):
    """Values ``[N, ...]`` to signs ``[k, N, ...]``: one float32 step after another, one value at a time."""
    out = np.empty((scales.shape[1], *x.shape), np.float32)
    for index in np.ndindex(x.shape):
        r = x[index]
        for i, v in enumerate(scales[index[0]]):
            s = np.float32(-1 if r < 0 else 1)
            out[(i, *index)] = s
            r = np.float32(r - s * v)
    return out


def convolve(x, w, stride, padding, dilation, out_size, groups):
    """``x [N, C, H, W]`` with ``w [O, C / groups, kh, kw]``, zero padded, in float64."""
    n, _, height, width = x.shape
    out_channels, per_group, kh, kw = w.shape
    y = np.zeros((n, *out_size, out_channels))
    for oy, ox, o, ky, kx in np.ndindex(*out_size, out_channels, kh, kw):
        iy = oy * stride[0] - padding[0] + ky * dilation[0]
        ix = ox * stride[1] - padding[1] + kx * dilation[1]
        if 0 <= iy < height and 0 <= ix < width:
            first = o // (out_channels // groups) * per_group
            y[:, oy, ox, o] += x[:, first : first + per_group, iy, ix] @ w[o, :, ky, kx]
    return y


@pytest.mark.parametrize(
    "channels, out, groups, segments, kernel, stride, padding, dilation, out_size",
    [
        (5, 3, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), (6, 5)),
        (64, 17, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), (6, 5)),
        (66, 4, 2, 1, (3, 2), (2, 1), (1, 0), (1, 2), (3, 3)),
        (6, 6, 6, 1, (3, 3), (1, 1), (1, 1), (1, 1), (6, 5)),
        (40, 4, 2, 2, (2, 2), (1, 1), (0, 0), (1, 1), (6, 5)),  # padded at the bottom and the right only
        (8, 4, 1, 4, (7, 7), (3, 3), (9, 9), (2, 2), (5, 5)),  # windows entirely outside
    ],
)
def test_conv_is_the_float_convolution_of_folded_tensors(
    channels, out, groups, segments, kernel, stride, padding, dilation, out_size
):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, 6, 5), dtype=np.float32)
    activation_scales = rng.random((2, 2), dtype=np.float32)
    per_group = channels // groups
    negative = rng.random((2, out, *kernel, per_group)) < 0.5
    weight_scales = rng.random((2, out, segments), dtype=np.float32)
    bias = rng.standard_normal(out, dtype=np.float32)
    w = layout.disk_to_kernel(layout.pack_bits(negative), per_group, groups=groups, segments=segments)

    y = reference.conv(
        x, w, weight_scales, activation_scales, bias,
        stride=stride, padding=padding, dilation=dilation, out_size=out_size,
    )  # fmt: skip

    folded = np.einsum("knchw,nk->nchw", fold(x, activation_scales), activation_scales)
    scale_of_channel = weight_scales.repeat(per_group // segments, axis=2)[:, :, None, None]
    weight = (np.where(negative, -1, 1) * scale_of_channel).sum(0).transpose(0, 3, 1, 2)
    expected = convolve(folded, weight, stride, padding, dilation, out_size, groups) + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_packed_bits_are_the_signs_of_the_residuals():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 70, 3, 4), dtype=np.float32)
    scales = rng.random((2, 3), dtype=np.float32)
    packed = reference.pack_activation(x, scales, groups=2)
    assert packed.shape == (3, 2, 3, 4, 2, 2) and packed.dtype == np.uint32
    signs = fold(x, scales)
    for c in range(70):
        bit = packed[..., c // 35, c % 35 // 32] >> np.uint32(c % 35 % 32) & 1
        np.testing.assert_array_equal(bit == 1, signs[:, :, c] == -1)
    assert not np.any(packed[..., 1] >> np.uint32(3))


def test_zeros_and_nan_count_as_positive():
    x = np.array([0.0, -0.0, np.nan, -1e-45, -np.inf, np.inf], np.float32).reshape(1, 6, 1, 1)
    assert reference.pack_activation(x, np.ones((1, 1), np.float32)).item() == 0b011000


def test_nan_scales_give_nan_for_their_sample_only():
    w = layout.disk_to_kernel(np.zeros((1, 3, 1, 1, 1), np.uint8), 4)
    scales = np.array([[1], [np.nan]], np.float32)
    y = reference.conv(
        np.ones((2, 4, 1, 1), np.float32), w, np.ones((1, 3, 1), np.float32), scales, out_size=(1, 1)
    )
    assert (y[0] == 4).all() and np.isnan(y[1]).all()


def test_thresholds_at_the_sums_of_scales_fold_as_scales_do():
    rng = np.random.default_rng(0)
    x = (rng.integers(-40, 40, (2, 70, 3, 4)) / 8).astype(np.float32)  # exact sums, many ties
    scales = np.array([[2.0, 1.0, 0.5]] * 2, np.float32)
    tree = np.array([0, -2, 2, -3, -1, 1, 3], np.float32)
    thresholds = np.broadcast_to(tree[:, None, None], (7, 2, 64)).copy()
    no_flips = np.zeros((2, 2), np.uint32)
    expected = reference.pack_activation(x, scales, groups=2)
    got = reference.pack_activation(x, scales, groups=2, thresholds=thresholds, flips=no_flips)
    np.testing.assert_array_equal(got, expected)


def test_flips_invert_channels_and_leave_spare_bits():
    x = np.array([-1.0, 1.0, -1.0], np.float32).reshape(1, 3, 1, 1)
    thresholds, flips = np.zeros((1, 1, 32), np.float32), np.array([[0xFFFFFFF0 | 0b110]], np.uint32)
    packed = reference.pack_activation(x, np.ones((1, 1), np.float32), thresholds=thresholds, flips=flips)
    assert packed.item() == 0b011


def test_slopes_then_residual():
    w = layout.disk_to_kernel(np.zeros((1, 2, 1, 1, 1), np.uint8), 1)
    one = np.ones((1, 2, 1), np.float32)
    x = np.array([-1.0, 1.0], np.float32).reshape(1, 1, 2, 1)
    y = reference.conv(
        x, w, one, np.ones((1, 1), np.float32), out_size=(2, 1),
        slopes=np.array([0.0, 0.5], np.float32),
        residual=np.array([1, 2, 3, 4], np.float32).reshape(1, 2, 1, 2),
    )  # fmt: skip
    assert y.ravel().tolist() == [1.0, 1.5, 4.0, 5.0]
