"""Properties of the machine that a result depends on, sizes of caches and memory."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fastfs._core import ops
from fastfs._version import __version__

__all__ = ["cache_bytes", "core_trouble", "environment", "free_bytes", "processor"]

USUAL_CACHE = 32 * 2**20
"""Assumed bytes of the cache if the processor does not report it."""


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on, for the result file. Without native core, "core" is None."""
    trouble = core_trouble(torch.device("cpu"))
    info: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "fastfs": __version__,
        "core": None if trouble else ops.build_info(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["device"] = properties.name
        info["multiprocessors"] = properties.multi_processor_count
        info["memory_bytes"] = properties.total_memory
        info["torch_cuda"] = torch.version.cuda
    return info


def core_trouble(device: torch.device) -> str | None:
    """Return why the native core cannot measure on the device, or None if it can."""
    if not ops.native_available():
        return ops.why_not_native()
    try:
        built = ops.build_info()
    except RuntimeError as error:  # FASTFS_CPU names an unavailable instruction set
        return str(error)
    if device.type == "cuda" and built["cuda"] is None:
        return (
            "fastfs was built without CUDA: install it with nvcc at hand (FASTFS_CUDA=1 makes the build fail without)"
        )
    return None


def processor() -> str:
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_bytes(device: torch.device) -> int:
    """Return the bytes of the last-level cache: L2 of a GPU, the largest cache of a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = file.read_text().strip()
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=USUAL_CACHE)


def free_bytes(device: torch.device) -> int:
    """Return the bytes of available memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 4 * 2**30
