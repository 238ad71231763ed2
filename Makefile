# Every target makes its own environment, in .venv or beside it, and installs what it lacks, once.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
STAMPS := $(VENV)/stamps
CLIENTS := .venv-clients
PEERS := .venv-peers
ZOO := .venv-zoo
TRITON := .venv-triton

.PHONY: demo test smoke wheel sdist release coverage stranger test-slow test-triton test-browser gpu versions experiments clients zoo support
.PHONY: bench bench-quick bench-large bench-influence bench-cockpit bench-vivit bench-regressions
.PHONY: docs check-site
.PHONY: lint format clean

demo: $(STAMPS)/demo
	$(BIN)/python -m demo.digits

# One thread per worker: the tests' tensors are small, and workers would fight for the cores.
test: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# The library in ten seconds.
smoke: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/project/test_smoke.py

# The same from the wheel that users install, without the checkout.
wheel: $(STAMPS)/test
	rm -rf build/wheel && mkdir -p build/wheel/tests
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PIP) --no-deps --target build/wheel/site build/wheel/*.whl
	cp tests/project/test_smoke.py build/wheel/tests
	cd build/wheel && OMP_NUM_THREADS=1 PYTHONPATH=site $(CURDIR)/$(BIN)/python -c \
		"import backpack; assert 'build/wheel/site' in backpack.__file__, backpack.__file__"
	cd build/wheel && OMP_NUM_THREADS=1 PYTHONPATH=site $(CURDIR)/$(BIN)/python -m pytest -q \
		-c /dev/null --rootdir . -p no:cacheprovider tests

# From the source distribution, whose tests must find all they read.
sdist: $(STAMPS)/test $(STAMPS)/release
	rm -rf build/sdist && mkdir -p build/sdist/unpacked
	$(BIN)/python -m build --sdist --outdir build/sdist .
	tar -xzf build/sdist/*.tar.gz --strip-components 1 --directory build/sdist/unpacked
	cd build/sdist/unpacked && OMP_NUM_THREADS=1 PYTHONPATH=. $(CURDIR)/$(BIN)/python -c \
		"import backpack; assert 'build/sdist' in backpack.__file__, backpack.__file__"
	cd build/sdist/unpacked && OMP_NUM_THREADS=1 PYTHONPATH=. $(CURDIR)/$(BIN)/python -m pytest -q --collect-only -n 0 \
		| tail -1
	cd build/sdist/unpacked && OMP_NUM_THREADS=1 PYTHONPATH=. $(CURDIR)/$(BIN)/python -m pytest -q -n 0 \
		$(patsubst %,tests/project/test_%.py,smoke layout pages howto support docs numbers pictures)

# What goes to a package index: ADDRESS is where the repository is, for links of the README.
release: $(STAMPS)/release
	test -n "$(ADDRESS)"
	rm -rf build/release && mkdir -p build/release/tree
	git archive HEAD | tar -x --directory build/release/tree
	$(BIN)/python docs/absolute.py $(ADDRESS) build/release/tree
	$(BIN)/python -m build --outdir build/release build/release/tree

# Which lines of the library no test reaches: a table, and htmlcov/index.html.
coverage: $(STAMPS)/test $(STAMPS)/coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov=backpack --cov-report=term:skip-covered \
		--cov-report=html $(COVERED)

# A fresh clone, its two commands, and every how-to copied from its page; minutes for each. PACKAGES=--packages takes
# those that need transformers, Lightning and TensorBoard, too.
stranger:
	$(PYTHON) tests/project/stranger.py $(PACKAGES)

test-slow: $(STAMPS)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

# The oldest and newest torch, and each Python; BARE=--bare leaves CUDA's 3 GB of libraries out.
VERSIONS ?= python3.10:2.11.0 python3.11:2.13.0 python3.12:2.12.1 python3.13:2.15.0
versions: $(BIN)/python
	$(BIN)/python tests/project/versions.py $(BARE) $(VERSIONS)

# The GPU kernel against torch's operations, in Triton's interpreter on the CPU.
test-triton: $(TRITON)/stamp
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(TRITON)/bin/python -m pytest -n $(WORKERS) -m triton \
		tests/forms/test_kernels.py

# Every quantity on a GPU against brute force, then what thresholds for devices rest on. DEVICE=cpu tries
# both where there is none. Here torch is for CPUs: GPU_PYTHON is one with pytest whose torch knows the device.
DEVICE ?= cuda
GPU_PYTHON ?= $(BIN)/python
# Those that `make bench` installs may be left out.
GPU_LIBRARIES ?= ours ours-no-gradient ours-forms backpack-for-pytorch opacus torch.func curvlinops
gpu:
	BACKPACK_DEVICE=$(DEVICE) OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -p no:benchmark -n $(WORKERS) -m gpu tests/gpu
	$(GPU_PYTHON) -m benchmarks.devices --device $(DEVICE)
	$(GPU_PYTHON) -m benchmarks.suite --device $(DEVICE) --no-sweeps --rounds 5 --budget 1 \
		$(if $(filter cpu,$(DEVICE)),--quick --libraries ours torch.func,--libraries $(GPU_LIBRARIES))

# The monitor's report in a browser: the one in CHROMIUM, or one that playwright fetches.
test-browser: $(STAMPS)/test
	$(PIP) playwright
	test -n "$(CHROMIUM)" || $(BIN)/python -m playwright install chromium
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -m browser tests/cockpit/test_browser.py

# Optimizers with curvature beside SGD and Adam, on digits: a small grid search, figures, a table.
experiments: $(STAMPS)/experiments
	$(BIN)/python -m experiments run --problem digits-logreg digits-cnn --epochs 10 --seeds 3 \
		--optimizer SGD Adam DiagGGNExact DiagGGNMC KFAC KFLR --lr 0.01 0.1 1 --damping 0.01 0.1 1
	$(BIN)/python -m experiments time --problem digits-logreg digits-cnn
	$(BIN)/python -m experiments plot
	$(BIN)/python -m experiments table

# Programs written for backpack-for-pytorch give the same numbers on it and on this library.
clients: $(CLIENTS)/original/stamp $(CLIENTS)/ours/stamp
	$(BIN)/python clients/compare.py $(foreach each,$(^D),$(each)/bin/python) --brief

# Every quantity on published architectures, in tiny sizes, against brute force.
zoo: $(ZOO)/stamp
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -m pytest -n $(WORKERS) -m zoo tests/zoo

# Run the cases of the tests for each quantity on its own, and write what came out.
support: $(ZOO)/stamp
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -W ignore -m tests.zoo.support docs/support.md

# What quantities cost, beside other libraries; options in BENCH, as in `make bench BENCH="--problems mlp"`.
bench: $(STAMPS)/bench $(PEERS)/backpack-for-pytorch/stamp $(PEERS)/opacus/stamp $(PEERS)/curvlinops/stamp
	$(BIN)/python -m benchmarks.suite $(BENCH)

# The monitor beside cockpit-for-pytorch: the same numbers, and what they cost.
bench-cockpit: $(STAMPS)/bench $(PEERS)/cockpit-for-pytorch/stamp
	$(BIN)/python -m benchmarks.cockpit agree
	$(BIN)/python -m benchmarks.cockpit cost $(BENCH)
	$(BIN)/python -m benchmarks.cockpit_table
	$(BIN)/python -m benchmarks.cockpit_memory

# Low-rank curvature beside vivit-for-pytorch and Lanczos with curvlinops.
bench-vivit: $(STAMPS)/bench $(PEERS)/vivit-for-pytorch/stamp $(PEERS)/curvlinops/stamp
	$(BIN)/python -m benchmarks.vivit --largest $(BENCH)

bench-quick: override BENCH += --quick
bench-quick: bench

# Large models as published: GPT-2 small, ViT-B/16, ResNet-50; some ten minutes, 5 GB.
bench-large: $(ZOO)/stamp
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -W ignore -m benchmarks.large $(BENCH)

# Data attribution: the same scores as kronfluence, in how much time, and what large models take; 9 GB.
bench-influence: $(STAMPS)/bench $(ZOO)/stamp $(PEERS)/kronfluence/stamp
	PYTHONPATH=$(PEERS)/kronfluence $(BIN)/python -W ignore -m benchmarks.influence agree
	PYTHONPATH=$(PEERS)/kronfluence OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.influence cost
	OMP_NUM_THREADS=1 $(ZOO)/bin/python -W ignore -m benchmarks.influence large $(BENCH)

# The same quantities from commit to commit.
bench-regressions: $(STAMPS)/bench
	$(BIN)/python -m pytest benchmarks/regressions.py -W default --benchmark-storage=$(VENV)/benchmarks \
		$(if $(wildcard $(VENV)/benchmarks/*),--benchmark-compare --benchmark-compare-fail=min:25%) \
		--benchmark-autosave --benchmark-columns=min,median,rounds --benchmark-group-by=param:problem

# The site, in docs/_build. From scratch, so that every tutorial is run on the library as it is.
docs: $(STAMPS)/docs
	rm -rf docs/_build docs/tutorials
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/_build

# The built site: links, images, formulas; in a headless Chromium also scripts, search, both widths, light and dark.
# CHROMIUM is the program's path; without it playwright fetches one.
check-site: docs $(STAMPS)/site
	test -n "$(CHROMIUM)" || $(BIN)/python -m playwright install chromium-headless-shell
	CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -n 0 tests/project/site_check.py

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMPS)/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-versions $(CLIENTS) $(ZOO) $(TRITON) $(PEERS) build dist *.egg-info demo/output experiments/output docs/_build
	rm -rf docs/tutorials htmlcov .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: empty files that are newer than what they were installed from.

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and by its exact version; a looser request may fetch a build many times larger.
$(STAMPS)/torch: constraints.txt | $(BIN)/python
	$(PIP) $$(grep '^torch==' constraints.txt)
	@mkdir -p $(STAMPS) && touch $@

EXTRAS := demo test lint bench docs experiments coverage release site
$(EXTRAS:%=$(STAMPS)/%): $(STAMPS)/%: pyproject.toml $(STAMPS)/torch
	$(PIP) --editable ".[$*]"
	@touch $@

# Two environments that differ in the library only.
$(CLIENTS)/original/stamp: LIBRARY = backpack-for-pytorch==1.7.1
$(CLIENTS)/ours/stamp: LIBRARY = --editable .
$(CLIENTS)/%/stamp: constraints.txt clients/dependencies.txt clients/requirements.txt | $(BIN)/python
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt -r clients/dependencies.txt
	$(@D)/bin/python -m pip install --quiet --no-deps -r clients/requirements.txt $(LIBRARY)
	@touch $@

$(ZOO)/stamp: constraints.txt tests/zoo/dependencies.txt tests/zoo/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt -r tests/zoo/dependencies.txt
	$(@D)/bin/python -m pip install --quiet --no-deps -r tests/zoo/requirements.txt
	@touch $@

$(TRITON)/stamp: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt triton numpy pytest pytest-xdist
	@touch $@

# Libraries to measure beside this one: folders without torch, which processes of this environment add.
$(PEERS)/%/stamp: benchmarks/peers/%.txt $(STAMPS)/torch
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) -r $<
	@touch $@
