#!/usr/bin/env bash
# Runs the core tests with the oldest versions that setup.cfg admits, in an environment of their own (.venv-oldest).
# The suite runs with the newest ones; together they are what the ranges promise.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-oldest
constraints=(--constraint scripts/constraints-cpu.txt --constraint scripts/constraints-oldest.txt)
ready=$venv/.ready-$(cat setup.cfg scripts/constraints-*.txt | cksum | tr ' ' -)
if [[ ! -e $ready ]]; then
    source scripts/setup_checks.sh
    setup_make_venv "$PWD/$venv" 3
    setup_say "installing the oldest versions into $venv: once, a minute or two"
    setup_pip "$venv" "the oldest versions of hf_tokenseek's dependencies" --editable ".[trl,peft]" "${constraints[@]}" \
        hypothesis psutil pytest pytest-xdist
    touch "$ready"
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
core=(tests/{callbacks,ist,lean,lemo,peft,sft} tests/test_{arguments,model_card,trainer,trainer_runs,training_options}.py)
# the newest families are younger than the oldest transformers
core+=(--ignore tests/lemo/test_families.py)
exec "$venv/bin/python" -m pytest -q -n auto "${core[@]}" "$@"
