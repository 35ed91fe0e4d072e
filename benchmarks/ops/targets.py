"""What the kernels have to reach on a GPU, and whether a result of `benchmarks.ops.feature_stats` does."""

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
    """A number to reach: the worst of the workloads it is about, and which that is. No `found`: not measured."""

    text: str
    wanted: float
    found: float | None
    where: str = ""
    at_most: bool = False

    @property
    def passed(self) -> bool | None:
        """Whether it is reached; None where it was not measured."""
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def of_ceiling(result: Result) -> float | None:
    """How near fastfs comes to reading the same bytes."""
    return next((row["of ceiling"] for row in result["rows"] if row["contestant"] == OURS), None)


def over(result: Result, names: Iterable[str]) -> float | None:
    """How much faster fastfs is than the fastest of the contestants."""
    wanted = set(names)
    return min((r["fastfs is faster by"] for r in result["rows"] if r["contestant"] in wanted), default=None)


def targets(results: list[Result]) -> list[Target]:
    """All targets, in the order of the list."""
    races = [r for r in results if "rows" in r]
    whole = [r for r in races if not r["per row"]]
    large = [r for r in whole if r["bytes"] / r["layers"] >= 2**20]
    small = [r for r in races if r["part"] == LISTS and r["workload"] in ("100 x 64K", "1000 x 64K")]

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
            [r for r in races if r["part"] == LADDER and 32e6 <= r["bytes"] < 256e6],
            of_ceiling,
        ),
        worst("of the ceiling, 1000 x 64K", 0.7, [r for r in small if r["layers"] == 1000], of_ceiling),
        worst("of the ceiling, per row", 0.93, [r for r in races if r["part"] == ROWS], of_ceiling),
        worst("times torch.compile at its best", 1.0, races, lambda r: over(r, WHOLE)),
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
    """One line per target. Where they are not asked for, the numbers alone."""
    print("targets" if asked else "targets for a GPU, here for the record")
    for target in found:
        word = {True: "PASS", False: "FAIL", None: "----"}[target.passed] if asked else "    "
        value = "not measured" if target.found is None else f"{target.found:.3g}"
        sign = "<=" if target.at_most else ">="
        where = f"  ({target.where})" if target.where else ""
        print(f"{word}  {value} {sign} {target.wanted:g} {target.text}{where}")
