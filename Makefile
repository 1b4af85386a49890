# make run: the main job.  make test: all tests.  Both set up what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN     = $(VENV)/bin
SHELL   = /bin/bash
JOBS   ?= 2
# one thread for each of several jobs: small models leave a second thread half idle
TOGETHER = OMP_NUM_THREADS=1

.PHONY: run test test-cluster test-browser docs setup lab export notebooks readme clean

run: setup            ## the whole road with the default model on the shipped sample
	$(BIN)/yothalia run

test: setup           ## everything; with NB=02_lora only that room
ifdef NB
	$(BIN)/python -m pytest -q tests/test_frame.py -k "sync or clean or defaults or $(NB)"
	$(BIN)/python -m pytest -q tests/test_notebooks.py -k "$(NB)"
else
	$(TOGETHER) $(BIN)/python -m pytest -q -n $(JOBS) tests/test_frame.py
	rm -rf _runs/demo
	$(TOGETHER) $(BIN)/python -m pytest -q -n $(JOBS) --maxschedchunk 1 --durations 12 tests/test_notebooks.py
	$(TOGETHER) $(BIN)/python -m pytest -q -n $(JOBS) --maxschedchunk 1 --durations 12 tests --ignore tests/test_frame.py --ignore tests/test_notebooks.py
endif

test-cluster: setup   ## a real Slurm of two nodes on this machine; needs root, and apt: slurmctld slurmd slurm-client munge
	YOTHALIA_TEST_CLUSTER=1 timeout 1500 $(BIN)/python -m pytest -q --durations 12 tests/test_cluster.py

test-browser: setup   ## the site and JupyterLab in a real Chromium; needs apt: chromium
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt playwright
	YOTHALIA_TEST_BROWSER=1 timeout 1200 $(BIN)/python -m pytest -q --durations 8 tests/test_browser.py tests/test_page.py tests/test_report.py $(if $(ONLY),-k '$(ONLY)')

docs: setup           ## the site, in _docs, from the notebooks as they are
	$(BIN)/yothalia docs

setup: $(VENV)/installed
$(VENV)/installed: constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; say which by PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

lab: setup            ## JupyterLab with this environment's kernel
	$(BIN)/jupyter lab --notebook-dir=.

export: setup         ## write the modules from the notebooks, clean the notebooks' metadata
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

notebooks: setup      ## run all notebooks and keep their outputs
	rm -rf _runs/demo
	find nbs -name '*.ipynb' -not -path '*/.*' | sort | while read n; do YOTHALIA_PROGRESS=off PYTHONWARNINGS=ignore $(BIN)/jupyter nbconvert --to notebook --execute --inplace $$n || exit 1; done
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export
	$(MAKE) readme

readme: setup         ## README.md from nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown --no-input --output-dir . --output README --RegexRemovePreprocessor.patterns='^#\| (hide|default)' nbs/index.ipynb

clean:
	rm -rf _runs _docs _proc _site build dist *.egg-info
