# Every target makes the virtual environment it needs: git, make and Python 3.10-3.13 are enough.
#   make demo    compile four attention models, print what was found, the error and the times
#   make test    all tests but slow ones (PYTEST="-k report" narrows them, PYTEST="-m slow" runs those)
#   make lint    ruff and pyright
#   make docs    the documentation, into site/
#   make check   lint, docs and test, as CI does
#   make install what all of them need
#   make format  let ruff rewrite the files
PYTHON ?= python3
PYTEST ?= -n auto --dist loadgroup -m "not slow"

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: demo test lint docs check install format clean
.DELETE_ON_ERROR:

demo: $(VENV)/test.stamp
	$(VENV)/bin/python examples/demo.py

test: $(VENV)/test.stamp
	$(VENV)/bin/python -m pytest $(PYTEST)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

check: lint docs test

install: $(VENV)/dev.stamp $(VENV)/docs.stamp

format: $(VENV)/dev.stamp
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Python compiles what it imports, when it does, and keeps that: most of torch and transformers it
# never does. The builds after the first find hatchling there.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --no-compile -c constraints.txt

# torch goes first and alone: named exactly, pip takes a local CPU wheel where one is offered; any
# looser requirement may take the newest release and its gigabytes of CUDA packages instead.
$(VENV)/test.stamp: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) -e '.[test]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/test.stamp
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/test.stamp
	$(INSTALL) --no-build-isolation -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
