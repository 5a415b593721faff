# Every target makes its own environment in .venv, out of constraints.txt, with nothing but Python >= 3.10 (with its
# venv module), a C++17 compiler and make; cmake and ninja come from PyPI. pip's own settings are obeyed.
#
#   make demo            the whole library at work on handwritten digits, about two minutes
#   make test            the tests, native kernels required
#   make test-scalar     the same without SIMD           make test-none   the same without the extension
#   make test-packaging  sdist, wheels, pure install     make lint        ruff, mypy, clang-format
#   make bench           against the rivals (ARGS="--threads 2 --write")                make clean
#   make test-gpu        builds the CUDA kernels and runs their tests on a GPU           make bench-gpu
#   make memcheck-gpu    some of those tests under compute-sanitizer: memory, races      (ARGS="-k sparse24")
#
#   PYTHON=python3.12          another interpreter       ARGS="-k conv -x"   handed to pytest or the demo
#   PYCOMPRESS_NATIVE=0        no C++ compiler needed: install as pure Python

PYTHON ?= python3
PYCOMPRESS_NATIVE ?= 1
export PYCOMPRESS_NATIVE
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# As many processes as cores, one thread each: most tests are too small for more. Tests of threading set their own.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q --numprocesses auto --dist worksteal
# One stamp per kind of install, so that a change of PYCOMPRESS_NATIVE installs anew.
INSTALLED := $(VENV)/.installed-native-$(PYCOMPRESS_NATIVE)
NATIVE_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f 2>/dev/null)
CPP := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: test-gpu bench-gpu memcheck-gpu demo test test-scalar test-none test-packaging lint format bench clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(RUN) -m pycompress demo $(ARGS)

test: $(INSTALLED)
	PYCOMPRESS_REQUIRE_NATIVE=$(PYCOMPRESS_NATIVE) $(PYTEST) -m "not packaging" $(ARGS)

# The programs in tests/native build kernels of their own: once, in `make test`, is enough. Without SIMD other kernels run, so
# what stands on kernels is tested; without the extension everything takes another path.
test-scalar: $(INSTALLED)
	PYCOMPRESS_ISA=scalar $(PYTEST) -m "not packaging" tests/core tests/ops tests/nn tests/analysis tests/io tests/quantization $(ARGS)

test-none: $(INSTALLED)
	PYCOMPRESS_DISABLE_NATIVE=1 $(PYTEST) -m "not packaging" --ignore=tests/native $(ARGS)

test-packaging: $(INSTALLED)
	env -u PYCOMPRESS_NATIVE $(RUN) -m pytest -q -m packaging $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Adds rows to benchmarks/results with ARGS=--write.
bench: $(INSTALLED) $(VENV)/.rivals
	set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(RUN) $$script $(ARGS); done
	$(RUN) -m pytest -q benchmarks/test_micro.py --benchmark-columns=min,median,iqr

# On a machine with a GPU and nvcc 12 or newer, with the CUDA build of torch that pip finds there (no constraints).
GPU_VENV := .venv-gpu
GPU_RUN := $(GPU_VENV)/bin/python
$(GPU_VENV)/.installed: $(NATIVE_SOURCES) $(shell find cmake -type f)
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_RUN) -m pip --disable-pip-version-check install --quiet scikit-build-core pybind11 'cmake>=3.23' ninja
	PYCOMPRESS_CUDA=1 $(GPU_RUN) -m pip --disable-pip-version-check install --quiet --no-build-isolation --editable '.[test]'
	touch $@

test-gpu: $(GPU_VENV)/.installed
	$(GPU_RUN) -m pytest -q -m gpu $(ARGS)

# Every tensor an allocation of its own, so that a read behind it is one behind an allocation. The checkers slow kernels down by 10 to 100 times:
# no large shapes, and nothing that torch compiles. racecheck knows shared memory only.
SANITIZED := -q -p no:cacheprovider -m gpu -k "not 4096 and not compile and not out_of_memory and not capture" tests/gpu
memcheck-gpu: $(GPU_VENV)/.installed
	set -e; for tool in memcheck racecheck; do echo "== $$tool"; PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_RUN) -m pytest $(SANITIZED) $(ARGS); done

bench-gpu: $(GPU_VENV)/.installed
	set -e; for script in benchmarks/gpu/bench_*.py; do echo "== $$script"; $(GPU_RUN) $$script $(ARGS); done
	$(GPU_RUN) benchmarks/gpu/bench_kd_loss.py --linear $(ARGS)

$(VENV)/.rivals: $(INSTALLED)
	$(PIP) onnx onnxruntime
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist demo_out

# The build tools live in the environment, so that a change in csrc recompiles only what changed.
$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) scikit-build-core pybind11 cmake ninja
	touch $@

$(INSTALLED): $(VENV)/.tools $(NATIVE_SOURCES)
	rm -f $(VENV)/.installed-native-*
	$(PIP) --no-build-isolation --config-settings=build-dir=build/{wheel_tag} --editable '.[dev]'
	touch $@
