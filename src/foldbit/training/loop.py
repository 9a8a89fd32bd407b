"""One loop: train a recipe into a run folder, stop at any step, go on from there.

A run folder holds

    config.yaml       the recipe
    metrics.jsonl     a line an epoch
    losses.jsonl      a line every 20 steps, and at an epoch's end: the mean training loss since the last
    tensorboard/      both, as curves
    checkpoint/       the newest state: model.safetensors, optimizer, schedule, random numbers, progress

A checkpoint is written after every epoch and when training is interrupted, under a temporary name and then
renamed. Resuming repeats nothing: images come in the order they would have come in.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from foldbit import timing
from foldbit.calibrate import CalibrationReport
from foldbit.calibrate import calibrate as calibrate_
from foldbit.core.config import QuantConfig
from foldbit.training import data as datasets
from foldbit.training import recipes
from foldbit.training.images import ImageData, ImageSet, batches
from foldbit.training.recipes import Recipe

_LOG_EVERY = 20  # steps


class RunError(ValueError):
    """A run folder cannot be used as asked."""


@dataclass
class Progress:
    """Where training stands: finished epochs, steps into the next one, its sums so far, and those logged."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    images: int = 0
    logged_loss: float = 0.0
    logged_images: int = 0

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From checkpoints."""
        vars(self).update(state)


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        model: the network, in evaluation mode, with the newest weights.
        metrics: a record an epoch, as in metrics.jsonl.
        losses: a record every 20 steps, as in losses.jsonl.
        finished: False where it was interrupted.
        steps: how many this call took; none where an earlier one had finished.
    """

    model: nn.Module
    metrics: list[dict[str, float]]
    losses: list[dict[str, float]]
    finished: bool
    steps: int


