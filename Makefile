# The user's verbs. `make help` lists them. TOPOLOGY chooses the inventory: ansible/inventories/$(TOPOLOGY).
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

export TOPOLOGY ?= single
INVENTORY ?= $(or $(CLICKSTREAM_INVENTORY),ansible/inventories/$(TOPOLOGY))
export ANSIBLE_CONFIG := $(CURDIR)/ansible/ansible.cfg
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PLATFORM := ansible/scripts/platform --inventory $(INVENTORY)
# The control environment; a stamp of its lock tells whether it is current.
VENV := .venv/.stamp
TEST_VENV := .cache/test-venv/.stamp
SCAN_VENV := .cache/scan-venv/.stamp
AIRFLOW_VENV := .cache/airflow-venv/.stamp
TEST_JARS := .cache/test-jars
KAFKA_JARS := .cache/kafka-jars
PACKAGE_TESTS = cd pipeline && CLICKSTREAM_TEST_JARS=$(CURDIR)/$(TEST_JARS) \
  CLICKSTREAM_TEST_KAFKA_JARS=$(CURDIR)/$(KAFKA_JARS) ../.cache/test-venv/bin/python -m pytest -q
ARGS ?=
# Processes of the package's tests, each with a Spark session of its own; 0 is one, which is pytest itself.
WORKERS ?= 2
comma := ,

##@ Run
.PHONY: up
up: ## From a fresh clone to rows in Gold; again: bring everything to what the files say
	@ansible/scripts/up

.PHONY: status
status: $(VENV) ## State, version, memory and health of every service; fails when one is unhealthy
	@$(PLATFORM) status

.PHONY: urls
urls: $(VENV) ## Addresses and logins
	@$(PLATFORM) urls

.PHONY: produce
produce: $(VENV) ## Send 300 events in a minute beside the running shop; ARGS="--rate 50 --duration 10"
	@$(PLATFORM) run pipeline -- ecom-producer $(ARGS)

.PHONY: gold
gold: $(VENV) ## The newest minutes of the product funnel, from the mart
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream show

.PHONY: topics
topics: $(VENV) ## Topics with partitions, copies and end offsets
	@$(PLATFORM) run kafka -- kafka-topics --bootstrap-server localhost:9092 --describe --exclude-internal
	@$(PLATFORM) run kafka -- kafka-get-offsets --bootstrap-server localhost:9092 --topic ecom_clickstream_raw

.PHONY: consume
consume: $(VENV) ## The first ten events of the topic
	@$(PLATFORM) run kafka -- kafka-console-consumer --bootstrap-server localhost:9092 --topic ecom_clickstream_raw --from-beginning --max-messages 10

.PHONY: lag
lag: $(VENV) ## How far each stream is behind the topic
	@$(PLATFORM) run kafka -- kafka-consumer-groups --bootstrap-server localhost:9092 --describe --all-groups

.PHONY: account
account: $(VENV) ## Account for every offset: classify what deduplication dropped, print the ledger
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream account

.PHONY: recompute
recompute: $(VENV) ## Compute Gold again, report and repair what differs: ARGS="--from 2025-11-29T00:00Z --to 2025-11-30T00:00Z"
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream recompute $(ARGS)

.PHONY: backfill
backfill: $(VENV) ## Judge records again by another version of the rules: ARGS="--ruleset 2 --dry-run"; ARGS=--rollback takes it back
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream backfill $(ARGS)

.PHONY: alerts
alerts: $(VENV) ## Products with high interest and low conversion, from the minutes that became final since the last run
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream alerts $(ARGS)

.PHONY: quality
quality: $(VENV) ## Freshness, holes, nulls, rejects and volume against their history; fails when a check does
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream quality $(ARGS)

.PHONY: report
report: $(VENV) ## The report of yesterday, and all that are there, into reports/: ARGS="--date 2025-11-29"
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream report $(ARGS) >/dev/null
	@mkdir -p reports
	@$(PLATFORM) run pipeline -- sudo sh -c '. /etc/clickstream/clickstream.env; tar -C "$$CLICKSTREAM_REPORT_DIR" -cf - .' | tar -C reports --no-same-permissions -xf -
	@echo "reports/index.html lists the days"

