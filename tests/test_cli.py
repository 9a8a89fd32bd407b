"""The command line, run as a user would: the real program, its output and exit codes."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
from safetensors import safe_open

from foldbit import cli, timing
from foldbit.training import catalogue, data

TINY = ["--model_args.widths=[8,8,16]", "--data.name=digits", "--batch_size=64", "--lr=0.01"]


def foldbit(*arguments, cwd=None, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "foldbit", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "250", "OMP_NUM_THREADS": "1"},
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def said_before_leaving(capsys, *arguments):
    """What a command that only tells something prints, run in this process, which is quicker."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a float run and a quantized one that starts from it."""
    folder = tmp_path_factory.mktemp("cli")
    foldbit("train", "--run=runs/float", "--epochs=2", *TINY, cwd=folder)
    foldbit(
        "train",
        "--recipe",
        "fashion-mnist/resnet8",
        "--run=runs/w1a2",
        "--init=runs/float",
        *TINY,
        cwd=folder,
    )
    (folder / "bad.safetensors").write_bytes(b"not one")
    (folder / "bomb.yaml").write_text(f"a: &a [{'x,' * 999}]\nb: [{'*a,' * 999}]\n")  # but not a large one
    (folder / "odd.yaml").write_text("data: {download: !!bool q}\n")
    shutil.copytree(folder / "runs/w1a2", folder / "runs/cut")
    weights = folder / "runs/cut/checkpoint/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


@pytest.mark.parametrize(
    "command", ["recipes", "train", "evaluate", "summary", "pack", "analyze", "bench", "demo"]
)
def test_help_says_what_a_command_does_and_takes(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "250")
    text = said_before_leaving(capsys, command, "--help")
    assert "--config" in text and "--print_config" in text
    # Every option says more than its type.
    assert not re.findall(r"\n +(?:-\S+ \S+|\w+) +\((?:type|required)", text)


def test_help_lists_the_commands():
    text = foldbit("--help").stdout
    for command in ("recipes", "train", "evaluate", "summary", "pack", "analyze", "bench", "demo"):
        assert command in text


def test_print_config_shows_the_whole_recipe(capsys):
    text = said_before_leaving(
        capsys, "train", "--recipe=fashion-mnist/resnet8", "--run=x", "--lr=0.125", "--print_config"
    )
    assert "lr: 0.125" in text and "activation: ls-2" in text and "seed: 0" in text


