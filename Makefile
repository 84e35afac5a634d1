# Four commands. Each makes .venv on first use (Python >= 3.11).
#   make demo    real clips, a real ViT, SC-VFP against the trivial predictors, a report; PART=fvlm or PART=s_hr_vqvae for the other systems
#   make lab     the notebooks in JupyterLab
#   make test    everything that has to hold
#   make bench   speed, as ratios measured in one process
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PART   ?= sc_vfp
READY  := $(VENV)/ready

.PHONY: demo lab test browser bench notebooks readme clean
.DEFAULT_GOAL := test

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"fvlm needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/fvlm demo --part $(PART) --out demo_out

# JupyterLab refuses to start for root, as in a container, unless told.
lab: $(READY)
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root)

test: $(READY) browser
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/run_all.py

# The browser tests drive a Chromium: installed where that is ours to do, and otherwise they are skipped.
browser:
	@for name in "$$FVLM_CHROMIUM" chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge; do \
		[ -n "$$name" ] && command -v "$$name" >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Chromium for the browser tests"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
			|| echo "Chromium could not be installed: the browser tests will be skipped"; \
	else echo "no Chromium found: the browser tests will be skipped (Debian, Ubuntu: sudo apt-get install chromium)"; fi

bench: $(READY)
	$(BIN)/python -m pip install --quiet '.[bench]'
	$(BIN)/python -m benchmarks

# Writes the package and README.md from the notebooks.
notebooks: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-clean && PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev-export

readme: notebooks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/render_readme.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info demo_out
