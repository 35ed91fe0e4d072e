"""From a variant to something that runs: a changed copy of csrc, and the shared library compiled from it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from benchmarks.variants import sass
from benchmarks.variants.catalogue import Variant

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
DRIVER = HERE / "driver.cu"


def mutated_sources(variant: Variant, folder: Path, sources: Path = SOURCES) -> Path:
    """A copy of csrc in `folder`, changed as the variant says; ValueError if a change does not fit exactly once."""
    shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    for header in HERE.glob("*.cuh"):
        shutil.copy(header, folder / "cuda")
    for mutation in variant.mutations:
        path = folder / mutation.file
        text = path.read_text()
        if (count := text.count(mutation.old)) != 1:
            raise ValueError(f"{variant.name}: {mutation.file} has {count} places like {mutation.old!r}, expected one")
        path.write_text(text.replace(mutation.old, mutation.new))
    return folder


def compile_library(variant: Variant, architecture: str, folder: Path) -> Path:
    """The driver with the variant's kernels for one architecture ("90"), as a shared library.

    Raises RuntimeError with the compiler's words.
    """
    nvcc = sass.find_tool("nvcc")
    if nvcc is None:
        raise RuntimeError("no nvcc: set CUDA_HOME or PATH")
    sources = mutated_sources(variant, folder / "csrc")
    library = folder / "variant.so"
    virtual = virtual_architecture(variant, architecture)
    command = [nvcc, *sass.FLAGS, "-DNDEBUG", "-shared", "-Xcompiler=-fPIC,-ffp-contract=off", "-cudart=shared"]
    command += [f"-gencode=arch=compute_{virtual},code=sm_{architecture}", f"-I{sources / 'cuda'}"]
    done = subprocess.run([*command, str(DRIVER), "-o", str(library)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{variant.name}:\n{done.stderr[-4000:]}")
    return library


def compile_cubin(variant: Variant, architecture: str, folder: Path) -> sass.Compiled:
    """The variant's kernels for one architecture, to be read; `folder` must not exist."""
    sources = mutated_sources(variant, folder / "csrc")
    virtual = virtual_architecture(variant, architecture)
    return sass.compile_cubin(DRIVER, architecture, folder / "cubin", f"-I{sources / 'cuda'}", virtual=virtual)


def virtual_architecture(variant: Variant, architecture: str) -> str:
    """Whose PTX the machine code comes from: as in the build, but bulk copies need that of Hopper or later."""
    virtual = sass.VIRTUAL.get(architecture, architecture)
    return max(virtual, variant.lowest, key=int)