def test_config_files_take_dotted_overrides(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.yaml").write_text("epochs: 9\nquant:\n  weight: ls-2\n")
    monkeypatch.chdir(tmp_path)
    text = said_before_leaving(
        capsys, "train", "--config=mine.yaml", "--run=x", "--quant.activation=ls-T", "--print_config"
    )
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
    foldbit("train", "--recipe=fashion-mnist/resnet8", *dynamic, cwd=folder)
    said = foldbit("pack", "runs/dynamic", "--calibration_images=300", cwd=folder).stdout
    assert "calibrating static" in said and "--calibrate false" in said and "static scales" in said
    assert f"{300 * 16 * 4 * 4:,}" in said  # values at the last layer, of the images asked for
    kept = foldbit("pack", "runs/dynamic", "--calibrate=false", "--out=kept.safetensors", cwd=folder).stdout
    assert "calibrating" not in kept
    for file, scales in [("runs/dynamic/packed.safetensors", "static"), ("kept.safetensors", "dynamic")]:
        with safe_open(folder / file, "pt") as contents:
            layers = json.loads(contents.metadata()["foldbit"])["layers"].values()
            assert all(layer["config"]["activation_scales"] == scales for layer in layers)
    # Static scales were learned in training: they are kept, unless calibration is asked for.
    assert "calibrating" not in foldbit("pack", "runs/w1a2", "--out=a.safetensors", cwd=folder).stdout
    again = foldbit("pack", "runs/w1a2", "--calibrate=true", "--out=b.safetensors", cwd=folder).stdout
    assert "error before" in again
    refused = foldbit("pack", "runs/dynamic", "--calibration_images=0", cwd=folder, check=False)
    assert refused.returncode == 1 and "at least; got 0" in refused.stderr


def test_summary_of_a_model_name():
    assert "compression" in foldbit("summary", "lenet5").stdout


def mistake(folder, monkeypatch, capsys, *arguments):
    """Exit code and message of a command that fails, run in this process, which is quicker."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    code, printed = stopped.value.code, capsys.readouterr().err
    return (1, code) if isinstance(code, str) else (code, printed.strip())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate", "nowhere"], 1, "no run folder"),
        (["evaluate", "lenet5"], 1, "its weights would be random"),
        (["evaluate", "runs/cut"], 1, "model.safetensors is damaged"),
        (["pack", "runs/cut"], 1, "model.safetensors is damaged"),
        (
            ["pack", "runs/float"],
            1,
            "foldbit train --recipe fashion-mnist/resnet8 --run runs/float-w1a2 --init runs",
        ),
        (["pack", "runs/w1a2", "--out=new/packed.safetensors"], 1, "there is no folder new to write"),
        (["bench", "runs/float"], 1, "no quantized layers"),
        (["bench", "runs/w1a2", "--threads=0"], 1, "from 1 to 1024; got 0"),
        (["train", "--recipe=nope", "--run=x"], 2, "unknown recipe"),
        (["train", "--run=runs/float", "--lr=7"], 1, "lr 0.01 -> 7.0"),
        (["train", "--run=x", "--data.folder=nowhere"], 1, "nowhere is not a folder"),
        (["train", "--run=x", "--init=runs/typo"], 1, "there is no folder runs/typo"),
        (["evaluate", "bad.safetensors"], 1, "not a readable safetensors file"),
        (["train", "--run=x", "--threads=0"], 1, "threads is a whole number, from 1 to 1024; got 0"),
        (["evaluate", "runs/float", "--threads=100000000"], 1, "from 1 to 1024; got 100000000"),
        (["train", "--run=x", "--seed=-1"], 1, "seed is a whole number, from 0 to 4294967295; got -1"),
        (["analyze", "normal", "--seed=99999999999999999999"], 1, "got 99999999999999999999"),
        (["train", "--run=x", "--lr=1e400"], 1, "lr must be positive and finite; got inf"),
        (["train", "--run=x", "--config=bomb.yaml"], 2, "bomb.yaml is not YAML: line 2: more than 200,000"),
        (["summary", "lenet5", "--config=bomb.yaml"], 2, "line 2: more than 200,000 characters"),
        (["train", "--run=x", "--config=odd.yaml"], 2, "odd.yaml is not YAML: a value cannot be read ('q')"),
        (["summary", "lenet5", "--config=odd.yaml"], 2, "a value cannot be read ('q')"),
        (["train", "--run=x", "--seed=!!int ''"], 2, "string index out of range"),
        (["train", "--run=x", f"--lr={'59:' * 200}1.5"], 2, "too large"),
        (["train", "--run=x", "--epochs=0"], 1, "epochs must be positive"),
        (["train"], 2, "--run is required"),
        (["evaluate"], 2, "WHAT is required"),
        (["train", "--run=x", "--quant.activation", "ls-9"], 2, "unknown scheme 'ls-9'; known are fp"),
        (["train", "--run=x", "--quant.activations", "ls-T"], 2, "did you mean --quant.activation?"),
        (["train", "--run=x", "--quant.clamp=x"], 2, "--quant.clamp: expected a number; got x"),
        (["train", "--run=x", "--quant=3"], 2, "such as --quant.weight, or null; got 3"),
        (
            ["summary", "resnet18-cifar", "--input_size", "1,1,28,28"],
            1,
            "in layer 'stem.0' (Conv2d) on an input",
        ),
        (["summary", "lenet5", "--input_size", "1,a"], 1, "such as 1,3,32,32; got '1,a'"),
        (["summary", "lenet5", "--inputsize", "1"], 2, "did you mean --input_size?"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, arguments, code, message):
    given, said = mistake(folder, monkeypatch, capsys, *arguments)
    assert given == code and message in said
    assert said.startswith("foldbit: ") and len(said.splitlines()) == 1
    assert not any(word in said for word in ("Union", "Namespace", "NestedArg", "<class", "train.run"))
    assert not (folder / "x").exists()


def test_a_mistake_of_the_real_program_has_no_traceback(folder):
    done = foldbit("pack", "runs/cut", cwd=folder, check=False)
    assert done.returncode == 1 and done.stderr.startswith("foldbit: ") and not done.stdout


def test_input_sizes_are_guessed_or_taken_with_or_without_brackets(monkeypatch, capsys):
    for size in ([], ["--input_size", "1,3,32,32"], ["--input_size=[1,3,32,32]"]):
        cli.main(["summary", "resnet18-cifar", *size])
        assert "1×64×32×32" in capsys.readouterr().out


def test_every_data_set_can_be_named():
    assert typing.get_type_hints(cli.evaluate)["dataset"] == data.Name | None


def test_evaluate_says_and_takes_which_data(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    packed = folder / "runs/w1a2/evaluated.safetensors"
    cli.main(["pack", "runs/w1a2", f"--out={packed}"])
    for arguments in (
        ["runs/w1a2", "--split=train"],
        ["runs/w1a2", "--dataset=digits"],
        [str(packed), "--threads=1"],  # it lies in a run folder, and so belongs to digits
    ):
        cli.main(["evaluate", *arguments])
        assert "right: digits (scikit-learn" in capsys.readouterr().out
    moved = tmp_path / "moved.safetensors"
    packed.rename(moved)
    cli.main(["evaluate", str(moved), "--dataset", "digits"])
    assert "right: digits" in capsys.readouterr().out
    code, said = mistake(folder, monkeypatch, capsys, "evaluate", str(moved))
    assert code == 1 and "name the data set: --dataset fashion-mnist or mnist or digits" in said


def test_a_finished_training_says_so_and_a_failed_start_blocks_nothing(tmp_path, monkeypatch, capsys):
    once = ["train", "--run=run", "--epochs=1", "--data.train_images=64", *TINY]
    mistake(tmp_path, monkeypatch, capsys, *once, "--init=typo")
    cli.main([*once, "--threads=1"])
    said = capsys.readouterr().out
    assert "on 1 thread: as asked" in said and "\ndone: test accuracy" in said
    cli.main(once)
    said = capsys.readouterr().out
    assert said.startswith("already finished: test accuracy") and "thread" not in said


def test_bench_doubts_what_a_busy_machine_measures(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    times = {name: timing.Timing(t, t, t) for name, t in [("float", 2.0), ("unpacked", 8.0), ("packed", 1.0)]}
    monkeypatch.setattr(timing, "interleaved", lambda *_, **__: times)
    cli.main(["bench", "runs/w1a2"])
    said = capsys.readouterr().out
    assert "1 thread\n" in said and "TRUST" not in said
    rows = [line.split()[:2] for line in said.splitlines()]
    assert ["float", "1.00"] in rows and ["unpacked", "0.25"] in rows and ["packed", "2.00"] in rows
    assert "packed over unpacked: 8.00" in said
    times["packed"] = timing.Timing(1.0, 0.4, 100.0)
    cli.main(["bench", "runs/w1a2"])
    said = capsys.readouterr().out
    assert "DO NOT TRUST" in said and "0.02 - 5.00" in said


def test_ctrl_c_leaves_a_checkpoint_that_the_same_command_takes_up(tmp_path):
    command = [sys.executable, "-m", "foldbit", "train", "--run=run", "--epochs=12", *TINY]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
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
    assert 2 <= len(records) < 12
    done = foldbit(*command[3:], cwd=tmp_path)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 12
    assert "epoch 1/" not in done.stdout and "done: test accuracy" in done.stdout
    assert Path(tmp_path / "run/checkpoint/model.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
@pytest.mark.parametrize(
    "unbuffered, arguments", [([], ["recipes"]), (["-u"], ["recipes"]), ([], ["train", "--help"])]
)
def test_nobody_reads_on_and_nothing_is_said(unbuffered, arguments):
    command = [sys.executable, *unbuffered, "-m", "foldbit", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == (0 if "--help" in arguments else 141)  # argparse forgives


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full there")
def test_output_onto_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "foldbit", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch("foldbit: .*No space left on device\n", done.stderr)


def test_an_error_of_another_pipe_is_told(tmp_path, monkeypatch, capsys):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(catalogue, "overview", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="Broken pipe"):
        cli.main(["recipes"])
    assert not capsys.readouterr().out


class Output:
    """Something with write, as a program may put in the place of its output."""

    def __init__(self, broken=False):
        self.text, self.broken = "", broken

    def write(self, text):
        if self.broken:
            raise BrokenPipeError(32, "Broken pipe")
        self.text += text


def test_any_output_will_do(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    cli.main(["recipes"])
    monkeypatch.setattr(sys, "stdout", Output())
    cli.main(["recipes"])
    assert "fashion-mnist" in sys.stdout.text
    monkeypatch.setattr(sys, "stdout", Output(broken=True))
    with pytest.raises(SystemExit, match="Broken pipe"):
        cli.main(["recipes"])


def test_an_output_without_a_descriptor_may_break(monkeypatch):
    class Broken(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit) as stopped:
        cli.main(["recipes"])
    assert stopped.value.code == 141


def test_an_output_that_broke_leaves_no_descriptor_open_and_the_next_as_it_was(monkeypatch):
    reads, writes = os.pipe()
    with os.fdopen(writes, "w", encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        cli.main(["recipes", "mnist/lenet5"])
        assert output.errors == "strict"
        os.close(reads)
        free = os.dup(writes)
        os.close(free)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["recipes"])
        again = os.dup(writes)
        os.close(again)
        assert stopped.value.code == 141 and again == free


def test_a_terminal_without_a_character_shows_another(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "foldbit", "summary", "runs/w1a2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0 and b"1?8?" in done.stdout and not done.stderr


def test_ctrl_c_while_arguments_are_read_is_one_line(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parse", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["recipes"])
    assert stopped.value.code == 130 and capsys.readouterr().err == "foldbit: interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_evaluate_takes_a_folder_with_a_name_of_any_bytes(folder, tmp_path):
    run = tmp_path / os.fsdecode(b"run\xff")
    shutil.copytree(folder / "runs/w1a2", run)
    assert "test images right" in foldbit("evaluate", str(run), "--threads=1").stdout
