# make demo    train two small networks, watched; pictures at the end
# make test    all tests; those that need a GPU or a browser are skipped where none is
# make wheel   manylinux wheels with CUDA in dist/, for each Python installed, or for those that PYTHONS="3.11 3.13" names
# A bare clone and Python 3.10 or newer are enough: everything goes into .venv, pinned by constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc build_backend -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.py')
CPP = $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu')
SHELL_SCRIPTS = $(shell git ls-files '*.sh') .ci/run
JAVASCRIPT = $(shell git ls-files '*.js')
WORKFLOWS = $(shell git ls-files '.github/workflows/*.yml')

.PHONY: demo test test-quick bench docs doctor lint format hooks clean install wheel wheel-test sdist

demo: install
	$(BIN)/fastfs demo

# A file of tests is run by one process. More than eight would mostly wait for memory.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST)

test-quick: install
	$(PYTEST) -m 'not slow'

bench: install
	$(BIN)/python -m benchmarks.ops.feature_stats
	$(BIN)/python -m benchmarks.monitor

# The documentation site, in build/site. The tests build it too, and follow its links.
docs: install
	$(BIN)/sphinx-build -W --keep-going docs build/site

doctor: install
	$(BIN)/fastfs doctor

# One target per language. `make --keep-going lint` reports the findings of all of them.
LINT := lint-python lint-types lint-cpp lint-shell lint-javascript lint-workflows
.PHONY: $(LINT)
lint: $(LINT)
$(LINT): install

lint-python:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The annotations are those of the pinned numpy, and the last numpy for Python 3.10 has other ones.
lint-types:
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(BIN)/mypy; fi

lint-cpp:
	$(BIN)/clang-format --dry-run -Werror $(CPP)

lint-shell:
	$(BIN)/shellcheck $(SHELL_SCRIPTS)

# The scripts of the report page share one scope: which names exist and are used is known of all of them together.
lint-javascript:
	$(BIN)/oxlint $(JAVASCRIPT)
	mkdir -p build/lint && cat $(JAVASCRIPT) > build/lint/page.js
	$(BIN)/oxlint --allow all --deny no-undef --deny no-unused-vars --deny no-redeclare --no-ignore build/lint/page.js

lint-workflows:
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck $(WORKFLOWS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Runs the linters of the changed languages before each commit.
hooks: install
	$(BIN)/pre-commit install

# Distributions need no .venv: their tools are those of a lock with hashes.
BUILD_TOOLS := build/wheels/tools
wheel wheel-test sdist: $(BUILD_TOOLS)/installed

wheel:
	$(BUILD_TOOLS)/bin/python -m scripts.wheels build $(PYTHONS)

wheel-test:
	$(BUILD_TOOLS)/bin/python -m scripts.wheels test $(PYTHONS)

sdist:
	$(BUILD_TOOLS)/bin/python -m build --sdist --no-isolation

$(BUILD_TOOLS)/installed: locks/build.txt
	$(PYTHON) -m venv --clear $(BUILD_TOOLS)
	$(BUILD_TOOLS)/bin/python -m pip install --require-hashes -r $<
	touch $@

install: $(VENV)/installed

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Editable: Python files are used in place. The core is compiled again, what changed of it, when its sources change.
# LOCKED=1 takes the tools from the lock with hashes first, which needs an index with the original files.
$(VENV)/installed: $(VENV)/created setup.py pyproject.toml constraints.txt fastfs/_version.py $(SOURCES)
	$(if $(LOCKED),$(BIN)/python -m pip install --require-hashes -r locks/tools.txt)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastfs/_C.*.so .pytest_cache .mypy_cache .ruff_cache
