# The two commands of the README, make demo and make test, and smaller ones. Each first makes .venv and
# installs into it what it needs; a second call goes straight to work. C++ is built anew when its sources
# changed; Python changes need nothing.

PYTHON ?= python3
BIN := .venv/bin

# The variables pin what builds the extension, too: the first is read by pip before 25.3, the second since.
CONSTRAINTS ?= constraints.txt
PIP := PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) $(BIN)/python -m pip

CXX_FILES := $(shell find csrc python_tests/emulation -type f)
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml $(CONSTRAINTS)

# Ninja would ask make for leave to start jobs, which make gives to makes alone.
unexport MAKEFLAGS

.PHONY: demo test tests long fuzz mutants test-integrations bench reproduce docs lint format emulated clean

demo: .venv/demo.stamp
	$(BIN)/mas-ext demo

test: lint tests

# The sanitizers see nothing of plain PyTorch and of other processes: those tests run once, below.
tests: emulated
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 MAS_EXT_EMULATED=build/sanitized OMP_NUM_THREADS=1 \
	  $(BIN)/pytest -n auto -m "not cuda" -k "not [reference and not instruction_set" \
	  python_tests/kernels/test_kernels.py python_tests/kernels/test_per_sample.py \
	  python_tests/kernels/test_low_rank.py python_tests/kernels/test_hostile.py
	OMP_NUM_THREADS=1 MAS_EXT_REQUIRE_NATIVE=1 $(BIN)/pytest -n auto --dist loadfile

# With 40 times as many sequences, kills and interruptions.
long: .venv/dev.stamp
	OMP_NUM_THREADS=1 MAS_EXT_TIMES=40 $(BIN)/pytest -n auto --dist loadfile python_tests/state python_tests/comparison \
	  python_tests/parameters/test_agreement.py python_tests/training/test_checkpoints.py python_tests/test_task_free.py \
	  python_tests/kernels/test_hostile.py

# Coverage-guided, each reader of files for so long. What it finds is in build/fuzz.
FUZZ_SECONDS ?= 3600
fuzz: .venv/fuzz.stamp
	for reader in $(notdir $(wildcard python_tests/fuzz/corpus/*)); do \
	  PYTHONPATH=python_tests OMP_NUM_THREADS=1 \
	    $(BIN)/python -m fuzz $$reader -max_total_time=$(FUZZ_SECONDS) || exit 1; \
	done

# Which small changes of the code no test notices.
mutants: emulated
	$(BIN)/python python_tests/mutants.py

# The adapters, against the libraries that they are for.
test-integrations: .venv-integrations/stamp
	OMP_NUM_THREADS=1 MAS_EXT_REQUIRE_NATIVE=1 .venv-integrations/bin/python -m pytest python_tests/integrations

bench: .venv/demo.stamp
	$(BIN)/mas-ext bench

reproduce: .venv/demo.stamp
	$(BIN)/python -m experiments
	$(BIN)/python -m experiments --page

docs: .venv/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean --quiet

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir build/mypy-windows mas_ext
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/dev.stamp
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# The CUDA kernels on CPU threads, as they are and with sanitizers. Ninja knows what to build anew.
emulated: .venv/dev.stamp
	$(call build_emulated,build/emulated,OFF)
	$(call build_emulated,build/sanitized,ON)

define build_emulated
$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/pybind11-config --cmakedir)" \
  -DMAS_EXT_EMULATE_CUDA=ON -DMAS_EXT_SANITIZE=$(2) -DMAS_EXT_WARNINGS_AS_ERRORS=ON
$(BIN)/cmake --build $(1)
endef

clean:
	rm -rf .venv .venv-integrations build

# pip is the last thing that venv puts there: an environment that failed half-way is made again.
$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: $(SOURCES) | $(BIN)/pip
	$(PIP) install --editable ".[demo]"
	touch $@

# Holds all that the demo needs, too.
.venv/dev.stamp: $(SOURCES) | $(BIN)/pip
	MAS_EXT_REQUIRE_NATIVE=1 SKBUILD_CMAKE_DEFINE=MAS_EXT_WARNINGS_AS_ERRORS=ON \
	  $(PIP) install --editable ".[dev]"
	touch .venv/demo.stamp $@

.venv/fuzz.stamp: .venv/dev.stamp
	$(PIP) install atheris
	touch $@

# An environment of its own, of several GB: torchvision, which Avalanche needs, comes with CUDA's torch alone.
# It is built in a folder of its own, too, so that both can be made at the same time.
.venv-integrations/bin/pip:
	$(PYTHON) -m venv .venv-integrations

.venv-integrations/stamp: $(SOURCES) constraints-integrations.txt | .venv-integrations/bin/pip
	MAS_EXT_REQUIRE_NATIVE=1 MAS_EXT_CUDA=off SKBUILD_BUILD_DIR=build/integrations \
	  SKBUILD_CMAKE_DEFINE=MAS_EXT_WARNINGS_AS_ERRORS=ON \
	  PIP_CONSTRAINT=constraints-integrations.txt PIP_BUILD_CONSTRAINT=constraints-integrations.txt \
	  .venv-integrations/bin/python -m pip install --editable ".[integrations]"
	touch $@
