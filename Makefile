# Every target sets up what it needs in .venv from requirements.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo
# Threads that spin for long while they wait slow a busy machine down five-fold; read by OpenMP when torch is loaded.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 1000
# pip leaves compiling the packages to their first import: where that may keep nothing, as in many containers, each
# process would compile torch's Python again (9 s instead of 2).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: build demo test sanitize gpu trial bench lint clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed, this is ' + sys.version)"
	@echo "=== installing the packages of requirements.txt into $(VENV): a minute or two, more where torch is downloaded"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt
	touch $@

# The compiled operator, rebuilt where its sources changed. Without a compiler everything runs on the reference.
build: $(VENV)/installed
	$(BIN)/python setup.py -q build_ext --inplace

# Films, flow, prototypes, pre-training, retrieval, a page: every stage by its own command. Interrupted, it goes on.
# make demo SEED=7 DEMO=demo7 runs another seed into another folder. With EPOCHS=36 it trains for longer, and RGB
# learns more.
SEED ?= 0
EPOCHS ?= 28
SET = --dataset ucf101 --videos $(DEMO)/films/videos --splits $(DEMO)/films/splits --flow $(DEMO)/flow
NET = --arch r2plus1d18 --width 0.125 --frames 8 --stride 2 --size 32
demo: $(VENV)/installed
	@echo "=== 1/8 the compiled operator (a minute; without a compiler the PyTorch reference is used),"
	@echo "=== 2/8 and meanwhile films of jointed figures, 10 actions"
	@{ $(MAKE) --no-print-directory build || echo "it could not be built: all runs on the reference, slower"; } & \
	    $(BIN)/python -m experiments.walkers --out $(DEMO)/films --train 400 --test 200 --sheet $(DEMO)/films.png; \
	    status=$$?; wait; exit $$status
	@echo "=== 3/8 optical flow (coarser TV-L1 than the default, for speed)"
	@$(BIN)/python flow.py --videos $(DEMO)/films/videos --out $(DEMO)/flow --short-side 0 --warps 1 --epsilon 0.03
	@echo "=== 4/8 prototypes (Eq. 11)"
	@$(BIN)/python prototypes.py --num 20 --dim 64 --out $(DEMO)/prototypes.npz
	@echo "=== 5/8 what the untrained network retrieves"
	@$(BIN)/python evaluate.py retrieval --checkpoint none $(SET) $(NET) --seed $(SEED) --json $(DEMO)/untrained.json
	@echo "=== 6/8 pre-training with the guided loss"
	@OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 pretrain.py @presets/cpu --batch-size 16 \
	    --sync-batch-norm none --epochs $(EPOCHS) --log-every 25 --seed $(SEED) $(SET) \
	    --prototypes $(DEMO)/prototypes.npz --out $(DEMO)/goca
	@echo "=== 7/8 what GOCA retrieves"
	@$(BIN)/python evaluate.py retrieval --checkpoint $(DEMO)/goca $(SET) --json $(DEMO)/goca.json
	@echo "=== 8/8 a page of all that, and what it means"
	@$(BIN)/python -m experiments.report $(DEMO)/goca --json $(DEMO)/untrained.json results/guiding_28/sep/seed45.json \
	    $(DEMO)/goca.json --out $(DEMO)
	@echo
	@$(BIN)/python -m experiments.demo $(DEMO)

# In two processes: most tests keep one core busy. Each takes one half of the files, so that what the tests of a file
# share is made once, and whoever is done first takes tests from the other.
test: build
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=5 tests

# The C++ of all kernels under AddressSanitizer and UndefinedBehaviorSanitizer, those for GPUs as g++ runs them. In a
# copy, since the extension then needs the sanitizers' libraries first.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g
sanitize: $(VENV)/installed
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r *.py pyproject.toml csrc support tests experiments presets launch $(SANITIZED)
	cd $(SANITIZED) && GOCA_CXXFLAGS="$(SANITIZERS)" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 GOCA_CXXFLAGS="$(SANITIZERS)" $(abspath $(BIN))/python -m pytest -q -k "not nvcc" \
	    tests/test_goca.py tests/test_operator.py tests/test_tvl1.py tests/cuda_on_cpu

