# Everything happens in .venv; nothing but python (3.10 or newer) and make is needed beforehand.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
# A process for every core.
EVERY_CORE := -n auto --maxprocesses 8 --dist loadscope

.PHONY: demo test check lint clean

demo: $(STAMP)
	$(VENV)/bin/python run.py --benchmark synthia2city

# Tests with a Ray cluster come one after another: such a run takes the machine by itself.
test: $(STAMP) lint
	$(VENV)/bin/python -m pytest -q $(EVERY_CORE) --ignore tests/engine
	$(VENV)/bin/python -m pytest -q tests/engine

# The inner loop: everything that is quick and needs no Ray cluster.
check: $(STAMP)
	$(VENV)/bin/python -m pytest -q $(EVERY_CORE) -m "not slow"

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Tutelage needs Python 3.10 or newer, this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)
