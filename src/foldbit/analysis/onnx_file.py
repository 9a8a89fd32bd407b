"""Weights of ONNX files: what convolutions and matrix products multiply by, wherever it is kept.

Only constants are looked at; nothing is run. The onnx package is imported when a file is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foldbit.analysis.sources import MissingPackage, Source, SourceError, Weight

_MOST_DEPTH = 16  # of subgraphs in subgraphs
_MOST_BYTES = 1 << 31  # protobuf's own limit


def onnx_file(path: Path) -> Source:
    """The weights of an ONNX file: initializers, or outputs of Constant nodes.

    Raises:
        MissingPackage: without the onnx package.
        SourceError: for a file that is no ONNX model, is damaged, or holds no float weights.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingPackage(
            f"reading ONNX files takes the package onnx ({error}): pip install onnx"
        ) from error
    if path.stat().st_size >= _MOST_BYTES:
        raise SourceError(f"{path} is larger than an ONNX file can be; keep its weights as external data")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except DecodeError as error:
        raise SourceError(f"{path} is not a readable ONNX file: {error}") from error
    if not model.graph.node:
        raise SourceError(f"{path} is not an ONNX model: its graph has no nodes")
    weights: list[Weight] = []
    left_out: dict[str, int] = {}
    for use in _uses(model.graph, {}, 0):
        shape = tuple(int(d) for d in use.tensor.dims)
        reason = _unusable(onnx, use, shape)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        elif use.name not in {weight.name for weight in weights}:  # shared weights once
            weights.append(Weight(use.name, use.kind, use.turned(shape), _reader(path, use, shape)))
    if not weights:
        found = "; ".join(f"{count} {reason}" for reason, count in left_out.items()) or "none at all"
        raise SourceError(
            f"{path} holds no float weights: no Conv, ConvTranspose, Gemm or MatMul node of the graph "
            f"multiplies by a float constant (constants found: {found})"
        )
    return Source(
        path.name,
        f"The weights of {path}, an ONNX file; scales for each output channel.",
        weights,
        inputs="the graph is not run: no activations",
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Use:
    """A constant that a node multiplies by."""

    name: str
    operation: str
    kind: str
    tensor: Any  # onnx.TensorProto
    transposed: bool  # whether outputs are its second dim

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with the output channels first."""
        return (shape[1], shape[0], *shape[2:]) if self.transposed and len(shape) > 1 else shape


def _uses(graph: Any, outer: dict[str, Any], depth: int) -> Iterator[_Use]:
    """Every weight of a graph and of the graphs inside it, in the order of the nodes."""
    if depth > _MOST_DEPTH:
        raise SourceError(f"the ONNX file nests graphs more than {_MOST_DEPTH} deep")
    constants = dict(outer)
    constants.update({tensor.name: tensor for tensor in graph.initializer})
    for node in graph.node:
        if node.op_type == "Constant" and len(node.output) == 1:
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
    for node in graph.node:
        yield from _of_node(node, constants)
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _uses(inner, constants, depth + 1)


_MOST_DIMS = 8  # a product of many that are large takes minutes


def _of_node(node: Any, constants: dict[str, Any]) -> Iterator[_Use]:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    given = [name if name in constants else None for name in node.input]
    if node.op_type in ("Conv", "ConvTranspose") and len(given) > 1 and given[1]:
        tensor, transposed = constants[given[1]], node.op_type == "ConvTranspose"
        groups = attributes["group"].i if "group" in attributes else 1
        kind = "pointwise convolution" if all(size == 1 for size in tensor.dims[2:]) else "convolution"
        if groups > 1 and [groups] == tensor.dims[:1] and not transposed:
            kind = "depthwise convolution"
        yield _Use(given[1], node.op_type, kind, tensor, transposed and groups == 1)
    elif node.op_type == "Gemm" and len(given) > 1 and given[1]:
        transposed = not ("transB" in attributes and attributes["transB"].i)
        yield _Use(given[1], "Gemm", "linear", constants[given[1]], transposed)
    elif node.op_type == "MatMul" and len(given) == 2 and (given[0] is None) != (given[1] is None):
        name = given[1] or given[0]
        assert name is not None
        yield _Use(name, "MatMul", "linear", constants[name], given[1] is not None)


def _unusable(onnx: Any, use: _Use, shape: tuple[int, ...]) -> str:
    """Why a constant is not a weight to quantize; empty where it is one."""
    types = onnx.TensorProto
    if use.tensor.data_type not in (types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE):
        return "not floating point"
    if any(size < 0 for size in shape):
        return "of a negative size"
    if len(shape) > _MOST_DIMS:
        return f"of more than {_MOST_DIMS} dims"
    if len(shape) < 2 or use.turned(shape)[0] < 2 or math.prod(shape) < 4:
        return "a vector, or no larger than one"
    if use.operation == "MatMul" and len(shape) > 2:
        return "a batch of matrices"
    return ""


def _reader(path: Path, use: _Use, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        from onnx import numpy_helper

        try:
            # Checks what an external tensor's location may be: below the file's own folder.
            array = numpy_helper.to_array(use.tensor, str(path.parent))
            if array.dtype.name not in ("float16", "float32", "float64"):
                array = array.astype("float32")  # bfloat16, which NumPy does not know
            tensor = torch.from_numpy(array.copy()).reshape(shape)
        except Exception as error:  # the file is hostile until read, and onnx raises of every kind
            message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise SourceError(
                f"{path}: the tensor {use.name[:100]!r} of shape {list(shape)} is damaged: {message}"
            ) from error
        return tensor.transpose(0, 1) if use.transposed else tensor

    return read
