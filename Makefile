# RoboDual Serve. Each target creates what it needs; `make demo` is the one to try first.
#   make setup [PYTHON=python3.11] [TORCH_INDEX=<index of PyTorch's CPU or CUDA wheels>] [EXTRAS=dev]
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

LOCK = uv pip compile -q --generate-hashes --no-annotate --upgrade --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --no-emit-package robodual-client -c deploy/locks/pins.in \
	--custom-compile-command "make lock"

.PHONY: help setup demo test check audit lock clean

help:
	@sed -n 's/^#   //p' Makefile
	@echo "targets: setup  demo  test  check  audit  lock  clean"

setup: $(STAMP)

$(STAMP): pyproject.toml clients/pyproject.toml clients/setup.py $(wildcard protos/robodual/v1/*.proto)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make setup: $(PYTHON) is Python %d.%d; the services need 3.10 or newer (PYTHON=python3.11)" % sys.version_info[:2])'
	@echo "==> virtual environment $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> PyTorch ($(TORCH)$(if $(TORCH_INDEX), from TORCH_INDEX))"
	@$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@echo "==> robodual-client, robodual and their dependencies; the wire format is compiled from protos/"
	@$(BIN)/python -m pip install -q -e "./clients[report,sim,calvin]" -e ".[$(EXTRAS)]"
	@touch $(STAMP)
	@echo "==> ready: $(BIN)/robodual --help"

demo: $(STAMP)
	@$(BIN)/robodual demo $(ARGS)

# Two files at a time, the longest first: those that wait for nothing but the processor, on a thread each, and then the
# rest, which start processes and wait for them. One by one at last: those that look at the clock.
BUSY := $(addprefix tests/,training/test_training_on_demonstrations.py checkpoints conditioning generalist kernels \
	parity playtable specialist training)
TIMED := $(addprefix tests/,benchmarks calvin/test_pace.py end_to_end/test_soak.py faults)
BESIDE := -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE) $(BUSY)
	$(BIN)/python -m pytest $(BESIDE) tests/end_to_end/test_shipped_pair.py tests $(addprefix --ignore=,$(BUSY) $(TIMED))
	$(BIN)/python -m pytest $(TIMED)
endif

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@echo "==> no option is set that lets data run code"
	@! grep -rnE 'allow_pickle ?= ?True|weights_only ?= ?False|trust_remote_code ?= ?True' --include='*.py' services clients benchmarks

audit: $(STAMP)
	@$(BIN)/python -m pip install -q pip-audit
	@echo "==> known vulnerabilities of what is installed; needs a way to the advisories"
	@mkdir -p build
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[^ ]*$$//' > build/installed.txt
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement build/installed.txt

# The images' packages, with hashes; needs uv, and TORCH_INDEX for the CPU's.
lock:
	$(LOCK) pyproject.toml --extra telemetry --extra cuda --no-emit-package flash-attn -o deploy/locks/cuda.txt
	$(LOCK) pyproject.toml --extra telemetry --index $(or $(TORCH_INDEX),$(error make lock: set TORCH_INDEX to the index of PyTorch's CPU wheels)) \
		--index-strategy unsafe-best-match -o deploy/locks/cpu.txt
	$(LOCK) deploy/locks/build.in -o deploy/locks/build.txt
	$(LOCK) deploy/locks/flash-attn.in --no-deps -o deploy/locks/flash-attn.txt

clean:
	@echo "==> removing $(VENV), runs/, caches and built files"
	@rm -rf $(VENV) runs build dist clients/build clients/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@rm -rf services/*.egg-info clients/*.egg-info
	@rm -f clients/robodual_client/wire/*.binpb clients/robodual_client/wire/*_pb2.pyi
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
