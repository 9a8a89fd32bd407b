"""Weights of ONNX files, wherever they are kept; hostile files are refused."""

import sys

import numpy as np
import pytest
import torch

from foldbit.analysis import onnx_file, sources
from foldbit.analysis.sources import SourceError

onnx = pytest.importorskip("onnx", reason="the package onnx is not installed")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

RANDOM = np.random.default_rng(0)
CONV = RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32)
DEPTHWISE = RANDOM.standard_normal((4, 1, 3, 3)).astype(np.float32)
POINTWISE = RANDOM.standard_normal((6, 4, 1, 1)).astype(np.float16)
UP = RANDOM.standard_normal((6, 5, 2, 2)).astype(np.float32)  # [in, out, ...]
MATRIX = RANDOM.standard_normal((7, 5))  # [in, out]


def node(operation, *inputs, output, **attributes):
    return helper.make_node(operation, list(inputs), [output], **attributes)


def constant(name, array):
    return node("Constant", output=name, value=numpy_helper.from_array(array, name))


def write(path, nodes, initializers):
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", [value], [value], [numpy_helper.from_array(a, n) for n, a in initializers.items()]
    )
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


@pytest.fixture
def path(tmp_path):
    nodes = [
        node("Conv", "x", "conv", output="a"),
        constant("depthwise", DEPTHWISE),
        node("Conv", "a", "depthwise", output="b", group=4),
        node("Conv", "b", "pointwise", output="c"),
        node("ConvTranspose", "c", "up", output="d"),
        node("Gemm", "d", "matrix", output="e"),
        node("Gemm", "d", "turned", output="f", transB=1),
        node("MatMul", "d", "matmul", output="g"),
        node("MatMul", "left", "g", output="h"),
        node("MatMul", "d", "matmul", output="again"),
        node("MatMul", "d", "g", output="none of them constant"),
        node("Add", "h", "bias", output="i"),
        node("Conv", "x", "integers", output="j"),
    ]
    initializers = {
        "conv": CONV, "pointwise": POINTWISE, "up": UP, "matrix": MATRIX, "turned": MATRIX,
        "matmul": MATRIX.astype(np.float32), "left": MATRIX, "bias": MATRIX, "integers": CONV.astype(np.int8),
    }  # fmt: skip
    return write(tmp_path / "model.onnx", nodes, initializers)


def test_weights_are_found_with_their_outputs_first(path):
    source = onnx_file.onnx_file(path)
    assert {weight.name: weight.kind for weight in source.weights} == {
        "conv": "convolution",
        "depthwise": "depthwise convolution",
        "pointwise": "pointwise convolution",
        "up": "convolution",
        "matrix": "linear",
        "turned": "linear",
        "matmul": "linear",
        "left": "linear",
    }
    expected = {
        "conv": CONV, "depthwise": DEPTHWISE, "pointwise": POINTWISE, "up": UP.swapaxes(0, 1),
        "matrix": MATRIX.T, "turned": MATRIX, "matmul": MATRIX.T.astype(np.float32), "left": MATRIX,
    }  # fmt: skip
    for weight in source.weights:
        assert weight.shape == expected[weight.name].shape
        assert torch.equal(weight.load(), torch.from_numpy(expected[weight.name].copy()))
    assert source.left_out == {"not floating point": 1}


def test_weights_inside_branches_are_found(tmp_path):
    branch = helper.make_graph([constant("w", CONV), node("Conv", "x", "w", output="y")], "then", [], [])
    path = write(
        tmp_path / "m.onnx", [node("If", "x", output="z", then_branch=branch, else_branch=branch)], {}
    )
    assert [weight.name for weight in onnx_file.onnx_file(path).weights] == ["w"]


def test_nesting_without_end_is_refused(tmp_path):
    graph = helper.make_graph([node("Conv", "x", "w", output="y")], "g", [], [])
    for _ in range(20):  # protobuf itself refuses more than some 30
        graph = helper.make_graph([node("If", "x", output="z", then_branch=graph)], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(SourceError, match="deep"):
        onnx_file.onnx_file(tmp_path / "m.onnx")


def test_bfloat16_is_read(tmp_path):
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [4, 2], [0.5, -1, 2, 3, 4, 5, 6, 7])
    graph = helper.make_graph([node("Gemm", "x", "w", output="y", transB=1)], "g", [], [], [tensor])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    [weight] = onnx_file.onnx_file(tmp_path / "m.onnx").weights
    assert weight.load().flatten().tolist() == [0.5, -1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08" * 40, b"\xff" * 100])
def test_files_that_are_no_models_are_refused(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(SourceError, match="not a"):
        onnx_file.onnx_file(tmp_path / "m.onnx")


def test_every_truncation_is_refused_or_read_whole(path):
    """Cut anywhere, a file never gives half a weight, nor an error without a reason."""
    whole = path.read_bytes()
    for end in range(0, len(whole), 29):
        path.write_bytes(whole[:end])
        try:
            for weight in onnx_file.onnx_file(path).weights:
                assert weight.load().shape == weight.shape
        except SourceError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("dims", [[4, 3, 3, 30], [1 << 62, 4], [4, -3, 3, 3], [4, 1 << 40]])
def test_a_tensor_that_lies_about_its_size_is_refused(path, dims):
    model = onnx.load_model_from_string(path.read_bytes())
    del model.graph.node[1:]
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match=r"is damaged|no float weights"):
        onnx_file.onnx_file(path).weights[0].load()


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "missing.bin"])
def test_external_data_stay_in_the_folder(path, location):
    (path.parent.parent / "secret").write_bytes(b"\0" * 1000)
    model = onnx.load_model_from_string(path.read_bytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match=r"'conv'.*is damaged"):
        onnx_file.onnx_file(path).weights[0].load()


def test_external_data_are_read(path):
    model = onnx.load_model_from_string(path.read_bytes())
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        location="data.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    assert (path.parent / "data.bin").stat().st_size > 100
    first = onnx_file.onnx_file(path).weights[0]
    assert torch.equal(first.load(), torch.from_numpy(CONV))


def test_a_graph_without_float_weights_says_what_it_has(tmp_path):
    path = write(tmp_path / "m.onnx", [node("Conv", "x", "w", output="y")], {"w": CONV.astype(np.int8)})
    with pytest.raises(SourceError, match=r"no float weights.*1 not floating point"):
        onnx_file.onnx_file(path)


def test_a_missing_package_is_named(monkeypatch, path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(sources.MissingPackage, match="pip install onnx"):
        onnx_file.onnx_file(path)


def test_weights_without_dims_or_with_very_many(tmp_path):
    """Their product would take minutes."""
    for dims in ([], [2**63 - 1] * 200_000):
        tensor = TensorProto(data_type=TensorProto.FLOAT, name="w", dims=dims, raw_data=b"0000")
        nodes = [node("Conv", "x", "w", output="y", group=2)]
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
        path = tmp_path / "odd.onnx"
        graph = helper.make_graph(nodes, "g", [value], [value], [tensor])
        path.write_bytes(helper.make_model(graph).SerializeToString())
        with pytest.raises(SourceError, match="no float weights"):
            onnx_file.onnx_file(path)
