"""The recipes that come with foldbit, and accuracies that are known of them: published ones and our own."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from foldbit.tables import table
from foldbit.training import composition, recipes


@dataclass(frozen=True)
class Source:
    """Where accuracies come from.

    Attributes:
        name: as the table names it.
        says: who says so, in words.
        ours: whether foldbit was trained for it; else others published it.
    """

    name: str
    says: str
    ours: bool = False


@dataclass(frozen=True)
class Accuracy:
    """What a network of a recipe reaches on the test images, or ImageNet's validation images.

    Attributes:
        weight: scheme of its weights.
        activation: scheme of its activations.
        top1: percent of images whose class it names.
        source: who says so.
        top5: percent of images whose class is among its first five.
        spread: standard deviation of top1 over seeds.
    """

    weight: str
    activation: str
    top1: float
    source: Source
    top5: float | None = None
    spread: float | None = None

    def __str__(self) -> str:
        digits = 1 if round(self.top1, 1) == self.top1 else 2
        spread = "" if self.spread is None else f" ± {self.spread:.{digits}f}"
        top5 = "" if self.top5 is None else f" / {self.top5:.{digits}f}"
        return f"{self.top1:.{digits}f}{spread}{top5}"


def accuracies() -> dict[str, list[Accuracy]]:
    """What is known, by recipe."""
    held = yaml.safe_load((resources.files("foldbit") / "recipes" / "published.yaml").read_text("utf-8"))
    sources = {name: Source(name, **fields) for name, fields in held["sources"].items()}
    return {
        recipe: [Accuracy(**{**row, "source": sources[row["source"]]}) for row in rows]
        for recipe, rows in held["accuracies"].items()
    }


def overview() -> str:
    """A table of all recipes: what each trains, for how long, and the accuracies that are known of it."""
    known = accuracies()
    rows = [row for name in composition.names() for row in _rows(name, known.get(name, []))]
    header = [
        "recipe",
        "epochs",
        "weight/\nactivation",
        "published\ntop-1 / top-5",
        "ours\ntop-1",
        "source",
        "trains",
    ]
    sources = {a.source.name: a.source.says for of_recipe in known.values() for a in of_recipe}
    notes = [
        "Test accuracies, in percent; the first row of a recipe is what it trains unless told otherwise:",
        "  foldbit train --recipe imagenet/resnet18 --weight ls-1 --activation gf-2 --run FOLDER",
        "Published numbers are of other code. Sources:",
        *(f"  {name}: {says}" for name, says in sources.items()),
        "`foldbit recipes NAME` shows a recipe whole; docs/recipes.md says how they build on each other.",
    ]
    return "\n".join([table(header, rows), "", *notes])


def description(name: str, *, weight: str | None = None, activation: str | None = None) -> str:
    """A recipe whole, as YAML that is a recipe again, with what is known of it as comments.

    Args:
        name: a packaged recipe.
        weight: scheme of the weights, instead of the recipe's.
        activation: scheme of the activations, likewise.

    Raises:
        ValueError: for an unknown recipe or scheme.
    """
    path = composition.path_of(name)
    lines = [f"{name}: {composition.about(path)}", *_known_in_words(accuracies().get(name, []))]
    own = recipes.load(path, weight=weight, activation=activation)
    for scheme in composition.variants(path):
        changed = _differences(own, recipes.load(path, weight=weight, activation=scheme))
        if f"quant.activation {scheme}" in changed:
            lines.append(f"--activation {scheme} makes it {', '.join(changed)}")
    comments = [textwrap.fill(line, 110, initial_indent="# ", subsequent_indent="#   ") for line in lines]
    fields = yaml.safe_dump(dataclasses.asdict(own), sort_keys=False, default_flow_style=None, width=110)
    return "\n".join([*comments, fields.rstrip()])


def _known_in_words(known: list[Accuracy]) -> list[str]:
    """A line for each source."""
    by_source: dict[Source, list[str]] = {}
    for accuracy in known:
        schemes = f"{accuracy.weight}/{accuracy.activation}"
        by_source.setdefault(accuracy.source, []).append(f"{schemes} {accuracy}")
    return [
        f"{'ours' if source.ours else 'published'}, {source.says}: {', '.join(numbers)}"
        for source, numbers in by_source.items()
    ]


def _rows(name: str, known: list[Accuracy]) -> list[list[Any]]:
    """A recipe's rows, the first one for the schemes that it states."""
    path = composition.path_of(name)
    recipe = recipes.load(path)
    stated = ("fp", "fp") if recipe.quant is None else (recipe.quant.weight, recipe.quant.activation)
    first = next((a for a in known if (a.weight, a.activation) == stated), None)
    rows = [[name, recipe.epochs, *_cells(*stated, first), composition.about(path)]]
    return rows + [["", "", *_cells(a.weight, a.activation, a), ""] for a in known if a is not first]


def _cells(weight: str, activation: str, accuracy: Accuracy | None) -> list[str]:
    schemes = f"{weight}/{activation}"
    if accuracy is None:
        return [schemes, "-", "-", ""]
    both = ["-", str(accuracy)] if accuracy.source.ours else [str(accuracy), "-"]
    return [schemes, *both, accuracy.source.name]


def _differences(one: recipes.Recipe, other: recipes.Recipe) -> list[str]:
    before, after = (dict(_leaves(dataclasses.asdict(recipe))) for recipe in (one, other))
    return [f"{name} {value}" for name, value in after.items() if before.get(name) != value]


def _leaves(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
