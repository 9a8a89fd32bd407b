"""Fusion: packed layers take over the cheap float work around them.

    batch norm, ReLU, clamp → packed layer → batch norm → ReLU or PReLU → + shortcut

What comes before a layer with static scales becomes the thresholds it folds by, a batch norm behind it
changes its scales and bias, and nonlinearity and residual are its last step, in registers. A module that was
absorbed stays where it stands in the network, with its parameters under their names, and passes its input on;
so state dicts and files are the same, fused or not.

Which modules follow each other is read off torch.fx's trace of the network, or of those of its parts that can
be traced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from foldbit.packed import thresholds
from foldbit.packed.absorbed import Absorbed, FoldedConv2d
from foldbit.packed.layers import Neighbours, PackedConv2d, PackedLayer
from foldbit.packed.tracing import InPlace, has_hooks, traces

#: Element by element or channel by channel, and monotone: thresholds can hold them.
MONOTONE = (nn.BatchNorm2d, nn.BatchNorm1d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.Identity)
NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
#: What a layer can do last.
NONLINEARITIES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity)


@dataclass
class FusionReport:
    """Which modules each packed layer does the work of, and which neighbours it leaves alone, and why."""

    fused: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name in dict.fromkeys([*self.fused, *self.left]):
            lines.append(f"  {name}: does {', '.join(self.fused.get(name, [])) or 'nothing besides'}")
            lines += [f"    not {reason}" for reason in self.left.get(name, [])]
        return "\n".join(lines)


def fuse_(model: nn.Module) -> FusionReport:
    """Let the packed layers of a model in evaluation take over what stands next to them.

    Float convolutions take over the batch norms behind them, too. Layers that did so before stay as they are.

    The trace speaks for every later call: a forward pass must not skip a module that it called then, nor use
    its result otherwise (in the trace required arguments are not None, and gradients are whatever they are),
    nor call a module of a part from outside that part where only the parts can be traced.
    """
    report = FusionReport()
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if isinstance(module, Absorbed):
            layer = names[module.layer]
            report.fused.setdefault(layer, []).append(f"{type(module.original).__name__} {name}")
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for part, graph in traces(model):
        modules = dict(part.named_modules())
        chain = _Chain(modules, Counter(), places, names, report, InPlace(graph, modules))
        chain.calls.update(str(node.target) for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            layer = modules.get(str(node.target)) if node.op == "call_module" else None
            if isinstance(layer, PackedLayer) and layer.neighbours == Neighbours():
                _fuse(layer, node, chain)
            elif type(layer) is nn.Conv2d:
                _fold(layer, node, chain)
        replace(model, chain.absorbed)
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer) and name not in report.fused and name not in report.left:
            report.left[name] = ["its neighbours: torch.fx cannot trace the forward pass that calls it"]
    return report


def unfuse_(model: nn.Module) -> None:
    """Give every module its own work back."""
    kinds = (Absorbed, FoldedConv2d)
    absorbed = {m: m.original.train(m.training) for m in model.modules() if isinstance(m, kinds)}
    replace(model, absorbed)
    for module in model.modules():
        if isinstance(module, PackedLayer) and module.neighbours != Neighbours():
            module.absorb(Neighbours())


def replace(model: nn.Module, replacements: dict[Any, Any]) -> None:
    """Put replacements in, wherever a module stands (it may stand in several places)."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]


@dataclass
class _Chain:
    """What is known about the modules of a part of a network."""

    modules: dict[str, nn.Module]
    calls: Counter[str]
    places: Counter[int]
    names: dict[nn.Module, str]
    report: FusionReport
    in_place: InPlace
    absorbed: dict[nn.Module, nn.Module] = field(default_factory=dict)

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one tensor and nothing else, if it does."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return None
        module = self.modules.get(str(node.target))
        return None if module in self.absorbed else module  # another layer has taken it

    def why_apart(self, node: fx.Node) -> str | None:
        """Why the module that a node calls can neither do others' work nor leave its own, if so."""
        module = self.modules[str(node.target)]
        if self.calls[str(node.target)] > 1 or self.places[id(module)] > 1:
            return "it is used in several places"
        if "forward" in vars(module):
            return "its forward pass has been replaced"
        return "it has hooks" if has_hooks(module) else None

    def why_keeps(self, node: fx.Node, layer: nn.Module, channels: int) -> str | None:
        """Why the module that a node next to the layer calls must keep its work, if it must.

        Args:
            node: the node.
            layer: the layer.
            channels: of what the layer takes or gives, where the module is.
        """
        module = self.modules[str(node.target)]
        reason = self.why_apart(node)
        if reason:
            return reason
        if isinstance(module, NORMS):
            if module.running_mean is None:
                return "it has no running statistics"
            flat = not isinstance(layer, PackedConv2d | nn.Conv2d)
            if type(module) is not (nn.BatchNorm1d if flat else nn.BatchNorm2d):
                return f"it does not fit a {type(layer).__name__}"
        own = module.num_features if isinstance(module, NORMS) else getattr(module, "num_parameters", 1)
        if own != channels and (own > 1 or isinstance(module, NORMS)):
            return f"its {own} channels are not the layer's {channels}"
        return None


