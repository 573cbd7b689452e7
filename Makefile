# The two commands of the README: each makes its own environment first. Nothing outside this folder is touched.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one more than there are cores: many tests wait for a server or a browser; files in their order, which has the long ones (e2e) early:
# by number of tests, as is xdist's habit, files of a few long tests would come last, one worker after the other idle beside them
WORKERS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) + 1)))

.PHONY: demo test lint types check format bench clean

demo: $(STAMP)
	$(BIN)/python -m gadgets.demo --out demo-output

# compiled first, as hundreds of processes begin in the tests, and PYTHONDONTWRITEBYTECODE may be set
test: $(STAMP) lint types
	$(BIN)/python -m compileall -q -j 0 gadgets recon_core benchmarks tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed and none was found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-output
