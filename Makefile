# The only entry. Each target makes the virtual environment first if it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test coverage interop lint format bench faults contract fuzz proto clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@echo "setting up $(VENV) (about a minute, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY) ## real traffic through a service and the collector, to invoices
	@$(BIN)/tallymark demo

lint: $(READY) ## style, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint, then every test
	$(BIN)/pytest $(ARGS)

coverage: $(READY) ## every test, and which lines none of them reached; takes about twice as long
	$(BIN)/pytest --cov --cov-report=term:skip-covered $(ARGS)

interop: $(READY) ## OpenTelemetry's clients in JavaScript, Go and Java, and its Collector: fetched, built, tried out
	$(BIN)/python -m tests.interop.build
	TALLYMARK_TEST_INTEROP=1 $(BIN)/pytest tests/interop $(ARGS)

format: $(READY) ## let ruff rewrite the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY) ## ratios of speed, as tables
	$(BIN)/python -m benchmarks $(ARGS)

RUNS ?= 1000
faults: $(READY) ## break recording processes RUNS times; SEED=… repeats a run
	$(BIN)/python -m tests.delivery.faults --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(ARGS)

contract: $(READY) ## break collectors and their database RUNS times; SEED=… repeats a run
	GRPC_VERBOSITY=ERROR $(BIN)/python -m tests.delivery.contract --runs $(RUNS) $(if $(SEED),--seed $(SEED)) $(ARGS)

INPUTS ?= 100000
fuzz: $(READY) ## send INPUTS damaged requests to decoder, database and server; SEED=… repeats a run
	GRPC_VERBOSITY=NONE $(BIN)/python -m tests.delivery.fuzz --inputs $(INPUTS) $(if $(SEED),--seed $(SEED)) $(ARGS)

proto: ## make the *_pb2 files from proto/ again (an old compiler: its output runs on protobuf 5.26 and newer)
	$(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/pip install --quiet 'grpcio-tools==1.64.3' 'setuptools<77' 'mypy-protobuf<3.7'
	PATH="$(CURDIR)/$(VENV)-proto/bin:$$PATH" $(VENV)-proto/bin/python -m grpc_tools.protoc -Iproto \
	    --python_out=collector/tallymark_collector/wire --mypy_out=collector/tallymark_collector/wire \
	    proto/tallymark_metrics_view.proto
	PATH="$(CURDIR)/$(VENV)-proto/bin:$$PATH" $(VENV)-proto/bin/python -m grpc_tools.protoc -Iproto \
	    --python_out=sdk --mypy_out=sdk --grpc_python_out=sdk --mypy_grpc_out=sdk proto/tallymark/v1/*.proto

clean: ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-proto .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
