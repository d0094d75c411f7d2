# What a newcomer or CI needs. Each target makes the environment and the build that it needs first.
# TORCH says what is installed where there is no environment yet: `make TORCH="torch==2.13.0"` builds for another torch.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# OpenMP's threads wait asleep: those of several test processes share the cores.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

# Another version of these may format or complain otherwise.
LINTERS := ruff==0.17.6 mypy==2.4.1 clang-format==21.1.8
PYTHON_CODE := fastops tests bench tools docs setup.py
CPP_CODE = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(BIN)/clang-format

.PHONY: test quick integrations finetune bench bench-steps build env lint format stubs dist sdist wheels docs clean cuda-report \
	sanitize gpu zoo abuse

test: build
	$(PYTEST) -n $(JOBS) --dist loadfile $(ARGS)

# Under two minutes on two cores: every op and optimizer once, and what is easily broken. tests/cuda is not collected, as
# that alone compiles the emulated kernels.
quick: build
	$(PYTEST) -n $(JOBS) --dist loadfile -m quick --ignore tests/cuda $(ARGS)

# What the docs promise of other packages: accelerate, Hugging Face's Trainer, Lightning, timm, Keras, the site, mypy.
# Here a package that is missing is an error.
integrations: build $(VENV)/.linters
	$(PIP) transformers accelerate timm lightning keras scikit-learn tensorboard onnx onnxscript mkdocs-material "mkdocstrings[python]"
	FASTOPS_INTEGRATIONS=1 $(PYTEST) -n $(JOBS) --dist loadfile -m integration $(ARGS)

finetune: build
	$(BIN)/python -m fastops finetune $(ARGS)

bench: build
	$(BIN)/python -m bench $(ARGS)

# Whole training steps, in an hour or two: ARGS="--models resnet18 --dtypes float32 --steps 5" for less.
bench-steps: build
	$(PIP) timm transformers
	$(BIN)/python -m bench steps --json bench/steps.json --chart docs/images/steps.png $(ARGS)

build: env
	MAX_JOBS=$(JOBS) $(BIN)/python setup.py -q build_ext --inplace

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" wheel ninja numpy \
		pytest pytest-xdist hypothesis expecttest tqdm matplotlib pillow pyyaml rich keras safetensors
	touch $@

$(VENV)/.linters: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(LINTERS)
	touch $@

lint: env $(VENV)/.linters
	$(CLANG_FORMAT) --dry-run -Werror $(CPP_CODE)
	$(BIN)/python -m ruff check $(PYTHON_CODE)
	$(BIN)/python -m ruff format --check $(PYTHON_CODE)
	$(BIN)/python -m mypy

# Mends what `make lint` finds, where a tool can.
format: $(VENV)/.linters
	$(CLANG_FORMAT) -i $(CPP_CODE)
	$(BIN)/python -m ruff check --fix $(PYTHON_CODE)
	$(BIN)/python -m ruff format $(PYTHON_CODE)

# fastops/_C.pyi from the extension that it describes, and stubtest of the two.
stubs: build $(VENV)/.linters
	$(BIN)/python tools/stubs.py

# dist/: the source distribution, and the wheel for the torch of the environment.
dist: env
	$(PIP) build
	$(BIN)/python -m build --no-isolation

sdist: env
	$(PIP) build
	$(BIN)/python -m build --no-isolation --sdist

# wheelhouse/: a wheel for each Python in manylinux containers, as [tool.cibuildwheel] says; needs docker or podman.
wheels: env
	$(PIP) cibuildwheel
	$(BIN)/python -m cibuildwheel --output-dir wheelhouse

# The site, as site/; a warning is an error.
docs: build
	$(PIP) mkdocs-material "mkdocstrings[python]"
	$(BIN)/python -m mkdocs build --strict --quiet

# What nvcc makes of every kernel, as bench/cuda_report.csv: needs nvcc, no GPU.
cuda-report: env
	$(BIN)/python tools/cuda_report.py $(ARGS)

# The CUDA kernels under emulation with ASan and UBSan, TSan, and portable fibers.
sanitize: env
	$(BIN)/python tools/sanitize.py $(ARGS)

# What takes too long for every run of the tests: the CPU kernels under ASan, UBSan and TSan, the fuzzers with a large
# budget, 10,000 calls of every op without growth. ARGS="--part fuzz --examples 5000" for one part of it.
abuse: build
	$(BIN)/python tools/abuse.py $(ARGS)

# On a machine with a GPU: the tests marked cuda, compute-sanitizer, the bench, and one dated report of them.
gpu: build
	$(BIN)/python tools/gpu.py $(ARGS)

# Every torchvision classification model, timm's families and Hugging Face's, patched and compared with themselves.
zoo: build
	$(PIP) timm transformers
	FASTOPS_ZOO=1 $(BIN)/python -m pytest tests/patch/test_zoo.py $(ARGS)

clean:
	rm -rf build dist site wheelhouse fastops/*.so *.egg-info
