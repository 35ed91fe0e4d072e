"""Print the results of `benchmarks.ops.feature_stats`: one table per part, one line per workload."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import print_table
from benchmarks.ops.implementations import FOREACH, TRITON, TRITON_LIST, WHOLE
from fastfs._bench.ceilings import COPY, READ
from fastfs._bench.comparison import EAGER, HAND, NORMS, OURS

COLUMNS = {
    "read": (READ,),
    "copy": (COPY,),
    "fastfs": (OURS,),
    "Triton": (TRITON, TRITON_LIST),
    "compile": WHOLE,
    "by hand": (HAND, FOREACH),
    "eager": (EAGER,),
    "3 norms": (NORMS,),
}
"""Columns of GB/s, each with the best of its implementations."""


def show(part: str, results: list[dict[str, Any]]) -> None:
    """Print a table of GB/s, and the excluded implementations with the reasons."""
    rows: list[Any] = []
    missing: dict[tuple[str, str], list[str]] = {}
    several = len({result["threads"] for result in results}) > 1
    for result in results:
        best = {}
        for column, names in COLUMNS.items():
            best[column] = max((r["GB/s"] for r in result["rows"] if r["implementation"] in names), default=None)
        ours = next(r for r in result["rows"] if r["implementation"] == OURS)
        name = f"{result['workload']}, {result['dtype']}"
        if several:
            name += f", threads: {result['threads']}"
        cells = ["-" if x is None else f"{x:.1f}" for x in best.values()]
        rows.append([name, *cells, f"{ours['of ceiling']:.2f}"])
        for implementation, why in result["left out"].items():
            missing.setdefault((implementation, why), []).append(name)
        if result["cut"]:
            missing.setdefault((name, f"cut: {result['cut']}"), [])
    print_table(f"{part}: GB/s, the best of each kind", ["", *COLUMNS, "of read"], rows)
    for (implementation, why), where in missing.items():
        count = f" ({len(where)} of {len(results)} workloads)" if where else ""
        print(f"  {implementation}: {why}{count}")