.PHONY: latency
latency: $(VENV) ## Seconds from an event's timestamp to its count in the mart, over a minute
	@$(PLATFORM) run pipeline -- sudo -u pipeline clickstream latency $(ARGS)

.PHONY: logs
logs: $(VENV) ## The journal of a service: SERVICE=kafka, ARGS=-f to follow
	@test -n "$(SERVICE)" || { echo "Which service? make logs SERVICE=kafka; 'make status' lists them." >&2; exit 2; }
	@$(PLATFORM) logs $(SERVICE) $(ARGS)

.PHONY: ssh
ssh: $(VENV) ## A shell on a node: NODE=name, else the first
	@$(PLATFORM) ssh $(NODE)

.PHONY: restart
restart: $(VENV) ## Restart a service node by node, healthy before the next: SERVICE=kafka; without it all, in order
	@$(PLATFORM) restart $(SERVICE)

.PHONY: down
down: ## Stop the guests; the data stays and `make up` starts them again
	@vagrant halt

.PHONY: destroy
destroy: ## Remove the guests with their data
	@vagrant destroy --force

##@ Cloud
CLOUD = $(if $(ENV),,$(error Which environment? make $@ ENV=dev, or prod))ansible/scripts/cloud
.PHONY: cloud-plan
cloud-plan: $(VENV) ## What Terraform would make in the cloud: ENV=dev
	@$(CLOUD) plan $(ENV)

.PHONY: cloud-up
cloud-up: $(VENV) ## Make the machines, write the inventory, install everything, ask every service: ENV=dev
	@$(CLOUD) up $(ENV) $(ARGS)

.PHONY: cloud-status
cloud-status: $(VENV) ## What is there, its cost by the month, tunnels to the pages, every service's health: ENV=dev
	@$(CLOUD) status $(ENV)

.PHONY: cloud-down
cloud-down: $(VENV) ## Remove it; refuses while the lake holds data, unless LAKE=keep or LAKE=delete: ENV=dev
	@$(CLOUD) down $(ENV) $(if $(LAKE),--lake $(LAKE)) $(ARGS)

##@ Test
.PHONY: test
test: ## Everything: lint, unit, one scenario a role, end to end; prints the time of each stage
	@ansible/scripts/test-all

.PHONY: lint
lint: $(VENV) ## Python, shell, YAML, Ansible and the repository's own rules
	ruff check .
	ruff format --check .
	@$(MAKE) --jobs=2 --output-sync .lint-files .lint-repository

# Apart, because each takes one core for a minute.
.PHONY: .lint-files .lint-repository
.lint-files: $(VENV)
	mypy
	shellcheck $$(grep -lrE '^#!(/bin/sh|/usr/bin/env bash)' .ci ansible/scripts)
	yamllint --strict .
	ansible-lint --offline

.lint-repository: $(VENV)
	pytest -q tests/repo

.PHONY: unit
unit: $(VENV) $(TEST_VENV) $(TEST_JARS).stamp $(AIRFLOW_VENV) ## The package, on local Spark, a private PostgreSQL and a stand-in for S3; the DAGs; the Ansible modules
	pytest -q tests/unit tests/dags
	$(PACKAGE_TESTS) -n $(WORKERS) --durations=12 -m "not crash"

.PHONY: terraform
terraform: $(VENV) $(TEST_VENV) $(SCAN_VENV) ## Terraform's modules, an environment's life on a stand-in for AWS, its inventory on guests, a policy scan
	@ansible/scripts/prepare-host guests
	.cache/test-venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=8 tests/terraform $(ARGS)

.PHONY: crash
crash: $(VENV) $(TEST_VENV) $(TEST_JARS).stamp $(KAFKA_JARS).stamp ## Kill the streams at random points, then count everything again: ARGS="--kills 30 --seed 7"
	$(PACKAGE_TESTS) -s tests/test_crash.py $(or $(ARGS),--kills 30)

.PHONY: bench
bench: $(VENV) $(TEST_VENV) $(TEST_JARS).stamp $(KAFKA_JARS).stamp ## Rates and ratios of producers, streams and batch layer: ARGS="--only silver --repeat 5"
	cd pipeline && CLICKSTREAM_TEST_JARS=$(CURDIR)/$(TEST_JARS) CLICKSTREAM_TEST_KAFKA_JARS=$(CURDIR)/$(KAFKA_JARS) \
	  PYTHONPATH=src ../.cache/test-venv/bin/python tests/bench.py $(ARGS)

