# Needs Python 3.11 or newer with pip and venv; everything else is set up here, once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
COHORT :=

.PHONY: demo study bench bench-full bench-gpu test test-processors test-slow lint format clean

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# A cohort, five trained folds, their maps, the same of untrained networks, the baselines, and how
# well all of them find the planted atrophy, and a made-up literature about it. Typed again, it goes
# on.
METHODS := IG SG GGC LRP
EXPLAIN := --path $(DEMO)/cohort/data.csv --modelpath $(DEMO)/output --model modelT16 \
	--method $(METHODS) --target 1 --steps 20 --save-subjects --outpath $(DEMO)/maps --device cpu
BASELINE := --path $(DEMO)/cohort/data.csv --modelpath $(DEMO)/output --overwrite

demo: .venv/ready
	$(BIN)/python simulate.py --outpath $(DEMO)/cohort --n 240 --voxel 6 $(COHORT)
	$(BIN)/python train_cv.py --path $(DEMO)/cohort/data.csv --outpath $(DEMO)/output \
		--model modelT16 --lr 5e-4 --epochs 30 --patience 15 --device cpu
	$(BIN)/python heatmap.py $(EXPLAIN)
	$(BIN)/python heatmap.py $(EXPLAIN) --randomize
	$(BIN)/python svm.py $(BASELINE) --outpath $(DEMO)/svm
	$(BIN)/python ttest.py $(BASELINE) --outpath $(DEMO)/ttest
	$(BIN)/python compare.py --maps $(METHODS:%=$(DEMO)/maps/%_map_all.nii.gz) \
		$(METHODS:%=$(DEMO)/maps/%_contrast_all.nii.gz) $(DEMO)/svm/SVM_weights_all.nii.gz \
		$(DEMO)/svm/SVM_pattern_all.nii.gz $(DEMO)/ttest/TTEST_map_all.nii.gz \
		--reference $(DEMO)/cohort/truth.nii.gz --mask $(DEMO)/cohort/brain.nii.gz \
		--sign neg pos abs --fwhm 10 0 --run $(DEMO)/output $(DEMO)/svm \
		--outpath $(DEMO)/comparison
	$(BIN)/python meta.py --foci $(DEMO)/cohort/foci.txt --like $(DEMO)/cohort/brain.nii.gz \
		--permutations 200 --outpath $(DEMO)/meta
	$(BIN)/python compare.py --maps $(METHODS:%=$(DEMO)/maps/%_map_all.nii.gz) \
		$(DEMO)/svm/SVM_pattern_all.nii.gz $(DEMO)/ttest/TTEST_map_all.nii.gz \
		--reference $(DEMO)/meta/reference.nii.gz --mask $(DEMO)/cohort/brain.nii.gz \
		--sign neg --fwhm 10 --run $(DEMO)/output $(DEMO)/svm --outpath $(DEMO)/literature

# The demo in four cohorts, and what it says of the methods: docs/study.md. A folder that is finished
# is skipped.
study: .venv/ready
	for mm in 1.5 4; do for spare in 0 0.5; do \
		folder=study/$${mm}mm_$${spare}spared; \
		test -f $$folder/comparison/report.html || $(MAKE) demo DEMO=$$folder \
			COHORT="--deformation $$mm --spare $$spare" || exit 1; done; done
	$(BIN)/python docs/study.py study

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
	$(BIN)/python -m pytest -n auto --dist worksteal

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
	rm -rf $(DEMO) study .venv
