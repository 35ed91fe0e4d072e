#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU, in one command:
#
#   benchmarks/gpu.sh          build in place, CUDA tests, compute-sanitizer, benchmarks; no network
#
# Needs python with torch (CUDA), numpy, pytest, hypothesis, setuptools, pybind11 and ninja; nvcc; compute-sanitizer.
#   PYTHON  interpreter (default: python3)
#   OUT     folder of the results (default: benchmarks/results)
#   QUICK=1 small benchmarks
# Ends with the first step that fails, and its exit code.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

step() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'gpu.sh: %s\n' "$*" >&2
  exit 1
}

step machine
"$python" - "$out/gpu_machine.json" <<'PY'
import json, platform, subprocess, sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA device")
p = torch.cuda.get_device_properties(0)
query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
facts = {
    "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": round(p.L2_cache_size / 2**20, 1),
    "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
    "torch": torch.__version__, "cuda_of_torch": torch.version.cuda, "python": platform.python_version(),
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, indent=2)
print(json.dumps(facts, indent=2))
PY

step build
command -v nvcc > /dev/null || fail "no nvcc: set CUDA_HOME or PATH"
nvcc --version | tail -n 2
SECONDS=0
FASTFS_CUDA=1 "$python" setup.py build_ext --inplace
echo "built in $SECONDS s"

step tests
FASTFS_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu tests -p no:cacheprovider --junitxml "$out/gpu_tests.xml"

step compute-sanitizer
command -v compute-sanitizer > /dev/null || fail "no compute-sanitizer on PATH"
# Without torch's cache every tensor is an allocation of its own, with edges that memcheck sees.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  echo "-- $tool"
  only=(--kernel-name kernel_substring=segment_sums)
  # What torch's kernels wrote is initialised: initcheck has to see them all.
  [[ $tool == initcheck ]] && only=()
  PYTHONPATH=. compute-sanitizer --tool "$tool" "${only[@]}" --report-api-errors no --error-exitcode 9 \
    "$python" benchmarks/gpu_sanitize.py | tee "$out/gpu_$tool.txt"
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING

step benchmarks
quick=()
[[ ${QUICK:-0} == 1 ]] && quick=(--quick)
"$python" -m benchmarks.feature_stats --device cuda --json "$out/gpu_feature_stats.json" "${quick[@]}"

step "done: results in $out"
