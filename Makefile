# Every target makes .venv from the requirements files when it is missing or outdated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CODE := train.py eval.py mlvision tools tests
DEMO := runs/demo
STUDENT := configs/scenes_efficientnet_lite0_relabel.yaml
SHORT := data.root=datasets/scenes_demo optim.epochs=3

.PHONY: demo test test-fast check format

# Every training image tells its largest object alone. A baseline learns that; its label maps then teach a student what each
# crop shows. The test images know all their objects. At the end a report shows where the student saw each label.
demo: $(VENV)/.installed
	$(BIN)/python tools/prepare_data.py scenes out=datasets/scenes_demo train_images=1400 test_images=400
	rm -rf $(DEMO)
	$(BIN)/python train.py configs/scenes_efficientnet_lite0_teacher.yaml $(SHORT) out=$(DEMO)/single_labels
	$(BIN)/python eval.py $(DEMO)/single_labels
	$(BIN)/python tools/make_label_maps.py $(STUDENT) data.root=datasets/scenes_demo teacher=[$(DEMO)/single_labels] \
		scales=[2.0] out=$(DEMO)/maps
	$(BIN)/python train.py $(STUDENT) $(SHORT) label_maps=$(DEMO)/maps out=$(DEMO)/relabel
	$(BIN)/python eval.py $(DEMO)/relabel
	$(BIN)/python tools/results_table.py runs=[$(DEMO)/single_labels,$(DEMO)/relabel]
	$(BIN)/python tools/explain.py $(DEMO)/relabel data.root=datasets/scenes_demo method=[grad_cam,occlusion] \
		labels=relevant num_images=60 out=$(DEMO)/explanations

# A module stays on one worker: its fixtures, some of which train, are then made once.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope

# What whoever adds a part wants to know first: the contracts, and the oracles of small parts. Neither all tests are collected
# nor the checks of shapes installed, which take as long as these tests.
FAST := tests/contracts tests/losses tests/methods tests/evaluators tests/posthoc tests/test_space.py
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadscope -o addopts="-q --strict-markers" \
		-m "not slow and not browser and not distributed" $(FAST)

check: $(VENV)/.installed
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

$(VENV)/.installed: requirements.txt requirements-text.txt requirements-parquet.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which with make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -e .
	touch $@
