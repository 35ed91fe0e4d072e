"""The steps of gpu.sh: the command of each, what it needs, how long it may take, and where it leaves its result."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

__all__ = [
    "BUILD",
    "DOCTOR",
    "LONG",
    "MEMORY_TESTS",
    "SHORT",
    "SHORT_SECONDS",
    "TESTS",
    "TRAINING_TESTS",
    "Step",
    "find",
]

# The files with tests marked gpu, so that what the other files import need not be there.
TESTS = (
    *(f"tests/cuda/test_{name}.py" for name in ("cuda", "cuda_grids", "cuda_streams", "cuda_updates", "theory_cuda")),
    *(
        f"tests/core/test_{name}.py"
        for name in (
            *("determinism", "functional", "gather", "gather_op", "measurements"),
            *("ops", "optimizer_stats", "pieces", "reference", "stats"),
        )
    ),
    "tests/cli/test_doctor.py",
    "tests/record/test_recorder.py",
)
TRAINING_TESTS = (
    "tests/cuda/test_cuda_sampled.py",
    "tests/cuda/test_monitor_cuda.py",
    "tests/parallel/test_one_rank.py",
    "tests/monitor/test_combinations.py",
    "tests/reproduce/test_demo.py",
)
MEMORY_TESTS = ("tests/cuda/test_cuda_memory.py",)

DEMO_NEEDS = ("typer", "rich", "matplotlib", "pandas", "scikit-learn")  # and plotly for the page, if it is there
TEST_NEEDS = ("pytest", "hypothesis", "scipy", *DEMO_NEEDS)  # and expecttest for opcheck
BENCHMARK_NEEDS = ("rich", "triton")

SHORT_SECONDS = 540.0
"""Duration of `short`, which the limits of its steps add up to."""

_HOUR = 3600.0


@dataclass(frozen=True)
class Step:
    """A step.

    Args:
        name: as on the command line and in the results.
        command: words, in which ``{python}`` and ``{parts}`` are replaced by the interpreter and the folder of parts.
            The words ``{quick}`` and ``{prebuilt}`` are replaced by options, or left out.
        limit: seconds after which it is ended.
        result: file that it writes, with placeholders: figures as JSON, or the report of pytest as XML; "" for none.
        needs: distributions that have to be installed.
        programs: programs that have to be on PATH.
        environment: environment variables, besides those of the caller.
        beside: whether it runs beside the following steps, up to the next one that runs alone.
        alone: whether it waits until no other step runs, because it measures time or fills the memory.
        judge: returns what is wrong with the output of a step with exit status 0, or None.
        keeps: which lines of the output are kept in the results, besides the last ones; "" for none.
    """

    name: str
    command: tuple[str, ...]
    limit: float = _HOUR
    result: str = ""
    needs: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False
    alone: bool = True
    judge: Callable[[str], str | None] | None = None
    keeps: str = ""


def find(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """Return the steps of these names, in the order of the names.

    Raises:
        KeyError: there is no such step.
    """
    by_name = {step.name: step for step in steps}
    return [by_name[name] for name in names]


def _figures(name: str, module: str, *options: str, limit: float = _HOUR, small: bool = True) -> Step:
    file = f"{{parts}}/{name}.json"
    command = ("{python}", "-m", module, *options, *(["{quick}"] if small else []), "--json", file)
    return Step(name, command, limit, file, needs=BENCHMARK_NEEDS)


def _fastfs(name: str, *arguments: str, limit: float = _HOUR, result: str = "", needs: Sequence[str] = ()) -> Step:
    command = ("{python}", "-c", "from fastfs._cli.app import app; app()", *arguments)
    return Step(name, command, limit, result, needs=("typer", "rich", *needs))


def _tests(
    name: str, files: Sequence[str], *, limit: float = _HOUR, parallel: bool = False, alone: bool = True
) -> Step:
    file = f"{{parts}}/{name}.xml"
    processes = ("-n", str(min(16, os.cpu_count() or 1))) if parallel and find_spec("xdist") else ()
    command = (
        *("{python}", "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "--durations=15", *processes),
        # Warnings of other packages are not ours to mend: nothing is pinned here.
        *("-W", "default::DeprecationWarning", "-W", "default::FutureWarning"),
        *("-W", "ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
        *("--junitxml", file, *files),
    )
    return Step(name, command, limit, file, needs=TEST_NEEDS, environment={"FASTFS_REQUIRE_GPU": "1"}, alone=alone)


OUR_KERNELS = "segment_sums|_rows_kernel"


def _initialized(output: str) -> str | None:
    """What torch's kernels wrote is initialized, so initcheck has to see them all; but only findings in ours count."""
    if "all calls done" not in output:
        return "not all calls were made"
    names = OUR_KERNELS.split("|")
    found = sum(any(name in line for name in names) for line in output.splitlines())
    return f"{found} lines name a kernel of fastfs" if found else None


