"""Two processes under torchrun train as one does, agree on everything, and stop and go on together."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foldbit.training import evaluate, loop, recipes, runs

SCRIPT = Path(__file__).with_name("two_processes.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def load_script():
    spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What the script leaves and says, until its last training is stopped by Ctrl-C."""
    folder = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, str(SCRIPT), str(folder)]
    errors = folder / "errors"
    said = ""
    with (
        errors.open("w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, env=ENVIRONMENT) as process,
    ):
        for line in process.stdout:
            said += line
            if "epoch 1/500" in line:
                process.send_signal(signal.SIGINT)
    assert (folder / "found.json").exists(), errors.read_text()[-4000:]
    return folder, json.loads((folder / "found.json").read_text()), said


@pytest.fixture(scope="module")
def script():
    script = load_script()
    script.register()
    return script


def test_both_have_the_same_network_to_the_last_bit(two):
    """Weights, batch norm's statistics and static scales."""
    _, found, _ = two
    for name in ("tiny", "plain", "taught", "whole", "parts"):
        first, second = found[name]["digests"]
        assert first == second and len({*found[name]["accuracies"]}) == 1, name


def test_static_scales_and_batch_norm_are_averages_of_both(two, digits, tmp_path):
    """After one step on 64 images, of which each process saw 32."""
    folder, _, _ = two
    one = loop.train(runs.recipe_of(folder / "once"), tmp_path / "one", images=digits, threads=1).model
    both, _ = runs.load_run(folder / "once")
    assert torch.allclose(both.stem[1].running_mean, one.stem[1].running_mean, atol=1e-6)
    assert torch.allclose(both.stem[1].running_var, one.stem[1].running_var, rtol=0.05)
    assert both.stem[1].num_batches_tracked == one.stem[1].num_batches_tracked == 1
    for name, buffer in one.named_buffers():
        if name.endswith("running_scales"):
            assert torch.allclose(both.get_buffer(name), buffer, rtol=0.1), name


def test_averages(two):
    """Of what rank r holds: the mean, on both, in every tensor's own shape; and nothing on one process."""
    _, found, _ = two
    assert found["averages"] == [[[0.5, 1.5], [[7.5]]]] * 2


def test_as_accurate_as_one_process(two, script, tmp_path, digits):
    _, found, _ = two
    one = loop.train(script.TINY, tmp_path / "one", images=digits, threads=1)
    assert one.metrics[-1]["test_accuracy"] > 0.5
    # 364 test images: the standard error of a difference is some 3 points, a seed's spread is more.
    assert found["tiny"]["accuracies"][0] == pytest.approx(one.metrics[-1]["test_accuracy"], abs=0.15)


@pytest.mark.parametrize("name", ["plain", "taught"])
def test_a_network_without_statistics_comes_out_as_from_one_process(two, script, tmp_path, digits, name):
    """The same batches, augmented alike, gradients averaged over all images, and a schedule in step."""
    folder, _, _ = two
    recipe = runs.recipe_of(folder / name)
    one = loop.train(recipe, tmp_path / "one", images=digits, threads=1)
    both, _ = runs.load_run(folder / name)
    for key, value in one.model.state_dict().items():
        assert torch.allclose(both.state_dict()[key], value, atol=2e-6), key
    metrics = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    for a, b in zip(metrics, one.metrics, strict=True):
        assert a["lr"] == b["lr"] and a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["test_accuracy"] == pytest.approx(b["test_accuracy"], abs=0.003)  # an image at the border


def test_evaluation_counts_every_image_once(two, digits):
    """364 images do not fill batches that two processes share: the last one is ragged."""
    folder, found, _ = two
    model, _ = runs.load_run(folder / "tiny")
    right = evaluate.predictions(model, digits.test, (digits.mean, digits.std)) == digits.test.labels
    assert found["tiny"]["accuracies"] == [float(right.double().mean())] * 2


def test_steps_are_counted_once(two):
    _, found, _ = two
    assert found["tiny"]["steps"] == [44, 44] and found["tiny"]["finished"]


def test_a_signal_to_one_stops_both_at_the_next_look_and_going_on_is_exact(two):
    folder, found, _ = two
    assert not found["first part"]["finished"] and found["first part"]["steps"] == [8, 8]
    assert found["parts"]["finished"] and found["parts"]["steps"] == [4, 4]
    assert found["parts"]["digests"] == found["whole"]["digests"]
    for name in ("metrics", "losses"):
        parts, whole = (
            [json.loads(line) for line in (folder / run / f"{name}.jsonl").read_text().splitlines()]
            for run in ("parts", "whole")
        )
        for record in [*parts, *whole]:
            record.pop("seconds", None)
        assert parts == whole


def test_a_batch_that_cannot_be_shared_is_refused(two):
    folder, found, _ = two
    assert "65 cannot be shared by 2; take a multiple of 2" in found["odd"]
    assert not (folder / "odd").exists()


def test_only_the_first_speaks(two):
    _, _, said = two
    assert said.count("epoch 1/2: loss") == 5 and said.count("on 1 thread") == 8


def test_torchrun_and_the_command_line_stop_on_ctrl_c_and_can_go_on(two):
    folder, _, said = two
    assert said.count("the same command goes on from endless") == 1
    recipe = recipes.load(folder / "endless" / "config.yaml")
    assert recipe.epochs == 500 and runs.may_use(folder / "endless", recipe)
