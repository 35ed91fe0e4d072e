#!/usr/bin/env bash
# Everything about the CUDA kernels that needs a GPU; no network.
#
#   benchmarks/gpu.sh            all steps
#   benchmarks/gpu.sh STEP...    some of them; needs, machine and build always come first
#
# First says all that is missing of what the steps need; those that lack something fail, the others run. Without a build
# it ends at once. Steps that failed are listed at the end, and it exits 1.
#   PYTHON  interpreter (default: python3)
#   OUT     folder of the results (default: benchmarks/results): gpu.json (all figures), gpu_tests.xml,
#           gpu_training_tests.xml, gpu_sanitizer.txt. Figures of several calls: python -m benchmarks.gpu.collect
#   PARTS   folder of what a step has written so far (default: build/gpu), should it be killed
#   QUICK=1 small benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."

steps=(
  tests training_tests memcheck racecheck synccheck initcheck
  kernels lists rows updates tuning cost monitor monitor_compiled timeline demo
)
# The files with tests marked gpu, so that what the other files import need not be there.
tests=(
  tests/cuda/test_{cuda,cuda_grids,cuda_memory,cuda_streams,cuda_updates,theory_cuda}.py
  tests/core/test_{determinism,functional,gather,gather_op,measurements,ops,optimizer_stats,reference,stats}.py
  tests/cli/test_doctor.py tests/record/test_recorder.py
)
training_tests=(
  tests/reproduce/test_demo.py tests/monitor/test_combinations.py tests/cuda/test_monitor_cuda.py
)
# Warnings of other packages are not ours to mend: nothing is pinned here.
pytest=(-m pytest -q -m gpu -p no:cacheprovider --durations=15 -W default::DeprecationWarning -W default::FutureWarning
  -W "ignore:Attempting to run cuBLAS, but there was no current CUDA context")

python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
parts=${PARTS:-build/gpu}
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"

wanted=()
for name in "$@"; do
  case " needs machine build ${steps[*]} " in
  *" $name "*) ;;
  *)
    echo "gpu.sh: unknown step $name; steps: needs machine build ${steps[*]}" >&2
    exit 2
    ;;
  esac
  [[ " needs machine build " == *" $name "* ]] || wanted+=("$name")
