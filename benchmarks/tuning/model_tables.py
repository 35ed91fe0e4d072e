"""The tables of docs/kernels.md that come from the model of the kernel: beside what was measured, and predictions.

    python -m benchmarks.tuning.model_tables

The constants of the model were fitted to the cells of the first table. The predictions use the same constants: other
GPUs differ in their number of multiprocessors and in their bandwidth alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tuning.architectures import ARCHITECTURES
from benchmarks.tuning.catalogue import BASELINE, variant
from benchmarks.tuning.model import FORMER, PRESENT, Constants, Design, Gpu, simulate

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Variants of the former kernel: elements of a chunk, and blocks of the grid for each one that is resident.
VARIANTS = {
    "baseline": (8192, 1),
    "grid of 4 waves": (8192, 4),
    "chunk 16384, 4 waves": (16384, 4),
    "chunk 16384, 16 waves": (16384, 16),
    "chunk 32768": (32768, 1),
    "chunk 32768, 4 waves": (32768, 4),
    "chunk 32768, 32 waves": (32768, 32),
    "chunk 65536": (65536, 1),
    "chunk 65536, 4 waves": (65536, 4),
}
MANY = "1000 x 64K elements"
WORKLOADS = {"32 MiB": 2**25, "256 MiB": 2**28, "1 GiB": 2**30, MANY: 0}  # bytes of one layer
ITEMSIZES = {"bf16": 2, "f32": 4, "f16": 2}
INPUTS = 3
CAPACITY = 681  # layers of a table of 32 KB
# The streaming read of an H100: microseconds = launch + bytes / rate, and the share of the nominal bandwidth that this
# rate is. Fitted to the reads of 32 MiB, 256 MiB and 1 GiB.
READ_LAUNCH, SHARE = 4.0, 0.946
READ_LAUNCHES = 14.0  # of the five launches for many layers: an input takes an entry of its own


@dataclass(frozen=True)
class Fit:
    """The constants of the model that are fitted, in microseconds.

    `launch` is what a launch takes beside its blocks, `large_launch` the same with a table of 32 KB. `rate` is what
    remains of the rate of a streaming read where there is arithmetic between loads. `stream` depends on the dtype.
    """

    launch: float
    large_launch: float
    rate: float
    trip: float
    between: float
    reduction: float
    unevenness: float
    stream: dict[str, float]

    def constants(self, dtype: str) -> Constants:
        """For inputs of one dtype."""
        return Constants(self.trip, self.between, self.reduction, self.stream[dtype], self.unevenness)


# All constants free: the closest fit. It gives the launch less time than the read needs, and a trip more.
FREE = Fit(0.29, 5.0, 0.976, 0.63, 0.66, 0.56, 0.1, {"bf16": 0.755, "f32": 0.615, "f16": 1.04})
# The launch is that of the read, less its first loads, and not fitted.
BOUND = Fit(3.0, 7.0, 0.975, 0.47, 0.82, 0.44, 0.12, {"bf16": 0.65, "f32": 0.525, "f16": 1.06})

Cells = dict[tuple[str, str, str], float]


def measured() -> Cells:
    """Fractions of the streaming read in the same run, by dtype, workload and variant."""
    results = json.loads((RESULTS / "waves-h100.json").read_text())["results"]
    return {(r["dtype"], r["workload"], row["variant"]): row["of ceiling"] for r in results for row in r["rows"]}


def reads() -> dict[tuple[str, str], float]:
    """Microseconds of the streaming read in that run, by dtype and workload."""
    results = json.loads((RESULTS / "waves-h100.json").read_text())["results"]
    return {(r["dtype"], r["workload"]): 1e3 * row["milliseconds"] for r in results for row in r["rows"][:1]}


def gpu(architecture: str) -> Gpu:
    """A GPU with the rate of a streaming read, if that is the same share of the bandwidth as on an H100."""
    at = ARCHITECTURES[architecture]
    return Gpu(at.multiprocessors, at.gigabytes_per_second * 1e3 * SHARE)


def launches(workload: str, element: int, chunk: int) -> list[list[tuple[int, int]]]:
    """The segments of every launch; `element` has the bytes of one element of all inputs."""
    if workload != MANY:
        return [[(chunk * element, WORKLOADS[workload] // element * element)]]
    layer = (chunk * element, 2**16 * element)
    return [[layer] * CAPACITY, [layer] * (1000 - CAPACITY)]


def microseconds(workload: str, dtype: str, chunk: int, design: Design, at: Gpu, fit: Fit) -> float:
    """The time of the sums."""
    given = launches(workload, INPUTS * ITEMSIZES[dtype], chunk)
    slower = Gpu(at.multiprocessors, at.bandwidth * fit.rate)
    launch = fit.large_launch if workload == MANY else fit.launch
    return simulate(given, design, slower, fit.constants(dtype)) + launch * len(given)


def former(workload: str, dtype: str, name: str, fit: Fit = FREE) -> float:
    """A variant of the former kernel on an H100: the measured time of the read over the time that the model has."""
    chunk, waves = VARIANTS[name]
    at = gpu("90")
    design = Design(FORMER, grid=3 * at.multiprocessors * waves)
    return reads()[dtype, workload] / microseconds(workload, dtype, chunk, design, at, fit)


def issue_limit(dtype: str, architecture: str) -> float:
    """Bytes per microsecond at which the kernel would take every issue slot of the GPU."""
    results = json.loads((RESULTS / "variants-static.json").read_text())["results"]
    (share,) = (
        row["shares"]["issue"]
        for row in results
        if (row["variant"], row["dtype"], row["architecture"]) == (BASELINE, dtype, architecture)
    )
    return ARCHITECTURES[architecture].gigabytes_per_second * 1e3 / float(share)


def present(workload: str, dtype: str, architecture: str, fit: Fit) -> float:
    """The library's kernel on a GPU, relative to a streaming read."""
    at = gpu(architecture)
    limited = Gpu(at.multiprocessors, min(at.bandwidth, issue_limit(dtype, architecture)))
    element = INPUTS * ITEMSIZES[dtype]
    size = 1000 * 2**16 * element if workload == MANY else WORKLOADS[workload]
    launch = READ_LAUNCHES if workload == MANY else READ_LAUNCH
    read = reads()[dtype, workload] if architecture == "90" else size / at.bandwidth + launch
    width = 2**16 if workload == MANY else size // element
    chunk = variant(BASELINE).chunk(ITEMSIZES[dtype], width)
    return read / microseconds(workload, dtype, chunk, Design(PRESENT), limited, fit)


