"""Describe the results of ``fastfs bench`` in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastfs._bench.ceilings import READ
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.quick import LAYER, LIST, ROWS

__all__ = ["conclusion", "troubles", "verdict"]

GOOD = 0.85
"""Fraction of the ceiling below which a result is reported as slow."""

AS_FAST = 0.97
"""Speedup over another implementation below which that one is reported as faster; the rest is noise."""

_NAMES = {EAGER: "the eager reference", HAND: "eager torch by hand"}


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Return sentences on a result of :func:`fastfs._bench.quick.measure`: speed on this machine and ratios."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {LAYER: [], LIST: [], ROWS: []}
    for case in result["results"]:
        by_kind[case["kind"]].append(case)
    said = []
    if not result["no core"]:
        said.append(f"feature_stats reads at {_of_ceiling(by_kind[LAYER])} of what this memory allows.")
        for kind, what in ((LIST, "Many small layers"), (ROWS, "Sums per row")):
            if by_kind[kind]:
                said.append(f"{what}: {_of_ceiling(by_kind[kind])}.")
        for name, what in (
            (EAGER, "the eager reference"),
            (HAND, "eager torch by hand"),
            (COMPILE, "torch.compile"),
            (NORMS, NORMS),
        ):
            if text := _against(result["results"], name, what):
                said.append(text)
        one, hundred = (result["overhead"].get(layers) for layers in ("1", "100"))
        if one is not None and hundred is not None:
            said.append(f"A call costs {one:.1f} us, and {max(0.0, hundred - one) / 99:.2f} us for each further layer.")
        core = result["environment"]["core"]
        cuda = f", CUDA kernels for {core['cuda']['architectures']}" if core["cuda"] else ""
        said.append(f"Native core: {core['instruction_set']} loops, compiler {core['compiler']}{cuda}.")
        return said
    for case in by_kind[LAYER]:
        rates = [
            f"{r['implementation']} {r['GB/s']:.1f}"
            for r in case["rows"]
            if r["implementation"] in (EAGER, HAND, COMPILE)
        ]
        said.append(f"GB/s of one layer, {case['dtype']}: {', '.join(rates) or 'no implementation was fast enough'}.")
    return said


def troubles(result: Mapping[str, Any]) -> list[str]:
    """Return problems of this machine or build, with their causes where known."""
    found = []
    environment = result["environment"]
    if result["no core"]:
        found.append(f"Only the slow reference was measured because there is no native core: {result['no core']}")
    left_out: dict[str, list[str]] = {}
    for case in result["results"]:
        for name, why in case["left out"].items():
            left_out.setdefault(f"{name} was left out: {why}", []).append(f"{case['kind']}, {case['dtype']}")
    for text, where in left_out.items():
        found.append(text if len(where) == len(result["results"]) else f"{text} ({'; '.join(where)})")
    core, on_cpu = environment["core"], "device" not in environment
    if core and on_cpu:
        if not core["openmp"]:
            found.append("The native core uses one thread: it was built without OpenMP.")
        if core["instruction_set"] == "generic" and len(core["instruction_sets"]) > 1:
            found.append(
                "The native core uses the generic loops: the processor has no AVX2, or FASTFS_CPU=generic is set."
            )
    if slow := [f"{where}: {ratio:.2f}" for where, ratio in _slow(result)]:
        cause, _ = _cause(result)
        found.append(f"Less than {GOOD} of what the memory allows ({'; '.join(slow)}){cause and f': {cause}'}.")
    return found


def conclusion(result: Mapping[str, Any]) -> str:
    """Return the verdict in one or two sentences: whether this machine gets what it should, and else what to do."""
    if result["no core"]:
        return "Verdict: fastfs was not measured, because there is no native core. `fastfs doctor` says why."
    reasons = []
    slow = _slow(result)
    if slow:
        where, ratio = min(slow, key=lambda found: found[1])
        reasons.append(f"it reads at {ratio:.2f} of the memory's speed ({where})")
    beaten = [
        (row["fastfs is faster by"], row["implementation"], f"{case['kind']}, {case['dtype']}")
        for case in result["results"]
        for row in case["rows"]
        if row["implementation"] in (NORMS, COMPILE, HAND, EAGER) and row["fastfs is faster by"] < AS_FAST
    ]
    if beaten:
        ratio, name, where = min(beaten)
        reasons.append(f"{name} is {1 / ratio:.2f} times as fast ({where})")
    compared = {row["implementation"] for case in result["results"] for row in case["rows"]}
    without = "" if COMPILE in compared else " torch.compile was not compared."
    if not reasons:
        return f"Verdict: ok. It reads at {GOOD} of the memory's speed or more, and nothing is faster.{without}"
    return f"Verdict: slow: {' and '.join(reasons)}. {_cause(result)[1]}{without}"


def _slow(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the measurements below the fraction that is expected of the memory's speed."""
    return [
        (f"{case['kind']}, {case['dtype']}", row["of ceiling"])
        for case in result["results"]
        for row in case["rows"]
        if row["implementation"] == OURS and case["rows"][0]["implementation"] == READ and row["of ceiling"] < GOOD
    ]


def _cause(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return why this machine may be slow, or "", and what to do."""
    environment = result["environment"]
    cores, threads, load = environment.get("cores"), environment["threads"], result.get("load")
    report = "if it stays slow, report it with the file of --json."
    if "device" in environment:
        return "", f"`fastfs doctor` checks the build. Run it again while nothing else uses the GPU; {report}"
    if cores and threads > cores:
        return f"{threads} threads on {cores} cores", f"Set OMP_NUM_THREADS={cores}."
    if cores and load is not None and load > 0.5 * cores:
        return (
            f"the machine was busy (load {load:.1f} on {cores} cores before the run)",
            "Run it again on an idle machine.",
        )
    return "", "Run it again on an idle machine; if it stays slow, report it with the file of --json."


def _of_ceiling(cases: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for case in cases:
        for row in case["rows"]:
            if row["implementation"] == OURS:
                parts.append(f"{row['of ceiling']:.2f} ({case['dtype']}, {row['GB/s']:.0f} GB/s)")
    return " and ".join(parts)


def _against(cases: Sequence[Mapping[str, Any]], name: str, what: str) -> str:
    """Return the smallest and largest speedup over another implementation."""
    ratios = [row["fastfs is faster by"] for case in cases for row in case["rows"] if row["implementation"] == name]
    if not ratios:
        return ""
    low, high = min(ratios), max(ratios)
    return f"Against {what}: {low:.1f}x" + (
        f" to {high:.1f}x as fast." if f"{high:.1f}" != f"{low:.1f}" else " as fast."
    )
