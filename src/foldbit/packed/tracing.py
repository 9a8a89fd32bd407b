"""What torch.fx sees of a network: who calls whom, and what is changed in place on the way."""

from __future__ import annotations

import copy
import inspect
import operator
import types
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

    Nodes name the model's modules. What a forward pass sets and changes, it does to a stand-in. A part counts
    as not traceable where it does something else with other optional arguments, and where one of its own
    parts has hooks, which see, and may change, what goes into that and comes out.
    """
    if isinstance(module, PackedLayer) or not any(isinstance(m, PackedLayer) for m in module.modules()):
        return []
    try:
        return [(module, _trace(module))]
    except Exception:  # whatever a forward pass does with a proxy: its parts may fare better
        return [found for child in module.children() for found in traces(child)]


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module's calls."""
    return any(getattr(module, hooks) for hooks in HOOKS)


def _trace(module: nn.Module) -> fx.Graph:
    if any(has_hooks(m) for m in module.modules() if m is not module and not _is_leaf(m)):
        raise _NotTraceable("a part has hooks")
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if len(defaults) > _MOST_OPTIONAL:
        raise _NotTraceable("it has many optional arguments")
    graph = _graph(module, {})
    given = [{name: defaults[name]} for name in defaults]
    given += [{other: defaults[other] for other in defaults if other != name} for name in defaults]
    if any(_calls(_graph(module, constant)) != _calls(graph) for constant in [defaults, *given] if constant):
        raise _NotTraceable("what it computes depends on which arguments it gets")
    if any(node.op == "placeholder" and str(node.target)[0] == "*" and node.users for node in graph.nodes):
        raise _NotTraceable("it takes any number of arguments")
    return graph


_MOST_OPTIONAL = 8


class _NotTraceable(Exception):
    """The trace of a forward pass would not speak for its calls."""


def _graph(module: nn.Module, constants: dict[str, Any]) -> fx.Graph:
    """The trace; what the forward pass keeps as attributes has another use there."""
    twins = _stand_ins(module)
    graph = _Tracer().trace(twins[module], concrete_args=constants)
    kept: list[fx.Node] = []
    held: Any = [list(vars(twin).values()) for twin in twins.values()]
    fx.node.map_aggregate(held, lambda v: kept.append(v.node) if isinstance(v, fx.Proxy) else None)
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "output")):
        for node in kept:
            graph.call_function(_keep, (node,))
    return graph


def _keep(value: Any) -> None:
    """Stands for an attribute that holds a value of the forward pass."""


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


def _is_leaf(module: nn.Module) -> bool:
    return not module._modules and _Tracer().is_leaf_module(module, "")


def _stand_ins(module: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each module one without hooks that a trace may write to; its leaves stand for themselves."""
    twins = {m: m if _is_leaf(m) else object.__new__(type(m)) for m in module.modules()}
    for m, twin in twins.items():
        if twin is not m:
            vars(twin).update({name: _copied(value, twins) for name, value in vars(m).items()})
            for hooks in HOOKS:
                getattr(twin, hooks).clear()
    return twins


def _copied(value: Any, twins: Mapping[nn.Module, nn.Module]) -> Any:
    """A value of a module's, for its twin: anew what a forward pass may change, but for parameters."""
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, _copied(value.__self__, twins))
    if type(value) in (list, tuple, set):
        return type(value)(_copied(item, twins) for item in value)
    if isinstance(value, dict):
        anew = copy.copy(value)
        anew.update({key: _copied(item, twins) for key, item in value.items()})
        return anew
    return value


class InPlace:
    """What a graph's nodes change in place.

    Args:
        graph: of a part of a network.
        modules: of that part, by name.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._changes = [
            i for node, i in self._order.items() if not all(map(self.is_own, self.changed_by(node)))
        ]

    def between(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether between two nodes something is changed that others may still read."""
        return any(self._order[first] < i < self._order[last] for i in self._changes)

    def is_own(self, node: fx.Node) -> bool:
        """Whether a node's value is in memory that only the one node that uses it can read."""
        if len(node.users) != 1:
            return False
        source = self.changed_by(node) or self._passed_on_by(node)
        return all(map(self.is_own, source)) if source else self._is_new(node)

    def changed_by(self, node: fx.Node) -> list[fx.Node]:
        """The values that a node changes in place."""
        given: Any = node.args[0] if node.args else node.kwargs.get("input")
        inplace, target = False, node.target
        if node.op == "call_module":
            inplace = getattr(self._modules.get(str(target)), "inplace", False)
        elif node.op == "call_method":
            inplace = _ends_in_place(str(target))
        elif node.op == "call_function" and target is not _keep:
            module = (getattr(target, "__module__", None) or "torch").partition(".")[0]
            if module not in ("torch", "operator", "_operator", "math", "builtins"):  # one of the user's
                return node.all_input_nodes
            inplace = target in _IN_PLACE or _ends_in_place(getattr(target, "__name__", "")) or _asks(node)
            given = node.kwargs.get("out", given if inplace else None)
            inplace = True
        changed: list[fx.Node] = []
        if inplace:
            fx.node.map_arg(given, changed.append)
        return changed

    def _passed_on_by(self, node: fx.Node) -> list[fx.Node]:
        module = self._modules.get(str(node.target)) if node.op == "call_module" else None
        return node.all_input_nodes if isinstance(module, _PASS_ON) else []

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
