"""Checkpoints: the state of a training, on disk whole or not at all.

A checkpoint is a folder of two files:

    model.safetensors    the network's state dict
    training.pt          optimizer, schedule, progress, and every process's random numbers: tensors and plain
                         values only, so that reading one runs no code of whoever wrote it

It is written as ``checkpoint.new`` and forced to disk; then the older one steps aside as ``checkpoint.old``,
and the new one takes the name ``checkpoint``. Whenever the process is killed, or the machine loses power, a
whole one stands under one of the last two names.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from foldbit.packed import files

WEIGHTS = "model.safetensors"
TRAINING = "training.pt"


class Damaged(ValueError):
    """A checkpoint cannot be read."""


def write(run: Path, weights: Mapping[str, Tensor], training: Mapping[str, Any]) -> None:
    """Write a checkpoint beside the old one, then put it in its place.

    Args:
        run: the run folder.
        weights: the network's state dict.
        training: tensors and plain values (numbers, text, lists, tuples, dictionaries).

    Cost: a copy of all tensors in memory, and waiting for the disk.
    """
    new, old, place = run / "checkpoint.new", run / "checkpoint.old", run / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)  # what a kill left
    new.mkdir()
    write_weights(new / WEIGHTS, weights)
    held = io.BytesIO()
    torch.save(dict(training), held)
    files.write(new / TRAINING, held.getvalue())
    _to_disk(new)
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    _to_disk(run)
    shutil.rmtree(old, ignore_errors=True)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all.

    Raises:
        TypeError: where it holds anything but tensors.
    """
    other = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if other:
        raise TypeError(f"a checkpoint holds tensors only; this model's state has {', '.join(other)} besides")
    # Copied, for safetensors refuses tensors that share memory, as tied weights do.
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in weights.items()
    }
    files.write(path, safetensors.torch.save(copies))
    _to_disk(path)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None where there is none."""
    return next((path for path in (run / "checkpoint", run / "checkpoint.old") if path.is_dir()), None)


def settle(run: Path) -> None:
    """Finish what a kill interrupted: one checkpoint, or none, under its own name, and nothing else."""
    if (run / "checkpoint.old").is_dir() and not (run / "checkpoint").is_dir():
        (run / "checkpoint.old").rename(run / "checkpoint")
    for left in ("checkpoint.old", "checkpoint.new"):
        shutil.rmtree(run / left, ignore_errors=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint.

    Raises:
        Damaged: where it cannot be read.
    """
    try:
        # Not by load_file, which opens no file whose path is not Unicode; sorted, for it gives any order.
        return dict(sorted(safetensors.torch.load((path / WEIGHTS).read_bytes()).items()))
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{path / WEIGHTS} is damaged ({line(error)})") from error


def read_training(path: Path) -> dict[str, Any]:
    """Everything else of a checkpoint, as it was written, on the CPU.

    Raises:
        Damaged: where it cannot be read, or holds anything but tensors and plain values.
    """
    damage = (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError)
    try:
        contents = torch.load(path / TRAINING, map_location="cpu", weights_only=True)
    except damage as error:
        raise Damaged(f"{path / TRAINING} is damaged ({line(error)})") from error
    if not isinstance(contents, dict):
        raise Damaged(f"{path / TRAINING} holds a {type(contents).__name__}, not the state of a training")
    return contents


def random_numbers(device: torch.device) -> dict[str, Any]:
    """Where this process's random numbers stand: Python's, NumPy's, torch's, and the device's."""
    # NumPy's global numbers, for users' models and transforms may draw from them.
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device).cpu()
    return state


def restore_random_numbers(state: Mapping[str, Any], device: torch.device) -> None:
    """Let random numbers go on where :func:`random_numbers` saw them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)


def line(error: Exception) -> str:
    """An error's first words, on a line: torch lists every tensor that does not fit."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return " ".join(lines[:2]) + (" ..." if len(lines) > 2 else "") if lines else type(error).__name__


def _to_disk(folder: Path) -> None:
    """Wait until the disk has the names in a folder."""
    if os.name == "nt":
        return  # Windows opens no folders, and keeps a journal of names by itself
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
