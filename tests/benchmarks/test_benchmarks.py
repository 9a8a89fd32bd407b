"""The benchmarks' arithmetic, and that they run at all, without the peers."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from foldbit.timing import Timing

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def module(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("size, kernel, stride", [(7, 3, 1), (8, 3, 2), (5, 5, 1), (4, 1, 2), (2, 5, 1)])
def test_macs_are_those_of_a_convolution_of_ones(size, kernel, stride):
    case = module("cases").Case(40, 24, size, kernel, stride)  # of which the kernels make 64 and 32
    ones = torch.ones(1, 64, size, size), torch.ones(32, 64, kernel, kernel)
    assert case.macs() == F.conv2d(*ones, stride=stride, padding=kernel // 2).sum()
    outputs = F.conv2d(*ones, stride=stride, padding=kernel // 2).numel()
    assert case.macs(padded_taps=True) == outputs * 64 * kernel**2


def test_share_of_peak():
    case = module("cases").Case(32, 16, 1, 1)  # 512 bits
    peak = module("peak")
    seconds = peak.ROUNDS * peak.BITS / 512  # one case a second
    assert peak.share_of_peak(case, 1, 1.0, seconds) == pytest.approx(1.0)
    assert peak.share_of_peak(case, 2, 4.0, seconds) == pytest.approx(0.5)


def test_a_layer_is_the_difference_of_two_chains():
    times = {"engine ×1": Timing(5.0, 4.0, 6.0), "engine ×3": Timing(9.0, 8.0, 12.0)}
    assert module("results").a_layer(times, "engine", 3) == Timing(2.0, 1.0, 4.0)


def test_goals():
    Goal = module("results").Goal
    assert Goal("at least", 1.0, 1.0).met and not Goal("at least", 0.9, 1.0).met
    assert Goal("at most", 1.0, 1.0, at_most=True).met and not Goal("at most", 1.1, 1.0, at_most=True).met
    assert not Goal("nothing", float("nan"), 1.0).met
    assert not Goal("nothing", float("nan"), 1.0, at_most=True).met


def test_what_is_wrong_is_not_timed():
    peers = module("peers")
    right = np.ones((2, 3))
    assert peers.check("right", right * (1 + 1e-7), right, 1e-5) == pytest.approx(1e-7, rel=1e-3)
    for wrong in (right * 1.01, np.full((2, 3), np.nan), np.ones((2, 3, 1))):
        with pytest.raises(peers.Wrong, match="a peer is off"):
            peers.check("a peer", wrong, right, 1e-3)


@pytest.mark.parametrize("planes", [1, 2])
def test_a_layer_of_foldbit_is_a_chain_of_one(planes):
    cases, peers = module("cases"), module("peers")
    chain = peers.chain(20, 5, 1, planes)
    layer = cases.Layer(cases.Case(20, 20, 5), planes, chain)
    with torch.no_grad():
        peers.check("module", layer.module()().numpy(), chain.binary(), 1e-6)
    peers.check("native call", np.moveaxis(layer.kernel()(), 3, 1), chain.binary(), 1e-6)
    assert layer.core()().shape == (1, planes, 1, 1, 5, 5, 20)


def test_native_calls_are_noted_and_can_be_repeated():
    cases, results = module("cases"), module("results")
    layer = cases.Layer(cases.Case(20, 20, 5), 2)
    with results.native_calls() as calls, torch.no_grad():
        expected = layer.module()()
    assert len(calls) == 1
    assert np.array_equal(np.moveaxis(calls[0](), 3, 1), expected.numpy())


@pytest.mark.parametrize("name", ["kernels", "networks"])
def test_script_runs(name, tmp_path):
    numbers, picture = tmp_path / "new" / "numbers.json", tmp_path / "new" / "picture.png"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--no-peers"]
    command += ["--json", str(numbers), "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "foldbit W1A2" in done.stdout
    assert json.loads(numbers.read_text())["goals"] == []  # tiny shapes prove nothing
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_script_says_which_peers_are_missing(monkeypatch, capsys):
    kernels = module("kernels")
    monkeypatch.setattr(sys, "argv", ["kernels.py"])
    monkeypatch.setattr(kernels.peers, "missing", lambda: ["openvino"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "openvino" in capsys.readouterr().err
