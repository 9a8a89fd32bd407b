"""The table of bits, bytes and multiply-accumulates of a model, layer by layer. Its bytes are the file's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foldbit import convert
from foldbit.nn.layers import QuantConv1d, QuantConv2d, QuantLinear
from foldbit.packed.layers import PackedLayer
from foldbit.packed.spec import LayerSpec
from foldbit.tables import nbytes, table

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerSummary:
    """One layer: a row of the table.

    Attributes:
        name, kind: the layer's name in the model, and its class.
        input_bits: bits of an input value as the layer's arithmetic takes it.
        output_shape: of its last call in one forward pass.
        parameters: how many numbers of each bit width the layer stores.
        memory: bytes of the layer's tensors in a packed file.
        float_memory: bytes of its float twin's tensors.
        macs: multiply-accumulates of one forward pass, all calls together, by precision: ``"W1A2"``, or
            ``"float"``.
        plane_macs: binary ones that its bitwise kernel does: MACs × weight planes × input planes.
    """

    name: str
    kind: str
    input_bits: int
    output_shape: tuple[int, ...]
    parameters: Counter[int]
    memory: int
    float_memory: int
    macs: Counter[str]
    plane_macs: int


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` found; ``print`` it for the table.

    Attributes:
        layers: a row for every layer that holds tensors.
        file_bytes: the size of the packed file, header included: what ``save_packed`` writes.
        left_float: why layers stayed float, for a model that went through ``quantize_``.
        not_packable: why layers cannot be packed. They count as if a file held their planes and scales.
    """

    layers: tuple[LayerSummary, ...]
    file_bytes: int
    left_float: dict[str, str] = field(default_factory=dict)
    not_packable: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> Counter[int]:
        """Numbers stored, by bit width."""
        return sum((layer.parameters for layer in self.layers), Counter())

    @property
    def macs(self) -> Counter[str]:
        """Multiply-accumulates of one forward pass, by precision."""
        return sum((layer.macs for layer in self.layers), Counter())

    @property
    def memory(self) -> int:
        """Bytes of all tensors in a packed file; the header comes on top."""
        return sum(layer.memory for layer in self.layers)

    @property
    def float_memory(self) -> int:
        """Bytes of all tensors of the float twin."""
        return sum(layer.float_memory for layer in self.layers)

    @property
    def compression(self) -> float:
        """How many times smaller the file is than the float twin's tensors."""
        return self.float_memory / self.file_bytes

    @property
    def bitwise_share(self) -> float:
        """The share of multiply-accumulates that bitwise kernels do."""
        total = self.macs.total()
        return 1 - self.macs["float"] / total if total else 0.0

    def __str__(self) -> str:
        widths = sorted(self.parameters)
        precisions = sorted(self.macs, key=lambda p: (p == "float", p))
        header = ["layer", "kind", "input\nbits", "output shape"]
        header += [f"{bits}-bit\nparams" for bits in widths]
        header += ["memory"]
        header += [f"{precision}\nMACs" for precision in precisions]

        def cells(parameters: Counter[int], memory: int, macs: Counter[str]) -> list[str]:
            return [
                *(f"{parameters[bits]:,}" for bits in widths),
                nbytes(memory),
                *(f"{macs[precision]:,}" for precision in precisions),
            ]

        rows = [
            [
                layer.name,
                layer.kind,
                layer.input_bits,
                "×".join(map(str, layer.output_shape)),
                *cells(layer.parameters, layer.memory, layer.macs),
            ]
            for layer in self.layers
        ]
        rows.append(["total", "", "", "", *cells(self.parameters, self.memory, self.macs)])
        lines = [
            table(header, rows, rule_before=len(rows) - 1),
            "",
            f"packed file          {self.file_bytes:,} bytes, header included",
            f"float32 tensors      {self.float_memory:,} bytes",
            f"compression          {self.compression:.1f}×",
            f"bitwise MACs         {self.bitwise_share:.1%} of {self.macs.total():,}",
            f"binary plane MACs    {sum(layer.plane_macs for layer in self.layers):,}",
        ]
        if self.left_float:
            lines += ["", "left float"] + [f"  {name}: {reason}" for name, reason in self.left_float.items()]
        if self.not_packable:
            lines += ["", "cannot be packed, and counted as if a file held their planes and scales"]
            lines += [f"  {name}: {reason}" for name, reason in self.not_packable.items()]
        return "\n".join(lines)