def _fuse(layer: PackedLayer, node: fx.Node, chain: _Chain) -> None:
    name = chain.names[layer]
    left = chain.report.left.setdefault(name, [])
    if layer.spec.config.activation == "fp":
        left.append("its neighbours: its input is float, and so is all it computes")
        return
    reason = chain.why_apart(node)
    if reason:
        left.append(f"its neighbours: {reason}")
        return
    before = _before(layer, node, chain, left)
    norm, nonlinearity = _after(layer, node, chain, layer.spec.out_channels, left)
    absorbed = [*before, *(m for m in (norm, nonlinearity) if m is not None)]
    if not left:
        del chain.report.left[name]
    if not absorbed:
        chain.report.fused[name] = []
        return
    chain.report.fused[name] = [f"{type(m).__name__} {chain.names[m]}" for m in absorbed]
    layer.absorb(Neighbours(tuple(before), norm, nonlinearity))
    chain.absorbed |= {m: Absorbed(m, layer) for m in absorbed}


def _fold(conv: nn.Conv2d, node: fx.Node, chain: _Chain) -> None:
    """A float convolution and the batch norm behind it."""
    norm, _ = _after(conv, node, chain, conv.out_channels, [])
    if isinstance(norm, nn.BatchNorm2d) and not chain.why_apart(node) and chain.module(node) is conv:
        folded = FoldedConv2d(conv, norm)
        chain.report.fused[chain.names[conv]] = [f"BatchNorm2d {chain.names[norm]}"]
        chain.absorbed |= {conv: folded, norm: Absorbed(norm, folded)}


def _before(layer: PackedLayer, node: fx.Node, chain: _Chain, left: list[str]) -> list[nn.Module]:
    """Modules before the layer that its thresholds can hold, the first first."""
    found: list[nn.Module] = []
    place = node.args[0] if node.args else None
    while (module := chain.module(place)) is not None and type(module) in MONOTONE:
        assert isinstance(place, fx.Node)
        reason = "its result has another use" if len(place.users) > 1 else None
        reason = reason or chain.why_keeps(place, layer, layer.spec.in_channels)
        reason = reason or _why_not_later(place, node, chain.in_place) or _why_no_thresholds(layer, module)
        if reason:
            left.append(f"{type(module).__name__} {chain.names[module]}: {reason}")
            break
        found.insert(0, module)
        place = place.args[0]
    return found


def _why_not_later(place: fx.Node, layer: fx.Node, in_place: InPlace) -> str | None:
    """Why the module that a node calls cannot leave its work to the layer, which runs later than it."""
    if not all(map(in_place.is_own, in_place.changed_by(place))):
        return "it works in place, and others may read what it changes"
    if in_place.between(place, layer):
        return "something is changed in place between it and the layer"
    return None


def _why_no_thresholds(layer: PackedLayer, module: nn.Module) -> str | None:
    if layer.activation_scales is None:
        return "dynamic scales are solved for its result; static ones would not need it"
    if layer.spec.activation_planes > thresholds.MAX_PLANES:
        return f"{layer.spec.activation_planes} planes would take too many thresholds"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
        return "its slope is negative, so it does not keep values in order"
    return None


def _after(
    layer: nn.Module, node: fx.Node, chain: _Chain, channels: int, left: list[str]
) -> tuple[nn.BatchNorm1d | nn.BatchNorm2d | None, nn.Module | None]:
    """A batch norm and a nonlinearity behind the layer, either, or none."""
    if len(node.args) + len(node.kwargs) > 1:
        left.append("what is behind it: it is called with a residual")
        return None, None
    found: list[Any] = [None, None]
    place = node
    for i, allowed in enumerate((NORMS, NONLINEARITIES)):
        user = next(iter(place.users)) if len(place.users) == 1 else None
        module = chain.module(user)
        if user is None or module is None or type(module) not in allowed:
            continue
        reason = chain.why_keeps(user, layer, channels)
        if reason:
            left.append(f"{type(module).__name__} {chain.names[module]}: {reason}")
            break
        found[i], place = module, user
    return found[0], found[1]
