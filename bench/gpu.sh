#!/usr/bin/env bash
# Build, check and time everything that needs a GPU: bash bench/gpu.sh [JSON file]
# Needs torch and triton, uses flashinfer and compute-sanitizer where they are; not SGLang, and nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
report=${1:-kernels.json}

# The package `sglang_relay_kernels` is the folder `kernels` under another name (setup.py).
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
ln -s "$PWD/kernels" "$packages/sglang_relay_kernels"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm --format=csv 2>/dev/null || true
timeout 360 "$python" bench/kernels.py --json "$report"
if command -v compute-sanitizer >/dev/null; then
  # PyTorch's caching allocator would hide an access past the end of a tensor inside its block.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" bench/kernels.py --check-only
else
  echo "compute-sanitizer is not here: no memory check was made"
fi
