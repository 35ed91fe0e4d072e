"""Targets of the kernels on a GPU, and whether a result of `benchmarks.ops.feature_stats` meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.ops.implementations import WHOLE
from benchmarks.ops.workloads import LADDER, LISTS, ROWS
from fastfs._bench.comparison import EAGER, OURS

Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A target and the worst value among its workloads. `found` is None if none was measured."""

    text: str
    wanted: float
    found: float | None
    where: str = ""
    at_most: bool = False

    @property
    def passed(self) -> bool | None:
        """Whether the target is met, or None if it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def of_ceiling(result: Result) -> float | None:
    """Return the bandwidth of fastfs as a fraction of a read of the same bytes."""
    return next((row["of ceiling"] for row in result["rows"] if row["implementation"] == OURS), None)


def over(result: Result, names: Iterable[str]) -> float | None:
    """Return the speedup of fastfs over the fastest of the given implementations."""
    wanted = set(names)
    return min((r["fastfs is faster by"] for r in result["rows"] if r["implementation"] in wanted), default=None)


def targets(results: list[Result]) -> list[Target]:
    """Return all targets in the order of the report."""
    cases = [r for r in results if "rows" in r]
    whole = [r for r in cases if not r["per row"]]
    large = [r for r in whole if r["bytes"] / r["layers"] >= 2**20]
    small = [r for r in cases if r["part"] == LISTS and r["workload"] in ("100 x 64K", "1000 x 64K")]

    def worst(text: str, wanted: float, chosen: list[Result], value: Callable[[Result], float | None]) -> Target:
        found = [(x, f"{r['workload']}, {r['dtype']}") for r in chosen if (x := value(r)) is not None]
        if not found:
            return Target(text, wanted, None)
        least, where = min(found)
        return Target(text, wanted, least, f"{where}; {len(found)} of {len(chosen)} workloads")

    found = [
        worst("of the ceiling, 256 MB and more", 0.95, [r for r in large if r["bytes"] >= 256e6], of_ceiling),
        worst(
            "of the ceiling, one layer of 32 MB and more",
            0.85,
            [r for r in cases if r["part"] == LADDER and 32e6 <= r["bytes"] < 256e6],
            of_ceiling,
        ),
        worst("of the ceiling, 1000 x 64K", 0.7, [r for r in small if r["layers"] == 1000], of_ceiling),
        worst("of the ceiling, per row", 0.93, [r for r in cases if r["part"] == ROWS], of_ceiling),
        worst("times torch.compile at its best", 1.0, cases, lambda r: over(r, WHOLE)),
        worst("times torch.compile at its best, many small layers", 3.0, small, lambda r: over(r, WHOLE)),
        worst(
            "times the eager reference, bfloat16",
            8.0,
            [r for r in whole if r["dtype"] == "bfloat16" and r["bytes"] >= 32e6],
            lambda r: over(r, [EAGER]),
        ),
    ]
    micros = [r["microseconds"]["100 layers"] for r in results if "microseconds" in r]
    text = "microseconds of host time, a call with 100 layers"
    return [*found, Target(text, 40.0, max(micros, default=None), at_most=True)]


def show_targets(found: list[Target], asked: bool) -> None:
    """Print one line per target. Without `asked`, print the numbers without a verdict."""
    print("targets" if asked else "targets for a GPU, for information")
    for target in found:
        word = {True: "PASS", False: "FAIL", None: "----"}[target.passed] if asked else "    "
        value = "not measured" if target.found is None else f"{target.found:.3g}"
        sign = "<=" if target.at_most else ">="
        where = f"  ({target.where})" if target.where else ""
        print(f"{word}  {value} {sign} {target.wanted:g} {target.text}{where}")
