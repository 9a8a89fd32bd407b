"""The packed layout: bits land where the specification says, and come back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldbit.kernels import layout


def signs(rng, *shape):
    return rng.random(shape) < 0.5


@given(st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_bytes_round_trip_and_spare_bits_are_zero(channels, seed):
    negative = signs(np.random.default_rng(seed), 3, 2, channels)
    packed = layout.pack_bits(negative)
    assert packed.shape == (3, 2, layout.bytes_for(channels))
    assert layout.spare_bits_are_zero(packed, channels)
    np.testing.assert_array_equal(layout.unpack_bits(packed, channels), negative)


def test_bit_c_mod_8_of_byte_c_div_8_is_channel_c():
    for c in range(20):
        packed = layout.pack_bits(np.arange(20) == c)
        assert packed[c // 8] == 1 << c % 8 and packed.sum() == 1 << c % 8


def test_spare_bits_that_are_set_are_noticed():
    assert not layout.spare_bits_are_zero(np.array([[255, 0b1000]], np.uint8), 11)
    assert layout.spare_bits_are_zero(np.array([[255, 0b0111]], np.uint8), 11)


def test_bit_c_mod_32_of_word_c_div_32_is_channel_c():
    for c in range(70):
        words = layout.bits_to_words(np.arange(70) == c)
        assert words.shape == (layout.words_for(70),) == (3,)
        assert words[c // 32] == 1 << c % 32 and np.count_nonzero(words) == 1


@pytest.mark.parametrize("groups, segments", [(1, 1), (2, 1), (1, 5), (3, 2)])
def test_kernel_layout_holds_every_weight_and_nothing_else(groups, segments):
    k, out, kh, kw, channels = 2, 18 * groups, 3, 2, 40
    negative = signs(np.random.default_rng(0), k, out, kh, kw, channels)
    words = layout.disk_to_kernel(layout.pack_bits(negative), channels, groups=groups, segments=segments)
    run = channels // segments
    assert words.shape == (k, groups, 2, segments, kh, kw, layout.words_for(run), layout.LANES)
    assert words.flags.c_contiguous and words.dtype == np.uint32
    for i, o, y, x, c in np.argwhere(negative)[::7]:
        group, channel = divmod(o, out // groups)
        word = words[i, group, channel // 16, c // run, y, x, c % run // 32, channel % 16]
        assert word >> np.uint32(c % run % 32) & 1
    assert sum(int(word).bit_count() for word in words.ravel()) == negative.sum()
