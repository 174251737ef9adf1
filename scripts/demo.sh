#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M plainly and with TokenSeek on the same data, and compares the two (outputs/demo/).
#
#     bash scripts/demo.sh
#
# Takes under 5 minutes on two cores once the environment stands; needs no model hub.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" demo
export HF_HUB_OFFLINE=1

exec python -m recipes.demo
