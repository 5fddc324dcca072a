# One environment, made from a hashed lock and kept in step with it; every target below runs in it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help env demo test doctor up down lint lock

# RAYWARD_LOCK=cpu|gpu decides; without it what is installed stays, and a first time takes what the machine has.
ifndef RAYWARD_LOCK
RAYWARD_LOCK := $(shell cat .venv/installed.kind 2>/dev/null || { nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu; })
endif
PYTHON ?= python3.11
RUN := .venv/bin/python
# The long files first, so that both processes have work to the end.
TOGETHER := --numprocesses 2 --dist loadfile --no-loadscope-reorder
COMPILE := .uv/bin/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--generate-hashes --no-emit-index-url

help:  ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16

# .venv/installed.lock is a copy of the lock that the environment was made from: equal means nothing to do.
env:  ## create the environment from the lock, or bring it up to date
	@cmp -s requirements/$(RAYWARD_LOCK).lock .venv/installed.lock \
		|| PYTHON=$(PYTHON) requirements/install $(RAYWARD_LOCK)

demo: env  ## unlearn the demo target from the embedded model, print a table and where the report is
	@$(RUN) -m jobs.rule run --profile laptop

test: env  ## run the whole test suite (performance ratios apart)
	@$(RUN) -m pytest tests/e2e tests/cluster tests/unit $(TOGETHER)

doctor: env  ## check this machine, each problem with its remedy
	@$(RUN) -m cluster doctor

up: env  ## start a local Ray head with its dashboard, and the MLflow UI, on loopback
	@$(RUN) -m cluster up

down: env  ## end what `make up` started
	@$(RUN) -m cluster down

lint: env  ## style, formatting and the floors between packages
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports --no-logo

# Pins that still satisfy the .in files are kept; delete a lock first to take the newest of everything.
lock:  ## compile the locks anew from requirements/*.in
	@PYTHON=$(PYTHON) requirements/install uv
	$(COMPILE) requirements/installer.in -o requirements/installer.lock
	$(COMPILE) --override requirements/override.txt --override requirements/override-cpu.txt \
		requirements/cpu.in -o requirements/cpu.lock
	$(COMPILE) --override requirements/override.txt requirements/gpu.in -o requirements/gpu.lock