def train(
    recipe: Recipe,
    run: str | os.PathLike[str],
    *,
    images: ImageData | None = None,
    threads: int | None = None,
) -> Outcome:
    """Train a recipe into a run folder, or go on where an earlier call was interrupted.

    Nothing is written before the model, the weights to start from and the data have been found and fit.

    Args:
        recipe: what to train and how.
        run: the folder; created where it is missing. One without a checkpoint is taken over.
        images: the data, where the caller has loaded them already.
        threads: of torch, on the CPU; None tries out whether one is faster than all, as beside other work
            it often is. Sums are rounded in another order on another number of threads, so that a seed
            repeats a training to the last digit only on as many.

    Raises:
        RunError: where the folder holds a run of another recipe, or ``init`` one of another model, or a
            checkpoint is damaged.
        FloatingPointError: where the loss stops being finite.
    """
    run = Path(run)
    resuming = _may_use(run, recipe)
    accelerator = Accelerator(mixed_precision=recipe.precision)
    set_seed(recipe.seed)
    model = recipes.build(recipe)
    if recipe.init is not None and not resuming:
        _load_weights(model, Path(recipe.init))
    images = images or load_data(recipe)
    train_set = images.train
    if recipe.data.train_images is not None:
        train_set = train_set[: recipe.data.train_images]
    normalize = (images.mean, images.std)
    loader = batches(
        train_set, recipe.batch_size, shuffle=True, seed=recipe.seed, normalize=normalize, drop_last=True
    )
    optimizer = _optimizer(recipe, model)
    schedule = _schedule(recipe, optimizer, len(loader) * recipe.epochs)
    progress = Progress()
    _claim(run, recipe)
    trial = copy.deepcopy(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    # The schedule stays out of prepare(), which would advance it once a process; it advances once a step.
    accelerator.register_for_checkpointing(schedule, progress)
    if (run / "checkpoint").exists():
        _load_checkpoint(accelerator, run / "checkpoint")
    steps_done = progress.epoch * len(loader) + progress.step
    metrics = _records_until(run / "metrics.jsonl", "epoch", progress.epoch)
    losses = _records_until(run / "losses.jsonl", "step", steps_done)
    if progress.epoch >= recipe.epochs:
        return Outcome(accelerator.unwrap_model(model).cpu().eval(), metrics, losses, finished=True, steps=0)
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=steps_done + 1)

    def log_loss(loss: float) -> None:
        record = {"step": progress.epoch * len(loader) + progress.step, "loss": loss}
        losses.append(record)
        if accelerator.is_main_process:
            _append(run / "losses.jsonl", record)
            writer.add_scalar("loss", loss, record["step"])

    evaluation = accelerator.prepare(
        batches(images.test, 1000, shuffle=False, normalize=normalize)
    )  # one epoch's order is any other's

    first_batch = next(iter(batches(train_set, recipe.batch_size, shuffle=False, normalize=normalize)))
    with _threads(threads, accelerator, trial, first_batch) as taken, _interruptions() as interrupted:
        while progress.epoch < recipe.epochs:
            began = time.monotonic()
            _train_epoch(
                accelerator, model, loader, optimizer, schedule, progress, recipe, interrupted, log_loss
            )
            if interrupted:
                _save(accelerator, run)
                print(f"interrupted in epoch {progress.epoch + 1}; the same command goes on from {run}")
                break
            record = {
                "epoch": progress.epoch + 1,
                "train_loss": progress.loss / progress.images,
                "train_accuracy": progress.correct / progress.images,
                "test_accuracy": accuracy(model, evaluation, accelerator),
                "lr": float(schedule.get_last_lr()[0]),
                "seconds": time.monotonic() - began,
                "threads": taken,
            }
            metrics.append(record)
            if accelerator.is_main_process:
                print(
                    f"  epoch {progress.epoch + 1}/{recipe.epochs}: loss {record['train_loss']:.3f}, "
                    f"test accuracy {record['test_accuracy']:.2%}, {record['seconds']:.0f} s",
                    flush=True,
                )
                _append(run / "metrics.jsonl", record)
                for name, value in record.items():
                    writer.add_scalar(name, value, (progress.epoch + 1) * len(loader))
            progress.load_state_dict({**Progress().state_dict(), "epoch": progress.epoch + 1})
            _save(accelerator, run)
    writer.close()
    finished = progress.epoch >= recipe.epochs
    steps = progress.epoch * len(loader) + progress.step - steps_done
    return Outcome(accelerator.unwrap_model(model).cpu().eval(), metrics, losses, finished, steps)


def load_run(run: str | os.PathLike[str]) -> tuple[nn.Module, Recipe]:
    """The network of a run folder with its newest weights, in evaluation mode, and its recipe.

    Raises:
        RunError: where the folder holds no run, or one without a checkpoint yet, or a damaged one.
    """
    recipe = recipe_of(run)
    model = recipes.build(recipe)
    _load_weights(model, Path(run))
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


def load_data(recipe: Recipe, folder: str | os.PathLike[str] | None = None) -> ImageData:
    """The recipe's images, from another folder where one is given."""
    folder = folder or recipe.data.folder
    return datasets.load(recipe.data.name, folder, download=recipe.data.download)


def calibrate(
    model: nn.Module, recipe: Recipe, count: int = 1024, *, images: ImageData | None = None
) -> CalibrationReport:
    """Give a recipe's network static activation scales, from the first ``count`` of its training images.

    Raises:
        RunError: for a count below 1.
        ValueError: as :func:`foldbit.calibrate` does.
    """
    if count < 1:
        raise RunError(f"calibration needs an image at least; got {count}")
    images = images or load_data(recipe)
    chosen = images.train[: min(count, recipe.data.train_images or count)]
    loader = batches(chosen, 256, shuffle=False, normalize=(images.mean, images.std))
    return calibrate_(model, loader)