def _sanitizer(tool: str, *, limit: float = _HOUR, beside: bool = False) -> Step:
    options = (
        ("--show-backtrace", "device", "--print-limit", "1000000")
        if tool == "initcheck"
        else ("--kernel-name", "kernel_substring=fastfs", "--error-exitcode", "9")
    )
    command = ("compute-sanitizer", "--tool", tool, *options, "--report-api-errors", "no")
    return Step(
        tool,
        (*command, "{python}", "-m", "benchmarks.gpu.sanitize"),
        limit,
        programs=("compute-sanitizer",),
        # Without torch's cache every tensor is an allocation of its own, with edges that memcheck sees.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        beside=beside,
        alone=not beside,
        judge=_initialized if tool == "initcheck" else None,
        keeps=OUR_KERNELS,
    )


BUILD = Step("build", ("{python}", "setup.py", "build_ext", "--inplace"), environment={"FASTFS_CUDA": "1"})

DOCTOR = _fastfs("doctor", "doctor", limit=15)

_FEATURES, _ON_GPU = "benchmarks.ops.feature_stats", ("--device", "cuda")
_VALUED = r"1 layer, (32 MiB|256 MiB|1 GiB)|1000 x 64K|rows of (1024|4096|16384)"

LONG = (
    DOCTOR,
    _tests("tests", TESTS),
    _tests("training_tests", TRAINING_TESTS),
    _tests("memory_tests", MEMORY_TESTS),
    *(_sanitizer(tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    _figures("kernels", _FEATURES, *_ON_GPU, "--only", "overhead,ladder", "--compile-seconds", "300"),
    _figures("lists", _FEATURES, *_ON_GPU, "--only", "lists,rows,transformers", "--compile-seconds", "300"),
    _figures("rows", "benchmarks.ops.gather_rows", *_ON_GPU),
    _figures("updates", "benchmarks.ops.optimizer_stats", *_ON_GPU),
    _figures("tuning", "benchmarks.tuning", "{prebuilt}"),
    _figures("cost", "benchmarks.ops.call_cost", *_ON_GPU, small=False),
    _figures("monitor", "benchmarks.monitor", *_ON_GPU),
    _figures("monitor_compiled", "benchmarks.monitor", *_ON_GPU, "--compile"),
    _figures("timeline", "benchmarks.monitor.timeline", *_ON_GPU),
    _fastfs("bench", "bench", *_ON_GPU, "--json", "{parts}/bench.json", result="{parts}/bench.json"),
    _fastfs(*("demo", "demo", *_ON_GPU, "--out", "{parts}/demo"), result="{parts}/demo/summary.json", needs=DEMO_NEEDS),
)
"""Everything, one step after the other."""

SHORT = (
    DOCTOR,
    *(_sanitizer(tool, limit=95, beside=True) for tool in ("memcheck", "racecheck", "synccheck")),
    _tests("tests", TESTS, limit=95, parallel=True, alone=False),
    _figures(
        *("kernels", _FEATURES, *_ON_GPU, "--only", "overhead,ladder,lists,rows", "--match", _VALUED),
        *("--rounds", "5", "--compile-seconds", "25"),
        limit=65,
    ),
    _tests("training_tests", TRAINING_TESTS, limit=110, parallel=True),
    _tests("memory_tests", MEMORY_TESTS, limit=30),
    _figures("monitor", "benchmarks.monitor", *_ON_GPU, "--rounds", "3", limit=75),
    _figures("monitor_compiled", "benchmarks.monitor", *_ON_GPU, "--compile", "--rounds", "3", limit=60),
    _figures("tuning", "benchmarks.tuning", "{prebuilt}", "--rounds", "3", limit=45),
    _fastfs(
        *("bench", "bench", *_ON_GPU, "--seconds", "30", "--json", "{parts}/bench.json"),
        limit=45,
        result="{parts}/bench.json",
    ),
)
"""What fits into nine minutes, in the order of its value.

The kernels are timed before the trainings are tested, so that three minutes have the tests of the kernels, what the
sanitizers found, and the first figures.
"""