done
(($#)) || wanted=("${steps[@]}")

title() { printf '\n== %s\n' "$*"; }
ends_with() { [[ ${asked[*]} == "$1" ]]; }
asked=("$@")

title needs
lacking=$("$python" benchmarks/gpu/needs.py "${wanted[@]}")
ends_with needs && exit 0

title machine
mkdir -p "$out" "$parts"
"$python" -m benchmarks.gpu.collect "$out/gpu.json"
ends_with machine && exit 0

title build
# What the core is made of. Compiled again only where that has changed, or the core does not load.
made_of() {
  find csrc build_backend setup.py -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum
  "$python" -VV
  nvcc --version
}
loads() { "$python" -c 'import sys; from fastfs._core import ops; sys.exit(not (ops.native_available() and ops.build_info()["cuda"]))'; }
if [[ $(made_of) == "$(cat "$parts/made_of" 2> /dev/null)" ]] && loads; then
  echo "nothing has changed"
else
  SECONDS=0
  FASTFS_CUDA=1 "$python" setup.py build_ext --inplace
  made_of > "$parts/made_of"
  echo "built in $SECONDS s"
fi

quick=()
[[ ${QUICK:-0} == 1 ]] && quick=(--quick)

# Without torch's cache every tensor is an allocation of its own, with edges that memcheck sees.
sanitize() {
  local tool=$1 status=0
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" compute-sanitizer --tool "$@" \
    --report-api-errors no "$python" benchmarks/gpu/sanitize.py > "$parts/$tool.txt" 2>&1 || status=$?
  # The first findings, and the end; initcheck says much about the kernels of others.
  {
    echo "== $tool, exit status $status"
    grep -m 200 'segment_sums\|_rows_kernel' "$parts/$tool.txt"
    tail -n 40 "$parts/$tool.txt"
  } | tee -a "$out/gpu_sanitizer.txt"
  return "$status"
}
# What torch's kernels wrote is initialised, so initcheck has to see them all; but only findings in ours count.
initcheck() {
  sanitize initcheck --show-backtrace device --print-limit 1000000 || return
  grep -q 'all calls done' "$parts/initcheck.txt" || return
  ! grep -q 'segment_sums\|_rows_kernel' "$parts/initcheck.txt"
}

# A benchmark, and its figures into the one file, which so has those of the steps before should this one be cut off.
measure() {
  local name=$1 status=0
  shift
  rm -f "$parts/$name.json"
  "$python" -m "$@" --json "$parts/$name.json" || status=$?
  keep "$name" && return "$status"
}
keep() {
  [[ -e $parts/$1.json ]] && "$python" -m benchmarks.gpu.collect "$out/gpu.json" "$parts/$1.json" > /dev/null
}

fastfs() { "$python" -c 'from fastfs._cli.app import app; app()' "$@"; }
demo() {
  local status=0
  rm -rf "$parts/demo" "$parts/demo.json"
  fastfs demo --device cuda --out "$parts/demo" || status=$?
  [[ ! -e $parts/demo/summary.json ]] || cp "$parts/demo/summary.json" "$parts/demo.json"
  keep demo && return "$status"
}

run() {
  case $1 in
  tests) FASTFS_REQUIRE_GPU=1 "$python" "${pytest[@]}" --junitxml "$out/gpu_tests.xml" "${tests[@]}" ;;
  training_tests)
    FASTFS_REQUIRE_GPU=1 "$python" "${pytest[@]}" --junitxml "$out/gpu_training_tests.xml" "${training_tests[@]}"
    ;;
  initcheck | demo) "$1" ;;
  memcheck | racecheck | synccheck) sanitize "$1" --kernel-name kernel_substring=fastfs --error-exitcode 9 ;;
  kernels) measure "$1" benchmarks.ops.feature_stats --device cuda --only overhead,ladder --compile-seconds 300 "${quick[@]}" ;;
  lists)
    measure "$1" benchmarks.ops.feature_stats --device cuda --only lists,rows,transformers --compile-seconds 300 "${quick[@]}"
    ;;
  rows) measure "$1" benchmarks.ops.gather_rows --device cuda "${quick[@]}" ;;
  updates) measure "$1" benchmarks.ops.optimizer_stats --device cuda "${quick[@]}" ;;
  tuning) measure "$1" benchmarks.tuning "${quick[@]}" ;;
  cost) measure "$1" benchmarks.ops.call_cost --device cuda ;;
  monitor) measure "$1" benchmarks.monitor --device cuda "${quick[@]}" ;;
  monitor_compiled) measure "$1" benchmarks.monitor --device cuda --compile "${quick[@]}" ;;
  timeline) measure "$1" benchmarks.monitor.timeline --device cuda "${quick[@]}" ;;
  esac
}

failed=()
[[ " ${wanted[*]} " == *check\ * ]] && rm -f "$out/gpu_sanitizer.txt"
for name in "${wanted[@]}"; do
  title "$name"
  SECONDS=0
  if [[ $'\n'$lacking$'\n' == *$'\n'$name$'\n'* ]]; then
    echo "gpu.sh: $name lacks what needs has named" >&2
    failed+=("$name")
  elif ! run "$name"; then
    printf 'gpu.sh: %s failed\n' "$name" >&2
    failed+=("$name")
  fi
  echo "$name: $SECONDS s"
done

title "results in $out"
if ((${#failed[@]})); then
  printf 'gpu.sh: failed: %s\n' "${failed[*]}" >&2
  exit 1
fi
echo "all steps passed"
