# make demo    train, pack and run a network on real images; the page it writes is the quickest tour
# make test    everything CI checks: ruff, mypy, pytest
# make test-vision   the tests against torchvision and timm, in an environment of their own (gigabytes, once)
# make bench   time the kernels and whole networks against other engines, one core kept busy for ten minutes
# make wheel   build sdist and wheel, and try the wheel where there is no compiler
# make clean   remove the virtual environment and everything built

PYTHON ?= python3
VENV   ?= .venv
VISION ?= .venv-vision
BIN    := $(VENV)/bin
# The pinned versions to install with; empty it to take the newest that the package allows.
CONSTRAINTS ?= -c constraints.txt
CODE   := src tests benchmarks examples
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-vision bench wheel clean setup data tools

demo: setup data
	@echo "== running the demo (four minutes on two quiet cores, more on slower ones)"
	$(BIN)/foldbit demo --folder runs/demo
	@echo "== make demo: done"

test: setup data tools
	@echo "== ruff, mypy"
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	@echo "== pytest"
	$(BIN)/pytest

test-vision: .make/vision
	$(VISION)/bin/pytest -m vision tests

bench: .make/bench
	@echo "== benchmarks (about ten minutes; leave the machine alone meanwhile)"
	$(BIN)/python benchmarks/kernels.py --json runs/bench/kernels.json --plot runs/bench/kernels.png
	$(BIN)/python benchmarks/networks.py --json runs/bench/networks.json --plot runs/bench/networks.png
	@echo "== make bench: done; numbers and pictures are in runs/bench"

wheel: setup
	bash tests/wheel_smoke.sh $(BIN)/python

clean:
	rm -rf $(VENV) $(VISION) .make build dist

# A virtual environment with the package, its extras and the native core. The stamp is renewed when the sources
# of the core or the list of dependencies change. Editable: Python sources are used as they lie here.
setup: .make/setup

.make/setup: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "== setting up $(VENV): torch, the tools, the native core (a few minutes, once)"
	@command -v c++ >/dev/null || { echo "make: a C++ compiler is needed (Debian: apt-get install g++)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(CONSTRAINTS)
	@mkdir -p .make && touch $@

# A second environment: torchvision pins a torch of its own. The core is built apart, beside the other one's.
.make/vision: pyproject.toml constraints-vision.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "== setting up $(VISION): torch, torchvision, timm (a few minutes, once)"
	test -x $(VISION)/bin/python || $(PYTHON) -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --upgrade pip
	$(VISION)/bin/python -m pip install --quiet --editable '.[dev,vision]' -C build-dir=build/vision \
	  -c constraints-vision.txt
	@mkdir -p .make && touch $@

.make/bench: .make/setup
	@echo "== setting up the engines to compare with: OpenVINO, ONNX Runtime"
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]' $(CONSTRAINTS)
	@touch $@

# Fashion-MNIST is a Debian package; where that cannot be had, foldbit looks elsewhere, and says so.
data: .make/data

.make/data:
	@if [ -d /usr/share/datasets/fashion-mnist ]; then echo "== data: Debian's dataset-fashion-mnist is there"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "== data: installing Debian's dataset-fashion-mnist"; \
	  { apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist; } >/dev/null \
	    || echo "== data: apt could not install it; the demo will try a download"; \
	else echo "== data: no apt here, or not root; the demo will try a download"; fi
	@mkdir -p .make && touch $@

# Chromium opens a page, a compiler and an emulator for ARM check its kernels, and SIMDe those for AVX-512 on
# machines without it; tests that lack them skip.
tools: .make/tools

.make/tools:
	@missing=""; \
	command -v chromium >/dev/null || missing="$$missing chromium"; \
	command -v aarch64-linux-gnu-g++ >/dev/null || missing="$$missing g++-aarch64-linux-gnu"; \
	command -v qemu-aarch64 >/dev/null || missing="$$missing qemu-user"; \
	[ -e /usr/include/simde/x86/avx512.h ] || missing="$$missing libsimde-dev"; \
	if [ -z "$$missing" ]; then echo "== tools for tests: all there"; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "== tools for tests: installing$$missing"; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } >/dev/null \
	    || echo "== tools for tests: apt could not install them; the tests that need them will be skipped"; \
	else echo "== tools for tests: no apt here, or not root; the tests that need$$missing will be skipped"; fi
	@mkdir -p .make && touch $@
