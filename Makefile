# Everything happens in .venv inside the checkout; nothing needs root. `make PYTHON=python3.12 …` picks the Python.
PYTHON ?= python3
PIP    := .venv/bin/python -m pip --disable-pip-version-check
JOBS   ?= 2

.PHONY: help demo test check bench clean
help:
	@echo "make demo   explain a real generative model on real images, and write the report"
	@echo "make test   build and run the tests"
	@echo "make check  format, lint and types"
	@echo "make bench  measure every op against its baselines and the physical limit"
	@echo "make clean  remove .venv and everything built"

demo: .venv/ready
	.venv/bin/protofast demo --out runs/demo

test: .venv/ready .venv/cabrnet/ready
	.venv/bin/python -m pytest -n $(JOBS)

check: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: .venv/ready
	.venv/bin/python -m benchmarks

clean:
	rm -rf .venv build dist *.egg-info protofast/*.so

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "make: protofast needs Python 3.10 or newer as '$(PYTHON)'; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv .venv || { \
	  echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu install it by: apt install python3-venv"; exit 1; }
	@touch $@

.venv/torch: .venv/python
	@$(PIP) install torch==2.13.0 || { \
	  echo "make: 'pip install torch==2.13.0' failed; see the lines above: a network, 5 GB of disk and a Python that torch supports (3.10 to 3.14) are needed"; exit 1; }
	@touch $@

.venv/packages: .venv/torch requirements.txt
	@$(PIP) install -r requirements.txt || { \
	  echo "make: installing requirements.txt failed; see the lines above, mend the network or disk, and run make again"; exit 1; }
	@touch $@

# For tests/test_cabrnet.py alone, which skips without it; cabrnet is for Python 3.10 to 3.12.
.venv/cabrnet/ready: .venv/packages requirements-cabrnet.txt
	@if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then \
	  rm -rf .venv/cabrnet; \
	  $(PIP) install --quiet --no-deps --only-binary :all: --target .venv/cabrnet -r requirements-cabrnet.txt && touch $@ || \
	  echo "make: installing requirements-cabrnet.txt failed; the tests of protofast.cabrnet will skip"; \
	else mkdir -p .venv/cabrnet && touch $@; fi

# PROTOFAST_BUILD_CUDA=1 or 0 in the environment decides whether the CUDA sources are built; unset, an nvcc decides.
.venv/ready: .venv/packages pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)
	@command -v $${CXX:-c++} >/dev/null || { \
	  echo "make: no C++ compiler found as '$${CXX:-c++}'; on Debian and Ubuntu: apt install g++ (or set CXX)"; exit 1; }
	@.venv/bin/python -c 'import sysconfig, pathlib, sys; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' || { \
	  echo "make: Python.h is missing; on Debian and Ubuntu: apt install python3-dev"; exit 1; }
	@$(PIP) install --no-build-isolation --no-deps --config-settings editable_mode=compat -e . || { \
	  echo "make: building protofast failed; see the compiler's lines above (a C++20 compiler is needed: g++ 11, clang++ 14 or newer)"; exit 1; }
	@touch $@
