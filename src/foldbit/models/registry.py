"""Models by name, so that a file or a recipe can say which network it belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

_BUILDERS: dict[str, Callable[..., nn.Module]] = {}
_MARK = "_foldbit_architecture"


def register(name: str) -> Callable[[Builder], Builder]:
    """Register a function that builds a model from plain (JSON) keyword arguments."""

    def add(builder: Builder) -> Builder:
        if name in _BUILDERS and _BUILDERS[name] is not builder:
            raise ValueError(f"a model named {name!r} is registered already")
        _BUILDERS[name] = builder
        return builder

    return add


def names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(sorted(_BUILDERS))


def arguments(name: str) -> tuple[str, ...]:
    """The arguments that a registered model takes by name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(names())}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(_BUILDERS[name]).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


def create(name: str, /, **kwargs: Any) -> nn.Module:
    """Build a registered model. It remembers its name and arguments, so that files can hold them.

    Raises:
        ValueError: for an unknown name, or arguments that the model refuses.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}; known are {', '.join(names())}")
    try:
        inspect.signature(_BUILDERS[name]).bind(**kwargs)
    except TypeError as error:
        raise ValueError(f"model {name!r}: {error}") from error
    model = _BUILDERS[name](**kwargs)
    setattr(model, _MARK, (name, kwargs))
    return model


def architecture_of(model: nn.Module) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a model that :func:`create` built, or None."""
    return getattr(model, _MARK, None)


def float_layers(model: nn.Module) -> dict[str, None]:
    """Layers that the model's author wants left float, as overrides for ``foldbit.quantize_``.

    A model says so with an attribute ``float_layers``, names or shell-style patterns.
    """
    names = [name for name, _ in model.named_modules()]
    patterns = getattr(model, "float_layers", ())
    return {p: None for p in patterns if any(fnmatchcase(name, p) for name in names)}
