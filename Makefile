# Every target sets up .venv first, and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test nightly check audit bench format clean

demo: $(STAMP)          ## the main job on the embedded model; opens up what happened
	$(BIN)/noren demo

test: $(STAMP)          ## all tests
	$(BIN)/python -m pytest

nightly: $(STAMP)       ## the long tests too (hours): kills, schedules, fuzzing
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m pytest -m "nightly or not nightly" --timeout 14400 -s

check: $(STAMP) audit   ## lint, format, types, known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(STAMP)         ## known vulnerabilities of what is installed, where the advisories can be reached
	@$(BIN)/python scripts/audit.py

bench: $(STAMP)         ## every benchmark; each prints one JSON line
	@for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script || exit 1; done

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Noren needs Python 3.11 or newer; give one with make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
