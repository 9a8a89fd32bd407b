"""Schemes: spelling, parsing, planes."""

import dataclasses

import pytest

import foldbit as fb
from foldbit.core import schemes


def test_names_and_planes():
    planes = {name: schemes.parse(name).planes for name in schemes.names()}
    assert planes == {
        **{"fp": 0, "ls-1": 1, "ls-2": 2, "ls-T": 2, "ls-3": 3, "ls-4": 4, "lsf-3": 3, "lsf-4": 4},
        **{f"gf-{k}": k for k in range(1, 9)},
        **{f"{kind}-{k}": k for kind in ("alt", "rg") for k in (2, 3, 4)},
    }
    assert [name for name in schemes.names() if schemes.parse(name).is_float] == ["fp"]


def test_peeled_schemes_are_foldable_and_the_others_are_not():
    not_foldable = {name for name in schemes.names() if not schemes.parse(name).foldable}
    assert not_foldable == {"ls-3", "ls-4", *(f"{kind}-{k}" for kind in ("alt", "rg") for k in (2, 3, 4))}


@pytest.mark.parametrize("name", schemes.names())
def test_parsing_is_the_inverse_of_spelling(name):
    scheme = schemes.parse(name)
    assert isinstance(scheme, fb.Scheme) and str(scheme) == scheme.name == name
    assert schemes.parse(scheme) is scheme
    assert scheme == schemes.parse(name) and hash(scheme) == hash(schemes.parse(name))


def test_schemes_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schemes.parse("ls-1").planes = 2


@pytest.mark.parametrize(
    "name", ["ls-5", "lsf-2", "alt-1", "LS-2", "ls-t", "gf-0", "gf-9", "gf-", "ls2", " ls-2", "", "float"]
)
def test_unknown_names_are_told_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"unknown scheme '{name}'; known are fp, ls-1, ls-2, ls-T, gf-1"):
        schemes.parse(name)


@pytest.mark.parametrize("scheme", [None, 2, b"ls-2", ["ls-2"]])
def test_only_names_and_schemes_are_parsed(scheme):
    with pytest.raises(TypeError, match=f"a scheme is a name such as 'ls-2', got {type(scheme).__name__}"):
        schemes.parse(scheme)
