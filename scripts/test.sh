#!/usr/bin/env bash
# Runs the tests in the checkout's own environment; needs neither a model hub nor a GPU. Four lanes, one after the other:
#
#     suite         all tests but those of the Triton kernels
#     interpreter   the Triton kernels' tests on the CPU: Triton's interpreter needs a process of its own
#     compile       scripts/check_kernels.py: every kernel that changed for every GPU target, with its limits and budgets
#     oldest        scripts/test_oldest.sh: the core tests with the oldest versions of the libraries that are admitted
#
#     bash scripts/test.sh                                   all lanes
#     bash scripts/test.sh tests/recipes -k collator         the suite only; arguments go to pytest
#     bash scripts/test.sh --lane interpreter -k attention   one lane; arguments go to its command
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev demo
# one test process a core, each with one thread: the tests' tensors are tiny
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

lane=all
if [[ ${1:-} == --lane ]]; then
    lane=${2:-}
    [[ $lane =~ ^(suite|interpreter|compile|oldest)$ ]] || setup_fail "--lane takes suite, interpreter, compile or oldest."
    shift 2
elif (($#)); then
    lane=suite
elif ! python -c 'import triton' 2>/dev/null; then
    lane=suite
    echo "[test] Triton has no package for this system: only the suite is run"
fi

failed=""
run_lane() {
    local name=$1
    shift
    if [[ $lane == all || $lane == "$name" ]]; then
        echo "[test] lane $name"
        "$@" || failed="$failed $name"
    fi
}

run_lane suite python -m pytest -q -n auto "$@"
run_lane interpreter env TRITON_INTERPRET=1 python -m pytest -q -n auto tests/interpreter "$@"
run_lane compile python scripts/check_kernels.py --changed "$@"
run_lane oldest bash scripts/test_oldest.sh "$@"

if [[ -n $failed ]]; then
    echo "[test] failed:$failed"
    exit 1
fi