def residual_lines() -> list[str]:
    """Rows of the table of the former kernel: measured, and in parentheses what the model says."""
    found = measured()
    lines = []
    for dtype in ITEMSIZES:
        for name in VARIANTS:
            cells = [f"{found[dtype, w, name]:.2f} ({former(w, dtype, name):.2f})" for w in WORKLOADS]
            lines.append(f"| {dtype} | {name} | {' | '.join(cells)} |")
    return lines


def prediction_lines() -> list[str]:
    """Rows of the table of predictions."""
    lines = []
    for architecture, at in ARCHITECTURES.items():
        for dtype in ITEMSIZES:
            cells = []
            for w in WORKLOADS:
                low, high = sorted(present(w, dtype, architecture, fit) for fit in (BOUND, FREE))
                cells.append(f"{low:.2f} to {high:.2f}")
            lines.append(f"| {at.gpu} | {dtype} | {' | '.join(cells)} |")
    return lines


def spread(fit: Fit) -> float:
    """Root mean square of the relative residuals of all cells."""
    found = measured()
    errors = [former(w, d, n, fit) / found[d, w, n] - 1 for d in ITEMSIZES for w in WORKLOADS for n in VARIANTS]
    return float((sum(e * e for e in errors) / len(errors)) ** 0.5)


def measured_lines() -> list[str]:
    """Rows of the tables of what ran: a variant, and for each workload the fractions of the read in bf16, f32, f16."""
    lines = []
    for file in ("variants-h100", "waves-h100"):
        results = json.loads((RESULTS / f"{file}.json").read_text())["results"]
        timed = [r for r in results if "rows" in r]
        cells = {(x["variant"], r["workload"], r["dtype"]): x["of ceiling"] for r in timed for x in r["rows"]}
        workloads = list(dict.fromkeys(r["workload"] for r in timed))
        for name in dict.fromkeys(name for name, _, _ in cells):
            columns = []
            for w in workloads:
                columns.append(" ".join(f"{cells[name, w, d]:.2f}" for d in ITEMSIZES if (name, w, d) in cells))
            lines.append(f"| {name} | {' | '.join(columns)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(measured_lines()), "\n")
    print("\n".join(residual_lines()), f"\nspread {spread(FREE):.3f}, {spread(BOUND):.3f}\n")
    print("\n".join(prediction_lines()))