def images_for(
    what: str | os.PathLike[str],
    recipe: Recipe | None,
    name: datasets.Name | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> ImageData:
    """The images to evaluate a network on: those named, or those of the run that it belongs to.

    Args:
        what: a run folder, or a packed file, which may lie in one.
        recipe: the run folder's.
        name: of the data set.
        folder: where its files are.

    Raises:
        RunError: where no data set is named, and the packed file lies in no run folder.
    """
    if recipe is None and (Path(what).parent / "config.yaml").is_file():
        recipe = recipe_of(Path(what).parent)
    if recipe is not None and name in (None, recipe.data.name):
        return load_data(recipe, folder)
    if name is None:
        raise RunError(
            f"{what} does not say what it was trained on, and lies in no run folder; name the data set: "
            f"--dataset {' or '.join(get_args(datasets.Name))}"
        )
    return datasets.load(name, folder)


@torch.no_grad()
def accuracy_on(
    model: nn.Module, images: ImageData, split: Literal["test", "train"] = "test", threads: int | None = None
) -> float:
    """The share of a data set's images that the model classifies right.

    Args:
        threads: of torch, on the CPU; None tries out whether one is faster than all.
    """
    normalize = (images.mean, images.std)
    some, _ = next(iter(batches(images[split], 64, shuffle=False, normalize=normalize)))
    model.eval()
    with timing.threads(threads, lambda: model(some)):
        right = predictions(model, images[split], normalize) == images[split].labels
    return right.double().mean().item()


@torch.no_grad()
def predictions(
    model: nn.Module, images: ImageSet, normalize: tuple[Sequence[float], Sequence[float]]
) -> Tensor:
    """The class that the model gives each image, int64 ``[N]``."""
    model.eval()
    loader = batches(images, 1000, shuffle=False, normalize=normalize)
    return torch.cat([model(x).argmax(1) for x, _ in loader])


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any, accelerator: Accelerator) -> float:
    """The share of images that the model classifies right, each counted once on any number of processes."""
    model.eval()
    correct, count = 0, 0
    for x, labels in loader:
        hits = accelerator.gather_for_metrics(model(x).argmax(1) == labels)
        correct += int(hits.sum())
        count += len(hits)
    return correct / count


def _train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    progress: Progress,
    recipe: Recipe,
    interrupted: list[int],
    log_loss: Callable[[float], None],
) -> None:
    """Train to the end of the epoch, or to the end of the step in which an interruption came."""
    model.train()
    loader.set_epoch(progress.epoch)
    remaining = skip_first_batches(loader, progress.step) if progress.step else loader
    bar = tqdm(
        remaining,
        total=len(loader),
        initial=progress.step,
        desc=f"epoch {progress.epoch + 1}/{recipe.epochs}",
        unit="batch",
        disable=None if accelerator.is_local_main_process else True,  # None: only on a terminal
        leave=False,
    )
    # Sums stay tensors until somebody looks, so that no step waits for the device.
    loss_sum = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    correct = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    logged_loss, logged_images = progress.logged_loss, progress.logged_images
    for x, labels in bar:
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        loss_sum += loss.detach() * len(labels)
        correct += (logits.detach().argmax(1) == labels).sum()
        progress.step += 1
        progress.images += len(labels)
        if progress.step % _LOG_EVERY == 0 or progress.step == len(loader):
            _check_finite(loss, progress)
            total, seen = progress.loss + loss_sum.item(), progress.images
            log_loss((total - logged_loss) / (seen - logged_images))
            logged_loss, logged_images = total, seen
            bar.set_postfix(
                loss=f"{total / seen:.3f}", accuracy=f"{(progress.correct + correct.item()) / seen:.1%}"
            )
        if interrupted:
            break
    _check_finite(loss_sum, progress)
    progress.loss += loss_sum.item()
    progress.correct += correct.item()
    progress.logged_loss, progress.logged_images = logged_loss, logged_images


