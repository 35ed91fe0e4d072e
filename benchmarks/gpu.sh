#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU; no network.
#
#   benchmarks/gpu.sh            all steps
#   benchmarks/gpu.sh STEP...    some of them
#   benchmarks/gpu.sh short      what fits into nine minutes, in the order of its value
#   benchmarks/gpu.sh needs      what is missing; machine: and what the GPU is; build: and builds the core in place
#
# Steps that lack something are left out, and those that fail do not stop the others; the exit status is then 1. The
# results are complete up to the last finished step whenever the script is interrupted (benchmarks/gpu/).
#   PYTHON   interpreter (default: python3)
#   OUT      folder of gpu.json, which has the status, failing tests and figures of every step (default:
#            benchmarks/results). Results of several calls: python -m benchmarks.gpu.collect
#   PARTS    folder of logs and partial results (default: build/gpu)
#   VARIANTS folder of kernels that were compiled ahead by python -m benchmarks.tuning --build-only (default:
#            build/variants, if it is there)
#   LIMIT    seconds for `short` (default: 540)
#   QUICK=1  small benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
