# `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SERVERS := orthanc orthanc-dicomweb dcmtk chromium chromium-driver redis-server prometheus

# Bytecode is kept even where the caller's environment says otherwise: each process of Ray imports some thousand modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test setup-servers lint format lock audit clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## Make .venv with the pinned packages (a second when it is there already)

# torch comes first and alone: asked for by another package, the newest build with its CUDA packages would be taken.
# The lock is complete, so nothing is resolved; modules are compiled when first imported. Half the time of a plain install.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup ## From nothing to a served draft report with evidence, in demo_out/
	$(BIN)/python -m ray_jobs.demo

test: setup ## Every test; those that need a server start it themselves
	$(BIN)/python -m pytest

setup-servers: ## Programs that some tests start, from Debian's packages; needs root. Without them those tests skip and say so
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SERVERS); \
	else \
		echo "not installed: $(SERVERS); as root on Debian: apt-get install $(SERVERS)"; \
	fi

lint: setup ## What pre-commit and CI check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## Format and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: setup ## Write the versions of .venv to requirements.lock
	$(BIN)/pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools > requirements.lock.new
	mv requirements.lock.new requirements.lock

audit: setup ## Software bill of materials (sbom.json, CycloneDX) and known vulnerabilities of the pinned packages
	$(BIN)/cyclonedx-py requirements requirements.lock --of JSON -o sbom.json
	@$(BIN)/pip-audit --strict --requirement requirements.lock --no-deps --disable-pip --progress-spinner off 2> .audit.log || { \
		grep -q 'Found .* known vulnerabilit' .audit.log && cat .audit.log && rm .audit.log && exit 1; tail -n 1 .audit.log; rm -f .audit.log; \
		echo "not every package could be checked, so nothing is known of vulnerabilities; sbom.json is written"; }
	@rm -f .audit.log

clean: ## Remove what the demo and the tools left
	rm -rf demo_out runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
