"""Trainings side by side: what each of several run folders trained, how well, how long, and how it went."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from foldbit.analysis import curves, report
from foldbit.tables import table
from foldbit.training import journal, runs
from foldbit.training.journal import Record
from foldbit.training.recipes import Recipe


@dataclass(frozen=True)
class Training:
    """What a run folder says of its training.

    Attributes:
        folder: the run folder.
        recipe: what it trained.
        metrics: a record an epoch.
        losses: a record every so many steps.
        warnings: how many there were.
    """

    folder: Path
    recipe: Recipe
    metrics: Sequence[Record]
    losses: Sequence[Record]
    warnings: int

    @property
    def last(self) -> float:
        """The newest test accuracy; NaN before the first epoch's end."""
        return self.metrics[-1]["test_accuracy"] if self.metrics else float("nan")

    @property
    def best(self) -> float:
        """The best one."""
        return max((record["test_accuracy"] for record in self.metrics), default=float("nan"))

    @property
    def seconds(self) -> float:
        """That its epochs took, evaluation included."""
        return sum(record["seconds"] for record in self.metrics)


def run(paths: Sequence[str], out: str | Path = "compare.html") -> str:
    """Compare trainings: write a page with their curves, and tell the tables.

    Args:
        paths: run folders, or folders with run folders in them; what else is among them is left out and said.
        out: the page, one file that works offline.

    Raises:
        ValueError: where there is no run folder, or the page's name does not serve.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page's name ends in .html; got {out}")
    if not out.parent.is_dir():
        raise ValueError(f"there is no folder {out.parent} for the page; make it first")
    found, left = find(paths)
    if not found:
        raise ValueError(f"no run folder among {', '.join(paths)}; `foldbit train` makes them")
    names, together = _names([training.folder for training in found]), groups(found)
    parts: list[report.Text | report.Table | report.Picture] = [
        report.Table(_HEADER, _rows(found, names)),
    ]
    drawn = {_title(group, names): [_curve(t) for t in group if t.metrics] for group in together}
    drawn = {name: lines for name, lines in drawn.items() if lines}
    if drawn:
        parts.append(report.Picture(curves.trainings(drawn), _CAPTION))
    of_seeds = [group for group in together if len(group) > 1]
    if of_seeds:
        parts.insert(1, report.Table(_SEEDS_HEADER, _seed_rows(of_seeds, names), _SEEDS_NOTE))
    report.write_page(
        out, "Trainings side by side", f"{len(found)} run folders.", [report.Section("Results", parts)]
    )
    said = [table(_HEADER, _rows(found, names))]
    if of_seeds:
        said += ["", table(_SEEDS_HEADER, _seed_rows(of_seeds, names)), textwrap.fill(_SEEDS_NOTE, 100)]
    said += [f"left out: {_printable(str(path))} ({_printable(why)})" for path, why in left.items()]
    return "\n".join([*said, f"curves: {out}"])


def find(paths: Iterable[str | Path]) -> tuple[list[Training], dict[Path, str]]:
    """The trainings of run folders, in their order, and what is none, with the reason."""
    found: list[Training] = []
    left: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_file():
            left[path] = "a file"
            continue
        try:
            inside = (
                sorted(p for p in path.iterdir() if (p / "config.yaml").is_file()) if path.is_dir() else []
            )
            folders = [path] if (path / "config.yaml").is_file() or not inside else inside
        except OSError as error:
            left[path] = str(error)
            continue
        for folder in folders:
            try:
                found.append(read(folder))
            except (ValueError, OSError) as error:
                left[folder] = str(error)
    return found, left


def read(folder: Path) -> Training:
    """What a run folder says of its training.

    Raises:
        ValueError: where it is none, or its files are damaged.
        OSError: where they cannot be read.
    """
    recipe = runs.recipe_of(folder)
    metrics = journal.records(folder / "metrics.jsonl")
    losses = journal.records(folder / "losses.jsonl")
    for records, keys in ((metrics, ("epoch", "test_accuracy", "seconds")), (losses, ("step", "loss"))):
        if not all(_sound(record.get(key), key) for record in records for key in keys):
            raise ValueError(f"a record of {folder} lacks one of {', '.join(keys)}, or it is no such number")
    if not all(_sound(record.get("step", 1), "step") for record in metrics):
        raise ValueError(f"a record of {folder} has a step that is no number of steps")
    return Training(folder, recipe, metrics, losses, len(journal.records(folder / "warnings.jsonl")))


def _sound(value: object, key: str) -> bool:
    """Whether a record's value can be counted with: epochs and steps are counted from 1."""
    return isinstance(value, int | float) and (1 if key in ("epoch", "step") else -1e300) <= value <= 1e300