# Where an NVIDIA GPU is: the tests that need one, the same small ones under compute-sanitizer, and the speed rows.
GPU_TESTS = -q -k "(cuda or gpu) and not on_cpu" tests
GPU_SMALL = -q -k "cuda and (33x65 or streams) or gpu" tests/test_operator.py tests/test_tvl1.py
CARD = $(shell nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' ' '_')
gpu: build
	$(BIN)/python -c "import sys, torch, goca; sys.exit(not (torch.cuda.is_available() and goca._goca.cuda) and \
	    'make gpu needs a GPU that torch sees, and the extension built with its CUDA kernels (see make build)')"
	$(BIN)/python -m pytest -n 4 --dist worksteal $(GPU_TESTS)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest $(GPU_SMALL)
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest $(GPU_SMALL)
	$(BIN)/python -m experiments.bench operator step flow --json results/$(CARD).json $(if $(VIDEOS),--videos $(VIDEOS))

# Some minutes a method on one GPU: S3D at the paper's clip size on larger generated films, with guiding and without, about
# as many steps as the demo takes. Logs, results and curves go to trial/results. Interrupted, it goes on.
TRIAL ?= trial
TRIAL_FILMS ?= --train 960 --test 240 --size 160 --frames 48
TRIAL_NET ?= @presets/one-gpu --batch-size 32 --lr 2.0 --epochs 12 --warmup-epochs 1
TRIAL_METHODS ?= goca sep sview
TRIAL_PROTOCOL ?= goca
TRIAL_RESULTS ?= $(TRIAL)/results
TRIAL_SET = --dataset ucf101 --videos $(TRIAL)/films/videos --splits $(TRIAL)/films/splits --flow $(TRIAL)/flow
trial: build
	$(BIN)/python -m experiments.walkers --out $(TRIAL)/films $(TRIAL_FILMS)
	$(BIN)/python flow.py --videos $(TRIAL)/films/videos --out $(TRIAL)/flow --short-side 0
	$(BIN)/python prototypes.py --num 20 --dim 128 --out $(TRIAL)/prototypes.npz
	mkdir -p $(TRIAL_RESULTS)
	for method in $(TRIAL_METHODS); do \
	    $(BIN)/python pretrain.py $(TRIAL_NET) --method $$method --log-every 10 $(TRIAL_SET) \
	        --prototypes $(TRIAL)/prototypes.npz --out $(TRIAL)/$$method && \
	    $(BIN)/python evaluate.py retrieval --checkpoint $(TRIAL)/$$method --protocol $(TRIAL_PROTOCOL) $(TRIAL_SET) \
	        --json $(TRIAL_RESULTS)/$$method.json && \
	    $(BIN)/python -m experiments.figures training --run $(TRIAL)/$$method --out $(TRIAL_RESULTS)/$$method.png && \
	    cp $(TRIAL)/$$method/log.jsonl $(TRIAL_RESULTS)/$$method.jsonl || exit 1; \
	done
	$(BIN)/python -m experiments.tables show $(foreach method,$(TRIAL_METHODS),$(TRIAL_RESULTS)/$(method).json)

# All rows, about 5 minutes on 2 cores. VIDEOS=DIR reads real films in place of generated ones.
MACHINE ?= $(shell uname -m)_$(shell nproc)_cores
bench: build
	$(BIN)/python -m experiments.bench --json results/$(MACHINE).json $(if $(VIDEOS),--videos $(VIDEOS))

lint: $(VENV)/installed
	$(BIN)/ruff check .

clean:
	rm -rf build demo trial *.so
