"""The machine's limit: a loop of xor, popcount and add (peak.cpp), and how close a kernel comes to it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from cases import Case

ROUNDS, BITS = 20_000, 16 * 512  # of the peak loop: rounds a call, bits a round


class NoCompiler(RuntimeError):
    """The peak loop is C++ and is compiled when the benchmark runs."""


def peak_loop() -> Callable[[], object] | None:
    """One call of the peak loop: ROUNDS * BITS bits; None where this machine lacks its instructions.

    Raises:
        NoCompiler: without a C++ compiler, or where it fails.
    """
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompiler("no C++ compiler (c++, g++ or clang++) on the path: install one (Debian: g++)")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr}")
        peak = ctypes.CDLL(str(library)).peak
    peak.argtypes, peak.restype = [ctypes.c_int64], ctypes.c_int64
    return partial(peak, ROUNDS) if peak(1) else None


def share_of_peak(case: Case, planes: int, taken: float, peak: float, *, padded_taps: bool = False) -> float:
    """What share of the peak loop's rate a kernel reaches that takes so many seconds."""
    return (planes * case.macs(padded_taps=padded_taps) / taken) / (ROUNDS * BITS / peak)