def summary(model: nn.Module, input_size: Sequence[int] | Tensor) -> Summary:
    """Summarise a float, quantized or packed model.

    A quantized model is counted as it will be once packed. The model runs once, in evaluation mode, and is
    left as it was.

    Args:
        model: any network of one tensor input.
        input_size: the shape of an input, batch included, such as ``(1, 3, 224, 224)``; or an input.

    Returns:
        A :class:`Summary`; ``print`` it for the table.
    """
    x = input_size if isinstance(input_size, Tensor) else _zeros(model, input_size)
    shapes = _output_shapes(model, x)
    rows = tuple(
        _summarise(name, module, shapes.get(module, []))
        for name, module in model.named_modules()
        if _own_tensors(module)
    )
    try:
        left_float = convert.conversion_report(model).left_float
    except ValueError:
        left_float = {}
    not_packable = {
        name: module.config.why_not_packed
        for name, module in model.named_modules()
        if isinstance(module, QuantConv2d | QuantConv1d | QuantLinear) and module.config.why_not_packed
    }
    return Summary(rows, convert.packed_size(model), left_float, not_packable)


def _summarise(name: str, module: nn.Module, output_shapes: list[torch.Size]) -> LayerSummary:
    own = _own_tensors(module)
    memory = sum(t.numel() * t.element_size() for t in own)
    parameters = Counter({_FLOAT_BITS: sum(t.numel() for t in own)})
    float_memory, input_bits, plane_macs, precision = memory, _FLOAT_BITS, 0, "float"
    spec = _spec_of(module)
    if spec is not None:
        input_bits = spec.activation_planes or _FLOAT_BITS
    if spec is not None and spec.weight_planes:
        weights = spec.out_channels * spec.channels * spec.kernel_size[0] * spec.kernel_size[1]
        stored = spec.tensors()
        sizes = {key: torch.Size(shape).numel() for key, (_, shape) in stored.items()}
        memory = sum(sizes[key] * dtype.itemsize for key, (dtype, _) in stored.items())
        floats = sum(size for key, size in sizes.items() if key != "planes")
        parameters = Counter({spec.weight_planes: weights, _FLOAT_BITS: floats})
        float_memory = 4 * (weights + (spec.out_channels if spec.bias else 0))
        if spec.activation_planes:
            precision = spec.config.name
            plane_macs = spec.weight_planes * spec.activation_planes
    count = _macs(module, spec, output_shapes)
    return LayerSummary(
        name or "(model)",
        type(module).__name__,
        input_bits,
        tuple(output_shapes[-1]) if output_shapes else (),
        parameters,
        memory,
        float_memory,
        Counter({precision: count}) if count else Counter(),
        plane_macs * count,
    )


def _macs(module: nn.Module, spec: LayerSpec | None, output_shapes: list[torch.Size]) -> int:
    """One multiply-accumulate for every output value and every weight it sees."""
    outputs = sum(shape.numel() for shape in output_shapes)
    if spec is not None:
        return outputs * spec.channels * spec.kernel_size[0] * spec.kernel_size[1]
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return outputs * module.weight[0].numel()
    return 0


def _spec_of(module: nn.Module) -> LayerSpec | None:
    if isinstance(module, PackedLayer):
        return module.spec
    if isinstance(module, QuantConv2d | QuantConv1d | QuantLinear):
        return LayerSpec.of(module, module.config)
    return None


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """What the module itself puts into a state dict; running scales count with the layer that owns them."""
    if type(module).__name__ == "ActivationQuantizer":
        return []
    buffers = [
        buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    ]
    return [*module.parameters(recurse=False), *buffers]


def _output_shapes(model: nn.Module, x: Tensor) -> dict[nn.Module, list[torch.Size]]:
    """What each module puts out, call by call: a module may stand in several places."""
    shapes: dict[nn.Module, list[torch.Size]] = {}

    def remember(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(module, []).append(output.shape)

    handles = [module.register_forward_hook(remember) for module in model.modules()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return shapes


def _zeros(model: nn.Module, size: Sequence[int]) -> Tensor:
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.zeros(*size)
    return torch.zeros(*size, dtype=parameter.dtype, device=parameter.device)
