# `make run` and `make test` do what the README's two commands do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPLAY := $(addprefix benchmarks/replay/,run.py recommend.py policies.py)

.PHONY: run test e2e chaos audit versions pythons lint format bench pictures docs

run: $(VENV)/.installed
	$(BIN)/tune-ssim run

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile

# Everything, the minutes-long tests too; a study is stopped at each of its writes instead of a sample of them.
e2e: $(VENV)/.installed
	TUNE_SSIM_E2E=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile -m ""

# Hours. Random kills and cut links, each with its table; a tracking server on PostgreSQL, where that is installed; every file of a
# study damaged in 2,000 ways each, with the counts in benchmarks/results/damage.jsonl.
chaos: $(VENV)/.installed
	$(BIN)/python benchmarks/chaos/kills.py
	-$(BIN)/python benchmarks/chaos/postgres.py
	rm -f benchmarks/results/damage.jsonl
	TUNE_SSIM_CASES=2000 TUNE_SSIM_COUNTS=benchmarks/results/damage.jsonl $(BIN)/python -m pytest -q --timeout 0 tests/test_damage.py

# Known vulnerabilities of the versions in constraints.txt; needs PyPI's advisory database.
audit:
	$(PYTHON) tests/audit.py

# A selection of the tests with the oldest and the newest Ray and MLflow that pyproject.toml admits; installs them in a temporary folder.
versions: $(VENV)/.installed
	$(BIN)/python tests/versions.py

# The tests that need no torch, with every supported Python on this machine.
pythons:
	$(PYTHON) tests/pythons.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One script for each claim of the README; each prints its hardware and commit.
bench: $(VENV)/.installed
	set -e; for script in benchmarks/*.py $(REPLAY); do \
		echo "== $$script"; $(BIN)/python "$$script"; done

# The README's pictures and tables: the benchmarks whose names begin with readme_.
pictures: $(VENV)/.installed
	set -e; for script in benchmarks/readme_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

# The documentation as a site in site/, without a network; its tool needs Python 3.11.
docs: $(VENV)/.installed
	$(BIN)/python docs/website/make_site.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@
