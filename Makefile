# What the README's commands call. Needs a Rust toolchain, a C compiler, make and python3 with pip; nothing else.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

.PHONY: help build demo test lint deny bench bench-model bench-train bench-projector bench-placement bench-overhead check-reference sim

help:
	@echo "make demo   build, bring two models, run a whole cluster on this machine, write a report"
	@echo "make test   every gate, then every test"
	@echo "make lint   every gate: format, clippy, rustdoc, the parts that must build alone, licences"
	@echo "make build  the three programs, in $(RELEASE)"
	@echo "make bench  every benchmark: bench-model, bench-train, bench-projector, bench-placement, bench-overhead"
	@echo "make sim    10,000 seeds of faults against the scheduler, then a million shards on 10,000 devices"
	@echo "make check-reference  every K, V and logit of two models against transformers' (minutes, 7 GB)"

# One program a command: the agent is built without ML in it, and stays so.
build:
	$(CARGO) build --release --locked -p coordinator --bin bonepile
	$(CARGO) build --release --locked -p worker --bin bonepile-worker --no-default-features --features agent
	$(CARGO) build --release --locked -p worker --bin bonepile-executor --no-default-features --features executor

demo: build
	$(RELEASE)/bonepile models pull --all
	$(RELEASE)/bonepile demo

# Documentation is for who changes the code: private items are in it, so links to them hold.
lint: deny
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --workspace --no-deps --document-private-items --locked
	$(CARGO) check -p coordinator --no-default-features --locked
	$(CARGO) check -p worker --no-default-features --features agent --locked

deny:
	@if $(CARGO) deny --version >/dev/null 2>&1; then \
		$(CARGO) deny --locked --all-features check bans licenses sources; \
	else \
		echo "skipped: cargo-deny is not installed, so licences and sources of dependencies are not checked"; \
	fi

# Everything is built with the workspace's features, so that nothing is built twice; the end-to-end tests start the programs
# themselves, and the models that some tests need are brought by the one built here: tests never download.
test: lint
	$(CARGO) build --workspace --bins --locked
	$(TARGET)/debug/bonepile models pull --all
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		echo $(CARGO) nextest run --workspace --locked; \
		$(CARGO) nextest run --workspace --locked; \
	else \
		echo $(CARGO) test --workspace --lib --bins --tests --locked; \
		$(CARGO) test --workspace --lib --bins --tests --locked; \
	fi
	$(CARGO) test --workspace --doc --locked

bench: bench-model bench-train bench-projector bench-placement bench-overhead

# Speed and memory of the models beside llama.cpp, which comes from a package the first time.

bench-model:
	$(CARGO) build --release --locked -p worker --bin bonepile-executor --no-default-features --features executor
	python3 tests/bench/model.py $(RELEASE)/bonepile-executor

# Steps of training beside PyTorch, which comes from packages the first time; then a training split over two boxes and one over four
# unequal replicas, behind shaped links in network namespaces, which need root.
bench-train: build
	python3 tests/bench/train.py $(RELEASE)/bonepile-executor
	python3 tests/bench/rounds.py $(RELEASE)

# What projectors between the two models carry, both directions, with every control; more than half an hour on two cores.
bench-projector:
	$(CARGO) build --release --locked -p worker --bin bonepile-executor --no-default-features --features executor
	python3 tests/bench/projector.py $(RELEASE)/bonepile-executor

# A published table of measured throughputs, three mixes of cards, 20 seeds: pure computation, the same on every machine.
bench-placement:
	$(CARGO) bench --locked -p coordinator --no-default-features --bench placement

# What a shard costs the coordinator and the worker, beside HyperQueue, which comes from a package the first time.
bench-overhead:
	$(CARGO) build --release --locked -p coordinator --bin bonepile
	$(CARGO) build --release --locked -p worker --bin bonepile-worker --no-default-features --features agent
	$(CARGO) build --release --locked -p worker --bin bonepile-executor --no-default-features --features executor
	python3 tests/bench/overhead.py $(RELEASE)

# Full tensors are made once, below the user's cache; transformers comes from a package the first time.
check-reference:
	python3 tests/reference/check.py $(CARGO)

# Stops at the first seed in which an invariant does not hold, prints the command that plays it again, and keeps the seed.
SIM_SEEDS ?= 10000
SIM_SHARDS ?= 1000000
SIM_DEVICES ?= 10000

sim:
	$(CARGO) build --release --locked -p coordinator --bin bonepile
	$(RELEASE)/bonepile sim --seeds $(SIM_SEEDS) --keep tests/seeds/scheduler.txt
	$(RELEASE)/bonepile sim --shards $(SIM_SHARDS) --devices $(SIM_DEVICES)
