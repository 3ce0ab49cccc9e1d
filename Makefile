# `make demo` and `make test` each do all of their own set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Of `make deb`: arm64 or amd64; 3.11 is Bookworm's Python, 3.13 Trixie's.
ARCH ?= arm64
TARGET_PYTHON ?= 3.11
PACKAGES := benchmarks edge_agent hardware models ondevice orchestrator tools wire tests

.PHONY: demo test test-hardware boot-test deb lint format programs clean

demo: $(READY)
	$(BIN)/orchestrator demo $(ARGS)

test: lint programs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

# Builds and emulates arm64 systems: wants root, and apt install mmdebstrap qemu-user-static
# binfmt-support qemu-system-arm lintian.
test-hardware: $(READY) programs
	$(BIN)/python -m pytest -m hardware tests/hardware $(ARGS)

boot-test: $(READY) programs
	$(BIN)/python -m pytest -m hardware tests/hardware/test_boot.py $(ARGS)

deb: $(READY)
	$(BIN)/python -m hardware.deb --arch $(ARCH) --python $(TARGET_PYTHON)

lint: $(READY)
	$(BIN)/ruff check $(PACKAGES)
	$(BIN)/ruff format --check $(PACKAGES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix $(PACKAGES)
	$(BIN)/ruff format $(PACKAGES)

# The pinned torch comes as a CPU build wherever pip finds one; see CONTRIBUTING.md.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Stillhouse needs Python 3.11 or later; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Tests with real programs are left out, and say so, where these are missing: a broker, and what
# reads and writes images to flash.
programs:
	@PATH="$$PATH:/usr/sbin:/sbin:/usr/local/sbin"; wanted=; \
	command -v mosquitto >/dev/null || wanted="$$wanted mosquitto"; \
	command -v mcopy >/dev/null || wanted="$$wanted mtools"; \
	command -v sfdisk >/dev/null || wanted="$$wanted fdisk"; \
	command -v debugfs >/dev/null || wanted="$$wanted e2fsprogs"; \
	[ -z "$$wanted" ] || { \
	  as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	  command -v apt-get >/dev/null && $$as_root apt-get update -qq >/dev/null 2>&1 \
	    && $$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$wanted >/dev/null 2>&1 \
	    && echo "installed$$wanted"; \
	} || echo "cannot be installed here:$$wanted; tests that want them will be skipped"

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
