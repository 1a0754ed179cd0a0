# Every target sets itself up in $(VENV): a fresh machine needs Python 3.11 or newer with venv, make and a C compiler.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Tests run in $(JOBS) processes; one thread each keeps them from competing.
test test-all test-oldest demo lint fuzz: export MPLBACKEND ?= Agg
test test-all test-oldest fuzz: export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-all test-oldest bench mutants peer fuzz audit docs notebooks lint format wheel clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    a first look: the models that ship, at several budgets (without them, train one in 3 minutes)"
	@echo "make test    the default test suite: models, methods and laws pairwise (at most 8 minutes on 2 cores)"
	@echo "make test-all  the whole product of models, methods and laws, and the slow tests"
	@echo "make test-oldest  tests with the oldest dependencies that pyproject.toml allows, in $(OLDEST)"
	@echo "make bench   measure speed on this machine (5 to 10 minutes on 2 idle cores)"
	@echo "make mutants [ROOM=ops] [SAMPLE=300]  make mistakes one at a time, count what tests notice (hours)"
	@echo "make peer TESTS=../diffusers [FILES=...]  run diffusers' own tests on wrapped models, list what is lost (hours)"
	@echo "make fuzz [SECONDS=180]  spoil files at random until a reader fails; tests/hostile has those known to be hostile"
	@echo "make audit   look for known vulnerabilities of the installed packages (needs a network, and says so without one)"
	@echo "make docs    build the site of the documentation into site/ (a minute)"
	@echo "make notebooks  run the notebooks of docs/tutorials and keep what they print and draw (minutes)"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the files"
	@echo "make wheel   build dist/*.whl from the tracked files"
	@echo "make clean   remove $(VENV) and everything built"
	@echo "settings: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS)"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "tokdyn needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/tokdyn demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --product -m 'not gpu'

# What meets other packages: their models, files, command lines and number types. TESTS= chooses others.
OLDEST := $(VENV)-oldest
TESTS  ?= tests/adapters tests/bases tests/checkpoints tests/cli tests/data tests/diffusion tests/evaluate tests/methods \
	tests/models tests/ops tests/parity tests/report tests/saved tests/train tests/contract/test_wrap.py \
	$(wildcard tests/test_*.py)
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -n $(JOBS) $(TESTS)

$(OLDEST)/.installed: pyproject.toml .ci/oldest
	rm -rf $(OLDEST)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python .ci/oldest >$(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
		--constraint $(OLDEST)/oldest.txt
	@touch $@

bench: $(STAMP)
	mkdir -p runs/bench
	$(BIN)/python -m benchmarks.flagship --out runs/bench/flagship.json

# mutmut lives in an environment of its own, which borrows everything else from $(VENV).
MUTANTS := $(VENV)-mutants
mutants: $(MUTANTS)/.installed
	$(MUTANTS)/bin/python tests/mutants $(ROOM) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(KNOWN),--known) $(if $(LIST),--list) --jobs $(or $(MUTANT_JOBS),1)

$(MUTANTS)/.installed: $(STAMP)
	test -x $(MUTANTS)/bin/python || $(PYTHON) -m venv $(MUTANTS)
	$(BIN)/python -c 'import sys; print(*(p for p in sys.path if p.endswith("site-packages")), sep="\n")' \
		>"$$($(MUTANTS)/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	$(MUTANTS)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[mutants]'
	@touch $@

# TESTS is a checkout of diffusers here; its default above is for test-oldest.
peer: $(STAMP)
	$(BIN)/python tests/peer $(if $(filter file,$(origin TESTS)),,$(TESTS) $(FILES)) --jobs $(or $(PEER_JOBS),1) \
		$(if $(KNOWN),--known) $(if $(LIST),--results tests/peer/results.md) --out runs/peer/report

# What fails is kept in runs/fuzz. With ENGINE=atheris (pip install '.[fuzz]') the branches that a file reaches guide it.
SECONDS ?= 180
fuzz: $(STAMP)
	$(BIN)/python tests/hostile --seconds $(SECONDS) $(if $(READERS),--readers $(READERS)) \
		$(if $(ENGINE),--engine $(ENGINE)) $(if $(SEED),--seed $(SEED))

# pip-audit lives in an environment of its own, so that it audits what tokdyn needs and not itself.
AUDIT := $(VENV)-audit
audit: $(STAMP)
	$(PYTHON) .ci/audit $(BIN)/python $(AUDIT)

# The site is built from the source alone, in an environment without torch.
DOCS := $(VENV)-docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build
	@echo "the site is in site/; open site/index.html, or serve it: $(DOCS)/bin/python -m http.server --directory site"

$(DOCS)/.installed: pyproject.toml
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		>$(DOCS)/requirements.txt
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(DOCS)/requirements.txt
	@touch $@

notebooks: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[notebooks]'
	$(BIN)/python docs/notebooks.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --package cli

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(VENV)-mutants $(AUDIT) $(DOCS) $(OLDEST) build site dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