def groups(found: Sequence[Training]) -> list[list[Training]]:
    """Trainings that differ in their seed alone, and so in the weights they start from and their teacher."""
    together: dict[str, list[Training]] = {}
    for training in found:
        recipe = training.recipe
        taught = recipe.distill and dataclasses.replace(recipe.distill, teacher="a teacher")
        started = recipe.init and "weights"
        alike = dataclasses.replace(recipe, seed=0, init=started, distill=taught)
        together.setdefault(repr(alike), []).append(training)
    return list(together.values())


_HEADER = [
    *["run", "network", "weights /\nactivations", "teacher", "epochs", "test accuracy\nlast"],
    *["\nbest", "seconds", "warnings"],
]
_SEEDS_HEADER = ["seeds", "runs", "test accuracy\nlast", "\nbest"]
_SEEDS_NOTE = (
    "Mean ± standard deviation over finished trainings that differ in their seed alone, and so in the "
    "weights they start from. The best of a training's epochs is chosen by the test images, and flatters."
)
_CAPTION = (
    "Test accuracy after each epoch, and the mean training loss between looks at it, of trainings with a "
    "finished epoch. Those that differ in their seed alone have one colour. With a teacher the loss is "
    "another one, and does not compare."
)


def _rows(found: Sequence[Training], names: Mapping[Path, str]) -> list[list[str]]:
    rows = []
    for training in found:
        recipe, done = training.recipe, len(training.metrics)
        teacher = "-" if recipe.distill is None else Path(recipe.distill.teacher).name
        rows.append(
            [
                names[training.folder],
                _printable(recipe.model),
                _schemes(recipe),
                _printable(teacher),
                str(done) if done == recipe.epochs else f"{done} of {recipe.epochs}",
                f"{training.last:.2%}" if done else "-",
                f"{training.best:.2%}" if done else "-",
                f"{training.seconds:,.0f}",
                str(training.warnings or "-"),
            ]
        )
    return rows


def _seed_rows(of_seeds: Sequence[Sequence[Training]], names: Mapping[Path, str]) -> list[list[str]]:
    rows = []
    for group in of_seeds:
        finished = [t for t in group if len(t.metrics) == t.recipe.epochs]
        rows.append(
            [
                _title(group, names),
                str(len(finished)) + ("" if len(finished) == len(group) else f" of {len(group)} finished"),
                *(
                    _mean_and_spread([getattr(training, which) for training in finished])
                    for which in ("last", "best")
                ),
            ]
        )
    return rows


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread} %"


def _schemes(recipe: Recipe) -> str:
    return "float" if recipe.quant is None else f"{recipe.quant.weight} / {recipe.quant.activation}"


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The folders' last names, or as much of their paths as tells them apart, printable."""
    whole = {folder: folder.resolve().parts for folder in folders}
    length = 1
    while len({parts[-length:] for parts in whole.values()}) < len({*whole.values()}):
        length += 1
    return {folder: _printable("/".join(parts[-length:])) for folder, parts in whole.items()}


def _printable(text: str) -> str:
    """The text, with codes for what cannot be printed: the name of a folder may hold any byte."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _title(group: Sequence[Training], names: Mapping[Path, str]) -> str:
    first, *more = (names[training.folder] for training in group)
    return ", ".join([first, *more]) if len(more) < 3 else f"{first} and {len(more)} more"


def _curve(training: Training) -> report.Curve:
    newest = training.metrics[-1]
    steps_an_epoch = (
        newest.get("step", training.losses[-1]["step"] if training.losses else 1) / newest["epoch"]
    )
    return report.Curve(
        [(record["epoch"], record["test_accuracy"]) for record in training.metrics],
        [(record["step"] / steps_an_epoch, record["loss"]) for record in training.losses],
    )
