#!/usr/bin/env bash
# The GPU lane: the Triton kernels' tests on real GPU tensors, then their benchmark. Arguments go to the benchmark:
#
#     bash scripts/test_gpu.sh [--tokens 2048 --output outputs/bench_kernels.json ...]
#
# Without a GPU it says so and ends well.
set -euo pipefail

# the kernel driver of AMD GPUs has this device
if ! nvidia-smi --list-gpus >/dev/null 2>&1 && [[ ! -e /dev/kfd ]]; then
    echo "no GPU found: nothing was run"
    exit 0
fi

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" dev demo
export HF_HUB_OFFLINE=1 TOKENSEEK_GPU=1
unset TRITON_INTERPRET

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    setup_fail "there is a GPU, but torch $(python -c 'import torch; print(torch.__version__)') cannot use it." \
        "Install the torch build for it into .venv (AMD: the ROCm build) and try again."
fi

python -m pytest -q tests/interpreter
python -m pytest -q tests/lemo/test_offload.py
python scripts/bench_kernels.py "$@"
