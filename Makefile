# `make demo` and `make test` do all of their own set-up: a virtual environment in .venv, torch and everything else at
# the versions of constraints-dev.txt, and this package with its compiled kernels. Nothing is done again until one of
# the files that it depends on changes. Needs python3 (3.10 or newer, with venv), make and, for the kernels, a C++20
# compiler. Tests whose program is missing are skipped and name it: objdump (Debian: binutils), qemu-x86_64 and
# qemu-aarch64 (qemu-user), aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu).

PYTHON ?= python3
VENV ?= .venv
# Where else to look for torch. Its CPU build is much smaller than PyPI's default one on Linux:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=
BENCHMARKS ?= loading quantize_memory

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := $(shell find csrc _build_backend -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' \) 2>/dev/null)

.PHONY: help setup demo test test-all lint format types bench gpu clean

help:
	@echo "make demo    quantize the demo model, save, reload, generate, measure (a few minutes)"
	@echo "make test    the tests, but for those marked slow; make test ARGS='tests/cli -k doctor' for some"
	@echo "make test-all   with the slow ones: every architecture, every CUDA kernel compiled for every GPU generation"
	@echo "make lint    ruff and clang-format    make format   apply them    make types   mypy"
	@echo "make bench   benchmarks that need nothing beside the checkout; results in benchmarks/results"
	@echo "make gpu     on a machine with a GPU: its tests and benchmarks, 12 minutes; results in benchmarks/results"
	@echo "make clean   remove build outputs and out/; the virtual environment stays"

setup: $(VENV)/.installed

# --- set-up: each stamp lies in the virtual environment, so that they go together ---

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints-dev.txt $(VENV)/.created
	@echo "installing torch"
	@$(PIP) install -c constraints-dev.txt $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	@echo "installing hf_spqr and the development tools, compiling the kernels"
	@$(PIP) install -c constraints-dev.txt -e '.[dev]'
	@touch $@

# --- jobs ---

demo: setup
	$(BIN)/python examples/demo.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -exec $(BIN)/clang-format --dry-run --Werror {} +

format: setup
	$(BIN)/ruff check --fix .
	find csrc tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -exec $(BIN)/clang-format -i {} +

types: setup
	$(BIN)/mypy

bench: setup
	@for name in $(BENCHMARKS); do echo "$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

gpu: setup
	HF_SPQR_CUDA=1 HF_SPQR_FORCE_EXT=1 $(BIN)/python setup.py build_ext --inplace
	PYTHON=$(BIN)/python benchmarks/gpu_session.sh $(ARGS)

clean:
	rm -rf build dist out *.egg-info hf_spqr/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(VENV)/.installed
