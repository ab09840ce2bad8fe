# Two commands do all the set-up on a fresh machine: make demo, make test. Both need Python 3.11 or newer and a package
# index. make check also needs Node; make slow Node 20.15, and the right to install packages of Debian 12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# constraints.txt has the hash of whatever is installed, by the environment for builds too; what is not in it fails. There
# is no single file to hash of ourselves: we come first, without dependencies, and then pip finds us installed.
INSTALL := PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/pip install --disable-pip-version-check
LOCKED := $(INSTALL) --require-hashes -c constraints.txt
BUF := npx --yes @bufbuild/buf@1.75.0
TARGET := cpu

.PHONY: help demo test check lint types format proto release-proto testdata slow nightly audit licences sbom image bench \
  bench-service clean
help: ## What there is to make
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

# The version check gives a sentence instead of a traceback of pip's. Only since 26.1 does pip take the hashes of
# constraints for what is named without a version.
$(VENV)/.python: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "QuerySelect needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed -n '/^pip==/,/[^\\]$$/p' constraints.txt > $(VENV)/pip.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r $(VENV)/pip.txt
	@touch $@

$(VENV)/.own: $(VENV)/.python pyproject.toml
	$(INSTALL) -q --no-deps -e .
	@touch $@

# The build of torch without CUDA where pip is set up to find it: of files whose hash is allowed, pip prefers those that
# an index tells the hash of.
$(VENV)/.torch: $(VENV)/.own
	cpu=$$(sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' constraints.txt); \
	if $(INSTALL) -qq --dry-run --no-deps $$cpu 2> /dev/null; then $(LOCKED) -q $$cpu; fi
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(LOCKED) 'queryselect[service,simulate]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(LOCKED) 'queryselect[dev]'
	@touch $@ $(VENV)/.demo

# What the service's image installs: make VENV=.venv-image .venv-image/.image
$(VENV)/.image: $(VENV)/.torch
	$(LOCKED) -q 'queryselect[references,service,tracing]'
	@touch $@

# Locking, auditing and the bill of materials: tools in an environment of their own.
.venv-supply/.done: .venv/.python
	$(PYTHON) -m venv --without-pip .venv-supply
	PIP_PYTHON=.venv-supply $(LOCKED) -q --group supply
	@touch $@

$(VENV)/.bench: $(VENV)/.torch
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

testdata: .venv/.dev ## Writes proto/testdata, requests and answers that any language can replay
	$(BIN)/python -m scripts.testdata

slow: .venv/.dev ## What needs other tools or time
	$(BIN)/python -m pytest -m slow

nightly: .venv/.dev ## What is longer still, and what needs others' services: licences, tests, known vulnerabilities
	$(BIN)/python -m scripts.licences --check
	$(BIN)/python -m pytest -m nightly
	$(MAKE) audit

audit: .venv-supply/.done ## Known vulnerabilities of what is pinned; fails where no advisory service can be reached
	.venv-supply/bin/python scripts/audit.py

licences: .venv/.dev ## Writes docs/licences.md
	$(BIN)/python -m scripts.licences

sbom: .venv-supply/.done ## dist/sbom.cdx.json: what the service's image installs, in CycloneDX
	$(MAKE) VENV=.venv-image .venv-image/.image
	mkdir -p dist
	scripts/sbom .venv-supply .venv-image dist/sbom.cdx.json

image: ## The server's image, by docker or buildah, and what is in it (TARGET=cuda: for GPUs; ARGS: for its build)
	scripts/image $(TARGET) $(ARGS)

bench: .venv/.bench ## Every strategy against its peers and the machine's limits (ARGS="--scaling margin": how it grows)
	$(BIN)/python -m benchmarks $(ARGS)

bench-service: .venv/.dev ## What the service can take: transport, load, cancelling, broken requests (ARGS="load health")
	$(BIN)/python -m benchmarks.service $(ARGS)

clean: ## Removes what make made
	rm -rf .venv .venv-image .venv-proto .venv-supply demo/report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis
