"""From a variant to something that runs: the driver, compiled with the policies of the variant."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from benchmarks.tuning import sass
from benchmarks.tuning.catalogue import BASELINE, Variant

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
DRIVER = HERE / "driver.cu"
LIBRARY, MADE_OF = "variant.so", "made_of"
_SUFFIXES = (".h", ".cuh", ".cu")


def definitions(variant: Variant) -> list[str]:
    """The compiler flags that choose the policies of a variant: none for the baseline, which has the library's."""
    if variant.name == BASELINE:
        return []
    figures = {
        "CHUNK_BITS": variant.chunk_bits,
        "LARGEST_BITS": variant.largest_bits,
        "GROUP_BITS": variant.group_bits,
        "LANE_ELEMENTS": variant.lane_elements,
        "CHAIN": variant.chain,
        "THREADS": variant.threads,
        "BLOCKS": variant.blocks,
        "LOAD": variant.load,
    }
    return ['-DFASTFS_POLICIES="tuned_policy.cuh"', *(f"-DTUNE_{name}={value}" for name, value in figures.items())]


def flags(variant: Variant) -> list[str]:
    """Where the headers are, and the policies."""
    return [f"-I{SOURCES / 'cuda'}", f"-I{HERE}", *definitions(variant)]


def compile_library(variant: Variant, architecture: str, folder: Path) -> Path:
    """The driver with the variant's kernels for one architecture ("90"), as a shared library; makes the folder.

    Raises:
        RuntimeError: With the compiler's words, if there is no nvcc or it fails.
    """
    nvcc = sass.find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc: set CUDA_HOME or PATH")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / LIBRARY
    virtual = sass.VIRTUAL.get(architecture, architecture)
    command = [nvcc, *sass.FLAGS, "-DNDEBUG", "-shared", "-Xcompiler=-fPIC,-ffp-contract=off", "-cudart=shared"]
    command += [f"-gencode=arch=compute_{virtual},code=sm_{architecture}", *flags(variant)]
    done = subprocess.run([*command, str(DRIVER), "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{variant.name}:\n{done.stderr[-4000:]}")
    (folder / MADE_OF).write_text(fingerprint(variant, architecture))
    return library


def prebuilt_library(variant: Variant, architecture: str, folder: Path) -> Path | None:
    """The library in the folder, or None unless it is of these sources, flags and architecture."""
    made_of = folder / MADE_OF
    found = made_of.exists() and made_of.read_text() == fingerprint(variant, architecture)
    return folder / LIBRARY if found else None


def fingerprint(variant: Variant, architecture: str) -> str:
    """A digest of what a library is made of: sources, flags and architecture, wherever the tree lies."""
    files = sorted(path for folder in (SOURCES, HERE) for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    parts = [path.relative_to(SOURCES.parent).as_posix().encode() + path.read_bytes() for path in files]
    parts.append(repr((architecture, sass.FLAGS, definitions(variant))).encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def compile_cubin(variant: Variant, architecture: str, folder: Path) -> sass.Compiled:
    """The variant's kernels for one architecture, to be read; makes the folder."""
    folder.mkdir(parents=True)
    return sass.compile_cubin(DRIVER, architecture, folder / "cubin", *flags(variant))
