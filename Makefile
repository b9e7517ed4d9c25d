# Needs git, make, and python3 >= 3.11 with pip and venv. Everything is installed into .venv in this folder.
#
#   make demo    render an example to drr.png, and say where that is
#   make test    run the tests: the notebooks of the modules, and tests/
#   make slow    run what takes longer: the pages, in a notebook and in a browser, and the tests that are marked slow
#   make pose    run what needs timm, in an environment of its own, .venv-pose: timm needs torchvision, and that needs torch for CUDA
#   make triton  compile the GPU kernels with the oldest and the newest Triton that they allow, without a GPU
#   make check   check that the package, the README and the notebooks agree, and that the website builds
#   make format  let ruff format and tidy the notebooks, tools and tests
#   make docs    build the website into _docs/;  make serve  shows it on http://localhost:8000
#   make benchmark  compare the speed with other packages, which it installs outside this folder
#   make outputs NBS=nbs/index.ipynb    run notebooks again and keep their outputs

PYTHON ?= python3
# The version that the tests run with; TORCH=torch takes the newest.
TORCH ?= torch==2.13.0
# As many processes as there are cores, each with its share of them; make WORKERS=0 test runs all in one process.
WORKERS ?= logical
NBS ?= $(shell find nbs -name "*.ipynb" -not -path "*/.*" | sort)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.PHONY: demo test slow pose triton check format docs serve benchmark outputs readme clean
.DELETE_ON_ERROR:

# Stamps: each says that a part of the environment is installed.
.venv/torch.installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffdrr needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PIP) install '$(TORCH)'
	@touch $@

.venv/package.installed: .venv/torch.installed settings.ini setup.py
	$(PIP) install --editable .
	@touch $@

.venv/dev.installed: .venv/torch.installed settings.ini setup.py
	$(PIP) install --editable '.[dev]'
	@touch .venv/package.installed $@

define WHAT_NEXT

drr.png shows the built-in example from the front: a procedural chest CT, no patient. What next?

  $(BIN)/diffdrr render --view "LAO 30" -o oblique.png         from another side
  $(BIN)/diffdrr render --structures heart,aorta -o heart.png  some of its structures
  $(BIN)/diffdrr render ct.nii.gz -o mine.png                  your own CT: NIfTI, NRRD, MetaImage or a DICOM folder
  $(BIN)/diffdrr doctor                                        what is installed, and who can render here
  $(BIN)/diffdrr --help                                        all commands
  make serve                                                      the website, with tutorials, on http://localhost:8000
  README.md                                                       the same in eleven lines of Python
endef
export WHAT_NEXT

demo: .venv/package.installed
	@echo "rendering the built-in example; the first time the CT is made and kernels are compiled, which takes half a minute"
	$(BIN)/diffdrr render --height 500 --delx 0.8 -o drr.png
	@echo "$$WHAT_NEXT"

test: .venv/dev.installed
	$(PYTEST) nbs tests

# SITE is where the website has been built; without it, it is built.
slow: .venv/dev.installed
	$(if $(SITE),,$(MAKE) docs)
	SITE=$(or $(SITE),_docs) $(PYTEST) -m slow --nb-flags slow nbs tests

# Most of what is installed is never imported: so Python compiles it when it is.
.venv-pose/installed: settings.ini setup.py
	$(PYTHON) -m venv .venv-pose
	.venv-pose/bin/python -m pip --quiet --disable-pip-version-check install --no-compile --editable '.[pose,dev]'
	@touch $@

pose: .venv-pose/installed
	.venv-pose/bin/python -m pytest --nb-flags pose nbs/api/registration/712_regressor.ipynb nbs/api/training/943_network.ipynb nbs/tutorials/pose_regression.ipynb

triton: .venv/dev.installed
	$(BIN)/python -m tools.gpu.host --triton 3.4.0 newest

check: .venv/dev.installed
	$(BIN)/python -m tools.check

format: .venv/dev.installed
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format .
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

docs: .venv/dev.installed
	$(BIN)/python -m tools.docs
	$(BIN)/python -m tools.check_site _docs

serve: docs
	$(BIN)/python -m http.server --directory _docs 8000

benchmark: .venv/dev.installed
	$(BIN)/python -m benchmarks

outputs: .venv/dev.installed
	$(BIN)/python -m tools.nbrun $(NBS)

readme: .venv/dev.installed
	$(BIN)/python -m tools.readme

clean:
	rm -rf .venv .venv-pose .cache build dist _proc _docs nbs/nbdev.yml *.egg-info drr.png
