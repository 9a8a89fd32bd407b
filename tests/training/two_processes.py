"""What tests/training/test_distributed.py runs under torchrun, in each of two processes."""

import dataclasses
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn

from foldbit import QuantConfig, cli, models
from foldbit.training import data, loop, processes
from foldbit.training.loop import Habits
from foldbit.training.recipes import DataConfig, Distillation, Recipe

TINY = Recipe(
    model_args={"widths": [8, 8, 16]},
    quant=QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0),
    data=DataConfig(name="digits"),
    epochs=2,
    batch_size=64,
    lr=1e-2,
)

#: Without batch norm and static scales a step depends on the whole batch alone, however it is shared.
PLAIN = Recipe(
    model="plain",
    quant=None,
    data=DataConfig(name="digits", train_images=400, augment="crop-flip"),
    epochs=2,
    batch_size=64,
    optimizer="sgd",
    lr=0.05,
    schedule="linear",
)


def register():
    models.register("plain")(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Tanh(), nn.Linear(32, 10))
    )


def digest(model):
    return hashlib.sha256(
        b"".join(t.numpy().tobytes() for t in model.cpu().state_dict().values())
    ).hexdigest()


def interrupt(step):
    """SIGTERM in that step, in this process."""
    calls = iter(range(1, 10**6))
    genuine = loop._Training._step

    def stepping(*arguments):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return genuine(*arguments)

    loop._Training._step = stepping
    return lambda: setattr(loop._Training, "_step", genuine)


def main(folder):
    rank = int(os.environ["RANK"])
    register()
    images = data.digits()
    found = {}

    def train(recipe, name, **habits):
        outcome = loop.train(recipe, folder / name, images=images, threads=1, habits=Habits(**habits))
        found[name] = {
            "digests": gather_object([digest(outcome.model)]),
            "accuracies": gather_object([outcome.metrics[-1]["test_accuracy"] if outcome.metrics else None]),
            "steps": gather_object([outcome.steps]),
            "finished": outcome.finished,
        }

    tensors = [torch.tensor([0.0, 1.0]) + rank, torch.tensor([[7.0]]) + rank]
    processes.average(tensors, processes.accelerator())
    found["averages"] = gather_object([[t.tolist() for t in tensors]])
    once = dataclasses.replace(TINY, data=DataConfig(name="digits", train_images=64), epochs=1, lr=1e-9)
    train(once, "once")
    train(TINY, "tiny")
    train(PLAIN, "plain")
    taught = dataclasses.replace(
        PLAIN, distill=Distillation(str(folder / "plain"), temperature=3.0, weight=0.5, correct=True)
    )
    train(taught, "taught")
    short = dataclasses.replace(TINY, data=DataConfig(name="digits", train_images=400), epochs=2)  # 6 steps
    train(short, "whole", look_every=2)
    undo = interrupt(8) if rank == 1 else lambda: None  # that is step 2 of the second epoch
    train(short, "parts", look_every=2)
    undo()
    found["first part"] = found["parts"]
    train(short, "parts", look_every=2)
    try:
        loop.train(dataclasses.replace(TINY, batch_size=65), folder / "odd", images=images)
    except ValueError as error:
        found["odd"] = str(error)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    os.chdir(folder)  # and now a training by the command line, until somebody stops it
    cli.main(
        [
            *["train", "--run=endless", "--data.name=digits", "--data.train_images=400", "--threads=1"],
            *["--model_args.widths=[8,8,16]", "--batch_size=64", "--epochs=500"],
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
