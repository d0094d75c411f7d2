# Everything a newcomer or CI needs: each target makes the environment and the build first.
# TORCH names what is installed when there is no environment yet; `make TORCH="torch==2.13.0"` builds for another.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: test finetune bench build env lint stubs dist docs clean cuda-report sanitize gpu zoo abuse

# OpenMP's threads wait asleep: those of the two test processes share the cores.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

finetune: build
	$(BIN)/python -m fastops finetune $(ARGS)

bench: build
	$(BIN)/python -m bench $(ARGS)

build: env
	MAX_JOBS=$(JOBS) $(BIN)/python setup.py -q build_ext --inplace

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77" wheel ninja numpy \
		pytest pytest-xdist hypothesis expecttest tqdm matplotlib pillow rich keras safetensors
	touch $@

lint: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ruff mypy clang-format
	$(BIN)/python -m ruff check fastops tests bench tools docs setup.py
	$(BIN)/python -m ruff format --check fastops tests bench tools docs setup.py
	$(BIN)/python -m mypy

# fastops/_C.pyi from the extension that it describes, and stubtest of the two.
stubs: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mypy ruff
	$(BIN)/python tools/stubs.py

# dist/: the source distribution, and the wheel for the torch of the environment.
dist: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	$(BIN)/python -m build --no-isolation

# The site, as site/; a warning is an error.
docs: build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mkdocs-material "mkdocstrings[python]"
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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check timm transformers
	FASTOPS_ZOO=1 $(BIN)/python -m pytest tests/patch/test_zoo.py $(ARGS)

clean:
	rm -rf build dist site fastops/*.so *.egg-info
