# make demo: from nothing to a pruned, faster, reloaded network.  make test: lint, types and the test suite.  make docs: the site.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PAGES  := $(VENV)/.installed-docs
# Fixtures of a file are made once, and the longest tests, which come early, do not end up last.
BY_FILE := --dist loadfile --no-loadscope-reorder
SAID    := $(VENV)/.types
# A tree of modules is compiled once, and not again in each of the processes that tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all docs docs-serve kernels checks doctests lint types clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev,demo,onnx,hf,gguf,data,search,tune,train,track]"
	touch $@

# What only the site and the notebooks need.
$(PAGES): $(STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs,notebooks]"
	touch $@

# Into site/; a dead link, a page without a place or a name without a docstring fails. The variable quietens an advertisement.
docs: $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(PAGES)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# Builds into the user's cache folder (native/ says how); without a compiler it says so, and everything runs without.
kernels: $(STAMP)
	$(BIN)/python -c "from secateur.deployment import native; print('kernels:', native.isa(), native.why_not())"

demo: $(STAMP) kernels
	$(BIN)/secateur demo --out runs/demo --force

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Kernels are there before the tests need them.
checks: $(STAMP)
	$(MAKE) -j3 --output-sync=target lint doctests kernels

# Types take one core for longer than the other checks together: beside the tests, and what mypy says stands at the end.
define tests
	$(BIN)/mypy > $(SAID) 2>&1 & types=$$!; trap "kill $$types" INT TERM; \
	$(BIN)/python -m pytest -n 2 $(BY_FILE) $(1); tests=$$?; \
	wait $$types; types=$$?; echo "mypy:"; cat $(SAID); \
	test $$tests -eq 0 && test $$types -eq 0
endef

test: checks
	$(call tests,-m "not slow")

# By themselves: conftest files of several folders would clash as modules. A file without a prompt has no example.
doctests: $(STAMP)
	$(BIN)/python -m pytest --doctest-modules $$(grep -rl --include='*.py' '>>>' src/secateur)

test-all: checks $(PAGES)
	$(call tests)

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache
