"""On a GPU: solvers and quantizers as on the CPU, training without waiting, resumed, in bfloat16.

pytest -m gpu
"""

import copy
import dataclasses

import pytest
import torch

import foldbit as fb
from foldbit import models
from foldbit.training import checkpoints, data, loop, runs, throughput
from foldbit.training.loop import Habits
from foldbit.training.monitor import Monitor
from foldbit.training.recipes import DataConfig, Distillation, Recipe

SCHEMES = ["ls-1", "ls-2", "ls-T", "gf-2", "gf-3", "lsf-3"]

TINY = Recipe(
    model_args={"widths": [8, 8, 16]},
    quant=fb.QuantConfig("ls-1", "ls-2", activation_scales="static", clamp=3.0),
    data=DataConfig(name="digits"),
    epochs=3,
    batch_size=64,
    lr=1e-2,
)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(4, 7), (3, 20_000)])
def test_scales_are_those_of_the_cpu(cuda, scheme, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    there = fb.solve(x.to(cuda), scheme, dim=-1)
    assert there.device.type == "cuda"
    assert torch.allclose(there.cpu(), fb.solve(x, scheme, dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_values_are_those_of_the_cpu(cuda, scheme, dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 300).to(dtype)
    q = fb.quantize(x, scheme, dim=-1)
    planes = fb.fold(x.to(cuda), q.scales.to(cuda), dim=-1)
    assert torch.equal(planes.cpu(), q.planes)
    assert torch.equal(fb.unfold(planes, q.scales.to(cuda), dim=-1).cpu(), q.values())


def network(config):
    torch.manual_seed(0)
    model = models.create("resnet8-xnor", widths=[8, 16, 16])
    return fb.quantize_(model, config, overrides=models.float_layers(model))


@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("estimator", ["polynomial", "clipped", "scaled", "identity"])
def test_gradients_are_those_of_the_cpu(cuda, scales, estimator):
    """One quantized layer, for in deep networks a rounding may flip a sign."""
    config = fb.QuantConfig(
        "ls-1", "ls-2", activation_scales=scales, clamp=2.0, activation_estimator=estimator
    )
    torch.manual_seed(0)
    layer = torch.nn.Sequential(fb.QuantConv2d(8, 8, 3, config=config))
    x = torch.randn(4, 8, 10, 10)
    found = []
    for device in ("cpu", cuda):
        there = copy.deepcopy(layer).to(device)
        leaf = x.to(device).requires_grad_()
        there(leaf).square().mean().backward()
        found.append((leaf.grad.cpu(), there[0].weight.grad.cpu()))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scales", ["static", "dynamic"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_training_step_never_waits(cuda, scales, precision):
    config = fb.QuantConfig("ls-1", "ls-2", activation_scales=scales, clamp=3.0)
    model = network(config).to(cuda).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x = torch.randn(16, 1, 28, 28, device=cuda).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (16,), device=cuda)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()  # libraries start up
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_loop_never_waits_between_looks(cuda, tmp_path, monkeypatch):
    genuine = loop._Training._step
    counts = {True: 0, False: 0}

    def step(self, x, labels, looks):
        assert x.is_cuda
        strict = not looks and self.state.progress.step > 1
        counts[strict] += 1
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            genuine(self, x, labels, looks)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Training, "_step", step)
    recipe = dataclasses.replace(TINY, epochs=1)
    loop.train(recipe, tmp_path / "run", images=data.digits(), habits=Habits(watch_every=0))
    assert counts[False] == 3 and counts[True] == 19


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_learns_with_a_teacher_and_packs(cuda, tmp_path, precision):
    images = data.digits()
    teacher = loop.train(dataclasses.replace(TINY, quant=None), tmp_path / "teacher", images=images)
    assert teacher.metrics[-1]["test_accuracy"] > 0.85
    taught = Distillation(str(tmp_path / "teacher"), temperature=2.0, weight=0.5, correct=True)
    recipe = dataclasses.replace(TINY, distill=taught, precision=precision, init=str(tmp_path / "teacher"))
    outcome = loop.train(recipe, tmp_path / "run", images=images)
    assert outcome.metrics[-1]["test_accuracy"] > 0.7
    model, _ = runs.load_run(tmp_path / "run")
    assert next(model.parameters()).device.type == "cpu"
    x = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        before = model(x)
        assert torch.allclose(fb.pack_(model)(x), before, atol=1e-4)


def test_going_on_is_close(cuda, tmp_path, monkeypatch):
    """Not to the last bit, for sums on a GPU need not have one order; to the last step and the last image."""
    images = data.digits()
    recipe = dataclasses.replace(TINY, epochs=2)
    whole = loop.train(recipe, tmp_path / "whole", images=images)
    genuine, calls = loop._Training._step, iter(range(1, 10**6))

    def step(self, *arguments):
        if next(calls) == 27:
            self.interrupted.append(2)
        genuine(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Training, "_step", step)
        assert loop.train(recipe, tmp_path / "parts", images=images).steps == 27
    state = checkpoints.read_training(tmp_path / "parts" / "checkpoint")
    assert state["random"][0]["device"].device.type == "cpu"
    last = loop.train(recipe, tmp_path / "parts", images=images)
    assert last.finished and last.steps == 17
    assert last.metrics[-1]["test_accuracy"] == pytest.approx(whole.metrics[-1]["test_accuracy"], abs=0.1)


def test_measuring_layers_waits_once(cuda):
    model = network(fb.QuantConfig("ls-1", "ls-2")).to(cuda).train()
    monitor = Monitor(model, 1)
    x = torch.randn(8, 1, 28, 28, device=cuda)
    model(x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        with monitor.watching():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(monitor.take()) == 6


def test_throughput(cuda):
    said = throughput.against_float(dataclasses.replace(TINY, batch_size=32), seconds=0.1)
    assert torch.cuda.get_device_name() in said and "W1A2" in said
