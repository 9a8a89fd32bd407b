"""The histogram search: its bounds, its certificate, and graphs that hold for any batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foldbit.core import histograms, schemes, solvers

TWO, TERNARY = schemes.parse("ls-2"), schemes.parse("ls-T")


def errors(x, scales):
    magnitudes = x.double().abs()
    v1, v2 = scales[:, :1], scales[:, 1:]
    return (magnitudes - torch.where(magnitudes >= v1, v1 + v2, v1 - v2)).square().sum(1)


def check(x, scheme, tolerance):
    scales, excess = histograms.solve_rows(x, scheme)
    least, _ = solvers._by_sorting(x, scheme)
    energy = x.double().square().sum(1)
    missed = errors(x, scales) - errors(x, least)
    assert (missed <= (excess + 1e-13) * energy).all()
    assert (excess >= 0).all() and (excess <= tolerance).all()
    return excess


@pytest.mark.parametrize("scheme", [TWO, TERNARY], ids=str)
@given(
    x=hnp.arrays(
        "float64",
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=60),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-20]),
    )
)
@settings(max_examples=60, deadline=None)
def test_any_values(scheme, x):
    check(torch.from_numpy(x), scheme, 1e-6)


@pytest.mark.parametrize("scheme", [TWO, TERNARY], ids=str)
@pytest.mark.parametrize(
    ("opened", "refinements", "tolerance"), [(8, 2, 1e-12), (1, 2, 0.1), (1, 1, 0.1), (2, 0, 0.1)]
)
def test_the_certificate_accounts_for_what_is_not_opened(opened, refinements, tolerance, scheme, monkeypatch):
    """Plateaus of the gain and coarse bins: fewer openings leave splits unseen, and the bound must say so."""
    monkeypatch.setattr(histograms, "_OPENED", opened)
    monkeypatch.setattr(histograms, "_REFINEMENTS", refinements)
    monkeypatch.setattr(histograms, "_FIRST_BITS", 4)
    monkeypatch.setattr(histograms, "_REFINED_BITS", 12 if tolerance < 1e-6 else 4)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20, 500, generator=generator, dtype=torch.float64)
    heavy = torch.rand(20, 500, generator=generator, dtype=torch.float64) ** -0.5
    clusters = torch.randint(1, 9, (20, 500), generator=generator) + 0.01 * normal
    excess = torch.cat([check(x, scheme, tolerance) for x in (normal, heavy, clusters)])
    if tolerance > 1e-6:  # bounds, and no constant
        assert excess.max() > 1e-9 and excess.unique().numel() > 10


def test_promises_bound_every_split_inside_a_bin():
    """Bins by hand: all splits of the sorted row, against the best edge or the promise of their bin."""
    generator = torch.Generator().manual_seed(1)
    for scheme in (TWO, TERNARY):
        for _ in range(30):
            x = torch.rand(1, 40, generator=generator, dtype=torch.float64).square().sort(1).values
            edges = torch.tensor([[0.0, 0.05, 0.2, 0.6, 1.0]], dtype=torch.float64)
            mean = x.mean(1, keepdim=True)
            objective = histograms.Objective(scheme, 40, mean)
            index = torch.searchsorted(edges, x, right=True) - 1
            counts, sums = histograms._count_and_add(index, x - mean, 4)
            above = histograms._above(counts, sums)
            bins = histograms.Bins(counts, sums, *above, edges[:, :-1] - mean, edges[:, 1:] - mean)
            best, promised = bins.best_edge(objective).gain, bins.promises(objective)
            for high in range(1, 40):
                gain = objective.gain(
                    torch.tensor([[float(high)]], dtype=torch.float64),
                    (x - mean)[:, -high:].sum(1, keepdim=True),
                )
                below, first = index[0, 39 - high], index[0, 40 - high]
                limit = best if below != first else torch.maximum(best, promised[:, first])
                assert gain <= limit + 1e-12


class Solve(torch.nn.Module):
    def forward(self, x):
        return histograms.solve_rows(x.flatten(1), TWO)


def batch(n):
    return torch.randn(n, 3, 250, generator=torch.Generator().manual_seed(n))


def test_one_exported_graph_serves_any_batch_and_looks_at_no_value():
    exported = torch.export.export(Solve(), (batch(4),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    targets = {str(node.target) for module in exported.graph_module.modules() for node in module.graph.nodes}
    assert any("scatter_add" in t for t in targets)
    assert not {t for t in targets if any(looks in t for looks in (".item", "local_scalar", "nonzero"))}
    for n in [4, 1, 7]:
        for got, expected in zip(exported.module()(batch(n)), Solve()(batch(n)), strict=True):
            torch.testing.assert_close(got, expected)


def test_compiled_for_any_batch():
    torch.compiler.reset()
    compiled = torch.compile(Solve(), backend="eager", fullgraph=True, dynamic=True)
    for n in [4, 1, 7]:
        for got, expected in zip(compiled(batch(n)), Solve()(batch(n)), strict=True):
            torch.testing.assert_close(got, expected)
