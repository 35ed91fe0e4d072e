#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU, in one command:
#
#   benchmarks/gpu.sh          build in place, CUDA tests, compute-sanitizer, benchmarks; no network
#
# First says all that is missing of what it needs. Where there is no network: on another machine
# `pip install --target DIR PACKAGES`, then here PYTHONPATH=DIR benchmarks/gpu.sh.
#   PYTHON  interpreter (default: python3)
#   OUT     folder of the results (default: benchmarks/results)
#   QUICK=1 small benchmarks
# Without a build it ends at once. Of the other steps all run; those that failed are listed at the end, and it exits 1.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
# The files with tests marked gpu, so that what the other files import need not be there.
tests=(tests/test_{cuda,cuda_updates,determinism,doctor,functional,gather,monitor_cuda,ops,optimizer_stats,recorder,reference,stats}.py)
mkdir -p "$out"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

failed=()
step() { printf '\n== %s\n' "$*"; }
# Runs a command as a step; that it failed is remembered for the end.
try() {
  local name=$1
  shift
  step "$name"
  "$@" || { failed+=("$name") && printf 'gpu.sh: %s failed\n' "$name" >&2; }
}

step needs
"$python" - <<'PY'
import shutil, sys
from importlib.metadata import PackageNotFoundError, version

# Distributions, with the oldest version where it matters. expecttest is for torch.library.opcheck, rich for tables.
needs = {
    "torch": (2, 11), "setuptools": (77,), "pybind11": (2, 13), "ninja": (), "numpy": (), "rich": (),
    "pytest": (), "hypothesis": (), "expecttest": (),
}
missing = []
for name, oldest in needs.items():
    wanted = name + (">=" + ".".join(map(str, oldest)) if oldest else "")
    try:
        found = version(name)
    except PackageNotFoundError:
        missing.append(f"{wanted}: not installed")
        continue
    print(f"{name} {found}")
    if oldest and tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit()) < oldest:
        missing.append(f"{wanted}: {found} is installed")
if not shutil.which("nvcc"):
    missing.append("nvcc: not on PATH nor in CUDA_HOME")
if missing:
    sys.exit(f"gpu.sh: missing for {sys.executable}:\n  " + "\n  ".join(missing))
PY
command -v compute-sanitizer > /dev/null || echo "compute-sanitizer: not on PATH nor in CUDA_HOME; its steps will fail"
nvcc --version | tail -n 2

step machine
"$python" - "$out/gpu_machine.json" <<'PY'
import json, platform, shutil, subprocess, sys
import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA device")
p = torch.cuda.get_device_properties(0)
driver = None
if shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None
facts = {
    "device": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory_gib": round(p.total_memory / 2**30, 1), "l2_mib": round(p.L2_cache_size / 2**20, 1),
    "driver": driver, "torch": torch.__version__, "cuda_of_torch": torch.version.cuda,
    "python": platform.python_version(),
}
with open(sys.argv[1], "w") as file:
    json.dump(facts, file, indent=2)
print(json.dumps(facts, indent=2))
PY

step build
SECONDS=0
FASTFS_CUDA=1 "$python" setup.py build_ext --inplace
echo "built in $SECONDS s"

run_tests() {
  FASTFS_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu "${tests[@]}" -p no:cacheprovider --junitxml "$out/gpu_tests.xml"
}
try tests run_tests

# Without torch's cache every tensor is an allocation of its own, with edges that memcheck sees.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" compute-sanitizer --tool "$@" \
    --report-api-errors no "$python" benchmarks/gpu_sanitize.py 2>&1 | tee "$out/gpu_$1.txt"
}
# What torch's kernels wrote is initialised, so initcheck has to see them all; but only findings in ours count.
initcheck() {
  sanitize initcheck --show-backtrace device --print-limit 1000000 || return
  grep -q 'all calls done' "$out/gpu_initcheck.txt" || return
  ! grep -n 'segment_sums\|_rows_kernel' "$out/gpu_initcheck.txt"
}
for tool in memcheck racecheck synccheck; do
  try "$tool" sanitize "$tool" --kernel-name kernel_substring=fastfs --error-exitcode 9
done
try initcheck initcheck

quick=()
[[ ${QUICK:-0} == 1 ]] && quick=(--quick)
try benchmarks "$python" -m benchmarks.feature_stats --device cuda --json "$out/gpu_feature_stats.json" "${quick[@]}"
try "benchmark of rows" "$python" -m benchmarks.gather_rows --device cuda --json "$out/gpu_gather_rows.json" "${quick[@]}"
try updates "$python" -m benchmarks.updates --device cuda --json "$out/gpu_updates.json" "${quick[@]}"
try "benchmark of the monitor" "$python" -m benchmarks.monitor --device cuda --json "$out/gpu_monitor.json" "${quick[@]}"

step "results in $out"
if ((${#failed[@]})); then
  printf 'gpu.sh: failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
echo "all steps passed"
