# make demo    train two small networks, watched; pictures at the end
# make test    all tests; those that need a GPU or a browser are skipped where none is
# A bare clone and Python 3.11 or newer are enough: everything goes into .venv, pinned by constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc build_backend -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.py')
FORMATTED = $(shell git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' 'benchmarks/*.cuh' 'benchmarks/*.cu' 'tests/*.h' 'tests/*.cuh' 'tests/*.cpp' 'tests/*.cu')
SCRIPTS = $(shell git ls-files '*.sh') .ci/run

.PHONY: demo test test-quick bench doctor lint format clean install

demo: install
	$(BIN)/fastfs demo

# A file of tests is run by one process. More than eight would mostly wait for memory.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

test: install
	$(PYTEST)

test-quick: install
	$(PYTEST) -m 'not slow'

bench: install
	$(BIN)/python -m benchmarks.ops.feature_stats
	$(BIN)/python -m benchmarks.monitor

doctor: install
	$(BIN)/fastfs doctor

# Targets of their own, so that `make --keep-going lint` tells everything at once.
LINT := lint-ruff lint-format lint-mypy lint-clang-format lint-shellcheck
.PHONY: $(LINT)
lint: $(LINT)
$(LINT): install

lint-ruff:
	$(BIN)/ruff check .

lint-format:
	$(BIN)/ruff format --check .

lint-mypy:
	$(BIN)/mypy

lint-clang-format:
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

lint-shellcheck:
	$(BIN)/shellcheck $(SCRIPTS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

install: $(VENV)/installed

$(VENV)/created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Editable: Python files are used in place. The core is compiled again, what changed of it, when its sources change.
$(VENV)/installed: $(VENV)/created setup.py pyproject.toml constraints.txt fastfs/_version.py $(SOURCES)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastfs/_C.*.so .pytest_cache .mypy_cache .ruff_cache
