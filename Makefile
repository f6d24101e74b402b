# Every command a developer needs; `make help` lists them. Nothing but Python 3.11 and g++ is expected on the machine.

PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_BENCH ?= .venv-bench
# The oldest TensorFlow and Keras 3 that the suite passes on.
OLDEST := 'tensorflow==2.17.*' 'keras==3.8.*'
# One process a core is quickest: TensorFlow's import dominates short files, and its threads share the cores anyway.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
SECONDS ?= 60
BENCH_ARGS ?=
# A checkout of the Opus codec's sources, whose block-sparse products then take part.
OPUS ?=

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# What an installation is made from; a change of the native core installs again, which compiles what changed.
PROJECT_FILES := pyproject.toml setup.py keras_blocksparse/native/CMakeLists.txt \
	$(wildcard $(addprefix keras_blocksparse/native/,src/* include/* tf/* tflite/*))

# TensorFlow's start-up lines are not ours to show, and tests must be the same on a machine with a GPU.
export TF_CPP_MIN_LOG_LEVEL ?= 3
demo test test-oldest bench docs: export CUDA_VISIBLE_DEVICES := -1
export KERAS_BACKEND := tensorflow

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint docs test-native test-oldest bench-venv bench lite-matrix aarch64 fuzz clean

help:  ## list the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

# An environment is installed once for each set of extras, and again only when the project's own metadata changed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-%: $(PROJECT_FILES) | $(BIN)/python
	$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(VENV_OLDEST)/.stamp-test: $(PROJECT_FILES)
	$(PYTHON) -m venv $(VENV_OLDEST)
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) --editable '.[test]' $(OLDEST)
	@touch $@

# Other libraries have needs of their own, and none of them belongs to what a developer or a user installs.
$(VENV_BENCH)/.stamp-bench: $(PROJECT_FILES)
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/python $(PIP_INSTALL) --editable '.[bench]'
	@touch $@

venv: $(VENV)/.stamp-dev  ## install everything a developer needs into .venv

demo: $(VENV)/.stamp-examples  ## real speech: dense against 90 % block-sparse, table and picture in demo_output/
	$(BIN)/python -m examples.japanese_vowels

test: $(VENV)/.stamp-test  ## the whole suite
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.stamp-dev  ## build docs/ into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-native:  ## the native core under address, undefined-behaviour and thread sanitizers
	sh keras_blocksparse/native/sanitize.sh build/sanitize

fuzz:  ## hostile files against the delegate and the loader, SECONDS each (60); needs clang
	sh keras_blocksparse/native/fuzz.sh $(SECONDS) build/fuzz

test-oldest: $(VENV_OLDEST)/.stamp-test  ## the suite on the oldest TensorFlow and Keras supported
	$(VENV_OLDEST)/bin/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

bench-venv: $(VENV_BENCH)/.stamp-bench  ## the libraries to compare with, in .venv-bench

bench: $(VENV_BENCH)/.stamp-bench  ## against other libraries, into docs/benchmarks; BENCH_ARGS=--quick: a smoke run
	$(VENV_BENCH)/bin/python -m benchmarks.kernels $(BENCH_ARGS) $(if $(OPUS),--opus $(OPUS))
	$(VENV_BENCH)/bin/python -m benchmarks.layers $(BENCH_ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.device $(BENCH_ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.export_size_latency $(BENCH_ARGS)
	$(VENV_BENCH)/bin/python -m benchmarks.training_cost $(BENCH_ARGS)

aarch64: $(VENV)/.stamp-test  ## cross-build the delegate for ARM boards; kernels and C++ example in an emulator
	$(BIN)/python -m examples.cpp.check --aarch64
	$(BIN)/python -m pytest tests/native/test_emulated.py

lite-matrix: $(VENV)/.stamp-examples  ## exported files and the delegate on many runtimes, into docs/runtimes.md
	$(BIN)/python -m benchmarks.lite_matrix $(BENCH_ARGS)

clean:  ## remove what commands wrote, but the environments
	rm -rf build dist site demo_output *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
