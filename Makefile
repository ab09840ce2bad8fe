# Two commands do all the set-up on a fresh machine: make demo, make test. Both need Python 3.11 or newer and a package
# index. make check also needs Node.
PYTHON ?= python3
BIN := .venv/bin
# constraints.txt has the hash of whatever is installed, by the environment for builds too; what is not in it fails. There
# is no single file to hash of ourselves: we come first, without dependencies, and then pip finds us installed.
INSTALL := PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check
LOCKED := $(INSTALL) --require-hashes -c constraints.txt
BUF := npx --yes @bufbuild/buf@1.75.0

.PHONY: help demo test check lint types format proto release-proto slow nightly bench bench-service clean
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

# The version check gives a sentence instead of a traceback of pip's.
.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "QuerySelect needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# Only since 26.3 does pip take the hashes of constraints for what is named without a version.
.venv/.pip: .venv/.python constraints.txt
	sed -n '/^pip==/,/[^\\]$$/p' constraints.txt > .venv/pip.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r .venv/pip.txt
	@touch $@

.venv/.own: .venv/.pip pyproject.toml
	$(INSTALL) -q --no-deps -e .
	@touch $@

.venv/.demo: .venv/.own
	$(LOCKED) 'queryselect[service,simulate]'
	@touch $@

.venv/.dev: .venv/.own
	$(LOCKED) 'queryselect[dev]'
	@touch $@ .venv/.demo

.venv/.bench: .venv/.own
	$(LOCKED) 'queryselect[bench]'
	$(LOCKED) --no-deps --group peers
	@touch $@

demo: .venv/.demo ## A real active-learning loop on real images, and demo/report.html
	$(BIN)/python -m demo

test: .venv/.dev ## The test suite; needs nothing but Python
	$(BIN)/python -m pytest -m 'not slow and not nightly and not gpu'

check: .venv/.dev lint types ## Lint, types, generated code in sync, proto lint and breaking check
	scripts/proto --check
	$(BUF) lint proto
	$(BUF) breaking proto --against proto/released.binpb

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

format: .venv/.dev ## Formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: ## Generates the Python code from proto/
	scripts/proto

release-proto: ## Keeps the proto image of this release, for the breaking check
	$(BUF) build proto -o proto/released.binpb

slow: .venv/.dev ## What needs other tools or time
	$(BIN)/python -m pytest -m slow

nightly: .venv/.dev ## What is longer still
	$(BIN)/python -m pytest -m nightly

bench: .venv/.bench ## Every strategy against its peers and the machine's limits (ARGS="--scaling margin": how it grows)
	$(BIN)/python -m benchmarks $(ARGS)

bench-service: .venv/.dev ## What the service can take: transport, load, cancelling, broken requests (ARGS="load health")
	$(BIN)/python -m benchmarks.service $(ARGS)

clean: ## Removes what make made
	rm -rf .venv .venv-proto demo/report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Locking, auditing and the bill of materials: tools in an environment of their own.
.venv-supply/.done: constraints.txt
	$(MAKE) -s .venv/.pip
	$(PYTHON) -m venv --without-pip .venv-supply
	PIP_PYTHON=.venv-supply $(LOCKED) -q --group supply
	@touch $@
