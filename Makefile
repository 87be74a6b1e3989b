# Everything runs from .venv, which is made and kept up to date by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCALE := .venv-scale
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SHELL := /bin/bash
QUICK := not more and not gpu and not acceptance and not calibrate and not chaos and not scale
QUEUE_TESTS := $(addprefix tests/unit/test_,jobs_queue.py catalog.py migrations.py)
DATABASE_TESTS := tests/unit/test_collection.py $(wildcard tests/integration/test_api_*.py) \
	$(addprefix tests/integration/test_,promotion.py problems.py webhooks.py recent.py worker.py deletion.py overload.py)
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo run test test-more test-scale test-gpu acceptance audit calibrate chaos check bench bench-scale bench-gpu verify-f2llm soak docs lock vendor

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) ## Make .venv and install everything, pinned; TORCH_INDEX=URL takes torch from there

demo: setup ## From a CSV to a verdict and predictions, then stop; FILE=your.csv for your own, PROMPT=model to prompt one
	@$(BIN)/tuneproof demo $(if $(FILE),'$(FILE)') $(if $(PROMPT),--prompt '$(PROMPT)')

run: setup ## Start the API and one worker on what is in ./data
	@$(BIN)/tuneproof up

test: setup ## The tests, in under five minutes on two cores
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile -m "$(QUICK)"

test-more: setup ## What is heavier, or needs servers or browsers
	$(BIN)/pytest -n 2 --dist loadfile -m more
	TEST_ON_POSTGRES=new $(BIN)/pytest -n 2 --dist loadfile -m "$(QUICK)" $(QUEUE_TESTS)

test-scale: setup $(SCALE)/.installed ## The database's tests on PostgreSQL, and what takes several machines, in small
	TEST_ON_POSTGRES=new $(BIN)/pytest -n 2 --dist loadfile -m "$(QUICK)" $(QUEUE_TESTS) $(DATABASE_TESTS)
	$(SCALE)/bin/pytest -m scale -s

test-gpu: setup ## What needs a CUDA GPU
	$(BIN)/pytest -m gpu

acceptance: setup ## The whole way on the real data sets, some twenty minutes; not part of the other targets
	$(BIN)/pytest -m acceptance -s

calibrate: setup ## How often the verdict errs: a hundred seeds of chance, and of a gap that is there
	$(BIN)/pytest -m calibrate -s

chaos: setup ## Servers, workers and training killed at random moments, over ten minutes; CHAOS_SECONDS=60 for less
	$(BIN)/pytest -m chaos -s tests/integration/test_chaos.py tests/integration/test_chaos_service.py

check: setup ## Style, types, imports, migrations in step with the models, lines by room
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -P -m service migrate --check
	$(BIN)/python tools/lines.py

# Status 2: a benchmark's data are not there, which it says itself.
bench: setup ## Every benchmark's table, some two hours; BENCH_ARGS=--quick for short runs
	@for program in $(filter-out benchmarks/bulk_actors.py,$(wildcard benchmarks/[a-z]*.py)); do echo "== $$program"; $(BIN)/python "$$program" $(BENCH_ARGS) || test $$? = 2; done

bench-scale: $(SCALE)/.installed ## Bulk labelling by one and by two actors of a Ray cluster; BENCH_ARGS=--quick for a short run
	$(SCALE)/bin/python benchmarks/bulk_actors.py $(BENCH_ARGS)

bench-gpu: setup ## Engine and training at the shape of Qwen3-0.6B, on a CUDA GPU; BENCH_ARGS=--quick for short runs
	$(BIN)/python benchmarks/serving.py --device cuda $(BENCH_ARGS)
	$(BIN)/python benchmarks/training.py --device cuda $(BENCH_ARGS)

verify-f2llm: setup ## F2LLM-0.6B and Qwen3-0.6B from their hub, checked on a CUDA GPU: pooling, EOS, stock reload, prompts, memory
	$(BIN)/python benchmarks/_verify_f2llm.py

soak: setup ## Ten minutes at saturation: no error but 429, memory that does not grow; SOAK_SECONDS=60 for less
	$(BIN)/python benchmarks/_soak.py --seconds $(or $(SOAK_SECONDS),600)

audit: ## Known vulnerabilities of what is pinned, by pip-audit; needs the package index's own vulnerability records
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder"; "$$folder/bin/python" -m pip --disable-pip-version-check -qq install 'pip-audit>=2.9,<3'; \
	"$$folder/bin/pip-audit" --strict --disable-pip --no-deps --requirement constraints.txt

docs: setup ## The documentation as a site, in site/; a broken link fails it
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs site
	@echo "site/index.html"

# The pins are what a fresh environment gets today. No local versions such as torch's `+cpu`, which exist only
# where that build can be seen, and no CUDA libraries: torch names those itself, to the patch.
lock: ## Write constraints.txt anew from the newest versions that pyproject.toml allows
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PYTHON) -m venv "$$folder/venv"; \
	"$$folder/venv/bin/python" -m pip --disable-pip-version-check -qq install '.[server,dev,ray]'; \
	{ echo '# What `make setup` installs, pinned. Made by `make lock`; do not edit.'; \
	  "$$folder/venv/bin/python" -m pip --disable-pip-version-check freeze --exclude tuneproof --exclude setuptools \
	  | sed -E 's/\+[a-z0-9.]+$$//' | grep -Ev '^(nvidia-|cuda-|triton)'; } > "$$folder/constraints.txt"; \
	cp "$$folder/constraints.txt" constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes some minutes."
	$(if $(TORCH_INDEX),@$(PIP) install --no-deps --constraint constraints.txt --index-url '$(TORCH_INDEX)' torch)
	@$(PIP) install --constraint constraints.txt --editable '.[server,dev]'
	@touch $@

# Apart from the other: nothing may come to need Ray, or what it brings along.
$(SCALE)/.installed: pyproject.toml constraints.txt
	@test -x $(SCALE)/bin/pip || $(PYTHON) -m venv $(SCALE)
	@echo "Installing Ray and everything else into $(SCALE); the first time takes some minutes."
	@$(SCALE)/bin/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt --editable '.[server,dev,ray]'
	@touch $@

# The pages run without a build step: these files are the packages' own, served from here.
vendor: ## Write the web pages' libraries anew, at the versions named here (needs npm)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; cd service/web/static/vendor; \
	npm pack --silent --pack-destination "$$folder" preact@11.2.0 htm@3.1.1 > /dev/null; \
	take() { tar xzOf "$$folder"/$$1-*.tgz "package/$$2" | sed -E 's#from"preact"#from"./preact.js"#; s#//\# sourceMappingURL=.*##' > $$3; }; \
	take preact dist/preact.mjs preact.js; take preact hooks/dist/hooks.mjs hooks.js; take preact LICENSE preact.LICENSE; \
	take htm dist/htm.mjs htm.js; take htm LICENSE htm.LICENSE
