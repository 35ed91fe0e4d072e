"""Which design of the kernel behind `feature_stats` is fastest: chunks, groups, threads, blocks, rows, loads.

    python -m benchmarks.tuning --json FILE [--quick] [--variant NAME ...]    on a GPU
    python -m benchmarks.tuning --build-only FOLDER --arch 90                 anywhere with nvcc: compiles ahead
    python -m benchmarks.tuning --static --json FILE                          anywhere with nvcc

On a GPU every variant is compiled for it (nvcc, all at once; with --prebuilt FOLDER, only those that were not compiled
ahead from the same sources), checked against float64 and, where it keeps the order of additions, against the baseline's
bits; then all are timed in turn, beside a streaming read of the same bytes. The calls take turns with several sets of
inputs, together over four times the L2, so that none is in it. CUDA_VISIBLE_DEVICES says which GPU. docs/kernels.md has
the predictions and what is known without a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import count_option, file_option, print_table, write_json
from benchmarks.tuning import build, measure, static
from benchmarks.tuning.catalogue import BASELINE, VARIANTS, Variant, variant
from benchmarks.tuning.library import NAMES, Library


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=file_option, help="write the results to this file")
    parser.add_argument("--static", action="store_true", help="compile and read only: needs no GPU")
    parser.add_argument("--quick", action="store_true", help="a few variants and tiny workloads: does it run")
    parser.add_argument("--rounds", type=count_option, default=7)
    parser.add_argument("--build-only", type=Path, metavar="FOLDER", help="compile into this folder, and do not run")
    parser.add_argument("--arch", help="architecture for --build-only, such as 90")
    parser.add_argument("--prebuilt", type=Path, metavar="FOLDER", help="where --build-only has compiled")
    parser.add_argument("--variant", action="append", metavar="NAME", help="this one (and the baseline); repeatable")
    arguments = parser.parse_args()
    try:
        arguments.variants = [variant(name) for name in arguments.variant or []]
    except ValueError as error:
        parser.error(str(error))
    if (arguments.build_only is None) != (arguments.arch is None):
        parser.error("--build-only and --arch need each other")
    if not arguments.static and arguments.build_only is None and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device; --static needs none")
    return arguments


def chosen(asked: list[Variant], quick: bool) -> list[Variant]:
    """The variants of this run, the baseline first."""
    if not asked:
        return [v for v in VARIANTS if v.quick or not quick]
    return [variant(BASELINE), *(v for v in asked if v.name != BASELINE)]


def compile_all(
    variants: list[Variant], architecture: str, folder: Path, prebuilt: Path | None = None
) -> dict[str, Path]:
    """The libraries by name of the variant; those that `prebuilt` lacks are compiled into the folder."""
    found = {v.name: prebuilt and build.prebuilt_library(v, architecture, prebuilt / v.slug) for v in variants}
    left = [v for v in variants if found[v.name] is None]
    print(f"compiling {len(left)} of {len(variants)} variants for sm_{architecture}", flush=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = pool.map(lambda v: build.compile_library(v, architecture, folder / v.slug), left)
        paths = {v.name: path for v, path in zip(left, made, strict=True)}
    return {**{name: path for name, path in found.items() if path is not None}, **paths}


@dataclass(frozen=True)
class Machine:
    """The GPU that the variants are compiled for and run on; `cache` in bytes."""

    device: torch.device
    architecture: str
    multiprocessors: int
    cache: int

    @classmethod
    def present(cls) -> Machine:
        device = torch.device("cuda", 0)
        gpu = torch.cuda.get_device_properties(device)
        return cls(device, f"{gpu.major}{gpu.minor}", gpu.multi_processor_count, gpu.L2_cache_size)


def run(
    variants: list[Variant],
    machine: Machine,
    libraries: dict[str, Library],
    rounds: int,
    quick: bool,
    path: Path | None,
) -> None:
    """Checks and times; prints a table per workload and dtype, and writes what there is so far to the path."""
    at = machine.device, machine.multiprocessors
    results: list[dict[str, Any]] = []
    print("checking", flush=True)
    for v in variants:
        checked = measure.check(v, libraries[v.name], libraries[BASELINE], machine.device)
        results.append({"variant": v.name, "what": v.what, "prediction": v.prediction, **checked})
    for dtype in NAMES:
        for layers in measure.workloads(dtype.itemsize, quick):
            results.append(measure.timed(layers, dtype, variants, libraries, *at, machine.cache, rounds))
            write_json(path, machine.device, results)
            show(results[-1])
    show_means([r for r in results if "rows" in r], variants)


def show(result: dict[str, Any]) -> None:
    """One workload."""
    rows = [
        [
            r["variant"],
            f"{r['milliseconds']:.4f}",
            f"{r['GB/s']:.0f}",
            f"{r['of ceiling']:.3f}",
            f"{r['of baseline']:.3f}",
        ]
        for r in result["rows"]
    ]
    columns = ["", "ms", "GB/s", "of ceiling", "of baseline"]
    print_table(f"{result['workload']}, {result['dtype']} (speed; more is better)", columns, rows)


def show_means(results: list[dict[str, Any]], variants: list[Variant]) -> None:
    """Geometric means over the workloads of the speed relative to the baseline, a column per dtype."""
    lines = []
    for v in variants:
        cells = []
        for dtype in NAMES.values():
            rows = [r for result in results if result["dtype"] == dtype for r in result["rows"]]
            found = [r["of baseline"] for r in rows if r["variant"] == v.name]
            cells.append(f"{math.exp(sum(map(math.log, found)) / len(found)):.3f}" if found else "")
        lines.append([v.name, *cells])
    print_table("all workloads, speed relative to the baseline", ["", *NAMES.values()], lines)


def main() -> None:
    arguments = command_line()
    variants = chosen(arguments.variants, arguments.quick)
    if arguments.static:
        static.run(variants, arguments.json)
        return
    if arguments.build_only is not None:
        compile_all(variants, arguments.arch, arguments.build_only, arguments.build_only)
        return
    machine = Machine.present()
    with tempfile.TemporaryDirectory() as folder:
        paths = compile_all(variants, machine.architecture, Path(folder), arguments.prebuilt)
        libraries = {name: Library(path) for name, path in paths.items()}
        run(variants, machine, libraries, arguments.rounds, arguments.quick, arguments.json)


if __name__ == "__main__":
    main()
