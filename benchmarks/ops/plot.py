"""Plot GB/s over size from a result of `benchmarks.ops.feature_stats`.

    python -m benchmarks.ops.plot RESULT.json OUT.png

RESULT may also be the collection of gpu.sh. One panel per dtype, one line per implementation, from the part "ladder".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.ops.show import COLUMNS
from benchmarks.ops.workloads import LADDER, size_name

STEP = "kernels"  # of gpu.sh
LABELS = {
    "read": "streaming read",
    "copy": "copy",
    "fastfs": "fastfs",
    "Triton": "Triton",
    "compile": "torch.compile, its best",
    "by hand": "eager by hand",
    "eager": "eager reference",
    "3 norms": "torch._foreach_norm (3 of 8 sums)",
}
STYLES: dict[str, dict[str, Any]] = {
    "read": {"color": "black", "linestyle": "--"},
    "copy": {"color": "black", "linestyle": ":"},
    "fastfs": {"color": "tab:red", "linewidth": 2.5},
    "Triton": {"color": "tab:purple"},
    "compile": {"color": "tab:blue"},
    "by hand": {"color": "tab:orange"},
    "eager": {"color": "tab:green"},
    "3 norms": {"color": "tab:gray"},
}


def ladder(content: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return environment and results of the ladder, with the largest number of threads if there are several.

    Raises:
        ValueError: there are no results of the ladder.
    """
    if "steps" in content:
        content = content["steps"].get(STEP, {})
    results = [r for r in content.get("results", []) if r.get("part") == LADDER]
    if not results:
        raise ValueError(f"no results of the part {LADDER!r}")
    threads = max(r["threads"] or 0 for r in results)
    return content["environment"], [r for r in results if (r["threads"] or 0) == threads]


def lines(results: list[dict[str, Any]], dtype: str) -> dict[str, list[tuple[int, float]]]:
    """Return bytes and GB/s by label, sorted by size, for the best implementation of each kind."""
    found: dict[str, list[tuple[int, float]]] = {}
    for result in sorted((r for r in results if r["dtype"] == dtype), key=lambda r: r["bytes"]):
        for column, names in COLUMNS.items():
            rates = [row["GB/s"] for row in result["rows"] if row["implementation"] in names]
            if rates:
                found.setdefault(column, []).append((result["bytes"], max(rates)))
    return found


def draw(content: dict[str, Any], dtypes: list[str], out: Path) -> None:
    """Write the figure."""
    import matplotlib.pyplot as plt

    environment, results = ladder(content)
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6 * len(dtypes), 4.5), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for column, points in lines(results, dtype).items():
            axis.plot(*zip(*points, strict=True), marker=".", label=LABELS[column], **STYLES[column])
        axis.set_xscale("log", base=2)
        ticks = axis.get_xticks()[1:-1:2]
        axis.set_xticks(ticks, [size_name(int(size)) if size >= 1 else "" for size in ticks])
        axis.set_title(dtype)
        axis.set_xlabel("bytes of a call's inputs, from memory")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("GB/s")
    where = environment.get("device") or f"{environment['processor']}, threads: {environment['threads']}"
    figure.suptitle(f"feature_stats of one layer, {where}")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize="small", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="panels")
    arguments = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    try:
        draw(json.loads(arguments.result.read_text()), arguments.dtypes.split(","), arguments.out)
    except (OSError, ValueError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
