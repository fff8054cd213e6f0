# The two commands of the README. Each makes its own environment: Python 3.11 and a package index are all they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .oldest
DEMO_FLAGS ?=
PYTEST_FLAGS ?=

# Nothing below may reach for the network once the environment stands.
RUN := env HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

.PHONY: demo test test-oldest soak docs lint types clean

demo: $(STAMP) ## the whole main job on the shipped pair; ends with a page to look at
	$(RUN) $(BIN)/davae demo $(DEMO_FLAGS)

test: lint types ## what a change has to pass
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--numprocesses 2 --dist worksteal $(PYTEST_FLAGS)

test-oldest: $(STAMP) $(OLDEST)/.installed ## what saves, loads and widens, on the oldest diffusers that is allowed
	PYTHONPATH=$(OLDEST) $(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) \
		tests/test_fixtures.py tests/pipelines/test_portable.py tests/pipelines/test_base_lora.py tests/backbones/test_table.py

soak: $(STAMP) ## every promise of docs/reliability.md, many times over; PYTEST_FLAGS="--part 0.1" for a tenth
	$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "soak or slow" --soak experiments/results/soak.json \
		--timeout 7200 --numprocesses 2 --dist worksteal $(PYTEST_FLAGS)

docs: $(STAMP) ## the site: the pages of docs/, and a reference made from the code
	$(RUN) $(BIN)/python -m sphinx -W -q -c docs -d build/doctrees . build/site
	@echo $(CURDIR)/build/site/docs/index.html

lint: $(STAMP)
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

PIP := $(BIN)/python -m pip --disable-pip-version-check
HASHED := $(PIP) install --require-hashes --only-binary :all: --no-deps --requirement

# Where the files are known by their hashes, only these are installed: torch's build for CPUs if pip finds it.
$(STAMP): pyproject.toml constraints.txt requirements.txt requirements-cpu.txt requirements-cuda.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(shell uname -sm),Linux x86_64)
	$(HASHED) requirements.txt
	$(HASHED) requirements-cpu.txt || $(HASHED) requirements-cuda.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
else
	$(PIP) install --constraint constraints.txt --editable '.[dev,eval]'
endif
	$(PIP) check
	touch $@

# Put before the environment's own: it has a newer huggingface_hub, which speaks through another HTTP library.
$(OLDEST)/.installed: pyproject.toml
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(OLDEST) \
		diffusers==0.37.1 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build docs/reference
