"""Thresholds against folding the function's own values, up to the last float."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foldbit.core import folding
from foldbit.kernels import layout, reference
from foldbit.packed import thresholds

CHANNELS = 7


def norm(seed):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(CHANNELS).eval()
    norm.running_mean.normal_()
    norm.running_var.exponential_()
    nn.init.normal_(norm.weight)  # of both signs
    nn.init.normal_(norm.bias)
    return norm


def degenerate(seed):
    degenerate = norm(seed)
    nn.init.zeros_(degenerate.weight)
    degenerate.weight.data[0] = 1e-30
    degenerate.weight.data[1] = -1e30
    return degenerate


FUNCTIONS = {
    "nothing": lambda seed: nn.Identity(),
    "batch norm": norm,
    "degenerate batch norm": degenerate,
    "batch norm, clamp": lambda seed: nn.Sequential(norm(seed), nn.Hardtanh(-0.7, 0.7)),
    "clamp": lambda seed: nn.Hardtanh(-1.5, 1.5),
    "ReLU, batch norm": lambda seed: nn.Sequential(nn.ReLU(), norm(seed)),
    "batch norm, ReLU6": lambda seed: nn.Sequential(norm(seed), nn.ReLU6()),
    "two batch norms": lambda seed: nn.Sequential(norm(seed), nn.LeakyReLU(0.1), norm(seed + 1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.floats(0, 3, width=32), min_size=1, max_size=4), st.booleans())
def test_comparisons_fold_as_scales_do(name, seed, scales, ordered):
    module = FUNCTIONS[name](seed)
    scales = torch.tensor(sorted(scales, reverse=True) if ordered else scales)  # greedy scales can grow

    @torch.no_grad()
    def function(x):
        return module(x[:, :, None, None])[:, :, 0, 0]

    tree, flips = thresholds.find(function, scales, CHANNELS)
    assert tree.shape == (2 ** len(scales) - 1, CHANNELS)
    finite = tree[tree.isfinite()]
    nasty = torch.cat([finite, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0])])
    x = torch.cat([torch.randn(500), nasty, nasty.nextafter(torch.tensor(torch.inf)).clamp(max=3.4e38)])
    x = torch.cat([x, nasty.nextafter(torch.tensor(-torch.inf)).clamp(min=-3.4e38)])
    x = x[:, None].expand(-1, CHANNELS).contiguous()
    expected = torch.stack([negative for negative, _ in folding.walk(function(x), scales[:, None, None])])
    words = reference.pack_activation(
        x.numpy()[:, :, None, None],
        np.zeros((len(x), len(scales)), np.float32),
        thresholds=thresholds.lay_out(tree, flips, 1)[0].numpy(),
        flips=thresholds.lay_out(tree, flips, 1)[1].numpy().view(np.uint32),
    )  # [k, n, 1, 1, 1, 1]
    bits = words[:, :, 0, 0, 0, 0, None] >> np.arange(CHANNELS, dtype=np.uint32) & 1
    np.testing.assert_array_equal(bits == 1, expected.numpy())


@pytest.mark.parametrize("channels, runs", [(6, 1), (66, 2), (96, 3)])
def test_the_kernels_layout(channels, runs):
    tree = torch.arange(3 * channels).reshape(3, channels).float()
    flips = torch.arange(channels) % 3 == 0
    laid_out, words = thresholds.lay_out(tree, flips, runs)
    per_run = channels // runs
    assert laid_out.shape == (3, runs, 32 * layout.words_for(per_run)) and laid_out.is_contiguous()
    for c in range(channels):
        run, place = divmod(c, per_run)
        assert laid_out[:, run, place].tolist() == tree[:, c].tolist()
        assert (int(words[run, place // 32]) >> place % 32 & 1) == int(flips[c])
