# Everything runs in .venv, which the first target makes from nothing but Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-slow bench style quality clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

demo: install
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train_scripts/train_ldm.py --preset digits --output_dir runs/digits
	@echo "runs/digits is a pipeline; its samples, ten labelled rows of digits, are runs/digits/samples.png"

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

# What benchmarks/README.md says of training and sampling, on real MNIST: some two hours of two CPU cores. Interrupted,
# it keeps trainings, and rows of time_to_quality.py, that are done.
MNIST ?= $(HWDIFFUSION_DATA)/mnist
BENCH := runs/bench
JUDGE := $(BENCH)/mnist-classifier
bench: install
	test -d "$(MNIST)" || { echo "make bench needs MNIST=FOLDER, with MNIST's parquet files"; exit 1; }
	$(BIN)/python train_scripts/train_classifier.py --preset mnist-classifier --train_data_dir "$(MNIST)" --output_dir $(JUDGE)
	$(BIN)/python benchmarks/time_to_quality.py --budget 600 --train_data_dir "$(MNIST)" \
		--classifier $(JUDGE) --output $(BENCH)/time-to-quality
	for budget in 180 120; do $(BIN)/python benchmarks/time_to_quality.py --budget $$budget --rows ours --train_data_dir "$(MNIST)" \
		--classifier $(JUDGE) --output $(BENCH)/time-to-quality || exit 1; done
	$(BIN)/python train_scripts/train_distill.py --teacher $(BENCH)/time-to-quality/ours-600s --train_data_dir "$(MNIST)" \
		--mixed_precision auto --max_train_seconds 300 --output_dir $(BENCH)/student
	$(BIN)/python train_scripts/train_wgan.py --preset mnist-wgan --train_data_dir "$(MNIST)" \
		--max_train_seconds 555 --output_dir $(BENCH)/mnist-wgan
	$(BIN)/hwdiffusion compare $(BENCH)/time-to-quality/ours-600s $(BENCH)/time-to-quality/ours-pixels-600s \
		$(BENCH)/mnist-wgan --classifier $(JUDGE) --num_samples 1000 --label_frequencies held_out --output_dir $(BENCH)/compare
	$(BIN)/python benchmarks/sampling_speed.py --pixel $(BENCH)/time-to-quality/ours-pixels-600s \
		--latent $(BENCH)/time-to-quality/ours-600s --student $(BENCH)/student --classifier $(JUDGE) \
		--torch_dtype float32 bfloat16 --output $(BENCH)/sampling-speed
	for precision in no bf16; do for of in train_ldm:mnist-fast train_ddpm:mnist-ddpm; do \
		$(BIN)/python benchmarks/step_speed.py $${of#*:} --script $${of%:*} --train_data_dir "$(MNIST)" --rounds 10 \
		--mixed_precision $$precision --output $(BENCH)/step-speed-$${of#*:}-$$precision || exit 1; done; \
		$(BIN)/python benchmarks/step_speed.py mnist-fast --script train_ldm --stable_targets 0 --train_data_dir "$(MNIST)" --rounds 10 \
		--mixed_precision $$precision --output $(BENCH)/step-speed-mnist-fast-plain-loss-$$precision || exit 1; done
	$(BIN)/python benchmarks/scaling.py mnist-ddpm --train_data_dir "$(MNIST)" --output $(BENCH)/scaling

style: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
