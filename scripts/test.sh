#!/usr/bin/env bash
# Runs the test suite in the checkout's own environment; needs no model hub. Arguments go to pytest:
#
#     bash scripts/test.sh [tests/recipes -k collator ...]
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev demo
export HF_HUB_OFFLINE=1

exec python -m pytest -q "$@"
