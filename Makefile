# make train   set up, then run the default job      make train ARGS="--steps 4 --seed 1"
# make quick   set up, then lint, then fast tests    make quick ARGS="-k pack"
# make test    set up, then lint, then all tests     make test ARGS="tests/test_ops.py"
# make test-faults   set up, then the fault campaign of docs/reliability.md, within 20 minutes
# make lint    run ruff and pyright
# make docs    build the documentation site into site/
# make clean   remove .venv and every cache, but not runs/
#
# PYTHON is any Python >= 3.11. The default is the first one below that runs and has venv.
# TORCH is the arguments of `pip install`, separated by blanks. The default installs the wheel of
# the index. On PyPI for Linux, this wheel includes CUDA. Another choice must be exported for every
# make, because a make with another value installs again:
#   export TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$p && break; done)
ARGS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST := $(if $(filter Linux,$(shell uname)),$(VENV)/triton-3.6/.ready)
OLD_TRANSFORMERS := $(VENV)/transformers-4.57/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# A worker of pytest runs on one core: tests/conftest.py gives it one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

.PHONY: train quick test test-faults lint docs clean

train: $(READY)
	$(BIN)/python -m expo_fast.train $(ARGS)
	@echo "the packages are in $(VENV): run 'source $(BIN)/activate', then 'expo-fast --help'"

quick: lint
	$(PYTEST) -m "not slow and not long and not faults" $(ARGS)

test: lint $(OLDEST) $(OLD_TRANSFORMERS)
	$(PYTEST) $(ARGS)

test-faults: $(READY)
	$(PYTEST) -m faults $(ARGS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Every run of make compares TORCH with what was installed, and installs again if they differ.
ifneq ($(TORCH),$(file <$(READY)))
.PHONY: $(READY)
endif

# torch is installed without its dependencies, because a separate index of torch may not have the
# versions that are pinned here. The last pip command installs them. setuptools builds this package
# without build isolation, so its version is pinned too.
$(READY): pyproject.toml constraints.txt
	@rm -f $@
	@test -n "$(PYTHON)" || { echo "found no Python >= 3.11 with venv: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): $(TORCH), then constraints.txt"
	@$(PIP) install --constraint constraints.txt setuptools
	@echo '$(TORCH)' | xargs $(PIP) install --no-deps
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@printf '%s' '$(TORCH)' > $@

# The oldest supported triton, which exists for Linux only, and a numpy that its interpreter takes.
# The same tests run with it and with the installed version.
$(VENV)/triton-3.6/.ready: $(READY)
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) triton==3.6.0 numpy==2.3.5
	@touch $@

# The last transformers 4, which reads the folders that are saved here, and the two packages whose
# versions in constraints.txt it refuses.
$(OLD_TRANSFORMERS): $(READY)
	@rm -rf $(@D)
	@$(PIP) install --no-deps --target $(@D) \
		transformers==4.57.1 huggingface_hub==0.36.2 tokenizers==0.22.2
	@touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
