"""Training's speed against float: what is timed, and what is said."""

import dataclasses

import pytest
import torch

from foldbit import QuantConfig, cli, timing
from foldbit.training import data, throughput
from foldbit.training.recipes import DataConfig, Recipe

QUANT = Recipe(model_args={"widths": [8, 8, 8]}, quant=QuantConfig("ls-1", "ls-2"), batch_size=4)


def test_both_are_trained_on_images_of_the_right_shape(monkeypatch):
    ran = {}

    def interleaved(candidates, **_):
        for name, call in candidates.items():
            network = call.__closure__  # what a step closes over
            found = {type(cell.cell_contents).__name__: cell.cell_contents for cell in network}
            model, x = found["ResNet"], found["Tensor"]
            before = [p.clone() for p in model.parameters()]
            call()
            ran[name] = (
                tuple(x.shape),
                model.training,
                any(hasattr(m, "input_quantizer") for m in model.modules()),
                all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)),
            )
        return {"float": timing.Timing(0.5, 0.5, 0.5), "W1A2": timing.Timing(1.0, 0.8, 1.25)}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    said = throughput.against_float(QUANT, threads=1)
    assert ran == {"float": ((4, 1, 28, 28), True, False, True), "W1A2": ((4, 1, 28, 28), True, True, True)}
    assert "batch 4 of 1×28×28, float32, adam" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["float", "8", "1.00", "1.00", "-", "1.00"] in rows
    assert ["W1A2", "4", "0.50", "0.40", "-", "0.62"] in rows
    assert "DO NOT TRUST" in said  # quartiles 45 % apart


@pytest.mark.parametrize(
    ("changes", "shape", "classes"),
    [
        ({"data": DataConfig(name="cifar100"), "model": "resnet18-cifar"}, (3, 32, 32), 100),
        ({"data": DataConfig(name="imagenet"), "model": "resnet18"}, (3, 224, 224), 1000),
        ({"data": DataConfig(name="imagenet", image_size=64), "model": "resnet18"}, (3, 64, 64), 1000),
        ({"data": DataConfig(name="folder", image_size=48)}, (3, 48, 48), 10),
        ({"model_args": {"in_channels": 3}}, (3, 28, 28), 10),
        ({"model_args": {"num_classes": 7}, "data": DataConfig(name="folder", image_size=8)}, (3, 8, 8), 7),
    ],
)
def test_shapes(changes, shape, classes):
    assert throughput._images(dataclasses.replace(QUANT, **changes)) == (shape, classes)


def test_known_shapes_are_those_of_the_data():
    images = data.digits()
    assert throughput.IMAGES["digits"] == (images.train.shape, len(images.classes))


@pytest.mark.parametrize(
    ("changes", "threads", "message"),
    [
        ({"quant": None}, 1, "trains in float; name the schemes"),
        ({}, 0, "at least 1; got 0"),
        ({"data": DataConfig(name="folder")}, 1, "--data.image_size"),
    ],
)
def test_what_cannot_be_timed(changes, threads, message):
    with pytest.raises(ValueError, match=message):
        throughput.against_float(dataclasses.replace(QUANT, **changes), threads=threads)


def test_the_command_is_spelled_both_ways(capsys):
    tiny = [
        *["--recipe=fashion-mnist/resnet8", "--weight=ls-1", "--activation=ls-1", "--seconds=0.01"],
        *["--model_args.widths=[4,4,4]", "--batch_size=2", "--threads=1", "--precision=bf16"],
    ]
    for command in (["bench", "train"], ["bench-train"]):
        cli.main([*command, *tiny])
        said = capsys.readouterr().out
        assert "W1A1" in said and "bfloat16" in said and "images/s" in said
