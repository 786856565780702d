# The two commands of the README: `make demo` and `make test`. Each creates .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.PHONY: demo test docs lint clean help

help:
	@echo "make demo   install into $(VENV) and segment the example images (results in demo_output/)"
	@echo "make test   install the test tools as well and run all checks"
	@echo "make docs   build the documentation into site/ (open site/index.html)"
	@echo "make lint   only the style and layer checks"
	@echo "make clean  remove $(VENV), demo_output/, example_output/ and site/"

demo: $(VENV)/.installed
	$(PY) examples/demo.py

test: $(VENV)/.installed-test
	.ci/system-packages
	.ci/check

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(VENV)/.installed-test
	.ci/check --lint-only

clean:
	rm -rf $(VENV) demo_output example_output site

# The stamp is written last, so an interrupted installation is taken up again by the next call.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "micro_sam needs Python 3.11 or newer. Call: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(PY) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "Could not create a virtual environment; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[gui,test]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install --quiet -c constraints.txt -e ".[docs]"
	@touch $@
