# make demo      set up and watch it meta-train          make test   set up and pass every test
# make bench     the benchmark suite                     make lint   ruff            make docs  the pages, in site/
# make gpu-check tests, compute-sanitizer and benchmarks on a CUDA machine, with PYTHON's own torch, no network
PYTHON ?= python3
VENV := .venv
PYTEST_ARGS ?= --numprocesses auto
PY := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)

.PHONY: demo test bench lint docs build gpu-check clean
demo: $(VENV)/built
	@$(VENV)/bin/fastmeta demo

test: $(VENV)/built
	@$(PY) -m pytest $(PYTEST_ARGS)

bench: $(VENV)/built
	@$(PY) -m benchmarks $(BENCH_ARGS)

lint: $(VENV)/installed
	@$(VENV)/bin/ruff check .

docs: $(VENV)/installed
	@$(PY) -m mkdocs build --strict --quiet --site-dir site

build: $(VENV)/built

$(VENV)/installed: requirements.txt
	@echo "installing what requirements.txt names into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --upgrade pip
	@$(PY) -m pip install --quiet -r requirements.txt
	@touch $@

# the package and its command are linked once (what setuptools says of that: build/link.log); what is native is then built in place, where ninja knows what changed
$(VENV)/linked: $(VENV)/installed setup.py pyproject.toml
	@mkdir -p build
	@FASTMETA_NO_EXT=1 $(PY) -m pip install --no-build-isolation --no-deps --editable . > build/link.log 2>&1 || { cat build/link.log; exit 1; }
	@touch $@

# compilers tell much: all of it in the log, and on the screen where the build fails
$(VENV)/built: $(VENV)/linked $(NATIVE)
	@echo "building the native kernels (about two minutes the first time; build/native.log has the compilers' words)"
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace > build/native.log 2>&1 || { cat build/native.log; exit 1; }
	@touch $@

gpu-check:
	@PYTHON=$(PYTHON) OUT=$(OUT) bash benchmarks/gpu_check.sh

clean:
	@rm -rf $(VENV) build *.egg-info fastmeta/*.so
