"""The table of bits, bytes and multiply-accumulates of a model, layer by layer. Its bytes are the file's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foldbit import convert, storage
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
        counted: False where it multiplies and nobody knows here how often, as in attention or an LSTM, or
            where it was not called as a module: ``macs`` is then empty, and stands for no zero.
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
    counted: bool = True


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
    def not_counted(self) -> tuple[str, ...]:
        """Layers whose multiply-accumulates are in no total."""
        return tuple(layer.name for layer in self.layers if not layer.counted)

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
        """The share of the multiply-accumulates, of those that are counted, that bitwise kernels do."""
        total = self.macs.total()
        return 1 - self.macs["float"] / total if total else 0.0

    def __str__(self) -> str:
        widths = sorted(self.parameters)
        found = {*self.macs, *(["float"] if self.not_counted else [])}
        precisions = sorted(found, key=lambda p: (p == "float", p))
        header = ["layer", "kind", "input\nbits", "output shape"]
        header += [f"{bits}-bit\nparams" for bits in widths]
        header += ["memory"]
        header += [f"{precision}\nMACs" for precision in precisions]

        def cells(
            parameters: Counter[int], memory: int, macs: Counter[str], counted: bool = True
        ) -> list[str]:
            numbers = [f"{macs[precision]:,}" for precision in precisions]
            return [
                *(f"{parameters[bits]:,}" for bits in widths),
                nbytes(memory),
                *(numbers if counted else [*[""] * (len(precisions) - 1), "not counted"]),
            ]

        rows = [
            [
                layer.name,
                layer.kind,
                layer.input_bits,
                "×".join(map(str, layer.output_shape)),
                *cells(layer.parameters, layer.memory, layer.macs, layer.counted),
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
            f"bitwise MACs         {self.bitwise_share:.1%} of {self.macs.total():,}"
            + (" counted" if self.not_counted else ""),
            f"binary plane MACs    {sum(layer.plane_macs for layer in self.layers):,}",
        ]
        if self.not_counted:
            lines += ["", f"not counted, and in no total of MACs: {', '.join(self.not_counted)}"]
        if self.left_float:
            lines += ["", "left float"] + [f"  {name}: {reason}" for name, reason in self.left_float.items()]
        if self.not_packable:
            lines += ["", "cannot be packed, and counted as if a file held their planes and scales"]
            for reason in dict.fromkeys(self.not_packable.values()):
                names = [name for name, own in self.not_packable.items() if own == reason]
                lines.append(f"  {', '.join(names)}: {reason}")
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

    Raises:
        TypeError: where ``input_size`` is neither.
        RuntimeError: where the model does not take such an input; says at which layer.
    """
    calls = _calls(model, input_size if isinstance(input_size, Tensor) else _zeros(model, input_size))
    rows = tuple(
        _summarise(name, module, calls.get(module, []))
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
    return Summary(rows, storage.packed_size(model), left_float, not_packable)


def likely_input_size(model: nn.Module) -> tuple[int, ...]:
    """One image of as many channels as the first 2-d convolution takes: 28×28 where it is grey, else 32×32.

    Raises:
        ValueError: where the model has no 2-d convolution.
    """
    for module in model.modules():
        channels = 0
        if isinstance(module, PackedLayer):
            channels = module.spec.in_channels if module.spec.kind == "conv2d" else 0
        elif isinstance(module, nn.Conv2d | QuantConv2d):
            channels = module.in_channels
        if channels:
            return (1, 1, 28, 28) if channels == 1 else (1, channels, 32, 32)
    raise ValueError("this network has no 2-d convolution to guess its input from; say its input_size")


def try_input(model: nn.Module, x: Tensor) -> None:
    """Run a model once in evaluation mode, and leave it as it was.

    Raises:
        RuntimeError: where it fails; says at which layer, and for which input.
    """
    _calls(model, x)


@dataclass(frozen=True)
class _Call:
    """Shapes of the first input and of the output of one call of a module."""

    input: torch.Size
    output: torch.Size


def _summarise(name: str, module: nn.Module, calls: list[_Call]) -> LayerSummary:
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
    known = _macs(module, spec, calls)
    count = known or 0
    return LayerSummary(
        name or "(model)",
        type(module).__name__,
        input_bits,
        tuple(calls[-1].output) if calls else (),
        parameters,
        memory,
        float_memory,
        Counter({precision: count}) if count else Counter(),
        plane_macs * count,
        known is not None,
    )


_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
# Their weights, of two dimensions and more, scale or are looked up: nothing is accumulated.
_NO_PRODUCTS = nn.LayerNorm | nn.RMSNorm | nn.Embedding | nn.EmbeddingBag


def _macs(module: nn.Module, spec: LayerSpec | None, calls: list[_Call]) -> int | None:
    """One multiply-accumulate for every output value and every weight it sees; None where nobody knows."""
    if spec is not None:
        weights = spec.channels * spec.kernel_size[0] * spec.kernel_size[1]
    elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | _TRANSPOSED):
        weights = module.weight[0].numel()
    else:
        multiplies = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        return None if multiplies and not isinstance(module, _NO_PRODUCTS) else 0
    if not calls:
        return None  # used without a call, as attention does with its projection, or not used
    # In a transposed convolution every input value, not every output value, meets so many weights.
    return weights * sum((c.input if isinstance(module, _TRANSPOSED) else c.output).numel() for c in calls)


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


def _calls(model: nn.Module, x: Tensor) -> dict[nn.Module, list[_Call]]:
    """The shapes of each call of each module in one forward pass: a module may stand in several places."""
    calls: dict[nn.Module, list[_Call]] = {}
    running: list[nn.Module] = []

    def begin(module: nn.Module, _inputs: object) -> None:
        running.append(module)

    def end(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        running.pop()
        if isinstance(output, Tensor):
            first = inputs[0] if inputs else None
            shape = first.shape if isinstance(first, Tensor) else torch.Size()
            calls.setdefault(module, []).append(_Call(shape, output.shape))

    handles = [module.register_forward_pre_hook(begin) for module in model.modules()]
    handles += [module.register_forward_hook(end) for module in model.modules()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code may call no hooks
            model.eval()(x)
    except Exception as error:  # a network of the user's own may raise anything
        layer = running[-1] if running else model
        name = next(name for name, module in model.named_modules() if module is layer)
        where = f"in layer {name!r} ({type(layer).__name__})" if name else f"in {type(layer).__name__} itself"
        raise RuntimeError(
            f"the network fails {where} on an input of {'×'.join(map(str, x.shape))}: {error}. "
            "Is the input_size right?"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, was_training in training.items():
            module.training = was_training
    return calls


def _zeros(model: nn.Module, size: Sequence[int]) -> Tensor:
    numbers = isinstance(size, Sequence) and not isinstance(size, str)
    if not numbers or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in size):
        raise TypeError(
            f"input_size is the shape of an input, batch included, such as (1, 3, 224, 224), or an input; "
            f"got {size!r}"
        )
    parameter = next(model.parameters(), None)
    if parameter is None:
        return torch.zeros(*size)
    return torch.zeros(*size, dtype=parameter.dtype, device=parameter.device)
