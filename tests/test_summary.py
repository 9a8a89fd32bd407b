"""The summary: its bytes are the file's, its multiply-accumulates can be counted by hand."""

from collections import Counter

import pytest
import torch
from torch import nn

import foldbit as fb
from foldbit import storage
from foldbit.summary import likely_input_size, try_input

SIZE = (2, 4, 9, 9)


class Net(nn.Module):
    """Strided, grouped and one-dimensional convolutions, and a linear layer over tokens."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 2), stride=2, padding=(1, 0), groups=4)
        self.along = nn.Conv1d(12, 16, 3, bias=False)
        self.tokens = nn.Linear(16, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = self.grouped(self.norm(self.stem(x)))  # [N, 12, 4, 3]
        x = self.along(x.flatten(2))  # [N, 16, 10]
        return self.head(self.tokens(x.transpose(1, 2)).mean(1))


MACS = {
    "stem": 2 * 8 * 7 * 7 * 4 * 9,
    "norm": 0,
    "grouped": 2 * 12 * 4 * 3 * 2 * 6,
    "along": 2 * 16 * 10 * 12 * 3,
    "tokens": 2 * 10 * 10 * 16,
    "head": 2 * 3 * 10,
}
QUANTIZED = ["grouped", "along", "tokens"]


def net(config=None):
    torch.manual_seed(0)
    return fb.quantize_(Net(), config) if config else Net()


def settle(model):
    """Let static scales see data."""
    with torch.no_grad():
        model.train()(torch.randn(SIZE))
    return model


def rows(found):
    return {row.name: row for row in found.layers}


# --- bytes


CONFIGS = [
    fb.QuantConfig("ls-1", "ls-2"),
    fb.QuantConfig("ls-2", "ls-T", activation_scales="static"),
    fb.QuantConfig("gf-5", "fp"),
    fb.QuantConfig("ls-T", "ls-1", granularity="group", group_size=2),
    fb.QuantConfig("ls-1", "ls-1", granularity="tensor", activation_scales="static"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_bytes_are_those_on_disk_before_packing_and_after(config, tmp_path):
    model = settle(net(config))
    before = fb.summary(model, SIZE)
    fb.pack_(model)
    after = fb.summary(model, SIZE)
    fb.save_packed(model, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert before.file_bytes == after.file_bytes == size
    assert before.memory == after.memory
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert after.memory + 8 + header == size


@pytest.mark.parametrize("name, size", [("resnet8-xnor", (1, 1, 28, 28)), ("lenet5", (1, 1, 28, 28))])
def test_the_bytes_of_registered_models_are_those_on_disk(name, size, tmp_path):
    model = fb.models.create(name)
    fb.quantize_(model, overrides=fb.models.float_layers(model))
    before = fb.summary(model, size)
    fb.save_packed(fb.pack_(model), tmp_path / "model.safetensors")
    assert before.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert fb.summary(model, size).file_bytes == before.file_bytes
    assert before.compression == before.float_memory / before.file_bytes


def test_the_bytes_of_layers_in_several_places_are_those_on_disk(tmp_path):
    shared = nn.Linear(8, 8)
    model = fb.quantize_(nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()), nn.Linear(8, 8)), skip=())
    before = fb.summary(model, (2, 8))
    fb.save_packed(fb.pack_(model), tmp_path / "model.safetensors")
    assert before.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert rows(before)["0"].macs == {"W1A2": 2 * 2 * 8 * 8}  # two calls of two samples
    assert fb.summary(model, (2, 8)).macs == before.macs


def test_a_float_model_is_as_large_as_its_state_dict():
    model = net()
    found = fb.summary(model, SIZE)
    expected = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert found.memory == found.float_memory == expected
    assert 0 < found.file_bytes - expected < 2000  # the header
    assert found.bitwise_share == 0
    assert set(found.macs) == {"float"}
    assert set(found.parameters) == {32}
    assert found.left_float == {}


def test_memory_of_one_layer_by_hand():
    config = fb.QuantConfig("ls-2", "ls-T", activation_scales="static")
    row = rows(fb.summary(net(config), SIZE))["grouped"]
    # 2 planes of 12 filters of 3x2 taps of 2 channels, a byte each; 24 scales, 12 biases, 2 input scales.
    assert row.memory == 2 * 12 * 6 + 4 * (24 + 12 + 2)
    assert row.parameters == {2: 12 * 6 * 2, 32: 24 + 12 + 2}
    assert row.float_memory == 4 * (12 * 6 * 2 + 12)


@pytest.mark.parametrize(
    ("fields", "scales"),
    [({"granularity": "input"}, 2 * 8), ({"granularity": "rank", "rank": 2}, 2 * 2 * (12 + 2 * 6))],
)
def test_layers_that_cannot_be_packed_count_their_planes_and_scales_and_are_named(fields, scales):
    found = fb.summary(net(fb.QuantConfig("ls-2", "ls-2", **fields)), SIZE)
    row = rows(found)["grouped"]
    assert row.parameters == {2: 12 * 6 * 2, 32: scales + 12}
    assert row.memory == 2 * 12 * 6 + 4 * (scales + 12)
    assert list(found.not_packable) == QUANTIZED
    assert "cannot be packed, and counted as if" in str(found) and "along the sum" in str(found)
    assert fb.summary(net(CONFIGS[0]), SIZE).not_packable == {}


# --- multiply-accumulates


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=lambda config: config.name if config else "float")
@pytest.mark.parametrize("packed", [False, True])
def test_multiply_accumulates_by_hand(config, packed):
    model = net(config)
    if packed and config:
        fb.pack_(settle(model))
    found = fb.summary(model, SIZE)
    bitwise = config is not None and config.activation != "fp"
    for name, row in rows(found).items():
        precision = config.name if bitwise and name in QUANTIZED else "float"
        assert row.macs == (Counter({precision: MACS[name]}) if MACS[name] else Counter()), name
    total = sum(MACS.values())
    done = sum(MACS[name] for name in QUANTIZED) if bitwise else 0
    assert found.macs.total() == total
    assert found.bitwise_share == pytest.approx(done / total)
    planes = sum(row.plane_macs for row in found.layers)
    bits = {"ls-1": 1, "ls-2": 2, "ls-T": 2, "gf-5": 5, "fp": 0}
    assert planes == (done * bits[config.weight] * bits[config.activation] if bitwise else 0)


def test_rows_say_what_each_layer_is():
    found = rows(fb.summary(net(fb.QuantConfig("ls-1", "ls-2")), SIZE))
    assert list(found) == ["stem", "norm", "grouped", "along", "tokens", "head"]
    assert found["grouped"].kind == "QuantConv2d"
    assert found["grouped"].output_shape == (2, 12, 4, 3)
    assert found["tokens"].output_shape == (2, 10, 10)
    assert [row.input_bits for row in found.values()] == [32, 32, 2, 2, 2, 32]
    assert found["stem"].parameters == {32: 8 * 4 * 9}
    assert found["along"].parameters == {1: 16 * 12 * 3, 32: 16}
    weight_only = rows(fb.summary(net(fb.QuantConfig("ls-1", "fp")), SIZE))
    assert weight_only["grouped"].input_bits == 32


def test_transposed_convolutions_by_hand():
    # Each of 4×9×9 values is multiplied by 3×3 weights for each of 3 output channels of its group.
    found = fb.summary(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2)), (2, 4, 9, 9))
    assert found.macs == {"float": 2 * 4 * 9 * 9 * 3 * 3 * 3} and found.not_counted == ()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lift = nn.Linear(4, 8)
        self.norm = nn.LayerNorm((5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 3)
        self.table = nn.Embedding(10, 8)
        self.own = nn.Parameter(torch.zeros(5, 8))

    def forward(self, x):
        x = self.norm(self.lift(x)) + self.table(torch.zeros(5, dtype=torch.int64)) + self.own
        return self.lstm(self.attention(x, x, x)[0])[0]


def test_what_is_not_counted_is_said_and_is_not_zero():
    found = fb.summary(Attention(), (2, 5, 4))
    assert found.not_counted == ("(model)", "attention", "attention.out_proj", "lstm")
    assert found.macs == {"float": 2 * 5 * 4 * 8}
    text = str(found)
    line = next(line for line in text.splitlines() if line.startswith("lstm"))
    assert line.endswith("not counted")
    assert next(line for line in text.splitlines() if line.startswith("norm")).split()[-1] == "0"
    assert "in no total of MACs: (model), attention, attention.out_proj, lstm" in text
    assert "0.0% of 320 counted" in text
    only = fb.summary(nn.Sequential(nn.LSTM(4, 3)), (5, 2, 4))
    assert "not counted" in str(only)  # though no layer has any multiply-accumulates
    assert "counted" not in str(fb.summary(net(), SIZE))


# --- the input


@pytest.mark.parametrize("size", ["2,4,9,9", 36, (2, 4, 9.5, 9), None, True, (2, -4, 9, 9)])
def test_what_is_no_input_size(size):
    with pytest.raises(TypeError, match="such as \\(1, 3, 224, 224\\)"):
        fb.summary(net(), size)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (net(), "in layer 'stem' \\(Conv2d\\) on an input of 2×5×9×9: .*to have 4 channels"),
        (nn.Conv2d(4, 2, 3), "in Conv2d itself on an input of 2×5×9×9"),
        (nn.Sequential(nn.Sequential(nn.ReLU()), nn.Linear(4, 2)), "in layer '1' \\(Linear\\)"),
    ],
)
def test_a_network_that_fails_is_told_where(model, message):
    with pytest.raises(RuntimeError, match=message):
        fb.summary(model, (2, 5, 9, 9))


def test_likely_inputs_of_known_models_run():
    for name in fb.models.names():
        model = fb.models.create(name)
        size = likely_input_size(model)
        try_input(model, torch.zeros(size))
        fb.quantize_(model)
        assert likely_input_size(model) == size
        assert likely_input_size(fb.pack_(model)) == size
    with pytest.raises(ValueError, match="no 2-d convolution"):
        likely_input_size(nn.Linear(3, 3))


# --- the table


def test_the_table_has_larqs_columns_and_totals():
    model = net(fb.QuantConfig("ls-1", "ls-2"))
    text = str(fb.summary(model, SIZE))
    lines = text.splitlines()
    assert lines[0].split() == ["input", "1-bit", "32-bit", "W1A2", "float"]
    assert lines[1].split() == [
        "layer", "kind", "bits", "output", "shape", "params", "params", "memory", "MACs", "MACs",
    ]  # fmt: skip
    assert set(lines[2]) == {"-"}
    assert lines[5].split() == [
        "grouped",
        "QuantConv2d",
        "2",
        "2×12×4×3",
        "144",
        "24",
        "168",
        "B",
        "3,456",
        "0",
    ]
    total = next(line for line in lines if line.startswith("total")).split()
    assert total == [
        "total",
        f"{144 + 576 + 160:,}",
        f"{288 + 33 + 24 + 16 + 20 + 33:,}",
        *total[3:5],
        "18,176",
        "28,284",
    ]
    assert f"packed file          {fb.summary(model, SIZE).file_bytes:,} bytes" in text
    assert f"bitwise MACs         {18176 / (18176 + 28284):.1%} of 46,460" in text
    assert f"binary plane MACs    {2 * 18176:,}" in text
    assert lines[-3:] == [
        "left float",
        "  stem: the first quantizable layer (skip='first-last')",
        "  head: the last quantizable layer (skip='first-last')",
    ]


def test_columns_of_several_widths_and_precisions():
    config = fb.QuantConfig("ls-1", "ls-1")
    overrides = {"along": fb.QuantConfig("gf-3", "ls-2"), "tokens": fb.QuantConfig("ls-T", "ls-T")}
    found = fb.summary(fb.quantize_(net(), config, overrides=overrides), SIZE)
    assert found.parameters.keys() == {1, 2, 3, 32}
    assert set(found.macs) == {"W1A1", "W3A2", "WTAT", "float"}
    header = str(found).splitlines()[0].split()
    assert header == ["input", "1-bit", "2-bit", "3-bit", "32-bit", "W1A1", "W3A2", "WTAT", "float"]


def test_a_model_that_is_a_layer_and_a_model_without_layers():
    linear = fb.summary(nn.Linear(4, 3), (2, 4))
    assert [row.name for row in linear.layers] == ["(model)"]
    assert linear.macs == {"float": 24}
    nothing = fb.summary(nn.Sequential(nn.ReLU()), (2, 4))
    assert nothing.layers == ()
    assert nothing.bitwise_share == 0
    assert str(nothing).splitlines()[0].split() == ["input"]


# --- the model is left as it was


def snapshot(model):
    return (
        [(name, id(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()],
        {name: t.clone() for name, t in model.state_dict().items()},
        {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
    )


def assert_same(model, before):
    modules, state, parameters = snapshot(model)
    assert (modules, parameters) == (before[0], before[2])
    assert list(state) == list(before[1])
    assert all(torch.equal(t, before[1][name]) for name, t in state.items())


@pytest.mark.parametrize("config", [None, *CONFIGS], ids=lambda config: config.name if config else "float")
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes_in_the_model(config, training):
    model = net(config).train(training)
    model.norm.train(not training)
    before = snapshot(model)
    fb.summary(model, SIZE)
    fb.summary(model, torch.randn(SIZE))
    assert_same(model, before)


def test_fresh_static_scales_stay_fresh():
    model = net(fb.QuantConfig(activation_scales="static"))
    fb.summary(model, SIZE)
    assert not model.tokens.input_quantizer.seen
    with pytest.raises(ValueError, match="never seen data"):
        fb.pack_(model)


def test_nothing_changes_when_the_forward_pass_raises():
    model = net(fb.QuantConfig()).train()
    model.stem.eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        fb.summary(model, (2, 5, 9, 9))
    assert_same(model, before)


def test_inputs_of_the_models_dtype():
    model = net(fb.QuantConfig()).double()
    assert fb.summary(model, SIZE).macs.total() == sum(MACS.values())
    half = fb.pack_(net(fb.QuantConfig())).bfloat16()
    assert rows(fb.summary(half, SIZE))["head"].output_shape == (2, 3)


def test_outputs_that_are_no_tensors_are_passed_over():
    model = nn.Sequential(nn.LSTM(4, 3))
    found = fb.summary(model, (5, 2, 4))
    assert found.layers[0].output_shape == ()
    assert found.memory == storage.packed_size(model) - 8 - int.from_bytes(
        storage.files.serialize(model)[:8], "little"
    )
