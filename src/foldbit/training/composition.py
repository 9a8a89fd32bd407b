"""How recipes build on each other: YAML files that say only what they change.

    base: imagenet/resnet18        # a recipe of foldbit's, or a file, relative to this one
    epochs: 100                    # what differs from it
    by_activation:                 # what else differs where activations have that scheme
      ls-1: {quant: {clamp: 2.0}}

Mappings are merged key by key; anything else replaces what the base says. Settings for a scheme change those
of their own file and of its bases; a file that builds on it changes them again.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from foldbit import options
from foldbit.core import schemes
from foldbit.core.config import QuantConfig

#: What a file may say beside the fields of a recipe; ``about`` describes it in a line.
KEYS = ("base", "about", "by_activation")


_OPTIONS = {"recipe": "base: ...", "weight": "quant: {weight: ...}", "activation": "quant: {activation: ...}"}


def names() -> tuple[str, ...]:
    """The recipes that come with foldbit, ``imagenet/resnet18``: files in folders by data set."""
    root = _root()
    return tuple(sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*.yaml")))


def path_of(name: str) -> Path:
    """The YAML file of a packaged recipe.

    Raises:
        ValueError: for an unknown name.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"unknown recipe {name!r}{meant} `foldbit recipes` lists them; --config takes a file of your own"
        )
    return _root() / f"{name}.yaml"


def resolve(
    path: str | os.PathLike[str], *, weight: str | None = None, activation: str | None = None
) -> dict[str, Any]:
    """What a recipe's file says with all that it builds on, as plain nested values.

    Args:
        path: the file.
        weight: scheme of the weights, instead of the file's.
        activation: scheme of the activations, likewise, with the settings that go with it.

    Raises:
        ValueError: where a file is missing or is no recipe, or files build on each other in a circle.
    """
    levels = _levels(Path(path))
    scheme = activation or _activation(levels)
    merged: dict[str, Any] = {}
    for level in levels:
        merged = merge(merged, {key: value for key, value in level.items() if key not in KEYS})
        merged = merge(merged, level.get("by_activation", {}).get(scheme, {}))
    chosen = {key: s for key, s in (("weight", weight), ("activation", activation)) if s is not None}
    return merge(merged, {"quant": chosen}) if chosen else merged


def variants(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The schemes of activations that a recipe has settings for."""
    return tuple(dict.fromkeys(s for level in _levels(Path(path)) for s in level.get("by_activation", {})))


def about(path: str | os.PathLike[str]) -> str:
    """What a recipe says about itself, in a line."""
    return str(_levels(Path(path))[-1].get("about", ""))


def spell(fields: Mapping[str, Any]) -> list[str]:
    """Fields of a recipe as arguments of the command line, which takes them at their place among others."""
    inner = fields.get("model_args")
    if not isinstance(inner, Mapping):
        return [f"--config={json.dumps(dict(fields))}"]
    # One by one: a mapping would take the place of all that came earlier on the line.
    rest = {key: value for key, value in fields.items() if key != "model_args"}
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in inner.items()}
    return [f"--config={json.dumps(rest)}", *(f"--model_args.{key}={word}" for key, word in words.items())]


def spell_out(arguments: list[str]) -> list[str]:
    """Recipes by name, and files, as the fields that they come to, each at its place among the options.

    ``--weight`` and ``--activation`` go into each of them; without any they are fields like others.

    Args:
        arguments: of a command line, the command first.

    Raises:
        ValueError: for an option without its value, and as :func:`resolve` does.
    """
    pairs = _pairs(arguments)
    schemes = {option[2:]: value for option, value in pairs if option in ("--weight", "--activation")}
    spelled: list[str] = []
    for option, value in pairs:
        if option in ("--recipe", "--config"):
            path = path_of(value) if option == "--recipe" else value
            spelled += spell(resolve(path, **schemes))
        elif option not in ("--weight", "--activation"):
            spelled.append(value)
    if not any(option in ("--recipe", "--config") for option, _ in pairs):
        spelled[1:1] = [f"--quant.{what}={scheme}" for what, scheme in schemes.items()]
    return spelled


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings, the second one's values before the first one's."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """The options that recipes know with their values, anything else with an empty name."""
    pairs = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option not in ("--recipe", "--config", "--weight", "--activation"):
            pairs.append(("", argument))
        elif equals or (value := next(rest, "")):
            pairs.append((option, value))
        else:
            raise ValueError(f"{option} needs a value")
    return pairs


def _activation(levels: Sequence[Mapping[str, Any]]) -> str | None:
    """The scheme of activations that files agree on; None for a float network."""
    scheme: str | None = None
    for level in levels:
        quant = level.get("quant", {"activation": scheme})
        scheme = (
            quant.get("activation", scheme or QuantConfig.activation) if isinstance(quant, Mapping) else None
        )
    return scheme


def _root() -> Path:
    return Path(str(resources.files("foldbit") / "recipes"))


def _levels(path: Path, above: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """A file's contents and those of all that it builds on, the lowest first."""
    real = path.resolve()
    if real in above:
        circle = " → ".join(p.name for p in (*above[above.index(real) :], real))
        raise ValueError(f"recipes build on each other in a circle: {circle}")
    level = _read(path)
    base = level.get("base")
    if base is None:
        return [level]
    try:
        below = path.parent / base if base.endswith((".yaml", ".yml")) else path_of(base)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from error
    return [*_levels(below, (*above, real)), level]


def _read(path: Path) -> dict[str, Any]:
    """A file's mapping, as far as composition looks into it checked."""
    try:
        with path.open(encoding="utf-8") as file:
            held = options.from_yaml(file.read(options.LONGEST + 1))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text, and so no recipe: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if held is None:
        return {}
    if not isinstance(held, dict) or not all(isinstance(key, str) for key in held):
        raise ValueError(f"{path} is not a recipe: expected fields and their values; got {held!r:.80}")
    for key in ("base", "about"):
        if not isinstance(held.get(key, ""), str):
            raise ValueError(f"{path}: {key} is text; got {held[key]!r:.80}")
    for key, instead in _OPTIONS.items():
        if held.pop(key, None) is not None:  # null is what --print_config prints
            raise ValueError(f"{path}: {key!r} is an option of the command line; in a file write {instead!r}")
    settings = held.get("by_activation", {})
    if not isinstance(settings, dict) or not all(isinstance(inner, dict) for inner in settings.values()):
        raise ValueError(
            f"{path}: by_activation gives fields for schemes, as ls-1: {{quant: {{clamp: 2.0}}}}"
        )
    for scheme in settings:
        try:
            schemes.parse(scheme)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: by_activation: {error}") from error
    return held
