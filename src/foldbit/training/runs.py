"""Run folders: who may write into one, and what can be had from it.

A run folder holds

    config.yaml       the recipe
    lock              locked by the process that trains there, where the system can; the file stays, empty
    classes.json      the names of the classes, in the order of the network's outputs
    metrics.jsonl     a line an epoch
    losses.jsonl      a line every so many steps, and at an epoch's end: the mean training loss since the last
    warnings.jsonl    a line a warning, where there were any
    tensorboard/      all of them as curves, and statistics of the quantized layers
    checkpoint/       the newest state (:mod:`foldbit.training.checkpoints`)
    best/             where it was asked for: a run folder of its own, with the weights of the best epoch
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from foldbit import options
from foldbit.core.config import QuantConfig
from foldbit.models import pretrained
from foldbit.packed import files
from foldbit.training import checkpoints, recipes
from foldbit.training.recipes import Recipe

CLASSES = "classes.json"
LOCK = "lock"


class RunError(ValueError):
    """A run folder cannot be used as asked."""


def load_run(run: str | os.PathLike[str]) -> tuple[nn.Module, Recipe]:
    """The network of a run folder with its newest weights, in evaluation mode, and its recipe.

    Raises:
        RunError: where the folder holds no run, or one without a checkpoint yet, or a damaged one.
    """
    recipe = recipe_of(run)
    model = recipes.build(recipe)
    load_weights(model, Path(run))
    return model.eval(), recipe


def recipe_of(run: str | os.PathLike[str]) -> Recipe:
    """The recipe of a run folder.

    Raises:
        RunError: where there is none.
    """
    run = Path(run)
    if not run.is_dir():
        raise RunError(f"there is no folder {run}")
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run} is not a run folder: it has no config.yaml; make one with `foldbit train`")
    return recipes.load(run / "config.yaml")


def start_from(model: nn.Module, init: str) -> tuple[str, ...]:
    """Fill a model with the weights that a recipe's ``init`` names: a run's, a library's, or a file's.

    Returns:
        The names of tensors that keep the values they have, such as a classifier for other classes.

    Raises:
        RunError: where a run has none, or they do not fit.
        PretrainedError: likewise of a library or a file.
    """
    if pretrained.is_source(init) and not Path(init).is_dir():
        return pretrained.load_weights(model, init)
    load_weights(model, Path(init))
    return ()


def load_weights(model: nn.Module, run: Path) -> None:
    """Fill a model with the newest weights of a run.

    Raises:
        RunError: where there are none, or they do not fit.
    """
    if not run.is_dir():
        raise RunError(f"there is no folder {run} to take weights from")
    path = checkpoints.newest(run)
    if path is None or not (path / checkpoints.WEIGHTS).is_file():
        raise RunError(
            f"{run} has no checkpoint yet ({checkpoints.WEIGHTS} is missing in it); train it first"
        )
    try:
        weights = checkpoints.read_weights(path)
    except checkpoints.Damaged as error:
        raise RunError(f"{error}; train that run again, from another folder") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"the weights of {run} do not fit this model: {checkpoints.line(error)}") from error


def may_use(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a checkpoint of this recipe, to go on from.

    Raises:
        RunError: where the folder is another recipe's, or somebody's who does not know foldbit, or holds a
            config.yaml that a person wrote and no checkpoint, or has a name that is not Unicode.
    """
    config = run / "config.yaml"
    if not options.is_unicode(str(run)):
        raise RunError(
            f"a run folder's name is Unicode, for TensorBoard; got {str(run)!a}; pick another folder"
        )
    if not config.exists():
        begun = {LOCK, _UNFINISHED}  # what a kill leaves of a start
        if run.exists() and (not run.is_dir() or {path.name for path in run.iterdir()} - begun):
            raise RunError(f"{run} exists, is not an empty folder and holds no run; pick another folder")
        return False
    before = recipes.load(config)  # a file of that name that is no recipe is refused: it is another's
    path = checkpoints.newest(run)
    if path is None:
        if not recipes.is_dump(config.read_text("utf-8")):
            raise RunError(
                f"{config} was not written by foldbit train, which would replace it; pick another run folder "
                "(--config takes this file from where it is)"
            )
        return False
    if not (path / checkpoints.TRAINING).is_file():
        raise RunError(f"{path} holds weights alone, from which no training can go on; pick another folder")
    if before != recipe:
        raise RunError(
            f"{run} holds a run of another recipe: {', '.join(differences(before, recipe))}; "
            "pick another folder, or delete it"
        )
    return True