def _check_finite(loss: Tensor, progress: Progress) -> None:
    if not loss.isfinite():
        raise FloatingPointError(
            f"the loss is {loss.item()} in epoch {progress.epoch + 1}, by step {progress.step}; "
            "try a lower learning rate. The checkpoint of the last full epoch is kept"
        )


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM comes; a second signal acts at once, as it would have."""
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def remember(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
    except ValueError:  # not the main thread, which alone may handle signals: then nothing is caught
        before = {}
    try:
        yield caught
    finally:
        for caught_signal, handler in before.items():
            signal.signal(caught_signal, handler)


def _may_use(run: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a checkpoint of this recipe, to go on from; refuses a folder of others."""
    config = run / "config.yaml"
    if not config.exists():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise RunError(f"{run} exists, is not an empty folder and holds no run; pick another folder")
        return False
    before = recipes.load(config)  # a file of that name that is no recipe is refused: it is another's
    if not any((run / name).exists() for name in ("checkpoint", "checkpoint.old")):
        return False
    if before != recipe:
        raise RunError(
            f"{run} holds a run of another recipe: {', '.join(_differences(before, recipe))}; "
            "pick another folder, or delete it"
        )
    return True


def _claim(run: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's."""
    if (run / "checkpoint.old").exists() and not (run / "checkpoint").exists():
        (run / "checkpoint.old").rename(run / "checkpoint")  # killed between the two renames of _save
    run.mkdir(parents=True, exist_ok=True)
    recipes.save(recipe, run / "config.yaml")


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Which fields differ, ``lr 0.01 -> 0.02``, down into records."""
    if dataclasses.is_dataclass(before) and type(before) is type(now):
        for field in dataclasses.fields(before):
            inner = f"{name}.{field.name}" if name else field.name
            yield from _differences(getattr(before, field.name), getattr(now, field.name), inner)
    elif before != now:
        yield f"{name} {_in_short(before)} -> {_in_short(now)}"


def _in_short(value: Any) -> str:
    return value.name if isinstance(value, QuantConfig) else str(value)


@contextmanager
def _threads(
    asked: int | None, accelerator: Accelerator, trial: nn.Module, batch: tuple[Tensor, Tensor]
) -> Iterator[int]:
    """Train on as many threads as are asked for, or pay just now, by a copy of the model and some images."""
    if accelerator.device.type != "cpu":
        yield torch.get_num_threads()
        return
    x, labels = batch

    def step() -> None:
        with torch.random.fork_rng(devices=[]):  # training draws what it would have drawn
            F.cross_entropy(trial(x), labels).backward()

    with timing.threads(asked, step, accelerator.print) as taken:
        yield taken


def _load_weights(model: nn.Module, run: Path) -> None:
    """The newest weights of a run."""
    path = run / "checkpoint" / "model.safetensors"
    if not run.is_dir():
        raise RunError(f"there is no folder {run} to take weights from")
    if not path.is_file():
        raise RunError(f"{run} has no checkpoint yet ({path.name} is missing in it); train it first")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged ({error}); train that run again, from another folder") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"the weights of {run} do not fit this model: {_line(error)}") from error


def _load_checkpoint(accelerator: Accelerator, path: Path) -> None:
    damage = (SafetensorError, RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError)
    try:
        accelerator.load_state(str(path))
    except damage as error:
        raise RunError(
            f"the checkpoint {path} is damaged ({_line(error)}); delete it to train from the beginning"
        ) from error


def _line(error: Exception) -> str:
    """An error's first words, on a line: torch lists every tensor that does not fit."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) + (" ..." if len(lines) > 2 else "") if lines else type(error).__name__


def _save(accelerator: Accelerator, run: Path) -> None:
    """Write a checkpoint beside the old one, then put it in its place."""
    new, old = run / "checkpoint.new", run / "checkpoint.old"
    accelerator.save_state(str(new))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if (run / "checkpoint").exists():
            (run / "checkpoint").rename(old)
        new.rename(run / "checkpoint")
        shutil.rmtree(old, ignore_errors=True)


def _append(path: Path, record: dict[str, float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _records_until(path: Path, key: str, last: int) -> list[dict[str, float]]:
    """The records up to a checkpoint's epoch or step; a kill may have left later ones, which are dropped."""
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [record for record in records if record[key] <= last]
    if len(kept) < len(records):
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def _schedule(
    recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "one-cycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps + 1)
    end = 1e-3 if recipe.schedule == "linear" else 1.0
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=steps)
