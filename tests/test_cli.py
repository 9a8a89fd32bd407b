"""The command line, run as a user would: the real program, its output and exit codes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

TINY = ["--model_args.widths=[8,8,16]", "--data.name=digits", "--batch_size=64", "--lr=0.01"]


def foldbit(*arguments, cwd=None, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "foldbit", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "250"},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a float run and a quantized one that starts from it."""
    folder = tmp_path_factory.mktemp("cli")
    foldbit("train", "--run=runs/float", "--epochs=2", *TINY, cwd=folder)
    foldbit(
        "train", "--recipe", "fashion-mnist-w1a2", "--run=runs/w1a2", "--init=runs/float", *TINY, cwd=folder
    )
    return folder


@pytest.mark.parametrize("command", ["train", "evaluate", "summary", "pack", "bench", "demo"])
def test_help_says_what_a_command_does_and_takes(command):
    text = foldbit(command, "--help").stdout
    assert "--config" in text and "--print_config" in text
    # Every option says more than its type.
    assert not re.findall(r"\n +(?:-\S+ \S+|\w+) +\((?:type|required)", text)


def test_help_lists_the_commands():
    text = foldbit("--help").stdout
    for command in ("train", "evaluate", "summary", "pack", "bench", "demo"):
        assert command in text


def test_print_config_shows_the_whole_recipe():
    text = foldbit("train", "--recipe=fashion-mnist-w1a2", "--run=x", "--lr=0.125", "--print_config").stdout
    assert "lr: 0.125" in text and "activation: ls-2" in text and "seed: 0" in text


def test_config_files_take_dotted_overrides(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 9\nquant:\n  weight: ls-2\n")
    text = foldbit(
        "train", "--config=mine.yaml", "--run=x", "--quant.activation=ls-T", "--print_config", cwd=tmp_path
    ).stdout
    assert "epochs: 9" in text and "weight: ls-2" in text and "activation: ls-T" in text


def test_train_evaluate_pack_evaluate_summary_bench(folder):
    unpacked = foldbit("evaluate", "runs/w1a2", cwd=folder).stdout
    assert "test images right" in unpacked and "digits" in unpacked
    said = foldbit("pack", "runs/w1a2", cwd=folder).stdout
    packed = folder / "runs/w1a2/packed.safetensors"
    assert packed.is_file() and "packed.safetensors" in said
    assert "W1A2" in foldbit("summary", str(packed), cwd=folder).stdout
    assert f"{packed.stat().st_size:,} bytes" in foldbit("summary", "runs/w1a2", cwd=folder).stdout
    for what in ("runs/w1a2", str(packed)):
        table = foldbit("bench", what, "--seconds=0.1", cwd=folder).stdout
        assert "unpacked" in table and "not bitwise" in table


def test_pack_calibrates_what_was_trained_with_dynamic_scales(folder):
    dynamic = ["--quant.activation_scales=dynamic", "--init=runs/float", "--run=runs/dynamic", *TINY]
    foldbit("train", "--recipe=fashion-mnist-w1a2", *dynamic, cwd=folder)
    said = foldbit("pack", "runs/dynamic", "--calibration_images=300", cwd=folder).stdout
    assert "calibrating static" in said and "--calibrate false" in said and "static scales" in said
    for values in (300 * 8 * 8 * 8, 300 * 16 * 2 * 2):  # of the first layer's input, and of the last one's
        assert f"{values:,}" in said
    kept = foldbit("pack", "runs/dynamic", "--calibrate=false", "--out=kept.safetensors", cwd=folder).stdout
    assert "calibrating" not in kept
    for file, scales in [("runs/dynamic/packed.safetensors", "static"), ("kept.safetensors", "dynamic")]:
        with safe_open(folder / file, "pt") as contents:
            assert f'"activation_scales": "{scales}"' in str(contents.metadata())
    # Static scales were learned in training: they are kept, unless calibration is asked for.
    assert "calibrating" not in foldbit("pack", "runs/w1a2", "--out=a.safetensors", cwd=folder).stdout
    again = foldbit("pack", "runs/w1a2", "--calibrate=true", "--out=b.safetensors", cwd=folder).stdout
    assert "error before" in again
    refused = foldbit("pack", "runs/dynamic", "--calibration_images=0", cwd=folder, check=False)
    assert refused.returncode == 1 and "at least; got 0" in refused.stderr


def test_summary_of_a_model_name():
    assert "compression" in foldbit("summary", "lenet5").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "no run folder"),
        (["pack", "runs/float"], "nothing to pack"),
        (["bench", "runs/float"], "no quantized layers"),
        (["train", "--recipe=nope", "--run=x"], "unknown recipe"),
        (["train", "--run=runs/float", "--lr=7"], "another recipe"),
        (["train", "--run=x", "--data.folder=nowhere"], "nowhere"),
        (["evaluate", "bad.safetensors"], "not a readable safetensors file"),
        (["train", "--run=x", "--epochs=0"], "epochs must be positive"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(folder, arguments, message):
    (folder / "bad.safetensors").write_bytes(b"not one")
    done = foldbit(*arguments, cwd=folder, check=False)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_takes_up(tmp_path):
    command = [sys.executable, "-m", "foldbit", "train", "--run=run", "--epochs=40", *TINY]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            if "epoch 2/" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
    assert process.returncode == 130 and "goes on from" in output
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert 2 <= len(records) < 40
    done = foldbit(*command[3:], cwd=tmp_path)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 40
    assert "epoch 1/" not in done.stdout and "done: test accuracy" in done.stdout
    assert Path(tmp_path / "run/checkpoint/model.safetensors").is_file()
