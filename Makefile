# make train: watch a small model learn; make test: prove that everything works. Each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
RECIPE ?= arithmetic
WORKERS ?= 2
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: train test test-slow lint bench docs notebooks wheel clean

train: $(VENV)/.installed
	$(BIN)/fastrl train $(RECIPE) $(ARGS)

# Workers share the cores: OpenMP's threads must not spin while they wait.
test: $(VENV)/.installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m "not slow and not gpu" \
	  -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest bench $(ARGS)

# The pages of docs/ as a site in build/docs; a broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet

# Run the pages that are notebooks again and keep what they show. On a quiet machine: they show times.
notebooks: $(VENV)/.installed-docs
	$(BIN)/jupyter nbconvert --execute --inplace --ExecutePreprocessor.record_timing=False \
	  docs/*.ipynb

# A wheel in dist/, tagged with the Linuxes that it runs on; with CUDA's major in its version where
# nvcc built kernels, which FASTRL_CUDA=off prevents.
wheel: $(VENV)/.installed-dev
	rm -rf build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel .
	$(BIN)/python tests/wheel_links.py build/wheel/fastrl-*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat auto -w dist build/wheel/*.whl

# torch first and pinned: unpinned, pip may take a build with gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist fastrl/*.so *.egg-info