.PHONY: days
days: $(VENV) $(TEST_VENV) $(TEST_JARS).stamp $(KAFKA_JARS).stamp ## How many files the lake keeps, over simulated days: ARGS="--days 6"
	@dpkg -s libfaketime >/dev/null 2>&1 || $(if $(filter 0,$(shell id -u)),,sudo) apt-get -qq install -y faketime
	cd pipeline && CLICKSTREAM_TEST_JARS=$(CURDIR)/$(TEST_JARS) CLICKSTREAM_TEST_KAFKA_JARS=$(CURDIR)/$(KAFKA_JARS) \
	  PYTHONPATH=src ../.cache/test-venv/bin/python tests/days.py $(ARGS)

.PHONY: molecule
molecule: $(VENV) ## One role in a guest of its own: ROLE=kafka; without ROLE all of them
	@ansible/scripts/prepare-host guests
	@for role in $(or $(ROLE),common java zookeeper kafka postgres spark airflow pipeline); do molecule test -s $$role; done

.PHONY: e2e
e2e: $(VENV) ## The whole platform in its guest: events to Gold, reload, kill -9 of every service, bad input
	@ansible/scripts/prepare-host guests
	pytest -v --tb=short --durations=12 tests/e2e/test_platform.py

.PHONY: e2e-airflow
e2e-airflow: $(VENV) ## On a guest of its own: every DAG, each failure, a daemon killed amid a run, the page in a browser
	@ansible/scripts/prepare-host guests browser
	pytest -v --tb=short --durations=12 tests/e2e/test_airflow.py

.PHONY: prove
prove: $(VENV) ## 200,000 records with every fault, through restarts, account, recompute, backfill; takes half an hour
	@ansible/scripts/prepare-host guests
	pytest -v --tb=short -m proof tests/e2e

.PHONY: load
load: $(VENV) ## On a guest: latency at 5 to 20,000 events a second, a backlog of 2,000,000, files; takes half an hour
	@ansible/scripts/prepare-host guests
	pytest -v --tb=short -m load tests/e2e

##@ Maintain
.PHONY: deploy
deploy: $(VENV) ## Bring servers you already have to the inventory: INVENTORY=path
	@ansible-playbook -i $(INVENTORY) ansible/playbooks/site.yml $(ARGS)

.PHONY: lock
lock: $(VENV) ## Renew the artifact locks (jars and Python requirements): ARGS="kafka --upgrade"
	@ansible/scripts/prepare-host tests
	@ansible/scripts/lock $(ARGS)

.PHONY: prepare
prepare: ## Install what this machine needs for guests and tests
	@ansible/scripts/prepare-host guests tests

.PHONY: venv
venv: $(VENV) ## The control environment .venv, from its lock

.PHONY: environments
environments: $(VENV) $(TEST_VENV) $(SCAN_VENV) $(AIRFLOW_VENV) $(TEST_JARS).stamp $(KAFKA_JARS).stamp ## What all tests run in, from the locks

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV): ansible/requirements.txt
	@ansible/scripts/make-venv .venv $<
	@touch $@

$(TEST_VENV): ansible/requirements-test.txt | $(VENV)
	@ansible/scripts/prepare-host tests
	@ansible/scripts/make-venv .cache/test-venv $<
	@touch $@

$(SCAN_VENV): terraform/requirements.txt | $(VENV)
	@ansible/scripts/make-venv .cache/scan-venv $<
	@touch $@

$(AIRFLOW_VENV): roles/airflow/files/requirements.txt | $(VENV)
	@ansible/scripts/make-venv .cache/airflow-venv $<
	@touch $@

$(TEST_JARS).stamp: roles/spark/files/jars.lock
$(KAFKA_JARS).stamp: roles/kafka/files/jars.lock
$(TEST_JARS).stamp $(KAFKA_JARS).stamp: | $(VENV)
	@ansible localhost -m maven_jars -a '{"path": "$(CURDIR)/$(basename $@)", "lock": "{{ lookup(\"ansible.builtin.file\", \"$(CURDIR)/$<\") }}"$(if $(MAVEN_REPOSITORY_URL),$(comma) "repository_url": "$(MAVEN_REPOSITORY_URL)")}' 
	@touch $@
