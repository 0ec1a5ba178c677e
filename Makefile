# make quickstart   a Llama trained tensor parallel on four CPU processes, from nothing
# make real         LoRA on SmolLM2 on four CPU processes and in one, with texts before and after: ten minutes
# make test         every test that runs without an accelerator, but the long matrices: a quarter of an hour on two quiet cores
# make test-unit    those that start no other process: two minutes
# make test-matrix  the long matrices, and every script by its real launcher: hours
# make test-gpu     those that need an accelerator
# make durations    what each test file takes, recorded in tests/durations.json; FILES=tests/test_new.py for some
# make fuzz         500 random cases of the engine against one process; CASES=, FIRST=, SEED=, SHRINK=1: docs/fuzzing.md
# make mutants      deliberate breakages of the package, each of which its tests must catch
# make test-versions  sets of versions that people have, each built from nothing, with a sample of tests; SETS=newest
# make scout        the newest of everything, torch too, and the sample; what moved is in its JSON file
# make minors       the names that we rely on in every minor version between the sets
# make test-clients  LLaMA-Factory, ms-swift and axolotl by their own commands against one process of theirs; CLIENTS=axolotl
# make lint         ruff, mypy, the floors of the package, its prose

PYTHON ?= python3
# Where torch comes from. Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# DeepSpeed compiles a small operation with the ninja of the environment; several processes share the cores.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
# Without bytecode each of the hundreds of processes that tests start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv quickstart real test test-unit test-matrix test-gpu test-versions test-clients scout minors durations fuzz mutants lint format

venv: $(INSTALLED)

# torch first and alone: it is by far the largest, and nothing that follows may choose another.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,dev]'
	touch $@

# DS_ACCELERATOR: DeepSpeed need not look for a GPU, and warn in every process that it finds none.
quickstart: $(INSTALLED)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/quickstart/accelerate.yaml \
		-m tp_plugin.finetune recipes/quickstart/train.yaml

STEPS ?= 24
real: $(INSTALLED)
	DS_ACCELERATOR=cpu $(BIN)/python -m tests.real --steps $(STEPS)

# Two workers: ranks of a test wait for each other, and those of another one use the cores meanwhile.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(BIN)/python -m pytest tests integration -m "not slow" $(PARALLEL)

test-unit: $(INSTALLED)
	$(BIN)/python -m pytest tests -m "unit and not slow"

test-matrix: $(INSTALLED)
	$(BIN)/python -m pytest tests integration -m slow --real-launches $(PARALLEL)
	$(BIN)/python -m pytest integration tests/test_readme.py -m "not slow" --real-launches $(PARALLEL)

FILES ?= tests integration
durations: $(INSTALLED)
	$(BIN)/python -m pytest $(FILES) -m "not slow" --record-durations

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest tests/gpu

# Environments are kept in ENVS; FRESH=1 builds them again.
SETS ?=
ENVS ?= .versions
VERSIONS := -m tests.versions --envs $(ENVS) $(if $(FRESH),--fresh)
test-versions: $(INSTALLED)
	$(BIN)/python $(VERSIONS) $(SETS)

CLIENTS ?=
test-clients: $(INSTALLED)
	$(BIN)/python -m tests.clients $(CLIENTS) --envs $(ENVS)

scout: $(INSTALLED)
	$(BIN)/python -m tests.versions newest-torch --envs $(ENVS) --fresh

minors: $(INSTALLED)
	$(BIN)/python -m tests.versions.minors --envs $(ENVS)

CASES ?= 500
FIRST ?= 0
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz $(if $(SEED),--seed $(SEED) --log,--cases $(CASES) --first $(FIRST)) $(if $(SHRINK),--shrink)

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.prose

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
