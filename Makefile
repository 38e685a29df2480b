# Each target sets up what it needs; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= arithmetic
WORKERS ?= 2
BIN := $(VENV)/bin
EDITABLE := $(BIN)/pip install --quiet --constraint constraints.txt --editable
PYTHONS ?= $(BIN)/python
TORCHES ?= 2.13.0 2.15.0
INSTALLED := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: train test test-slow lint bench tables docs notebooks wheel test-wheel clean help

## Watch a small model learn: RECIPE=arithmetic ARGS="--set seed=1 --out runs/mine".
train: $(VENV)/.installed
	$(BIN)/fastrl train $(RECIPE) $(ARGS)

## Prove that everything works; ARGS are pytest's.
# Workers share the cores: OpenMP's threads must not spin while they wait.
test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow and not gpu" \
	  -n $(WORKERS) --dist worksteal $(ARGS)

## The tests that take long.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

## Style, formatting and types.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	$(BIN)/mypy

## Every race under pytest-benchmark.
bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest bench $(ARGS)

## What the code already holds, written into the pages of docs/.
tables: $(VENV)/.installed
	$(BIN)/python docs/tables.py

## The pages of docs/ as a site in build/docs; a broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet

## Run the pages that are notebooks again and keep what they show.
# On a quiet machine: they show times. What is told of the kernel differs between machines.
notebooks: $(VENV)/.installed-docs
	$(BIN)/jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False \
	  --ClearMetadataPreprocessor.enabled=True \
	  --ClearMetadataPreprocessor.clear_cell_metadata=False docs/*.ipynb

## A wheel for each of PYTHONS in dist/.
# Tagged with the Linuxes that it runs on; with CUDA's major in its version where nvcc built kernels,
# which FASTRL_CUDA=off prevents.
wheel: $(VENV)/.installed-dev
	rm -rf build/wheel build/lib.*
	for python in $(PYTHONS); do \
	  $(BIN)/pip --python "$$(command -v $$python)" wheel --quiet --no-deps \
	    --build-constraint constraints.txt --wheel-dir build/wheel . || exit 1; \
	done
	for wheel in build/wheel/*.whl; do \
	  $(BIN)/python tests/wheel_links.py $$wheel && PATH="$(abspath $(BIN)):$$PATH" \
	    $(BIN)/auditwheel repair --plat auto --wheel-dir dist $$wheel || exit 1; \
	done

## The wheel for our own Python beside each of TORCHES and Hugging Face's `kernels`.
# The file itself; the others are fetched.
test-wheel: wheel
	PATH="$(abspath $(BIN)):$$PATH" KERNELS=1 TORCHES="$(TORCHES)" bash tests/packaging.sh \
	  "$$(ls -t dist/fastrl-*-cp$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])')-*.whl | head -n 1)"

# torch first and pinned: unpinned, pip may take a build with gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt
	@echo "installing into $(VENV): packages are downloaded and kernels compiled, minutes in all"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(INSTALLED)
	@echo "compiling the native kernels"
	$(EDITABLE) '.[gym]'
	touch $@

# All that .installed has as well, compiled once.
$(VENV)/.installed-dev: $(VENV)/.torch $(INSTALLED)
	@echo "compiling the native kernels"
	$(EDITABLE) '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(EDITABLE) '.[docs]'
	touch $@

## Remove what was installed and built.
clean:
	rm -rf $(VENV) build dist fastrl/*.so *.egg-info

## This list.
help:
	@awk -F: '/^## / {what = substr($$0, 4)} /^[a-z-]+:/ && what {printf "%-11s%s\n", $$1, what; what = ""}' \
	  $(firstword $(MAKEFILE_LIST))
