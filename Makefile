# `make train` and `make test` are all a fresh clone needs: Python 3.11 or newer with venv, and make.
PYTHON ?= python3
VENV   ?= .venv
PRESET ?= shopping/laptop
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# vLLM lives apart: it pins its own torch, transformers and numpy, and fills 3.5 GB, so one environment serves every clone
VLLM   ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/agentgym-venvs/vllm
PINS   := tests/with_vllm/requirements.txt
SERVES := $(VLLM)/.ready-$(shell sha256sum $(PINS) | cut -c -12)

.PHONY: train test test-vllm vllm lint format wheel clean

# OUT=DIR names the run's folder (default: the first free of runs/<preset>, runs/<preset>-2, ...); ARGS adds options.
train: $(READY)
	$(BIN)/agentgym train $(PRESET) $(if $(OUT),--out $(OUT)) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

# On the CPU build, embedded and as a server. Warnings are vLLM's own; a start takes half a minute on two cores.
test-vllm: $(SERVES)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/with_vllm -o filterwarnings=default -o timeout=600 $(ARGS)

vllm: $(SERVES)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(READY)
	$(BIN)/python -m hatchling build -t wheel

# Installed again only when what it is made from changes. The pins are exact; torch's also keeps CUDA's gigabytes out
# where a CPU build of that version is at hand.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "agentgym needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version`. Try: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "no venv module: apt-get install python3-venv (or your system's like)"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# What vLLM wants of vision and audio has no CPU build, and breaks transformers' imports where it is there all the same.
$(SERVES):
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --requirement $(PINS)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
