# `make` alone lists what there is to do. ARGS="..." goes on to the program behind a target.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-cache-dir --disable-pip-version-check
# Most tests wait most of the time: four at a time.
PYTEST := pytest --numprocesses 4 --dist worksteal
WITH_ENGINE := $(BIN)/python checks/engine.py run

# Empty, it is as if it were not set: else each server and worker that a test starts compiles all of its code again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo run test lint format coverage bench bench-peers simulate chaos mutants clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready ## a server, two workers and hello-world in a container: what jobworker does, in seconds
	@$(WITH_ENGINE) --or-podman -- $(BIN)/python checks/demo.py

run: .venv/ready ## a server with jobs.yaml and a worker, until Ctrl-C
	@$(WITH_ENGINE) --or-podman -- $(BIN)/python checks/demo.py --stay

test: .venv/ready-dev browser nginx engines ## the tests, with real containers and a real browser
	@$(WITH_ENGINE) --and-podman -- $(BIN)/python -m $(PYTEST) $(ARGS)

lint: .venv/ready-dev ## ruff's rules and format, mypy in strict mode
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: .venv/ready-dev ## format the code as `make lint` wants it
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

coverage: .venv/ready-dev browser nginx engines ## the tests, and which branches they do not reach
	@COVERAGE_FILE=$(CURDIR)/.coverage $(WITH_ENGINE) --and-podman -- $(BIN)/coverage run -m $(PYTEST) $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

bench: .venv/ready-dev ## how fast it is on this machine, beside what else does the same
	@$(WITH_ENGINE) -- $(BIN)/python checks/bench.py $(ARGS)

bench-peers: .venv/ready-dev ## the same work by rq, celery, dramatiq and huey, installed in a folder of their own
	@command -v redis-server >/dev/null || $(PYTHON) checks/packages.py redis-server
	@$(BIN)/python checks/bench.py --peers $(ARGS)

simulate: .venv/ready-dev ## play histories of the real code on a virtual clock: ARGS="--histories 200000"
	@$(BIN)/python checks/simulate.py $(ARGS)

chaos: .venv/ready-dev ## kill everything again and again and count the promises
	@$(WITH_ENGINE) -- $(BIN)/python checks/chaos.py $(ARGS)

mutants: .venv/ready-dev ## break the code line by line and see the tests fail
	@$(WITH_ENGINE) -- $(BIN)/python checks/mutants.py $(ARGS)

clean: ## remove what all of these left in this folder
	@rm -rf .venv .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache __pycache__ */__pycache__

.PHONY: browser
browser:
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || $(PYTHON) checks/packages.py chromium || \
	    { echo "Or name a Chromium or Chrome that is there: CHROMIUM=/path/to/it make test" >&2; exit 1; }

# Without them the tests of podman, and of what is pulled, are left out.
.PHONY: engines
engines:
	@command -v podman >/dev/null && command -v docker-registry >/dev/null && \
	    { command -v runc >/dev/null || test -x /usr/sbin/runc; } || \
	    $(PYTHON) checks/packages.py podman runc docker-registry || true

.PHONY: nginx
nginx:
	@command -v nginx >/dev/null || test -x /usr/sbin/nginx || $(PYTHON) checks/packages.py nginx-light

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later, please: make PYTHON=...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || $(PYTHON) checks/packages.py python3-venv
	@echo "Setting up Python packages in .venv ..."
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

.venv/ready-dev: pyproject.toml .venv/ready
	@echo "Adding what development needs to .venv ..."
	@$(BIN)/python -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")' >.venv/dev.txt
	@$(PIP) -r .venv/dev.txt
	@touch $@
