# Needs Python 3.11 or newer with pip and venv; everything else is set up here, once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo bench bench-full bench-gpu test test-processors test-slow lint format clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# A cohort, five trained folds, LRP, IG and GGC maps, the same of untrained networks, the SVM, and how
# well all of them find the planted atrophy.
demo: .venv/ready
	$(BIN)/python simulate.py --outpath $(DEMO)/cohort --n 240 --voxel 6
	$(BIN)/python train_cv.py --path $(DEMO)/cohort/data.csv --outpath $(DEMO)/output \
		--model modelT16 --lr 5e-4 --epochs 30 --patience 15 --device cpu
	$(BIN)/python heatmap.py --path $(DEMO)/cohort/data.csv --modelpath $(DEMO)/output \
		--model modelT16 --method LRP IG GGC --target 1 --steps 20 --save-subjects \
		--outpath $(DEMO)/maps --device cpu
	$(BIN)/python heatmap.py --path $(DEMO)/cohort/data.csv --modelpath $(DEMO)/output \
		--model modelT16 --method LRP IG GGC --target 1 --steps 20 --save-subjects \
		--randomize --outpath $(DEMO)/maps --device cpu
	$(BIN)/python svm.py --path $(DEMO)/cohort/data.csv --modelpath $(DEMO)/output \
		--outpath $(DEMO)/svm
	$(BIN)/python compare.py --maps $(DEMO)/svm/SVM_weights_all.nii.gz \
		$(DEMO)/svm/SVM_pattern_all.nii.gz $(DEMO)/maps/LRP_map_all.nii.gz \
		$(DEMO)/maps/IG_map_all.nii.gz $(DEMO)/maps/GGC_map_all.nii.gz \
		$(DEMO)/maps/LRP_contrast_all.nii.gz $(DEMO)/maps/IG_contrast_all.nii.gz \
		$(DEMO)/maps/GGC_contrast_all.nii.gz --reference $(DEMO)/cohort/truth.nii.gz \
		--mask $(DEMO)/cohort/brain.nii.gz --sign neg pos abs --fwhm 10 0 \
		--run $(DEMO)/output $(DEMO)/svm --outpath $(DEMO)/comparison

# Each is quick as it is, and measures at the paper's size with --full.
BENCHMARKS := attribution training_step loading scaling
ON_A_DEVICE := attribution training_step scaling

bench: .venv/ready
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-full: .venv/ready
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --full || exit 1; done

# A training step through torch.compile as well.
bench-gpu: .venv/ready
	for name in $(ON_A_DEVICE); do \
		$(BIN)/python benchmarks/$$name.py --full --device cuda || exit 1; done
	$(BIN)/python benchmarks/training_step.py --full --device cuda --compile

test: .venv/ready
	$(BIN)/python -m pytest -n auto

# Kernels of other processors stand in for those processors: attribution must be right on each.
test-processors: .venv/ready
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest tests/attribution
	ONEDNN_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest tests/attribution

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow -n auto

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports --no-cache

format: .venv/ready
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(DEMO) .venv
