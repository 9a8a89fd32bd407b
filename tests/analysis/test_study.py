"""What schemes lose, against plain formulas and the numbers that are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foldbit as fb
from foldbit.analysis import sources, study
from foldbit.core import low_rank

NAMES = ["ls-1", "ls-T", "gf-2", "ls-2"]


def tally_of(rows, names=NAMES):
    tally = study.Tally(names)
    tally.add(rows)
    return tally


def by_hand(rows, name):
    exact, values = rows.double(), fb.quantize(rows, name, 1).values().double()
    error = (exact - values).square().sum() / exact.square().sum()
    cosine = (exact * values).sum() / (exact.norm() * values.norm())
    return error.item(), math.degrees(math.acos(min(1.0, cosine.item())))


@pytest.mark.parametrize("name", [*NAMES, "gf-3", "gf-4"])
def test_error_and_angle_are_the_plain_formulas(name):
    torch.manual_seed(0)
    rows = torch.randn(7, 50) * torch.tensor([1, 2, 3, 0.1, 10, 1, 1])[:, None]
    fit = tally_of(rows, [name]).fits()[name]
    assert (fit.error, fit.angle) == pytest.approx(by_hand(rows, name), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5), n=st.integers(1, 9), seed=st.integers(0, 10**6), values=st.sampled_from([3, 1000])
)
def test_of_least_squares_the_error_is_the_squared_sine(rows, n, seed, values):
    """Ties, zeros and short rows included."""
    x = torch.randint(-values, values, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    for name, fit in tally_of(x).fits().items():
        if name != "gf-2":
            assert math.sin(math.radians(fit.angle)) ** 2 == pytest.approx(fit.error, abs=1e-6)
        assert 0 <= fit.error <= 1 + 1e-9 and 0 <= fit.angle <= 90 + 1e-6


def test_parts_add_up(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(20, 30)
    whole = tally_of(rows)
    monkeypatch.setattr(study, "CHUNK", 70)  # two rows at a time
    parts = study.Tally(NAMES)
    parts.add(rows[:13])
    parts.add(rows[13:])
    for name in NAMES:
        assert parts.fits()[name].error == pytest.approx(whole.fits()[name].error, rel=1e-12)
    assert parts.histogram() == whole.histogram()


def test_zeros_are_met_exactly_and_nothing_is_refused():
    fits = tally_of(torch.zeros(3, 4)).fits()
    assert all(fit == study.Fit(0, 0) for fit in fits.values())
    histogram = tally_of(torch.zeros(3, 4)).histogram()
    assert histogram.zeros == 1 and histogram.outside == 0
    assert tally_of(torch.zeros(0, 4)).fits()["ls-2"] == study.Fit(0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        tally_of(torch.tensor([[1.0, bad]]))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_size_does_not_matter(size, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 64).to(dtype)
    fits = tally_of(study.in_units(x)).fits()
    scaled = tally_of(study.in_units((x.double() * size).to(dtype))).fits()
    for name in NAMES:
        assert scaled[name].error == pytest.approx(
            fits[name].error, rel=0.02 if dtype.itemsize == 2 else 1e-5
        )


def test_units_are_powers_of_two():
    x = torch.tensor([3e20, -1e10, 0.0])
    unit = (x.double() / study.in_units(x).double())[0].item()
    assert math.log2(unit).is_integer() and torch.equal(study.in_units(x).double() * unit, x.double())
    assert torch.equal(study.in_units(torch.zeros(2)), torch.zeros(2))


def test_histograms_hold_all_values_all_levels_and_all_error():
    torch.manual_seed(0)
    rows = torch.cat([torch.randn(2, 5000).clamp(-3, 3), torch.zeros(2, 5000)], 1)
    tally = tally_of(rows)
    histogram, width = tally.histogram(), 2 * study.REACH / study.BINS
    assert sum(histogram.density) * width + histogram.outside == pytest.approx(1, abs=1e-3)
    assert histogram.zeros == pytest.approx(0.5, abs=1e-3)
    for name in NAMES:
        per_row = fb.quantize(rows, name, 1).error(rows).mean().item()
        share = 1 - histogram.lost_outside[name]
        assert sum(histogram.lost[name]) * width == pytest.approx(per_row * share, rel=1e-3)
    unit = rows.double().square().mean(1).sqrt()
    v1, v2 = (fb.solve(rows, "ls-2", 1).double() / unit[:, None]).unbind(1)
    expected = torch.stack([-v1 - v2, v2 - v1, v1 - v2, v1 + v2]).median(1).values
    medians = [middle for _, middle, _ in histogram.levels["ls-2"]]
    assert medians == pytest.approx(expected.tolist(), abs=0.05)
    assert medians == sorted(medians)


def test_points_are_those_of_the_paper_on_normal_values():
    """Known values: one scale .363, rows .358, rank 1 .3575, 4 .336, 8 .308; two bits .117."""
    x = sources.distribution("normal", seed=1).weights[0].load()
    fits = study.row_fits(x, ["ls-1", "ls-2"])
    found = {(p.scheme, p.scaling): p for p in study.points(x, fits)}
    known = {"tensor": 0.363, "row": 0.358, "rank-1": 0.3575, "rank-4": 0.336, "rank-8": 0.308}
    for scaling, error in known.items():
        assert found["ls-1", scaling].error == pytest.approx(error, abs=2e-3)
    assert found["ls-2", "tensor"].error == pytest.approx(0.1175, abs=1e-3)
    assert [found["ls-1", s].xnor for s in known] == [1, 1, 1, 4, 8]
    assert found["ls-2", "row"].xnor == 2 and found["ls-2", "row"].bits == 2 + 2 * 32 / 64
    assert found["ls-1", "rank-4"].bits == 1 + 32 * 4 * (3136 + 64) / (3136 * 64)


def test_points_of_a_rank_are_low_rank_scales_and_full_rank_is_the_most():
    torch.manual_seed(0)
    x = torch.randn(12, 3)
    found = {p.scaling: p for p in study.points(x, {}) if p.scheme == "ls-1"}
    for rank in (1, 3):
        scaled = low_rank.low_rank(x, "ls-1", rank)
        label = "rank-1" if rank == 1 else "rank-8"
        assert found[label].error == pytest.approx(scaled.error(x).item(), abs=1e-7)
        assert found[label].bits == pytest.approx(scaled.bits_per_value())
        assert found[label].xnor == scaled.sign_products
    assert found["rank-8"].error == pytest.approx(0, abs=1e-7)


def test_layer_inputs_are_what_the_layers_see():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3)
    )
    model.train()
    x = torch.randn(6, 3, 8, 8)
    tallies = study.layer_inputs(model, x.split(2), NAMES)
    assert list(tallies) == ["0", "3"] and model.training and model[1].num_batches_tracked == 0
    assert tallies["0"].rows == 6
    assert tallies["0"].fits()["ls-2"].error == pytest.approx(tally_of(x.flatten(1)).fits()["ls-2"].error)
    hidden = model.eval()[:3](x).flatten(1)
    assert tallies["3"].fits()["ls-1"].error == pytest.approx(tally_of(hidden).fits()["ls-1"].error, rel=1e-6)


def test_layer_inputs_of_a_quantized_network_are_clamped():
    model = fb.quantize_(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), fb.QuantConfig(clamp=1.0), skip=())
    x = torch.randn(6, 3, 8, 8)
    expected = tally_of(x.clamp(-1, 1).flatten(1)).fits()
    assert study.layer_inputs(model, [x], NAMES)["0"].fits() == expected
