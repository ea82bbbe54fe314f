# Every target makes .venv if it is absent, so each works on a fresh machine.
# PYTHON chooses the interpreter (3.11 or newer): make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.bench
TRAINERS := $(VENV)/.trl

.PHONY: demo test test-trl check coverage-table bench clean

demo: $(STAMP)
	$(BIN)/klkit demo

test: $(STAMP)
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that need TRL, which the ones above skip.
test-trl: $(TRAINERS)
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -rs \
		tests/integrations/test_trl*.py tests/test_docs.py tests/test_benchmarks.py -k trl

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/check_wheel.py

# About three quarters of an hour on a machine with nothing else to do; docs/performance.md then has the new tables.
bench: $(PEERS)
	for name in logits linear adaptive distill sampling pipeline compare trl_step; do \
		$(BIN)/python benchmarks/$$name.py --patience 300 --json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/page.py
	$(BIN)/python benchmarks/wallclock.py
	$(BIN)/python benchmarks/variance.py

coverage-table: $(STAMP)
	$(BIN)/python benchmarks/interval_coverage.py
	$(BIN)/python benchmarks/decisions.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,dev]"
	touch $(STAMP)

# What klkit is compared with. Liger's chunked losses are plain PyTorch; the Triton it asks for is of no use without a GPU.
$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bench]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps liger-kernel
	touch $(PEERS)

$(TRAINERS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[trl,test]"
	touch $(TRAINERS)

clean:
	rm -rf $(VENV) dist build
