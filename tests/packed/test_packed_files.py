"""Packed files: they come back as they went, they are written whole, and no file can do harm."""

import copy
import errno
import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import foldbit as fb
from foldbit.nn.layers import QuantConv2d
from foldbit.packed import files
from foldbit.packed.layers import PackedLayer

SIZE = (2, 1, 12, 12)


def float_model():
    torch.manual_seed(0)
    model = fb.models.create("resnet8-xnor", widths=[12, 16, 20], in_channels=1, num_classes=3)
    model(torch.randn(4, *SIZE[1:]))  # running statistics that are not their defaults
    return model.eval()


CONFIG = fb.QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=2)


def quantized_model():
    model = fb.quantize_(float_model(), CONFIG, overrides=fb.models.float_layers(float_model())).train()
    model(torch.randn(4, *SIZE[1:]))
    return model.eval()


def packed_model():
    return fb.pack_(quantized_model())


class Bytes(bytes):
    def __repr__(self):  # short, for failures print it
        return f"{len(self)} bytes"


@pytest.fixture(scope="module")
def good():
    """A good file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        fb.save_packed(packed_model(), Path(folder) / "model.safetensors")
        return Bytes((Path(folder) / "model.safetensors").read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def parts(data):
    """Description and tensors of a file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return json.loads(header["__metadata__"]["foldbit"]), safetensors.torch.load(data)


def write(path, description, tensors):
    """A file of that description: plain values, or the text itself."""
    text = description if isinstance(description, str) else json.dumps(description)
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in tensors.items()}, path, {"foldbit": text}
    )
    return path


def fingerprint(model):
    """All that a refused file must leave as it was."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return modules, tensors


def assert_unchanged(model, before):
    modules, tensors = fingerprint(model)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    for name, (identity, t) in tensors.items():
        assert identity == before[1][name][0]
        assert torch.equal(t, before[1][name][1])


# --- round trips


@pytest.mark.parametrize("make", [None, float_model, quantized_model, packed_model])
def test_a_model_comes_back_bit_for_bit(make, tmp_path):
    model, x = packed_model(), torch.randn(SIZE)
    fb.save_packed(model, tmp_path / "model.safetensors")
    if make is None:
        loaded = fb.load_packed(tmp_path / "model.safetensors")
        assert fb.models.architecture_of(loaded) == fb.models.architecture_of(model)
    else:
        given_model = make().train()
        for t in given_model.state_dict().values():
            t.zero_()
        loaded = fb.load_packed(str(tmp_path / "model.safetensors"), given_model)
        assert loaded is given_model
    assert not any(m.training for m in loaded.modules())
    assert torch.equal(loaded(x), model(x))
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, t in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t)
    fb.save_packed(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        fb.QuantConfig("ls-1", "fp"),
        fb.QuantConfig("gf-8", "gf-8"),
        fb.QuantConfig("ls-T", "ls-T", granularity="tensor", activation_granularity="tensor"),
        fb.QuantConfig("ls-2", "ls-1", granularity="group", group_size=3, clamp=0.5),
        fb.QuantConfig("ls-1", "ls-2", activation_scales="static"),
        fb.QuantConfig("ls-3", "lsf-3"),
        fb.QuantConfig("ls-4", "ls-2", granularity="group", group_size=3),
        fb.QuantConfig("rg-2", "fp", granularity="tensor"),
    ],
    ids=lambda config: config.name,
)
def test_every_kind_of_layer_and_config_comes_back(config, tmp_path):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(6, 12, (2, 4), stride=(1, 2), padding="valid", groups=2),
            nn.Conv2d(12, 9, 3, padding=1, padding_mode="reflect", bias=False),
            nn.Flatten(2),
            nn.Conv1d(9, 6, 4, padding=2, dilation=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(6),
            nn.Linear(6, 3),
        )

    model, x = fb.quantize_(make(), config, skip=()), torch.randn(2, 6, 7, 12)
    model(x)
    fb.pack_(model)
    fb.save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(fb.load_packed(tmp_path / "model.safetensors", make())(x), model(x))


class Nested(nn.Module):
    """A block in two places under two names, a layer in two places, and blocks in blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.body = nn.ModuleDict({"a": block, "b": nn.Sequential(block, nn.Conv2d(8, 8, 1))})
        self.again = self.body["b"][1]
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.again(self.body["b"](self.body["a"](self.stem(x))))
        return self.head(x.mean((2, 3)))


