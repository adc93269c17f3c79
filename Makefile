# `make train` and `make test` need Python >= 3.11 with pip and venv; everything else lands in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRAIN_ARGS ?=
VERSIONS_ARGS ?=
# One process per core, each with one thread; a process takes about 1.5 GiB.
PARALLEL ?= -n auto --maxprocesses 8 --dist worksteal
# Idle CPU threads sleep rather than spin: on a machine that does other work too, spinning costs
# several times the throughput; on an idle one sleeping costs about a tenth.
export OMP_WAIT_POLICY ?= passive

.PHONY: train test fuzz test-float32 test-gpu test-versions check verify docs clean help

help:
	@echo "make train    set up, train EncNet on the embedded data set, print where the pictures are"
	@echo "make test     set up, lint, type-check and run the tests"
	@echo "make fuzz     the fuzzers of tests/fuzz, for minutes (in make test they take seconds)"
	@echo "make test-float32 the tests that compare float32 runs, summed as other processors do"
	@echo "make test-gpu the tests on a machine with a GPU, where they run the kernels on it;"
	@echo "              with PYTHON=python3 in the environment of that Python, installing nothing"
	@echo "make test-versions  the kernels with each supported Triton; hours, continues where it stopped"
	@echo "make verify   everything in test, then the checks that take longer"
	@echo "make docs     the documents and the API as a site, in build/site"
	@echo "make clean    remove the environment and caches (runs/ is kept)"

train: $(VENV)/.installed
	$(BIN)/python -m encnet_triton.train --resume $(TRAIN_ARGS)

# All tests that run in it; to collect the others takes seconds.
INTERPRETED := tests/kernels tests/bench/test_channel_programs.py

# Tests with these markers, the kernels' in Triton's interpreter where there is Triton.
define PYTEST
$(BIN)/python -m pytest $(PARALLEL) -m "$(1)"
@! $(BIN)/python -c 'import triton' 2>/dev/null || TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) -m "(interpreter or triton) and $(1)" $(INTERPRETED)
endef

test: export OMP_NUM_THREADS ?= 1
test: check
	$(call PYTEST,not verify)

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: export ENCNET_FUZZ_SECONDS ?= 120
fuzz: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PARALLEL) --timeout 3600 tests/fuzz

# Each changes instruction sets or the order of summation, where the processor has a choice.
SUMMED := DEFAULT=1 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
	MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2

test-float32: $(VENV)/.installed-test
	@for setting in $(SUMMED); do echo "$$setting"; \
		env OMP_NUM_THREADS=1 $$setting $(BIN)/python -m pytest -q -m float32 || exit 1; done

# A Python that is named has what it needs: nothing is made or installed, the checkout included.
ifeq ($(origin PYTHON),file)
test-gpu: $(VENV)/.installed-test
test-gpu: GPU_PYTHON := $(BIN)/python
else
test-gpu: GPU_PYTHON := $(PYTHON)
endif
test-gpu: export OMP_NUM_THREADS ?= 1
test-gpu: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
test-gpu:
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs a GPU: torch %s finds no CUDA device" % torch.__version__)'
	$(GPU_PYTHON) -m pytest $$($(GPU_PYTHON) -c 'import xdist' 2>/dev/null && printf %s '$(PARALLEL)')

test-versions: $(VENV)/.installed-test
	$(BIN)/python -m bench versions $(VERSIONS_ARGS)

# An sdist has no symbolic links, and mypy finds the two packages by nothing else.
LINKS := encnet_triton/kernels encnet_triton/train
$(LINKS):
	-ln -s ../$(@F) $@

check: $(VENV)/.installed-test | $(LINKS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

verify: export OMP_NUM_THREADS ?= 1
verify: test
	$(call PYTEST,verify)
	$(BIN)/python -m bench encode
	$(BIN)/python -m bench upsample
	$(BIN)/python -m bench crop
	$(BIN)/python -m bench cifar
	$(BIN)/python -m bench static compile --all
	$(BIN)/python -m bench static traffic

# Docstrings are read without importing anything, so that the site needs no torch.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --quiet --strict --config-file docs/site/mkdocs.yml
	@echo "build/site/index.html"

$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("encnet-triton needs Python 3.11 or newer; %s is %d.%d. Name another with: make PYTHON=python3.12" % ("$(PYTHON)", *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Modules are compiled by all cores at once, where pip does it one by one, without other packages'
# tests; some are of older Pythons and do not compile.
comma := ,
define INSTALL
$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt setuptools -e '.[$(1)]'
@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
endef

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(call INSTALL,plots)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.python pyproject.toml constraints.txt
	$(call INSTALL,plots$(comma)test)
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(VENV)-docs .venv-versions build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
