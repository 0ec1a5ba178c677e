# make quickstart   a Llama trained tensor parallel on four CPU processes, from nothing
# make test         every test that runs without an accelerator
# make test-gpu     those that need one
# make lint         ruff, mypy, the floors of the package

PYTHON ?= python3
# Where torch comes from. Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# DeepSpeed compiles a small operation with the ninja of the environment; several processes share the cores.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: venv quickstart test test-matrix test-gpu lint format

venv: $(INSTALLED)

# torch first and alone: it is by far the largest, and nothing that follows may choose another.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $@

quickstart: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/quickstart/accelerate.yaml \
		-m tp_plugin.finetune recipes/quickstart/train.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest tests integration -m "not slow"

test-matrix: $(INSTALLED)
	$(BIN)/python -m pytest tests integration -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