def test_a_layer_in_several_places_comes_back_in_all_of_them(tmp_path):
    model, x = fb.quantize_(Nested()), torch.randn(2, 2, 5, 5)
    y = model.eval()(x)
    fb.pack_(model)
    assert model.again is model.body["b"][1]
    assert model.body["a"] is model.body["b"][0]
    torch.testing.assert_close(model(x), y, atol=1e-3, rtol=0)
    fb.save_packed(model, tmp_path / "model.safetensors")
    for other in (Nested(), fb.quantize_(Nested()), copy.deepcopy(model)):
        loaded = fb.load_packed(tmp_path / "model.safetensors", other)
        assert isinstance(loaded.again, PackedLayer)
        assert loaded.again is loaded.body["b"][1]
        assert torch.equal(loaded(x), model(x))


def test_a_model_in_half_precision_comes_back_into_one(tmp_path):
    model = packed_model().half()
    fb.save_packed(model, tmp_path / "model.safetensors")
    x = torch.randn(SIZE).half()
    assert torch.equal(fb.load_packed(tmp_path / "model.safetensors", float_model().half())(x), model(x))
    with pytest.raises(fb.MismatchedModel, match="float16"):
        fb.load_packed(tmp_path / "model.safetensors")


# --- the file


def test_the_file_is_what_its_documentation_says(good):
    description, tensors = parts(good)
    assert set(description) == {"version", "architecture", "layers"}
    assert description["version"] == 1
    assert description["architecture"]["name"] == "resnet8-xnor"
    names = [name for name, m in packed_model().named_modules() if isinstance(m, PackedLayer)]
    assert list(description["layers"]) == names
    assert set(tensors) == set(packed_model().state_dict())
    for name in names:
        assert {key.rpartition(".")[2] for key in tensors if key.startswith(f"{name}.")} == {
            "planes", "scales", "bias", "activation_scales",
        }  # fmt: skip
        assert tensors[f"{name}.planes"].dtype == torch.uint8
        assert tensors[f"{name}.scales"].dtype == torch.float32


