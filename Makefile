# `make run` and `make test` each set up all they need in $(VENV) first; both can be run again.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: run test lint docs gpu-check benchmark clean

run: $(INSTALLED)
	$(BIN)/bilevel run recipes/mllm_hft.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[mllm,report,sweep,test,tensorboard,wandb]'
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python betty-ml==0.2.1 || \
		echo 'no betty-ml here: the tests that compare with it will say that they are skipped'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html
	$(BIN)/python -m docs.site_check docs/_build/html

gpu-check: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs tests

benchmark: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.run --page docs/benchmarks.md $(BENCHMARK_ARGS)
	$(BIN)/python -m tests.benchmarks.products --page docs/estimators/fewer_products.md

clean:
	rm -rf $(VENV) .benchmark docs/_build build dist *.egg-info
