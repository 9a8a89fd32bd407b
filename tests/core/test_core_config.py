"""The record of how a layer is quantized."""

import dataclasses
import json
import math

import pytest

import foldbit as fb
from foldbit.core import schemes


def test_the_default_is_one_bit_of_weight_and_two_of_activation():
    config = fb.QuantConfig()
    assert (config.weight, config.activation, config.granularity) == ("ls-1", "ls-2", "channel")
    assert (config.activation_scales, config.activation_granularity) == ("dynamic", "sample")
    assert config.name == "W1A2"


@pytest.mark.parametrize(
    ("weight", "activation", "name"),
    [
        ("ls-1", "ls-1", "W1A1"),
        ("ls-T", "ls-2", "WTA2"),
        ("gf-4", "fp", "W4A32"),
        ("fp", "ls-T", "W32AT"),
        ("gf-8", "gf-1", "W8A1"),
        ("ls-3", "ls-2", "W3A2"),
        ("alt-4", "lsf-3", "W4A3"),
        ("lsf-4", "lsf-4", "W4A4"),
    ],
)
def test_names_count_bits(weight, activation, name):
    assert fb.QuantConfig(weight=weight, activation=activation).name == name


def test_configs_are_frozen_and_compared_by_value():
    config = fb.QuantConfig(clamp=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clamp = 3.0
    assert config == fb.QuantConfig(clamp=2.0) != fb.QuantConfig()
    assert len({config, fb.QuantConfig(clamp=2.0), fb.QuantConfig()}) == 2


@pytest.mark.parametrize(
    "config",
    [
        fb.QuantConfig(),
        fb.QuantConfig("gf-3", "fp", granularity="group", group_size=16, weight_estimator="scaled"),
        fb.QuantConfig("ls-T", "ls-T", "tensor", activation_scales="static", clamp=1.5),
        fb.QuantConfig(activation_granularity="tensor", activation_estimator="polynomial", clamp=3),
        fb.QuantConfig("ls-T", granularity="input"),
        fb.QuantConfig("ls-2", granularity="rank", rank=3),
        fb.QuantConfig("fp", granularity="rank", rank=3),
    ],
)
def test_json_and_back(config):
    fields = json.loads(json.dumps(config.to_dict()))
    assert fb.QuantConfig.from_dict(fields) == config
    assert set(fields) == {field.name for field in dataclasses.fields(fb.QuantConfig)}


def test_missing_fields_take_their_defaults_and_unknown_ones_are_refused():
    assert fb.QuantConfig.from_dict({}) == fb.QuantConfig()
    assert fb.QuantConfig.from_dict({"weight": "ls-2"}) == fb.QuantConfig(weight="ls-2")
    with pytest.raises(ValueError, match="unknown fields of a QuantConfig: bits, wieght"):
        fb.QuantConfig.from_dict({"wieght": "ls-2", "bits": 1})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"weight": "ls-5"}, ValueError, "unknown scheme 'ls-5'"),
        ({"activation": "ls-3"}, ValueError, "'ls-3' is not foldable: .* use it for weights, and for activ"),
        ({"activation": "rg-2"}, ValueError, "'rg-2' is not foldable"),
        ({"activation": "2"}, ValueError, "unknown scheme '2'"),
        ({"weight": 1}, TypeError, "weight is a name; got 1"),
        ({"activation": schemes.parse("ls-2")}, TypeError, "activation is a name; got Scheme"),
        ({"weight_estimator": None}, TypeError, "weight_estimator is a name; got None"),
        ({"activation_estimator": 3}, TypeError, "activation_estimator is a name; got 3"),
        ({"granularity": "row"}, ValueError, "'tensor', 'channel', 'group', 'input', 'rank'; got 'row'"),
        ({"granularity": "sample"}, ValueError, "granularity is one of"),
        ({"activation_scales": "fixed"}, ValueError, "one of 'dynamic', 'static'; got 'fixed'"),
        ({"activation_granularity": "channel"}, ValueError, "one of 'sample', 'tensor'; got 'channel'"),
        ({"granularity": "group"}, ValueError, "group_size goes with granularity='group'"),
        ({"group_size": 4}, ValueError, "and only with it; got granularity='channel', group_size=4"),
        ({"granularity": "group", "group_size": 0}, ValueError, "at least 1; got 0"),
        ({"granularity": "group", "group_size": True}, ValueError, "at least 1; got True"),
        ({"granularity": "group", "group_size": 2.0}, ValueError, "a number of input channels"),
        ({"granularity": "rank"}, ValueError, "rank goes with granularity='rank' and only with it; .*None"),
        ({"rank": 2}, ValueError, "only with it; got granularity='channel', rank=2"),
        *(
            ({"granularity": "rank", "rank": rank}, ValueError, "rank is a whole number, at least 1; got")
            for rank in [0, -1, True, 1.0, "1"]
        ),
        ({"granularity": "rank", "rank": 1, "weight": "ls-T"}, ValueError, "ls-1, ls-2 and gf-k; got .*ls-T"),
        *(
            ({"clamp": clamp}, ValueError, "clamp is a positive, finite number or None; got")
            for clamp in [0, -1.0, math.inf, math.nan, "2", True]
        ),
    ],
)
def test_mistakes_are_told(fields, error, message):
    with pytest.raises(error, match=message):
        fb.QuantConfig(**fields)
    with pytest.raises(error, match=message):
        fb.QuantConfig.from_dict(fields)


def test_scales_that_vary_along_the_sum_cannot_be_packed_and_say_so():
    for granularity, fields in [("input", {}), ("rank", {"rank": 1})]:
        reason = fb.QuantConfig(granularity=granularity, **fields).why_not_packed
        assert f"{granularity!r}" in reason and "along the sum" in reason and "train with 'channel'" in reason
    for fields in [{}, {"granularity": "tensor"}, {"granularity": "group", "group_size": 2}]:
        assert fb.QuantConfig(**fields).why_not_packed is None
