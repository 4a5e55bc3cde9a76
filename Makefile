# `make demo` and `make test` set everything up in .venv and run. The same as plain lines is in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test base clean

demo: .venv/ready
	$(BIN)/python train.py

test: .venv/ready
	$(BIN)/python -m pytest

base: .venv/ready  ## make the shipped base again (about 10 minutes)
	$(BIN)/python pretrain.py --out base

clean:
	rm -rf .venv runs

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
