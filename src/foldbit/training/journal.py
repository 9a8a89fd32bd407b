"""What a training says: on the terminal, in the run folder, and to TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from foldbit.packed import files
from foldbit.training.monitor import Measured

Record = dict[str, Any]


class Journal:
    """Keeps the records of a run, and writes them where people look.

    A line is in its file before the checkpoint that it belongs to. A kill may leave later ones behind, which
    are dropped when the training goes on; so every epoch and every step is recorded once.

    Args:
        run: the run folder.
        epochs: of the whole training.
        steps_an_epoch: how many.
        images_a_step: on all processes together.
        epoch: finished epochs.
        step: finished steps.
        speaks: whether this process is the one that prints and writes; the others only keep records.

    Attributes:
        metrics: a record an epoch.
        losses: a record every so many steps.
        warnings: a record a warning.
    """

    def __init__(
        self,
        run: Path,
        *,
        epochs: int,
        steps_an_epoch: int,
        images_a_step: int,
        epoch: int,
        step: int,
        speaks: bool,
    ) -> None:
        self.run, self.speaks = run, speaks
        self.epochs, self.steps_an_epoch, self.images_a_step = epochs, steps_an_epoch, images_a_step
        self.metrics = records_until(run / "metrics.jsonl", "epoch", epoch, rewrite=speaks)
        self.losses = records_until(run / "losses.jsonl", "step", step, rewrite=speaks)
        self.warnings = records_until(run / "warnings.jsonl", "step", step, rewrite=speaks)
        self._said = {record["about"] for record in self.warnings}
        self._writer: SummaryWriter | None = None
        self._bar: tqdm[Any] | None = None
        self._since = (time.monotonic(), step)

    def begin(self, step: int) -> None:
        """Open what is written to while training, at the first step after ``step``."""
        if self.speaks:
            self._writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=step + 1)
        self._bar = tqdm(
            total=self.epochs * self.steps_an_epoch * self.images_a_step,
            initial=step * self.images_a_step,
            unit=" images",
            unit_scale=True,
            smoothing=0.1,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left{postfix}",
            disable=None if self.speaks else True,  # None: only on a terminal
            dynamic_ncols=True,
            leave=False,
        )
        self._since = (time.monotonic(), step)

    def step(self, epoch: int) -> None:
        """Count a step of an epoch, from 0, on the bar."""
        assert self._bar is not None
        self._bar.set_description_str(f"epoch {epoch + 1}/{self.epochs}", refresh=False)
        self._bar.update(self.images_a_step)

    def loss(self, step: int, loss: float, mean_loss: float, accuracy: float) -> None:
        """Record the mean loss since the last record, and show the epoch's so far."""
        record = {"step": step, "loss": loss}
        self.losses.append(record)
        now = time.monotonic()
        rate = (step - self._since[1]) * self.images_a_step / max(now - self._since[0], 1e-9)
        self._since = (now, step)
        assert self._bar is not None
        self._bar.set_postfix_str(f"loss {mean_loss:.3f}, accuracy {accuracy:.1%}", refresh=False)
        self._append("losses.jsonl", record)
        self._scalars({"loss": loss, "images per second": rate}, step)

    def epoch(self, record: Record) -> None:
        """Record a finished epoch, and say it."""
        self.metrics.append(record)
        self._append("metrics.jsonl", record)
        self._scalars({name: value for name, value in record.items() if name != "step"}, record["step"])
        left = sum(r["seconds"] for r in self.metrics) / len(self.metrics) * (self.epochs - record["epoch"])
        images = self.steps_an_epoch * self.images_a_step
        self.say(
            f"  epoch {record['epoch']}/{self.epochs}: loss {record['train_loss']:.3f}, "
            f"test accuracy {record['test_accuracy']:.2%}, {record['seconds']:.0f} s, "
            f"{images / record['seconds']:,.0f} images/s" + (f", {_duration(left)} left" if left else "")
        )
        self._since = (time.monotonic(), record["step"])  # evaluation is no training

    def layers(self, measured: Measured, complaints: Mapping[tuple[str, str], str], step: int) -> None:
        """Record what was measured of the quantized layers, and say each complaint once."""
        for layer, values in measured.items():
            self._scalars({f"{what}/{layer}": value for what, value in values.items()}, step)
        for (layer, kind), sentence in complaints.items():
            about = f"{layer}, {kind}"
            if about not in self._said:
                self._said.add(about)
                record = {"step": step, "about": about, "warning": sentence}
                self.warnings.append(record)
                self._append("warnings.jsonl", record)
                self.say(f"  warning, step {step}: {sentence}")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.speaks:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def to_disk(self) -> None:
        """Wait until the disk has what was recorded: a checkpoint may follow."""
        for name in ("metrics.jsonl", "losses.jsonl", "warnings.jsonl"):
            if self.speaks and (self.run / name).exists():
                with (self.run / name).open("a") as file:
                    os.fsync(file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close bar and files."""
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _append(self, name: str, record: Record) -> None:
        if self.speaks:
            with (self.run / name).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


def records(path: Path) -> list[Record]:
    """The records of a file of JSON lines, none where it is missing; a last line that a kill cut is left out.

    Raises:
        ValueError: where another line is no record.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            if not isinstance(record, dict):
                raise ValueError(f"a record is a JSON object, not {text:.40}")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is no record ({error})") from error
        found.append(record)
    return found


def records_until(path: Path, key: str, last: int, *, rewrite: bool) -> list[Record]:
    """The records up to a checkpoint's epoch or step; the file, rewritten, holds no later ones either."""
    kept = [record for record in records(path) if record[key] <= last]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if rewrite and path.exists() and path.read_text() != text:
        files.write(path, text.encode())
    return kept


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
