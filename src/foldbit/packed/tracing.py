"""What torch.fx sees of a network: who calls whom, and what is changed in place on the way."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from foldbit.packed.absorbed import Absorbed, FoldedConv2d
from foldbit.packed.layers import PackedLayer

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def traces(module: nn.Module) -> list[tuple[nn.Module, fx.Graph]]:
    """Graphs of the model, or of its largest parts that can be traced and hold packed layers.

    Nodes name the model's modules. What a forward pass sets and changes, it does to a copy. One that does
    something else where an optional argument is not given counts as not traceable.
    """
    if isinstance(module, PackedLayer) or not any(isinstance(m, PackedLayer) for m in module.modules()):
        return []
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        optional = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        graph = _Tracer().trace(_stand_in(module))
        if optional and _calls(graph) != _calls(_Tracer().trace(_stand_in(module), concrete_args=optional)):
            raise ValueError("what it computes depends on which arguments it gets")
    except Exception:  # whatever a forward pass does with a proxy: its parts may fare better
        return [found for child in module.children() for found in traces(child)]
    return [(module, graph)]


def _calls(graph: fx.Graph) -> list[tuple[str, str, str]]:
    """The calls of a graph, each with what it is given; but for those that look at constant arguments."""
    looks = (torch._assert, operator.eq, fx._symbolic_trace._assert_is_none)
    calls = [node for node in graph.nodes if node.op != "placeholder" and node.target not in looks]
    return [(node.op, str(node.target), f"{node.args} {node.kwargs}") for node in calls]


_IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift,
)  # fmt: skip


class _Proxy(fx.Proxy):
    """To torch.fx's own, x += y is x = x + y."""


def _in_place(function: Any) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _IN_PLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, PackedLayer | Absorbed | FoldedConv2d)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _stand_in(module: nn.Module) -> nn.Module:
    """A copy without hooks, that shares parameters, tensors that are attributes, and leaves of the trace."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for m in module.modules():
        memo |= {id(value): value for value in vars(m).values() if isinstance(value, Tensor)}
        if not m._modules and _Tracer().is_leaf_module(m, ""):
            memo[id(m)] = m
    twin = copy.deepcopy(module, memo)
    for m in twin.modules():
        if id(m) not in memo:
            for hooks in HOOKS:
                getattr(m, hooks).clear()
    return twin


class InPlace:
    """What a graph's nodes change in place.

    Args:
        graph: of a part of a network.
        modules: of that part, by name.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        changed = [(i, self.changed_by(node)) for node, i in self._order.items()]
        self._changes = [i for i, value in changed if value is not None and not self.is_own(value)]

    def between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether between two nodes something is changed that others may still read."""
        return any(self._order[first] < i < self._order[last] for i in self._changes)

    def is_own(self, node: fx.Node) -> bool:
        """Whether a node's value is in memory that only the one node that uses it can read."""
        if len(node.users) != 1:
            return False
        changed = self.changed_by(node) or self._passed_on_by(node)
        return self._is_new(node) if changed is None else self.is_own(changed)

    def changed_by(self, node: fx.Node) -> fx.Node | None:
        """The value that a node changes in place, if it does."""
        target, changed = node.target, None
        if node.op == "call_module":
            inplace = getattr(self._modules.get(str(target)), "inplace", False)
        elif node.op == "call_method":
            inplace = _ends_in_place(str(target))
        elif node.op == "call_function":
            inplace = target in _IN_PLACE or _ends_in_place(getattr(target, "__name__", "")) or _asks(node)
            changed = node.kwargs.get("out")
        else:
            inplace = False
        if inplace:
            changed = node.args[0] if node.args else node.kwargs.get("input")
        return changed if isinstance(changed, fx.Node) else None

    def _passed_on_by(self, node: fx.Node) -> fx.Node | None:
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        given = node.args[0] if isinstance(module, _PASS_ON) and node.args else None
        return given if isinstance(given, fx.Node) else None

    def _is_new(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self._modules.get(str(node.target)), _MAKE_NEW)
        return node.op == "call_function" and node.target in _FUNCTIONS_MAKE_NEW


#: In evaluation their output is their input.
_PASS_ON = (nn.Identity, nn.modules.dropout._DropoutNd, Absorbed)
#: The output of others may be a view of their input; that of these never is.
_FUNCTIONS_MAKE_NEW = (
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.cat, F.batch_norm,
)  # fmt: skip
_MAKE_NEW = (
    PackedLayer, nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.MaxPool2d,
    nn.AvgPool2d, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU,
)  # fmt: skip


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _asks(node: fx.Node) -> bool:
    """Whether a function is called with inplace=True, by name or by place."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # torch's own functions have no signature, and no such argument
        return False
    return bool(bound.arguments.get("inplace", False))
