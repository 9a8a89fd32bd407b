"""One loop: train a recipe into a run folder, stop at any step, go on from there, on one process or on many.

What lies in the folder: :mod:`foldbit.training.runs`. Going on repeats nothing and loses nothing: on the CPU,
and on as many processes and threads, weights, optimizer and metrics come out bit for bit as without the stop.

The loop never waits for the device, but for a look at the loss every ``look_every`` steps.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from foldbit import options, timing
from foldbit.training import distill, evaluate, finite, memory_order, processes, recipes, runs, schedules
from foldbit.training.images import ImageData, Images, batches
from foldbit.training.journal import Journal, Record
from foldbit.training.monitor import Monitor, complaints
from foldbit.training.recipes import Recipe
from foldbit.training.state import Progress, State


@dataclass(frozen=True)
class Outcome:
    """What came of a training.

    Attributes:
        model: the network, in evaluation mode, with the newest weights.
        metrics: a record an epoch, as in metrics.jsonl.
        losses: a record every so many steps, as in losses.jsonl.
        finished: False where it was interrupted.
        steps: how many this call took; none where an earlier one had finished.
        warnings: a record a warning, as in warnings.jsonl.
    """

    model: nn.Module
    metrics: list[Record]
    losses: list[Record]
    finished: bool
    steps: int
    warnings: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Habits:
    """What does not change the numbers of a training, and may differ from call to call.

    Attributes:
        checkpoint_minutes: a checkpoint is written after every epoch, when training is interrupted, and, at
            the next look, when the last one is so old.
        keep_best: keep the weights of the epoch with the best test accuracy, too, in RUN/best. The test
            images chose it, so that its accuracy flatters.
        watch_every: steps from one measurement of the quantized layers to the next; 0 for none.
        look_every: steps from one look at the loss, which waits for the device, to the next.
    """

    checkpoint_minutes: float = 15.0
    keep_best: bool = False
    watch_every: int = 100
    look_every: int = 20

    def __post_init__(self) -> None:
        if self.look_every < 1:
            raise ValueError(f"look_every is a number of steps, at least 1; got {self.look_every}")
        if self.watch_every < 0:
            raise ValueError(f"watch_every is a number of steps, or 0 for never; got {self.watch_every}")
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"checkpoint_minutes is at least 0; got {self.checkpoint_minutes}")


def train(
    recipe: Recipe,
    run: str | os.PathLike[str],
    *,
    images: ImageData | None = None,
    threads: int | None = None,
    habits: Habits = Habits(),
) -> Outcome:
    """Train a recipe into a run folder, or go on where an earlier call stopped.

    Under torchrun every process calls this with the same arguments, the run folder lies where all of them
    see it, and an interruption acts at the next look. Nothing is written before the model, the weights to
    start from, the teacher and the data have been found and fit.

    Args:
        recipe: what to train and how.
        run: the folder; created where it is missing. One without a checkpoint is taken over.
        images: the data, where the caller has loaded them already.
        threads: of torch, on the CPU; None tries out whether one is faster than all, as beside other work it
            often is. Sums are rounded in another order on another number of threads, so that a seed repeats
            a training to the last digit only on as many.
        habits: when to save, to look and to measure.

    Raises:
        RunError: where the folder holds a run of another recipe, or another training goes on there, or
            ``init`` names a run of another model, or a checkpoint is damaged, or the disk is full.
        TeacherError: where the recipe's teacher cannot be had, or does not fit.
        ValueError: where processes cannot share the batch, or for a number of threads out of range.
        FloatingPointError: where the loss stops being finite; it names step and layer.
    """
    run = Path(run)
    options.check_threads(threads)
    accelerator = processes.accelerator()
    with accelerator.local_main_process_first():  # which downloads what the others find then
        images = images or evaluate.load_data(recipe)
        recipe = recipes.fit(recipe, len(images.classes), images.train.shape[0])
        resuming = runs.may_use(run, recipe)
        if resuming:
            runs.check_classes(run, images.classes)
        model = recipes.build(recipe)
        if recipe.init is not None and not resuming:
            kept = runs.start_from(model, recipe.init)
            if kept:
                accelerator.print(f"  not in {recipe.init}, and random as before: {', '.join(kept)}")
        some = _first_batch(recipe, images)
        teacher = distill.load_teacher(recipe, some[0], len(images.classes)) if recipe.distill else None
    set_seed(recipe.seed, device_specific=True)  # processes draw what they draw apart from each other
    training = _Training(accelerator, recipe, run, model, teacher, images, some, habits)
    accelerator.wait_for_everyone()  # all have looked at the folder before it is changed
    first = accelerator.is_main_process
    with runs.claimed(run, recipe, images.classes, resuming=resuming) if first else nullcontext():
        accelerator.wait_for_everyone()
        if resuming:
            training.state.restore(run)
        return training.go_on(threads)


class _Training:
    """The parts of a training, put together, and what is done with them."""

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Recipe,
        run: Path,
        model: nn.Module,
        teacher: nn.Module | None,
        images: ImageData,
        some: tuple[Tensor, Tensor],
        habits: Habits,
    ) -> None:
        self.accelerator, self.recipe, self.run, self.habits = accelerator, recipe, run, habits
        self.some = some
        self.teacher = teacher
        if teacher is not None:  # which has no backward pass
            memory_order.arrange(teacher.to(accelerator.device), torch.channels_last)
        processes.check_shares(recipe.batch_size, accelerator)
        train_set = _train_set(recipe, images)
        normalize, workers = (images.mean, images.std), recipe.data.workers
        loader = batches(
            train_set,
            recipe.batch_size,
            shuffle=True,
            seed=recipe.seed,
            normalize=normalize,
            drop_last=True,
            augment=recipe.data.augment,
            workers=workers,
        )
        evaluated = evaluate.batch_size(train_set.shape, accelerator.num_processes)
        evaluation = batches(images.test, evaluated, shuffle=False, normalize=normalize, workers=workers)
        self.order = memory_order.fastest(model, accelerator.device)
        network = memory_order.arrange(model, self.order)
        optimizer = schedules.optimizer(recipe, network)
        schedule = schedules.schedule(recipe, optimizer, len(loader))
        loader.pin_memory = evaluation.pin_memory = accelerator.device.type == "cuda"
        # The schedule stays out of prepare(), which would advance it once a process; it advances once a step.
        self.model, optimizer, self.loader, self.evaluation = accelerator.prepare(
            network, optimizer, loader, evaluation
        )
        self.state = State(accelerator, network, optimizer, schedule)
        self.statistics = processes.running_statistics(network)
        self.monitor = Monitor(network, habits.watch_every if accelerator.is_main_process else 0)

    def go_on(self, threads: int | None) -> Outcome:
        """Train to the end, or until an interruption."""
        epochs, begun_at = self.recipe.epochs, self._steps_done()
        self.journal = Journal(
            self.run,
            epochs=epochs,
            steps_an_epoch=len(self.loader),
            images_a_step=self.recipe.batch_size,
            epoch=self.state.progress.epoch,
            step=begun_at,
            speaks=self.accelerator.is_main_process,
        )
        if self.state.progress.epoch < epochs:
            try:
                with self._threads(threads) as self.threads, processes.interruptions() as self.interrupted:
                    self.journal.begin(begun_at)
                    self.saved_at = time.monotonic()
                    while self.state.progress.epoch < epochs and self._epoch():
                        self._finish_epoch()
            finally:
                self.journal.close()
        finished = self.state.progress.epoch >= epochs
        if not finished:
            at = self.state.progress.epoch + 1
            self.journal.say(f"interrupted in epoch {at}; the same command goes on from {self.run}")
        steps, kept = self._steps_done() - begun_at, self.journal
        model = memory_order.arrange(self.state.network.cpu(), torch.contiguous_format).eval()
        return Outcome(model, kept.metrics, kept.losses, finished, steps, kept.warnings)

    def _epoch(self) -> bool:
        """Train to the end of the epoch; False where an interruption has stopped it, and is saved."""
        progress = self.state.progress
        self.model.train()
        self.loader.set_epoch(progress.epoch)
        remaining = self.loader
        if progress.step:
            remaining = skip_first_batches(self.loader, progress.step)
            remaining.set_epoch(progress.epoch)
        began = time.monotonic() - progress.seconds
        for x, labels in remaining:
            progress.step += 1
            looks = progress.step % self.habits.look_every == 0 or progress.step == len(self.loader)
            self._step(x.contiguous(memory_format=self.order), labels, looks)
            self.journal.step(progress.epoch)
            progress.seconds = time.monotonic() - began
            stop = bool(self.interrupted) and self.accelerator.num_processes == 1
            if looks:
                stop = self._look()
            if stop:
                self._save()
                return False
        return True

    def _step(self, x: Tensor, labels: Tensor, looks: bool) -> None:
        """A step of training. Unless it looks, or the layers are measured, nothing waits for the device."""
        state, step = self.state, self._steps_done()
        watched = self.monitor.due(step, state.progress.step == len(self.loader))
        with self._precision():
            with self.monitor.watching() if watched else nullcontext():
                logits = self.model(x).float()
            loss = self._loss(logits, x, labels)
        if self._must_check(looks):
            self._check_finite(loss, x)
        state.optimizer.zero_grad()
        self.accelerator.backward(loss)
        state.optimizer.step()
        state.schedule.step()
        processes.average(self.statistics, self.accelerator)
        with torch.no_grad():
            state.sums[0] += loss * len(labels)
            state.sums[1] += (logits.argmax(1) == labels).sum()
        state.progress.unseen_images += len(labels)
        if watched:
            measured = self.monitor.take()
            self.journal.layers(measured, complaints(measured), step)

    def _loss(self, logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of this process's images."""
        if self.teacher is None:
            return F.cross_entropy(logits, labels)
        assert self.recipe.distill is not None
        with torch.no_grad():
            told = self.teacher(x).float()
        return distill.distillation_loss(logits, told, labels, self.recipe.distill)

    def _look(self) -> bool:
        """Record the loss since the last look, and save when it is time; whether anybody asks to stop."""
        state, progress = self.state, self.state.progress
        old = time.monotonic() - self.saved_at >= 60 * self.habits.checkpoint_minutes
        said = [progress.unseen_images, bool(self.interrupted), old and self.accelerator.is_main_process]
        told = torch.cat([state.sums, torch.tensor(said, dtype=torch.float64, device=state.sums.device)])
        sums = self.accelerator.reduce(told, "sum").cpu()
        images, stop, save = sums[2:].tolist()
        state.take_in(sums[:2], int(images))
        self.journal.loss(
            self._steps_done(),
            float(sums[0]) / images,
            progress.loss / progress.images,
            progress.correct / progress.images,
        )
        if save and not stop and progress.step < len(self.loader):
            self._save()
        return bool(stop)

    def _finish_epoch(self) -> None:
        """Evaluate, record and save."""
        progress, began = self.state.progress, time.monotonic()
        right = evaluate.accuracy(self.state.network, self.evaluation, self.accelerator)
        record: Record = {
            "epoch": progress.epoch + 1,
            "step": self._steps_done(),
            "train_loss": progress.loss / progress.images,
            "train_accuracy": progress.correct / progress.images,
            "test_accuracy": right,
            "lr": float(self.state.schedule.get_last_lr()[0]),
            "seconds": progress.seconds + time.monotonic() - began,
            "threads": self.threads,
        }
        best = all(right > earlier["test_accuracy"] for earlier in self.journal.metrics)
        self.state.progress = Progress(epoch=progress.epoch + 1)
        self.journal.epoch(record)
        if best and self.habits.keep_best and self.accelerator.is_main_process:
            runs.keep_best(self.run, self.state.network.state_dict())
        self._save()

    def _save(self) -> None:
        self.journal.to_disk()
        self.state.save(self.run)
        self.saved_at = time.monotonic()

    def _steps_done(self) -> int:
        return self.state.progress.epoch * len(self.loader) + self.state.progress.step

    def _must_check(self, looks: bool) -> bool:
        return looks or self.accelerator.device.type == "cpu"  # which nobody has to wait for

    def _check_finite(self, loss: Tensor, x: Tensor) -> None:
        if loss.isfinite():
            return
        progress, exact = self.state.progress, self._must_check(False) or self.habits.look_every == 1
        where = f"epoch {progress.epoch + 1}, {'at' if exact else 'by'} step {progress.step}"
        with self._precision():
            culprit = finite.culprit(self.state.network, x)
        hint = "" if exact else "; go on with look_every 1 to see in which step and layer it begins"
        raise FloatingPointError(
            f"the loss is {loss.item()} in {where}: {culprit}{hint}. Try a lower learning rate than "
            f"{self.recipe.lr:g}, or a clamp. {self.run} keeps the last checkpoint"
        )

    def _precision(self) -> AbstractContextManager[Any]:
        """The recipe's precision, for the forward passes of training."""
        half = self.recipe.precision == "bf16"
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=half)

    @contextmanager
    def _threads(self, asked: int | None) -> Iterator[int]:
        """Train on as many threads as are asked for, or pay just now: a copy of the model tries them out."""
        if self.accelerator.device.type != "cpu":
            yield torch.get_num_threads()
            return
        network, (x, labels) = copy.deepcopy(self.state.network).train(), self.some

        def step() -> None:
            with torch.random.fork_rng(devices=[]):  # training draws what it would have drawn
                F.cross_entropy(network(x), labels).backward()

        with timing.threads(asked, step, self.accelerator.print) as taken:
            yield taken


def _train_set(recipe: Recipe, images: ImageData) -> Images:
    count = recipe.data.train_images
    return images.train if count is None else images.train[:count]


def _first_batch(recipe: Recipe, images: ImageData) -> tuple[Tensor, Tensor]:
    """Some training images, as they are, and their labels."""
    normalize = (images.mean, images.std)
    some = batches(_train_set(recipe, images), recipe.batch_size, shuffle=False, normalize=normalize)
    batch: tuple[Tensor, Tensor] = next(iter(some))
    return batch
