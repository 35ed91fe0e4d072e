"""The results of gpu.sh in one file: `python -m benchmarks.gpu.collect TARGET [FILE...]` adds those of other calls.

A FILE is the result of the step that it is named after, or another TARGET of the same machine. Without arguments, the
facts about the machine are printed as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["add", "collect", "machine", "merge"]

SAME = ("device", "driver", "torch")


def machine() -> dict[str, Any]:
    """Return properties of the GPU and of its driver, and the native core's, or None if it does not load.

    Raises:
        SystemExit: there is no GPU.
    """
    import torch

    from fastfs._core import ops

    if not torch.cuda.is_available():
        sys.exit(f"gpu.sh: torch {torch.__version__} sees no CUDA device")
    p = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip() or None
    return {
        "device": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "l2_mib": round(p.L2_cache_size / 2**20, 1),
        "driver": driver,
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "core": ops.build_info() if ops.native_available() else None,
    }


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Merge two collections of the same machine; steps of the second replace those of the first.

    Raises:
        ValueError: the machines differ.
    """
    different = {k: (old["machine"].get(k), new["machine"].get(k)) for k in SAME}
    different = {k: v for k, v in different.items() if v[0] != v[1]}
    if different:
        raise ValueError(f"results of different machines: {different}")
    return {"machine": new["machine"], "steps": {**old["steps"], **new["steps"]}}


def add(target: Path, steps: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Add results of steps to the target, and write it so that readers see either the old or the new content.

    Raises:
        ValueError: the target has results of another machine.
    """
    collected = {"machine": here, "steps": steps}
    if target.exists():
        collected = merge(json.loads(target.read_text()), collected)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.tmp")
    new.write_text(json.dumps(collected, indent=1) + "\n")
    os.replace(new, target)
    return collected


def with_machine(content: dict[str, Any], here: dict[str, Any]) -> dict[str, Any]:
    """Return the result file of a benchmark with the device and the driver in its environment."""
    return {**content, "environment": {**content.get("environment", {}), **{k: here[k] for k in ("device", "driver")}}}


def collect(target: Path, files: list[Path], here: dict[str, Any]) -> dict[str, Any]:
    """Add files to the target and write it.

    Raises:
        ValueError: a file or the target has results of another machine.
    """
    collected = add(target, {}, here)
    for path in files:
        content = json.loads(path.read_text())
        if "steps" in content and "machine" in content:
            content = merge(collected, content)["steps"]
        else:
            content = {path.stem: with_machine(content, here)}
        collected = add(target, content, here)
    return collected


if __name__ == "__main__":
    facts = machine()
    print(json.dumps(facts))
    try:
        if sys.argv[1:]:
            collect(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]], facts)
    except ValueError as error:
        sys.exit(f"gpu.sh: {sys.argv[1]}: {error}; choose another folder with OUT, or move the file")
