# slimline: `make run` does the whole example; `make help` lists the rest.
SHELL := bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
export VENV ?= .venv
BIN := $(VENV)/bin
RECIPE ?= examples/reviews/recipe.yaml
TESTS ?=
PORT ?= 5000
IMAGES ?= cpu language tensorrt llm mlflow
WHEELS ?=
GPU_CHECK ?=
GPU_PYTHON = $(or $(wildcard $(BIN)/python),python3)

export PYTHON TORCH TORCH_INDEX BASE ENGINE REGISTRY SOURCE
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
# Modules are compiled when first imported, not when installed; without .pyc files each start would cost 12 s more.
unexport PYTHONDONTWRITEBYTECODE

help: ## List the targets and settings
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  Settings, as in make run RECIPE=examples/reviews/products.yaml:"
	@echo "  RECIPE       the pipeline's parameters             ($(RECIPE))"
	@echo "  PYTHON       a Python 3.11 or 3.12                 (the first of python3.11, python3.12, python3)"
	@echo "  VENV         where the virtual environment goes    ($(VENV))"
	@echo "  TORCH        cpu or cuda                           (cuda where nvidia-smi lists a GPU)"
	@echo "  TORCH_INDEX  where the CPU build of torch is       (pip's settings, then download.pytorch.org/whl/cpu)"
	@echo "  TESTS        more for pytest, as in -m 'not slow'  ()"
	@echo "  PORT         of make ui                            ($(PORT))"
	@echo "  IMAGES       of cpu gpu language tensorrt llm mlflow ($(IMAGES))"
	@echo "  BASE         their base; debootstrap makes one     (python:3.11-slim-bookworm)"
	@echo "  WHEELS       what gpu-check lacks, as a folder     ()"
	@echo "  GPU_CHECK    more for its engines, as in --batches 1 ()"
	@echo "  REGISTRY     where images are pushed to            ()"

run: $(VENV)/run.stamp ## Install what is locked and run the example: a model in, a promoted smaller one out
	$(BIN)/slimline run optimize -f $(RECIPE)

run-llm: $(VENV)/run.stamp ## The same for a language model: SmolLM2 in, a promoted 4-bit one out
	$(BIN)/slimline run language -f $(if $(filter-out examples/reviews/%,$(RECIPE)),$(RECIPE),examples/smollm/recipe.yaml)

test: $(VENV)/dev.stamp ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

coverage: ## The same, with what it covers of the library, which takes a third longer
	$(MAKE) test TESTS="--cov --cov-report=term $(TESTS)"

images: ## Build the images that steps run in, with Docker or Podman
	docker/build.sh $(IMAGES)

test-containers: $(VENV)/dev.stamp ## Test the images and whole runs in containers (make images first)
	$(BIN)/python -m pytest tests/containers $(TESTS)

test-vllm: build/vllm.stamp ## Test that vLLM reads what we write, on the processor
	$(BIN)/python -m pytest tests/vllm $(TESTS)

lint: $(VENV)/dev.stamp ## Check style, types and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

lint-infra: build/checkov.stamp ## Check what infra/ renders to with checkov (infra/checkov.yaml has the exceptions)
	@for overlay in kind production; do \
		$(BIN)/kubectl kustomize infra/overlays/$$overlay > build/$$overlay.yaml && \
		build/checkov/bin/checkov --config-file infra/checkov.yaml -f build/$$overlay.yaml --skip-download || exit; \
	done

ui: $(VENV)/run.stamp ## Show the store in MLflow's own page
	$(BIN)/slimline ui --port $(PORT)

compile: $(VENV)/run.stamp ## Compile pipelines/*.py into slimline/compiled/*.yaml
	@for source in $(filter-out pipelines/_%,$(wildcard pipelines/*.py)); do \
		name=$$(basename $$source .py); \
		$(BIN)/slimline compile $$source -o slimline/compiled/$$name.yaml || exit; \
	done

lock: $(VENV)/run.stamp ## Write requirements/*.txt anew (LOCK_FLAGS=--upgrade for newer versions)
	requirements/lock.sh

benchmarks: $(VENV)/run.stamp ## Measure the table of the README again
	$(BIN)/python -m benchmarks

gpu-check: ## On this machine's GPU: time a language model in four forms, a layer's quantization and engines; check techniques
	@$(if $(WHEELS),$(GPU_PYTHON) -m pip install -q --no-index --no-deps --upgrade --target build/gpu-check $(WHEELS)/*.whl)
	PYTHONPATH=build/gpu-check $(GPU_PYTHON) -m benchmarks.gpu_llm
	PYTHONPATH=build/gpu-check $(GPU_PYTHON) -m benchmarks.scale --gpu
	PYTHONPATH=build/gpu-check $(GPU_PYTHON) -m benchmarks.gpu $(GPU_CHECK)
	PYTHONPATH=build/gpu-check $(GPU_PYTHON) -m benchmarks.gpu_techniques

clean: ## Remove the virtual environment and caches; stores and reports stay
	rm -rf $(VENV) build dist *.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/run.stamp: pyproject.toml requirements/run.txt requirements/cpu.txt requirements/torch-cpu.txt \
		requirements/cuda.txt requirements/installer.txt requirements/install.sh
	requirements/install.sh run
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements/dev.txt
	requirements/install.sh dev
	@touch $@

# checkov's own needs are at odds with ours (an older boto3), so it has a virtual environment to itself.
build/checkov.stamp: $(VENV)/dev.stamp requirements/checkov.txt
	$(BIN)/python -m venv --clear build/checkov
	build/checkov/bin/python -m pip install -q --no-deps --require-hashes -r requirements/checkov.txt
	@touch $@

# Nor can vLLM, which wants an older transformers, live with us.
build/vllm.stamp: $(VENV)/dev.stamp requirements/vllm.txt
	VENV=build/vllm requirements/install.sh vllm
	@touch $@

.PHONY: help run run-llm test coverage images test-containers test-vllm lint lint-infra ui compile lock benchmarks gpu-check clean
