# `make run` and `make test` each set up all they need in $(VENV) first; both can be run again.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -n 2 --dist worksteal

.PHONY: run test lint docs docs-versions sbom gpu-check benchmark profile clean

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

# the site of every tag v…, and of the tree as latest, in docs/_build/versions/
docs-versions: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m docs.versions

# what a release was tested with, as CycloneDX; its tool is kept out of what it lists
sbom: $(INSTALLED)
	test -x $(VENV)-sbom/bin/cyclonedx-py || { $(PYTHON) -m venv $(VENV)-sbom && \
		$(VENV)-sbom/bin/python -m pip install -q cyclonedx-bom==7.5.0; }
	mkdir -p dist
	$(VENV)-sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
		--output-reproducible --of JSON -o dist/bilevel-$(VERSION).cdx.json $(BIN)/python

gpu-check: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -rs tests
	$(BIN)/python -m tests.gpu.measure_ranks

# goes on with the rows that are missing; the page and its pictures are made from what is kept
benchmark: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.run $(BENCHMARK_ARGS)
	$(BIN)/python -m tests.benchmarks.growth
	$(BIN)/python -m tests.benchmarks.page
	$(BIN)/python -m docs.pictures benchmarks benchmark_history growth
	$(BIN)/python -m tests.benchmarks.products --page docs/estimators/fewer_products.md

profile: $(INSTALLED)
	for recipe in quadratic ridge logistic lasso hyper_cleaning; do \
		$(BIN)/bilevel run $$recipe upper.steps=24 evaluate.every=0 --quiet --no-report --profile || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-sbom .benchmark docs/_build build dist *.egg-info
