#!/usr/bin/env bash
# Build an sdist and a wheel; install the wheel into a new environment that sees no compiler; use it.
# Usage: tests/wheel_smoke.sh PYTHON   (a Python with the package `build`)
set -euo pipefail
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "== building sdist and wheel"
"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
ls "$work/dist"

echo "== installing the wheel where there is no compiler"
"$python" -m venv "$work/venv"
mkdir "$work/bin"  # a PATH without compilers
for tool in env sh uname; do ln -s "$(command -v "$tool")" "$work/bin/$tool"; done
CC=false CXX=false PATH="$work/bin" "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --only-binary :all: -c constraints.txt "$work"/dist/*.whl 2>"$work/pip.log" || { cat "$work/pip.log"; exit 1; }

echo "== using it"
cd "$work"  # away from the sources
PATH="$work/bin" "$work/venv/bin/python" -W error - <<'PYTHON'
from importlib import resources

import torch
import foldbit as fb
import foldbit.kernels.native as native

recipes = [f"{path.parent.name}/{path.name}" for path in (resources.files("foldbit") / "recipes").glob("*/*.yaml")]
assert {"imagenet/resnet18.yaml", "mnist/lenet5.yaml"} <= set(recipes), recipes
assert (resources.files("foldbit") / "recipes" / "published.yaml").is_file()
assert native.available()[:-1], "the wheel brings no native core"
torch.manual_seed(0)
model = fb.models.create("resnet8-xnor").eval()
fb.quantize_(model, fb.QuantConfig("ls-1", "ls-2"), overrides=fb.models.float_layers(model))
x = torch.randn(2, 1, 28, 28)
with torch.no_grad():
    expected = model(x)
    fb.save_packed(fb.pack_(model), "model.safetensors")
    packed = fb.load_packed("model.safetensors")(x)
torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
print(f"the wheel works: {native.current()} kernels, {fb.summary(model, (1, 1, 28, 28)).compression:.1f}x smaller")
PYTHON