@contextmanager
def claimed(run: Path, recipe: Recipe, classes: Sequence[str], *, resuming: bool) -> Iterator[None]:
    """Make the folder this recipe's, trained on images of these classes; nobody else trains there meanwhile.

    On Windows, and on file systems that know no locks, nobody else is kept away.

    Args:
        run: the folder.
        recipe: what is trained.
        classes: of its images.
        resuming: what :func:`may_use` said.

    Raises:
        RunError: where another training goes on there, or has since :func:`may_use` looked; for a full disk.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("a") as file:
        _lock(file, run)
        if may_use(run, recipe) != resuming:
            raise RunError(f"another training was in {run} just now; give the same command again")
        try:
            checkpoints.settle(run)
            if not resuming:  # else it is there, and says the same
                recipes.save(recipe, run / _UNFINISHED)
                (run / _UNFINISHED).replace(run / "config.yaml")
            files.write(run / CLASSES, json.dumps(list(classes)).encode())
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise RunError(
                f"the disk is full: {error.filename or run} could not be written; make room, and the same "
                "command goes on from the last checkpoint"
            ) from error


_UNFINISHED = "config.yaml.new"


_locked: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def _lock(file: IO[str], run: Path) -> None:
    """Lock an open file until it is closed; the system unlocks it when the process ends, however that comes.

    The lock is this open file's, and so keeps others in the same process away, too.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RunError(
                f"another training is going on in {run}; wait until it ends, or pick another folder"
            ) from error
        # Some file systems know no locks: there it is up to the user, as it was.
    _locked.add(file)


def _let_go() -> None:
    """Close, in a forked child, the files that its parent locked, which leaves them to the parent alone.

    Children that read images may outlive a kill by seconds, and would keep the folder locked.
    """
    for file in list(_locked):
        file.close()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_let_go)


def check_classes(run: Path, classes: Sequence[str]) -> None:
    """Refuse images whose classes are not those that a run was trained on, in the same order.

    Raises:
        RunError: for them. A folder that does not say its classes accepts all.
    """
    path = run / CLASSES
    if not path.is_file():
        return
    try:
        known = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error})") from error
    if known != list(classes):
        raise RunError(
            f"{run} was trained on the {len(known)} classes {_list(known)}; these images have "
            f"{len(classes)}: {_list(classes)}. Its outputs would be counted as other classes"
        )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")


def keep_best(run: Path, weights: Mapping[str, Tensor]) -> None:
    """Keep weights as RUN/best, a run folder of its own, which evaluates, packs and starts others."""
    place = run / "best" / "checkpoint"
    place.mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", CLASSES):
        files.write(run / "best" / name, (run / name).read_bytes())
    checkpoints.write_weights(place / checkpoints.WEIGHTS, weights)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Which fields differ, ``lr 0.01 -> 0.02``, down into records."""
    if dataclasses.is_dataclass(before) and type(before) is type(now):
        for field in dataclasses.fields(before):
            inner = f"{name}.{field.name}" if name else field.name
            yield from differences(getattr(before, field.name), getattr(now, field.name), inner)
    elif before != now:
        yield f"{name} {_in_short(before)} -> {_in_short(now)}"


def _in_short(value: Any) -> str:
    return value.name if isinstance(value, QuantConfig) else str(value)
