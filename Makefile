# `make demo` and `make test` are all a fresh clone needs (Python 3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STEPS ?= 600

.PHONY: demo test soak mutants lint format pretrain

# The stamps say which requirements a virtual environment was made from: a changed file installs again.
$(VENV)/run: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements.txt tests/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@ $(VENV)/run

demo: $(VENV)/run
	$(BIN)/python -m minisd.pocket.demo --steps $(STEPS)

test: $(VENV)/dev
	$(BIN)/python -m pytest

# The fault tests at the size for a night: hours.
soak: $(VENV)/dev
	MINISD_SOAK=nightly $(BIN)/python -m pytest tests/faults tests/e2e/test_resume.py tests/e2e/test_signals.py

# Whether the tests notice when the code is wrong: a few minutes; writes the table of docs/testing.md.
mutants: $(VENV)/dev
	$(BIN)/python -m tests.mutants

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pretrain: $(VENV)/run
	$(BIN)/python -m minisd.pocket.pretrain
