# Commands of CLIF. They run in .venv, which is made if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ASSETS := assets/smollm2-135m-instruct.gguf assets/smart_home.jsonl
RANKS ?= 2
# Tests in two lanes (one on one core), see tests/conftest.py; PYTEST_ADDOPTS="-p no:xdist" for one after the other.
LANES := --numprocesses auto
# Of the kernels' tests on a GPU compiling is most: a process for each two cores.
KERNELS := tests/gpu/test_gpu_dual_lora.py tests/gpu/test_gpu_paged_decode.py tests/gpu/test_gpu_elementwise.py

.PHONY: demo docs test test-all test-gpu bench gpu tune-gpu bench-kernels check format clean help

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Modules instead of scripts (python -m ...): a package of the machine's own Python has no script in .venv.
# The torch of PYTHON is used, also that of an active environment; TORCH=cpu gives .venv its own torch in any case.
$(READY): setup.py pyproject.toml .ci/make_venv.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	$(PYTHON) .ci/make_venv.py $(VENV) $(if $(filter cpu,$(TORCH)),--cpu-torch)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(READY)

$(ASSETS): | $(READY)
	$(BIN)/python -P -m clif.cli fetch

demo: $(READY) $(ASSETS)  ## Serve and fine-tune SmolLM2-135M on 2 ranks; ends by itself
	$(BIN)/python -P -m clif.cli run demo --ranks $(RANKS)
	@echo "What weights of 8 and 4 bits would cost, on the same rows, in about a minute:"
	@$(BIN)/python -P -m clif.cli eval "$$(ls -td runs/demo runs/demo-* 2>/dev/null | head -n 1)" \
		--weight-dtype auto,int8,int4 --metrics loss,perplexity,exact_match

test: $(READY)  ## Everything that runs in minutes without a GPU
	$(BIN)/python -P -m pytest $(LANES) -m "not gpu and not slow"

test-all: $(READY) $(ASSETS)  ## With the slow tests
	$(BIN)/python -P -m pytest $(LANES) -m "not gpu"

test-gpu: $(READY)  ## Tests that need an NVIDIA GPU
	$(BIN)/python -P -m pytest -m gpu --numprocesses 8 $(KERNELS)
	$(BIN)/python -P -m pytest -m gpu $(filter-out $(KERNELS),$(wildcard tests/gpu/test_*.py))

bench: $(READY) $(ASSETS)  ## The engine alone against transformers and PEFT, then CLIF against its baselines; idle cores
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/coserving.py

# The kernels need only torch and Triton: without a .venv no network and no installation.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# A second call continues; AGAIN=1 measures also what the table has. Without a GPU: DRY=1.
tune-gpu:  ## Find the fastest form and tiles of LoRA layers on this GPU, for the table that CLIF reads
	$(GPU_PYTHON) benchmarks/tune_gpu.py $(if $(DRY),--dry) $(if $(AGAIN),--again) \
		$(if $(SECONDS_ALL),--seconds $(SECONDS_ALL)) $(if $(OUT),--copy $(OUT))

bench-kernels:  ## The kernels on one GPU against cuBLAS, PEFT and the usual four launches
	$(GPU_PYTHON) benchmarks/bench_kernels.py $(if $(DRY),--dry) $(if $(OUT),--out $(OUT))

# Stages, each with its limit and result file; a second call continues with those that have not passed.
# No .venv and no network are needed: WHEELS names a folder with the packages that the machine lacks.
gpu:  ## Measure on a GPU that is available for minutes, the most important first; SECONDS_ALL=180: the first stages
	$(GPU_PYTHON) benchmarks/gpu_stages.py $(if $(DRY),--dry) $(if $(OUT),--out $(OUT)) \
		$(if $(SECONDS_ALL),--seconds $(SECONDS_ALL)) $(if $(ONLY),--only $(ONLY)) $(if $(AT_ONCE),--at-once) \
		$(if $(WHEELS),--wheels $(WHEELS))

check: $(READY)  ## Lint and types
	$(BIN)/python -P -m ruff check . && $(BIN)/python -P -m ruff format --check . && $(BIN)/python -P -m mypy

docs: $(READY)  ## Write the pages whose tables come from the code: those of docs/templates
	$(BIN)/python docs/make_docs.py

format: $(READY)  ## Fix and format with ruff
	$(BIN)/python -P -m ruff check --fix . ; $(BIN)/python -P -m ruff format .

clean:  ## Remove the virtual environment and the files of runs
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
