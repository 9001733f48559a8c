#!/usr/bin/env bash
# Everything that needs a GPU, in one command under nine minutes. Needs nothing outside the
# repository; results land in bench/results/gpu_check-<device>.json, row by row.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench gpu_check "$@"