def test_saving_is_deterministic_and_readable_by_others(tmp_path, good):
    fb.save_packed(packed_model(), tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_saving_is_all_or_nothing(function, error, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    fb.save_packed(packed_model(), path)
    before = path.read_bytes()
    other = packed_model()
    other.classifier.weight.data.zero_()

    def fail(*_arguments, **_more):
        raise error

    monkeypatch.setattr(os, function, fail)
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(type(error)):
            fb.save_packed(other, target)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    fb.save_packed(other, path)
    assert path.read_bytes() != before


def test_what_cannot_be_saved_is_refused_before_a_file_is_touched(tmp_path):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            pass

    extra = fb.pack_(fb.quantize_(Extra(nn.Linear(8, 8)), skip=()))
    for model, error, message in [
        (float_model(), ValueError, "no packed layers"),
        (quantized_model(), ValueError, r"not packed yet: stages\.0.*pack_"),
        (packed_model().stages[0][0].conv1, TypeError, "wrap this PackedConv2d in nn.Sequential"),
        (extra, ValueError, "tensors only.*_extra_state"),
    ]:
        with pytest.raises(error, match=message):
            fb.save_packed(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []
    fb.save_packed(packed_model(), tmp_path / "model.safetensors")
    with pytest.raises(fb.MismatchedModel, match=r"tensors only.*_extra_state"):
        fb.load_packed(tmp_path / "model.safetensors", Extra(nn.Linear(8, 8)))


# --- hostile files: each is refused with a typed error, and the model stays as it was


def refused(path, error, match=None, models=(None, float_model, quantized_model, packed_model)):
    for make in models:
        model = make and make().train()
        before = model and fingerprint(model)
        with pytest.raises(error, match=match) as caught:
            fb.load_packed(path, model) if model else fb.load_packed(path)
        assert len(str(caught.value)) < 3000
        if model:
            assert_unchanged(model, before)


def test_files_of_other_kinds(tmp_path, good):
    path = tmp_path / "model.safetensors"
    refused(path, FileNotFoundError, "no packed file at")
    refused(tmp_path, FileNotFoundError, "no packed file at")
    (length,) = struct.unpack("<Q", good[:8])
    for data in [
        b"",
        b"\0",
        bytes(8),
        bytes(1000),
        b"PK\x03\x04" + good[4:],  # a zip, as torch.save writes
        b"\x80\x02" + good[2:],  # a pickle
        struct.pack("<Q", 2**64 - 1) + good[8:],
        struct.pack("<Q", length + 1) + good[8:],
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", length) + b"\xff" * length + good[8 + length :],
    ]:
        path.write_bytes(data)
        refused(path, fb.NotPackedFile, "not a readable safetensors file", models=(None, float_model))
    safetensors.torch.save_file(float_model().state_dict(), path)
    refused(path, fb.NotPackedFile, "lacks the entry 'foldbit'")
    safetensors.torch.save_file(float_model().state_dict(), path, {"format": "pt"})
    refused(path, fb.NotPackedFile, "lacks the entry 'foldbit'")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_truncated_files(folder, good, data):
    (length,) = struct.unpack("<Q", good[:8])
    places = st.integers(0, len(good) - 1) | st.integers(0, length + 20) | st.integers(0, 10)
    path = folder / "truncated.safetensors"
    path.write_bytes(good[: data.draw(places)])
    refused(path, fb.NotPackedFile, models=(None,))
    path.write_bytes(good + b"\0")
    refused(path, fb.NotPackedFile, models=(None,))


FLOAT, PACKED = float_model(), packed_model()


def loads_or_is_refused(path):
    """Either way is fine, as long as a refusal is typed and changes nothing, and a model works."""
    for model in (None, copy.deepcopy(FLOAT)):
        before = model and fingerprint(model)
        try:
            loaded = fb.load_packed(path, model) if model else fb.load_packed(path)
        except fb.PackedFileError as error:
            str(error)
            if model:
                assert_unchanged(model, before)
        else:
            assert loaded(torch.ones(SIZE)).shape == (2, 3)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_random_damage(folder, good, data):
    (length,) = struct.unpack("<Q", good[:8])
    damaged = bytearray(good)
    places = st.integers(8, 8 + length - 1) | st.integers(0, len(good) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = data.draw(st.sampled_from(b'0123456789"{}[],:-.etfn\\') | st.integers(0, 255))
    path = folder / "damaged.safetensors"
    path.write_bytes(damaged)
    loads_or_is_refused(path)


HOSTILE = [
    None, True, False, 0, 1, -1, 3, 1.0, 0.5, 1e308, float("nan"), float("inf"), 2**24, 2**24 + 1, 2**63,
    10**400, -(10**400), "", "x", "fp", "ls-1", "\ud800", "x" * 10_000, [], [1], [1, 1], [[1, 1]], [1, -1],
    [True, 1], [2**24] * 4, {}, {"a": 1},
]  # fmt: skip


def paths_into(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from paths_into(child, (*path, key))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_descriptions_with_other_values(folder, good, data):
    description, tensors = parts(good)
    path = data.draw(st.sampled_from(list(paths_into(description))))
    value = data.draw(st.sampled_from(HOSTILE))
    if path:
        inner = description
        for key in path[:-1]:
            inner = inner[key]
        if data.draw(st.integers(0, 4)) or isinstance(inner, list):
            inner[path[-1]] = value
        elif data.draw(st.booleans()):
            del inner[path[-1]]
        else:
            inner[data.draw(st.sampled_from(["", "x", "name", "self", "\ud800"]))] = value
    else:
        description = value
    loads_or_is_refused(write(folder / "other.safetensors", json.dumps(description), tensors))


@pytest.mark.parametrize("depth", [10, 100, 500, 900, 940, 980, 1000, 100_000])
@pytest.mark.parametrize("place", ["version", "architecture", "kwargs", "layers", "kind", "config", "all"])
def test_deeply_nested_descriptions(place, depth, good, tmp_path):
    description, tensors = parts(good)
    layer = description["layers"]["stages.0.0.conv1"]
    if place == "kwargs":
        description["architecture"]["kwargs"]["widths"] = "@"
    elif place in ("kind", "config"):
        layer[place] = "@"
    else:
        description[place] = "@"
    text = '"@"' if place == "all" else json.dumps(description)
    text = text.replace('"@"', "[" * depth + "]" * depth)
    refused(write(tmp_path / "model.safetensors", text, tensors), fb.PackedFileError, models=(None,))


@pytest.mark.parametrize("text", ["", "{", "nonsense", "{'version': 1}", '{"version": 1', "[1, 2", "NaN,"])
def test_descriptions_that_are_not_json(text, good, tmp_path):
    path = write(tmp_path / "model.safetensors", text, parts(good)[1])
    refused(path, fb.CorruptPackedFile, "not JSON", models=(None, float_model))


@pytest.mark.parametrize("text", ["null", "1", '"version"', "[]", "[1]", "{}", '{"layers": {}}'])
def test_descriptions_that_are_no_descriptions(text, good, tmp_path):
    path = write(tmp_path / "model.safetensors", text, parts(good)[1])
    refused(path, fb.CorruptPackedFile, "not an object with a version", models=(None, float_model))


@pytest.mark.parametrize("version", [0, 2, -1, 10**30, "1", 1.0, True, None, [1], {"1": 1}, "9" * 10_000])
def test_other_versions(version, good, tmp_path):
    description, tensors = parts(good)
    path = write(tmp_path / "model.safetensors", description | {"version": version}, tensors)
    refused(path, fb.UnsupportedVersion, "reads version 1")


LAYER = "stages.1.0.conv1"  # 12 -> 16 channels, 3x3: 2 bytes a tap, with 4 spare bits


def entry(**changes):
    def change(description, tensors):
        description.update(changes)

    return change


def layer(**changes):
    def change(description, tensors):
        description["layers"][LAYER].update(changes)

    return change


def config(**changes):
    def change(description, tensors):
        description["layers"][LAYER]["config"].update(changes)

    return change


def tensor(name, make):
    def change(description, tensors):
        tensors[f"{LAYER}.{name}"] = make(tensors[f"{LAYER}.{name}"])

    return change


def without(*path):
    def change(description, tensors):
        inner = description
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]

    return change


def filled(value):
    def make(t):
        t = t.clone()
        t.flatten()[-1] = value
        return t

    return make


def float_tensor(name, value):
    """A value of a layer that is not packed."""

    def change(description, tensors):
        key = next(k for k in tensors if k.endswith(name) and not k.startswith(LAYER))
        tensors[key] = filled(value)(tensors[key])

    return change


def no_tensor(name):
    def change(description, tensors):
        del tensors[f"{LAYER}.{name}"]

    return change


CORRUPT = {
    "an entry too many": (entry(more=1), "entries architecture, layers, more, version"),
    "no layers": (without("layers"), "entries architecture, version"),
    "no architecture": (without("architecture"), "entries layers, version"),
    "layers are a list": (entry(layers=[]), "layers is a mapping"),
    "layers are null": (entry(layers=None), "layers is a mapping"),
    "a layer is a list": (entry(layers={LAYER: []}), "a layer has the fields"),
    "a layer is null": (entry(layers={LAYER: None}), "a layer has the fields"),
    "a layer lacks a field": (without("layers", LAYER, "stride"), "a layer has the fields"),
    "a layer has one too many": (layer(more=1), "a layer has the fields"),
    "architecture is a list": (entry(architecture=[]), "architecture is null or an object"),
    "architecture is a name": (entry(architecture="lenet5"), "architecture is null or an object"),
    "architecture lacks kwargs": (without("architecture", "kwargs"), "architecture is null or an object"),
    "architecture has more": (entry(architecture={"name": "", "kwargs": {}, "": 1}), "architecture is null"),
    "its name is a number": (entry(architecture={"name": 1, "kwargs": {}}), "architecture is null"),
    "its kwargs are a list": (entry(architecture={"name": "lenet5", "kwargs": []}), "architecture is null"),
    "unknown kind": (layer(kind="conv3d"), "kind is one of"),
    "kind is a list": (layer(kind=["conv2d"]), "kind is one of"),
    "unknown padding mode": (layer(padding_mode="mirror"), "padding_mode is one of"),
    "bias is a word": (layer(bias="yes"), "bias is one of"),
    "bias is a number": (layer(bias=1), "bias is one of"),
    "zero channels": (layer(in_channels=0), "in_channels is 1 whole number"),
    "negative channels": (layer(out_channels=-16), "out_channels is 1 whole number"),
    "channels are a boolean": (layer(in_channels=True), "in_channels is 1 whole number"),
    "channels are a float": (layer(in_channels=12.0), "in_channels is 1 whole number"),
    "channels are text": (layer(in_channels="12"), "in_channels is 1 whole number"),
    "absurd channels": (layer(out_channels=2**24 + 1), "out_channels is 1 whole number"),
    "absurd but legal channels": (layer(out_channels=2**24, in_channels=2**24), "its layer asks for uint8"),
    "channels without end": (layer(out_channels=10**400), "out_channels is 1 whole number"),
    "zero groups": (layer(groups=0), "groups is 1 whole number"),
    "groups that do not divide": (layer(groups=5), "groups 5 does not divide"),
    "kernel of one number": (layer(kernel_size=[3]), "kernel_size is 2 whole number"),
    "kernel is a number": (layer(kernel_size=3), "kernel_size is 2 whole number"),
    "kernel of zeros": (layer(kernel_size=[0, 3]), "kernel_size is 2 whole number"),
    "absurd kernel": (layer(kernel_size=[2**24, 2**24]), "its layer asks for uint8"),
    "another kernel": (layer(kernel_size=[3, 4]), "its layer asks for uint8"),
    "zero stride": (layer(stride=[1, 0]), "stride is 2 whole number"),
    "float stride": (layer(stride=[1.0, 1]), "stride is 2 whole number"),
    "boolean dilation": (layer(dilation=[True, 1]), "dilation is 2 whole number"),
    "huge padding": (layer(padding=[0, 0, 0, 2**40]), "padding is 4 whole number"),
    "negative padding": (layer(padding=[-1, 0, 0, 0]), "padding is 4 whole number"),
    "padding of two numbers": (layer(padding=[1, 1]), "padding is 4 whole number"),
    "config is a list": (layer(config=[]), "config is a mapping"),
    "unknown weight scheme": (config(weight="ls-9"), "unknown scheme"),
    "weight scheme is a list": (config(weight=["ls-1"]), "weight is a name"),
    "float weight": (config(weight="fp"), "quantized weight"),
    "more planes than there are": (config(weight="gf-8"), "its layer asks for uint8"),
    "nine planes": (config(weight="gf-9"), "unknown scheme"),
    "other input planes": (config(activation="gf-3"), r"its layer asks for float32 \[3\]"),
    "a group size without groups": (config(group_size=4), "group_size goes with"),
    "group size that does not divide": (config(granularity="group", group_size=5), "does not divide 12"),
    "absurd group size": (config(granularity="group", group_size=10**400), "does not divide 12"),
    "group size is a boolean": (config(granularity="group", group_size=True), "group_size is a number"),
    "groups of weights": (config(granularity="group", group_size=4), r"asks for float32 \[1, 16, 3\]"),
    "NaN clamp": (config(clamp=float("nan")), "clamp is a positive"),
    "clamp without end": (config(clamp=10**400), "clamp is a positive|too large"),
    "negative clamp": (config(clamp=-1), "clamp is a positive"),
    "clamp is text": (config(clamp="1"), "clamp is a positive"),
    "unknown field": (config(more=1), "unknown fields"),
    "planes missing": (no_tensor("planes"), "planes' is missing"),
    "scales missing": (no_tensor("scales"), "scales' is missing"),
    "bias missing": (no_tensor("bias"), "bias' is missing"),
    "static scales missing": (no_tensor("activation_scales"), "activation_scales' is missing"),
    "planes of another shape": (tensor("planes", lambda t: t[:, :-1]), r"\[1, 15, 3, 3, 2\], its layer"),
    "planes of another rank": (tensor("planes", lambda t: t[0]), r"uint8 \[16, 3, 3, 2\], its layer"),
    "empty planes": (tensor("planes", lambda t: t[:0]), r"uint8 \[0, 16, 3, 3, 2\], its layer"),
    "signed planes": (tensor("planes", lambda t: t.to(torch.int8)), r"int8 \[1, 16, 3, 3, 2\], its layer"),
    "spare bits": (tensor("planes", filled(0b10000)), "bits set past channel 12"),
    "half scales": (tensor("scales", lambda t: t.half()), r"float16 \[1, 16\], its layer"),
    "NaN scale": (tensor("scales", filled(torch.nan)), "scales holds NaN or infinity"),
    "infinite scale": (tensor("scales", filled(torch.inf)), "scales holds NaN or infinity"),
    "negative scale": (tensor("scales", filled(-1e-30)), "scales holds a negative scale"),
    "NaN bias": (tensor("bias", filled(torch.nan)), "bias holds NaN"),
    "NaN input scale": (tensor("activation_scales", filled(torch.nan)), "activation_scales holds NaN"),
    "NaN in a float layer": (float_tensor("weight", torch.nan), "weight holds NaN"),
    "negative variance": (float_tensor("running_var", -1), "running_var holds a negative variance"),
    "negative input scale": (tensor("activation_scales", filled(-1)), "activation_scales holds a negative"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_files(name, good, tmp_path):
    change, message = CORRUPT[name]
    description, tensors = parts(good)
    change(description, tensors)
    path = write(tmp_path / "model.safetensors", description, tensors)
    refused(path, fb.CorruptPackedFile, message, models=(None, float_model))


def renamed(new):
    """A sound layer under a name that the model lacks."""

    def change(description, tensors):
        description["layers"][new] = description["layers"].pop(LAYER)
        for key in [key for key in tensors if key.startswith(f"{LAYER}.")]:
            tensors[new + key.removeprefix(LAYER) if new else key.rpartition(".")[2]] = tensors.pop(key)

    return change


def dropped(description, tensors):
    del description["layers"][LAYER]


def duplicated(name):
    """The same layer once more, for a module of another kind."""

    def change(description, tensors):
        description["layers"][name] = description["layers"][LAYER]
        for key in [key for key in tensors if key.startswith(f"{LAYER}.")]:
            tensors[name + key.removeprefix(LAYER)] = tensors[key].clone()

    return change


def more_tensors(description, tensors):
    tensors["more"] = torch.zeros(3)


def fewer_tensors(description, tensors):
    del tensors["classifier.weight"]


def other_dtype(description, tensors):
    tensors["classifier.weight"] = tensors["classifier.weight"].double()


def other_shape(description, tensors):
    tensors["classifier.weight"] = tensors["classifier.weight"][:, :-1]


MISMATCHED = {
    "another stride": (layer(stride=[1, 1]), r"'stages\.1\.0\.conv1' has stride \(1, 1\), not \(2, 2\) as"),
    "another padding": (layer(padding=[0, 2, 1, 1]), r"has padding \(0, 2, 1, 1\), not \(1, 1, 1, 1\) as"),
    "absurd padding": (layer(padding=[2**24] * 4), "has padding"),
    "another padding mode": (layer(padding_mode="circular"), "has padding_mode circular, not zeros as"),
    "a layer of another kind": (layer(kind="conv1d"), "has kind conv1d, not conv2d as"),
    "nameless": (renamed(""), "packed layer '', the model has no such layer"),
    "dots": (renamed(".."), r"packed layer '\.\.', the model has no such layer"),
    "a path": (renamed("../../etc"), "no such layer"),
    "deeper": (renamed(f"{LAYER}.conv"), "no such layer"),
    "shorter": (renamed("stages.1.0"), "in the model it is XnorBlock"),
    "numbers": (renamed("stages.7.0.conv1"), "no such layer"),
    "an attribute": (renamed("__class__"), "no such layer"),
    "a method": (renamed("forward"), "no such layer"),
    "a normalisation": (duplicated("stages.1.0.bn1"), "in the model it is BatchNorm2d"),
    "a tensor too many": (more_tensors, "tensors the model lacks: more"),
    "a tensor too few": (fewer_tensors, r"tensors missing from the file: classifier\.weight"),
    "another dtype": (other_dtype, r"classifier\.weight is float64 .*the model expects float32"),
    "another shape": (other_shape, r"classifier\.weight is float32 \[3, 19\], the model expects .*\[3, 20\]"),
    "a layer that is not said to be packed": (dropped, "does not belong to this model|has no packed layer"),
}


@pytest.mark.parametrize("name", MISMATCHED)
def test_sound_files_of_other_models(name, good, tmp_path):
    change, message = MISMATCHED[name]
    description, tensors = parts(good)
    change(description, tensors)
    path = write(tmp_path / "model.safetensors", description, tensors)
    refused(path, fb.MismatchedModel, message)


@pytest.mark.parametrize(
    "architecture, message",
    [
        (None, r"does not say which network .* load_packed\(path, model\)"),
        ({"name": "", "kwargs": {}}, "unknown model ''"),
        ({"name": "os.system", "kwargs": {"command": "true"}}, r"unknown model 'os\.system'"),
        ({"name": "lenet5", "kwargs": {}}, "lenet5|no such layer"),
        ({"name": "resnet8-xnor", "kwargs": {}}, "has in_channels 12, not 32; out_channels"),
        ({"name": "resnet8-xnor", "kwargs": {"name": "lenet5"}}, "unexpected keyword argument 'name'"),
        ({"name": "resnet8-xnor", "kwargs": {"self": 1}}, "unexpected keyword argument 'self'"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [2**14] * 3}}, "has in_channels 12, not"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [2**14 + 1] * 3}}, "widths: expected whole numbers"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [10**400] * 3}}, "widths: expected whole numbers"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [True, 16, 20]}}, "widths: expected whole numbers"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [12.0, 16, 20]}}, "widths: expected whole numbers"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [12, 16]}}, "one width a stage"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": [1] * 10_000}}, "widths: expected a short sequence"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": "12"}}, "widths: expected a short sequence"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": None}}, "widths: expected a short sequence"),
        ({"name": "resnet8-xnor", "kwargs": {"widths": {"a": 1}}}, "widths: expected a short sequence"),
        ({"name": "resnet8-xnor", "kwargs": {"num_classes": -3}}, "expected whole numbers"),
        ({"name": "resnet8-xnor", "kwargs": {"nonlinearity": ["relu"]}}, "nonlinearity is"),
        ({"name": "lenet5", "kwargs": {"num_classes": 10**400}}, "num_classes is a whole number"),
    ],
)
def test_hostile_architectures(architecture, message, good, tmp_path):
    description, tensors = parts(good)
    path = write(tmp_path / "model.safetensors", description | {"architecture": architecture}, tensors)
    refused(path, fb.MismatchedModel, message, models=(None,))
    # With a model of one's own, what the file says of its architecture does not matter.
    assert fb.load_packed(path, float_model())(torch.ones(SIZE)).shape == (2, 3)


