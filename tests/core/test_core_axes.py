"""Rows of elements that share scales, and the way back."""

import pytest
import torch

from foldbit.core import axes


@pytest.mark.parametrize(
    ("ndim", "dim", "expected"),
    [
        (3, None, (0, 1, 2)),
        (3, -1, (2,)),
        (3, 0, (0,)),
        (4, (-1, 0), (0, 3)),
        (4, [3, 1, 2], (1, 2, 3)),
        (2, range(2), (0, 1)),
        (0, None, ()),
        (0, -1, ()),
        (0, 0, ()),
        (0, (), ()),
    ],
)
def test_dims_become_sorted_and_non_negative(ndim, dim, expected):
    assert axes.normalize(ndim, dim) == expected


@pytest.mark.parametrize(
    ("ndim", "dim", "error", "message"),
    [
        (3, 3, IndexError, "dim 3 is out of range for a tensor of 3 dims"),
        (3, (0, -4), IndexError, "dim -4 is out of range"),
        (0, 1, IndexError, "dim 1 is out of range for a tensor of 0 dims"),
        (3, (1, 1), ValueError, r"twice: \(1, 1\) for a tensor of 3 dims"),
        (3, (0, -3), ValueError, "names a dim twice"),
        (3, (), ValueError, "dim is empty: name at least one"),
    ],
)
def test_dims_that_make_no_sense(ndim, dim, error, message):
    with pytest.raises(error, match=message):
        axes.normalize(ndim, dim)


def test_rows_hold_the_elements_that_share_scales():
    x = torch.arange(120).reshape(2, 3, 4, 5)
    assert axes.kept_shape(x.shape, (1, 3)) == [2, 4]
    rows = axes.as_rows(x, (1, 3))
    assert rows.shape == (8, 15)
    for row, (i, j) in zip(rows, torch.cartesian_prod(torch.arange(2), torch.arange(4)), strict=True):
        assert sorted(row.tolist()) == sorted(x[i, :, j].flatten().tolist())
    assert axes.as_rows(torch.tensor(3.0), ()).tolist() == [[3.0]]
    assert axes.as_rows(x[:0], (1, 2, 3)).shape == (0, 60)


@pytest.mark.parametrize("dims", [(0, 1, 2, 3), (1, 2, 3), (3,), (2, 3)])
def test_dense_tensors_of_any_format_are_viewed_and_not_copied(dims):
    x = torch.randn(2, 3, 4, 5)
    layouts = [x]
    if dims in [(0, 1, 2, 3), (1, 2, 3)]:
        layouts += [x.to(memory_format=torch.channels_last), x.transpose(1, 3)]
    for y in layouts:
        assert axes.as_rows(y, dims).data_ptr() == y.data_ptr()


def test_rows_without_elements_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 0, 3\) has no elements along dim \(1,\)"):
        axes.as_rows(torch.empty(2, 0, 3), (1,))


@pytest.mark.parametrize("dims", [(0,), (2,), (0, 2), (1, 2), (0, 1, 2)])
def test_spread_scales_broadcast_plane_by_plane(dims):
    shape = (2, 3, 4)
    scales = torch.randn(*axes.kept_shape(shape, dims), 5)
    spread = axes.spread(scales, shape, dims)
    assert spread.shape == (5, *(1 if d in dims else size for d, size in enumerate(shape)))
    assert torch.equal(spread.squeeze([d + 1 for d in dims]), scales.movedim(-1, 0))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (4, 2), (2, 1, 2), (1, 2), (2, 0)])
def test_scales_that_do_not_fit_are_refused_and_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"do not fit a tensor of shape \(2, 3\) .*expected \(2, 'k'\)"):
        if shape == (2, 3):
            axes.spread(torch.ones(3, 2), (2, 3), (1,))
        axes.spread(torch.ones(shape), (2, 3), (1,))


def test_only_floating_point_tensors_have_scales():
    for dtype in [torch.float16, torch.bfloat16, torch.float32, torch.float64]:
        axes.check_float(torch.ones(2, dtype=dtype))
    with pytest.raises(TypeError, match=r"got torch\.int32; convert it, as with x\.float"):
        axes.check_float(torch.ones(2, dtype=torch.int32))
    with pytest.raises(TypeError, match=r"expected a torch\.Tensor, got ndarray; try torch\.as_tensor"):
        axes.check_float(torch.ones(2).numpy())
