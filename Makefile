# `make demo` and `make test` set everything up in .venv and run. The same as plain lines is in README.md.
# A second `make demo` goes on where the first was stopped; when both runs are finished it says where their reports are.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test base clean

demo: .venv/ready
	$(BIN)/python train.py $(if $(wildcard runs/demo/settings.json),--resume)
	$(BIN)/python train.py --data countdown --name countdown $(if $(wildcard runs/countdown/settings.json),--resume)

test: .venv/ready
	$(BIN)/python -m pytest

base: .venv/ready  ## make the shipped bases again (about 10 minutes each)
	$(BIN)/python -m tasks.pretrain --out tasks/words-base
	$(BIN)/python -m tasks.pretrain --task countdown --steps 3500 --out tasks/countdown-base

clean:
	rm -rf .venv runs

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