def test_builders_of_the_users_own_may_raise_what_they_like(good, tmp_path, monkeypatch):
    def careless(width):
        return nn.Sequential(nn.Linear(width + 1, width))

    monkeypatch.setitem(fb.models.registry._BUILDERS, "careless", careless)
    description, tensors = parts(good)
    for width in ("x", None, [], -5, {}, 10**400):
        architecture = {"name": "careless", "kwargs": {"width": width}}
        path = write(tmp_path / "model.safetensors", description | {"architecture": architecture}, tensors)
        refused(path, fb.MismatchedModel, models=(None,))


def test_models_of_other_shapes(good, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(good)
    others = [
        lambda: nn.Sequential(nn.Linear(3, 3)),
        lambda: fb.models.create("lenet5"),
        lambda: fb.models.create("resnet8-xnor", widths=[12, 16, 24], num_classes=3),
        lambda: fb.models.create("resnet8-xnor", widths=[12, 16, 20], num_classes=4),
        lambda: fb.models.create("resnet8-xnor", widths=[12, 16, 20], num_classes=3, nonlinearity="prelu"),
        lambda: fb.quantize_(float_model(), skip=()),  # more layers quantized than the file packs
    ]
    refused(path, fb.MismatchedModel, models=others)


def test_a_layer_with_a_forward_of_its_own_is_not_replaced(tmp_path):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    fb.save_packed(
        fb.pack_(fb.quantize_(nn.Sequential(nn.Linear(8, 8)), skip=())), tmp_path / "a.safetensors"
    )
    refused(
        tmp_path / "a.safetensors",
        fb.MismatchedModel,
        "in the model it is Doubled",
        models=(lambda: nn.Sequential(Doubled(8, 8)),),
    )


def test_errors_have_one_base_which_is_a_value_error():
    for error in (fb.NotPackedFile, fb.UnsupportedVersion, fb.CorruptPackedFile, fb.MismatchedModel):
        assert issubclass(error, files.PackedFileError)
    assert issubclass(files.PackedFileError, ValueError)


def test_a_quantized_model_that_is_filled_has_no_quantized_layers_left(good, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(good)
    model = fb.load_packed(tmp_path / "a.safetensors", quantized_model())
    assert not any(isinstance(m, QuantConv2d) for m in model.modules())
    assert sum(isinstance(m, PackedLayer) for m in model.modules()) == 6


def test_where_a_file_cannot_be_written(tmp_path):
    model = packed_model()
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing; create it"):
        fb.save_packed(model, tmp_path / "missing" / "model.safetensors")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        fb.save_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_behind_a_link_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "target"
    link.symlink_to(target)
    for data in (b"new", b"newer"):
        files.write(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.skipif(os.name == "nt", reason="links ask for rights there")
def test_links_in_a_circle_are_an_error_of_the_system(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=r"symbolic links: .*/a'$"):
        files.write(tmp_path / "a", b"x")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_symlink()) == ["a", "b"]


@pytest.mark.skipif(os.name == "nt", reason="no such files there")
def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "link", "null"):
        with pytest.raises(OSError, match=r"cannot write .*: expected a file, got a device, pipe or socket"):
            files.write(tmp_path / name, b"x")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "null").is_char_device()


def test_a_temporary_file_of_anothers_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    (tmp_path / ".a.0").write_bytes(b"another's")
    with pytest.raises(FileExistsError):
        files.write(tmp_path / "a", b"x")
    assert (tmp_path / ".a.0").read_bytes() == b"another's" and not (tmp_path / "a").exists()


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_that_a_file_had_or_that_the_umask_leaves(tmp_path, mask):
    for mode in (0o600, 0o640, 0o664):
        (tmp_path / f"{mode:o}").touch()
        (tmp_path / f"{mode:o}").chmod(mode)
    before = os.umask(mask)
    try:
        for name in ("new", "600", "640", "664"):
            files.write(tmp_path / name, b"x")
    finally:
        os.umask(before)
    modes = {path.name: f"{path.stat().st_mode & 0o777:o}" for path in tmp_path.iterdir()}
    assert modes == {"new": f"{0o666 & ~mask:o}", "600": "600", "640": "640", "664": "664"}


def test_a_write_that_fails_leaves_what_was_there_and_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*/a'$"):
        files.write(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"
