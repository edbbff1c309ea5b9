# `make help` lists the targets.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
# Where `make setup` gets torch: the usual package index, or another one, for example of CPU builds.
TORCH_INDEX ?=

DEPENDENCIES := $(VENV)/polymoe-requirements.txt
BUILT := build/built
SOURCES := setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
CXX_FILES = $(filter-out setup.py,$(SOURCES)) $(wildcard tests/cpp/*.cpp benchmarks/native/*.cpp)
PY_FILES := setup.py python tests benchmarks examples kernels
EXTENSION := $(wildcard python/polymoe/_C*.so)
# A file that changes with the list of sources, so that a removed source is noticed too.
LISTED := build/sources
$(shell mkdir -p build; echo $(SOURCES) | cmp -s - $(LISTED) || echo $(SOURCES) > $(LISTED))
JUNK := *_cache .hypothesis dist build

.DEFAULT_GOAL := help
.PHONY: help setup build wheel demo train docs-transformers test test-triton gpu-check test-slow lint format sanitize sanitize-address sanitize-thread clean
.PHONY: bench peers report

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEPENDENCIES) build ## create .venv with the pinned dependencies, build, make polymoe importable there
	@echo "ready: $(PY)"

# The stamp is a copy of the requirements as they were installed, so it changes only with them. Torch comes first and by
# itself, so that it can have an index of its own.
$(DEPENDENCIES): requirements-dev.txt
	@test -x $(PY) || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@cmp -s $< $@ || { \
	  echo "installing the pinned dependencies"; \
	  $(PY) -m pip install --no-deps $(TORCH_INDEX:%=--index-url %) $$(grep '^torch==' $<) && \
	  $(PY) -m pip install -r $<; }
	@$(PY) -c "import os, sysconfig; open(os.path.join(sysconfig.get_path('purelib'), 'polymoe.pth'), 'w').write(os.path.abspath('python') + '\n')"
	@cp $< $@

build: $(BUILT) ## build the extension in place; recompiles only what changed

$(BUILT): $(DEPENDENCIES) $(SOURCES) $(LISTED) $(if $(EXTENSION),,FORCE)
	@$(PY) setup.py --quiet build_ext --inplace
	@touch $@

FORCE:

wheel: $(DEPENDENCIES) ## a wheel for this Python and this torch minor version, in dist/
	rm -rf build/lib.*
	$(PY) -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

demo: setup ## DeepSeek-V4's experts on this CPU: Transformers' own paths against polymoe
	$(PY) examples/demo_deepseek_v4.py

train: setup ## a small MoE language model trained twice on this CPU, with eager experts and with polymoe's
	@$(PY) -c "import matplotlib" 2>/dev/null || $(PY) -m pip install $$(grep '^matplotlib' benchmarks/peers-needs.txt)
	$(PY) examples/train_tiny_moe.py --out build/train_tiny_moe.png

docs-transformers: setup ## write docs/transformers.md: every Transformers family, and what becomes of its experts
	PYTHONPATH=tests $(PY) -m zoo.table

bench: setup ## a quick look at every op, against torch and Transformers
	$(PY) -m benchmarks run --quick

# The other libraries pin other versions of torch and much that is not needed here, so they come without dependencies,
# after torch. One that does not install is named, and the rest goes on.
PEERS := .venv-peers
PEERS_PY := $(PEERS)/bin/python

peers: setup ## .venv-peers: the other CPU libraries that the benchmarks know, and matplotlib
	@test -x $(PEERS_PY) || $(PYTHON) -m venv $(PEERS)
	$(PEERS_PY) -m pip install --no-deps $(TORCH_INDEX:%=--index-url %) $$(grep '^torch==' requirements-dev.txt)
	$(PEERS_PY) -m pip install -r benchmarks/peers-needs.txt
	@$(PEERS_PY) -c "import os, sysconfig; open(os.path.join(sysconfig.get_path('purelib'), 'polymoe.pth'), 'w').write(os.path.abspath('python') + '\n')"
	@for peer in $$(grep -v '^#' benchmarks/peers.txt); do \
	  $(PEERS_PY) -m pip install --no-deps --only-binary :all: $$peer || \
	    echo "peers: $$peer does not install here; the others go on"; \
	done
	@$(PEERS_PY) -m benchmarks list

report: build ## measure, and write docs/benchmarks.md with its plots: after `make peers`; goes on where it was cut off
	@test -x $(PEERS_PY) || { echo "report: run 'make peers' first: it needs matplotlib and the other libraries"; exit 1; }
	$(PEERS_PY) -m benchmarks report

# Triton decides for a whole process whether kernels are compiled or interpreted.
TEST_TRITON := TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreted

test: setup ## all tests but the slow ones
	$(PY) -m pytest -m "not slow"
	$(TEST_TRITON)

test-triton: setup ## the Triton kernels, in Triton's interpreter
	$(TEST_TRITON)

gpu-check: setup ## compile the Triton kernels for eight GPUs that need not be there; writes docs/triton.md
	$(PY) -m tests.gpu_offline

test-slow: setup ## the tests that need minutes or many gigabytes
	$(PY) -m pytest -m slow

lint: $(DEPENDENCIES) ## ruff, mypy, clang-format
	$(VENV)/bin/ruff check $(wildcard $(PY_FILES))
	$(VENV)/bin/ruff format --check $(wildcard $(PY_FILES))
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(DEPENDENCIES) ## rewrite Python and C++ in the house style
	$(VENV)/bin/ruff check --fix $(wildcard $(PY_FILES))
	$(VENV)/bin/ruff format $(wildcard $(PY_FILES))
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove everything built, but not .venv and .venv-peers
	rm -rf $(JUNK) *.egg-info python/*.egg-info python/polymoe/_C*.so python/polymoe/_build_info.py
	find python tests benchmarks examples kernels -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# Instrumented builds live in build/<sanitizer>/, beside a copy of the package, and leave the ordinary build alone.
# Leak detection is off: Python and torch keep memory until exit. UBSan needs no list of its own: the build stops at
# the first report.
SANITIZED_TESTS := $(addprefix tests/test_,$(addsuffix .py,gate plan dispatch grouped_mm activate combine experts \
  quantized_kernels amx))
RUNTIME = $(shell g++ -print-file-name=$(1))

sanitize: sanitize-address sanitize-thread ## AddressSanitizer and UBSan over the op tests, ThreadSanitizer over plan and experts

build/address build/thread: build/%: FORCE
	@$(PY) setup.py --quiet build_py --build-lib $@ build_ext --sanitize=$* --build-lib $@

sanitize-address: $(DEPENDENCIES) build/address
	PYTHONPATH=build/address LD_PRELOAD="$(call RUNTIME,libasan.so) $(call RUNTIME,libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(PY) -m pytest -m "not slow" $(SANITIZED_TESTS)

sanitize-thread: $(DEPENDENCIES) build/thread
	PYTHONPATH=build/thread LD_PRELOAD="$(call RUNTIME,libtsan.so) $(call RUNTIME,libstdc++.so)" \
	  TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" \
	  setarch -R $(PY) -m pytest -m "not slow" tests/test_plan.py tests/test_experts.py
