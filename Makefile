# The two commands of the README. Each makes its own environment: Python 3.11 and a package index are all they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

# Nothing below may reach for the network once the environment stands.
RUN := env HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

.PHONY: demo test soak lint types clean

demo: $(STAMP) ## the whole main job on the shipped pair and pictures; ends with a page to look at
	$(RUN) $(BIN)/davae demo $(DEMO_FLAGS)

test: lint types ## what a change has to pass
	$(RUN) $(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

soak: $(STAMP) ## every promise of docs/reliability.md, many times over; PYTEST_FLAGS="--part 0.1" for a tenth
	$(RUN) $(BIN)/python -m pytest -m "soak or slow" --soak experiments/results/soak.json --timeout 7200 $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build
