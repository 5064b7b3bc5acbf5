# Every target works on a bare clone of a machine that has only Python (3.11 or newer) and make.
PYTHON  ?= python3
BACKEND ?= cpu
VENV    := .venv
BIN     := $(VENV)/bin
# macOS gets Metal MLX with the base install; elsewhere an extra names the backend (BACKEND=cuda13 for NVIDIA).
ifneq ($(shell uname -s),Darwin)
EXTRAS  := $(BACKEND),dev
else
EXTRAS  := dev
endif

.PHONY: demo test check format exhaustive real nano golden clean

demo: $(VENV)/installed
	$(BIN)/mlx_step35.generate --model nano --temp 0 --max-tokens 120 \
	  --prompt "Hello!"

test: $(VENV)/installed
	$(BIN)/python -m pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The long matrices: every depth, drafter, prompt length and crash point.
exhaustive: $(VENV)/installed
	$(BIN)/python -m pytest -m exhaustive

# With real weights, on a Mac: logits against stock mlx-lm, recall at long context, peak memory.
real: $(VENV)/installed
	@test -n "$(MODEL)" || { echo "usage: make real MODEL=DIR" >&2; exit 2; }
	MLX_STEP35_REAL_MODEL="$(MODEL)" $(BIN)/python -m pytest -m real -s

# Remaking the bundled model and its golden vectors needs PyTorch, so they have an environment of their own.
TOOLS := .venv-tools
nano: $(TOOLS)/installed
	$(TOOLS)/bin/python -m tools.nano.train --out build/nano
	$(TOOLS)/bin/python -m tools.nano.export --state build/nano/state.pt
golden: $(TOOLS)/installed
	$(TOOLS)/bin/python -m tools.nano.golden

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(TOOLS)/installed: pyproject.toml tools/nano/requirements.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet -r tools/nano/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(TOOLS) build *.egg-info
