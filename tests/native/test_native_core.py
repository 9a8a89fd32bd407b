"""The C++ core by itself: on 64-bit ARM under an emulator, and under sanitizers, against plain loops."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from foldbit.kernels import native

ROOT = Path(__file__).parents[2]
CORE = [
    ROOT / "csrc" / f"{name}.cpp"
    for name in ("operations", "depthwise", "dispatch", "threads", "rows", "solve")
]
COMMON = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}"]
X86 = {"portable": [], "avx2": ["-mavx2"], "avx512": ["-mavx512f", "-mavx512vpopcntdq"]}


def need(program, package):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: {package})")
    return program


def build(folder, compiler, options, kernels):
    """Compile the checking program with these instruction sets, each file with its own flags."""
    objects, running = [], []
    sources = [(ROOT / "tests/native/check_kernels.cpp", []), *((source, []) for source in CORE)]
    sources += [(ROOT / "csrc" / f"{name}.cpp", flags) for name, flags in kernels.items()]
    for source, flags in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        command = [compiler, *COMMON, *options, *flags, "-c", str(source), "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        if len(running) % 2 == 0:  # two at a time
            running[-2].wait()
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    program = folder / "check_kernels"
    subprocess.run([compiler, *options, "-pthread", *objects, "-o", str(program)], check=True)
    return program


def run(command, names):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in names:
        assert f"{name}: " in done.stdout
    assert "threads at once are right" in done.stdout


def test_neon_equals_plain_loops_under_an_emulator(tmp_path):
    compiler = need("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    emulator = need("qemu-aarch64", "qemu-user")
    program = build(tmp_path, compiler, ["-O2", "-static", "-DFOLDBIT_NEON"], {"portable": [], "neon": []})
    run([emulator, program, "100"], ["portable", "neon"])


def test_avx512_equals_plain_loops_on_any_machine(tmp_path):
    """SIMDe stands in for the instructions, which this machine may lack."""
    compiler = need("g++", "g++")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("its AVX2 file is for x86-64")
    if not Path("/usr/include/simde/x86/avx512.h").is_file():
        pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
    shim = f"-I{ROOT / 'tests/native/avx512'}"
    kernels = {"portable": [], "avx2": ["-mavx2"], "avx512": [shim, "-Wno-psabi"]}
    options = ["-O1", "-DFOLDBIT_X86", "-D__builtin_cpu_supports(feature)=1"]
    program = build(tmp_path, compiler, options, kernels)
    run([program, "60"], ["portable", "avx2", "avx512"])


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers, tmp_path):
    compiler = need("g++", "g++")
    machine = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    x86 = machine.startswith("x86_64")
    options = ["-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    kernels = dict(X86) if x86 else {"portable": []}
    if "avx512" in kernels and "avx512" not in native.available():  # long to compile, would not run
        kernels["avx512"] = [*X86["avx512"], "-O0", "-fno-sanitize=all"]
    if x86:
        options += ["-DFOLDBIT_X86", "-Wno-maybe-uninitialized"]  # which GCC finds in its own AVX-512 header
    program = build(tmp_path, compiler, options, kernels)
    run([program, "60"], ["portable"])
