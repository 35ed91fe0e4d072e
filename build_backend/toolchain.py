"""Finds the compilers and the headers, and says what to install where they are missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .settings import DEFAULT_ARCHITECTURES, BuildError, Settings

IS_X86_64 = platform.machine().lower() in ("x86_64", "amd64")

_PROBE = """\
#include <Python.h>
#include <omp.h>
#include <string_view>
int main() { return omp_get_max_threads() > 0 ? 0 : static_cast<int>(std::string_view("c++17").size()); }
"""
_INSTALL_CXX = (
    "Install one (Debian/Ubuntu: apt-get install g++ python3-dev; Fedora/RHEL: dnf install gcc-c++ python3-devel; "
    "conda: conda install cxx-compiler), or point CXX at one. "
    "Or install fastfs without native core, slower: FASTFS_NATIVE=0 pip install ..."
)


@dataclass(frozen=True)
class Nvcc:
    """An nvcc, the directory of libcudart_static.a, and the architectures to compile for."""

    path: str
    version: str
    library_dir: str
    architectures: tuple[str, ...]
    ptx: bool
    host_compiler: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)

    @property
    def described(self) -> str:
        return ",".join(self.architectures) + ("+PTX" if self.ptx else "")


# --- C++ ---------------------------------------------------------------------------------------------------------


def find_cxx(scratch: Path) -> list[str]:
    """The C++ compiler as a command: CXX, or the first of c++, g++, clang++ on PATH. Tried on a file in `scratch`.

    Raises:
      BuildError: none is there, or it lacks C++17, OpenMP or Python.h.
    """
    if not sys.platform.startswith("linux"):
        raise BuildError(
            f"the native core is written for Linux, and this is {sys.platform}. "
            "Install the pure Python package: FASTFS_NATIVE=0 pip install ..."
        )
    named = os.environ.get("CXX", "").strip()
    if named:
        cxx = shlex.split(named)
        if shutil.which(cxx[0]) is None:
            raise BuildError(f"CXX={named!r} names no program that exists. {_INSTALL_CXX}")
    else:
        found = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
        if found is None:
            raise BuildError(f"no C++ compiler found (looked for c++, g++ and clang++ on PATH). {_INSTALL_CXX}")
        cxx = [found]
    scratch.mkdir(parents=True, exist_ok=True)
    source = scratch / "probe.cpp"
    source.write_text(_PROBE)
    command = [*cxx, "-std=c++17", "-fopenmp", "-I", python_include(), str(source), "-fsyntax-only"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(
            f"the C++ compiler {shlex.join(cxx)!r} does not compile a small C++17 program with OpenMP and Python.h:\n"
            f"{result.stderr.strip()}\n{_INSTALL_CXX}"
        )
    return cxx


def python_include() -> str:
    return sysconfig.get_path("include")


# --- CUDA --------------------------------------------------------------------------------------------------------


def find_nvcc(settings: Settings) -> Nvcc | None:
    """The nvcc that `settings` ask for, or None: CUDA is not wanted, or auto and there is none.

    Raises:
      BuildError: there has to be one and is none, or it cannot emit what FASTFS_CUDA_ARCHS names.
    """
    if settings.cuda == "0":
        return None
    looked: list[str] = []
    path = _nvcc_of_wheels(looked) if settings.cuda == "wheel" else _nvcc_of_system(looked)
    if path is None:
        places = ", ".join(looked)
        if settings.cuda == "wheel":
            raise BuildError(f"FASTFS_CUDA=wheel, but the wheels brought no nvcc (looked in {places}).")
        if settings.cuda == "1":
            raise BuildError(
                f"FASTFS_CUDA=1, but there is no nvcc (looked in {places}). Install the CUDA toolkit or point "
                "CUDA_HOME to it, or get it from PyPI with FASTFS_CUDA=wheel, or build without CUDA with FASTFS_CUDA=0."
            )
        if settings.architectures is not None:
            raise BuildError(f"FASTFS_CUDA_ARCHS is set, but there is no nvcc (looked in {places}).")
        print(f"fastfs: without CUDA kernels, there is no nvcc (looked in {places})")
        return None
    architectures, ptx = choose_architectures(_emitted(path), settings, path)
    return Nvcc(
        path=path,
        version=_nvcc_version(path),
        library_dir=_cudart_dir(path),
        architectures=architectures,
        ptx=ptx,
        host_compiler=os.environ.get("NVCC_CCBIN", "").strip() or os.environ.get("CXX", "").strip() or None,
    )


def choose_architectures(emitted: list[str], settings: Settings, nvcc: str) -> tuple[tuple[str, ...], bool]:
    """The architectures to compile for, given those that nvcc can emit, and whether the last is kept as PTX too."""
    if settings.architectures is None:
        chosen = tuple(a for a in DEFAULT_ARCHITECTURES if a in emitted)
        if not chosen:
            raise BuildError(
                f"{nvcc} can emit none of {','.join(DEFAULT_ARCHITECTURES)}, only {','.join(emitted)}. "
                "Use a newer CUDA toolkit, or choose with FASTFS_CUDA_ARCHS."
            )
        return chosen, True
    unknown = [a for a in settings.architectures if a not in emitted and a.rstrip("af") not in emitted]
    if unknown:
        raise BuildError(f"FASTFS_CUDA_ARCHS names {','.join(unknown)}, but {nvcc} can emit {','.join(emitted)}.")
    return settings.architectures, settings.ptx


def _nvcc_of_system(looked: list[str]) -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable, "").strip()
        if home:  # whoever sets it means it: no other toolkit is tried
            looked.append(f"{variable}={home}")
            return _executable(Path(home) / "bin" / "nvcc")
    looked.append("PATH")
    on_path = shutil.which("nvcc")
    if on_path:
        return on_path
    looked.append("/usr/local/cuda")
    return _executable(Path("/usr/local/cuda/bin/nvcc"))


def _nvcc_of_wheels(looked: list[str]) -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        looked.append(folder)
        for candidate in sorted(Path(folder).glob("cu*/bin/nvcc")):
            return _executable(candidate)
    if not looked:
        looked.append("the package nvidia, which is not installed")
    return None


def _executable(path: Path) -> str | None:
    return str(path) if path.is_file() and os.access(path, os.X_OK) else None


def _nvcc_version(nvcc: str) -> str:
    text = _run(nvcc, "--version")
    found = re.search(r"\bV(\d+\.\d+[.\d]*)", text)
    if found is None:
        raise BuildError(f"{nvcc} --version tells no version:\n{text.strip()}")
    return found.group(1)


def _emitted(nvcc: str) -> list[str]:
    return sorted(re.findall(r"^sm_(\w+)$", _run(nvcc, "--list-gpu-code"), re.M), key=lambda a: (len(a), a))


def _cudart_dir(nvcc: str) -> str:
    # nvcc on PATH may be a script or a link far from its toolkit: ask it where its own root is.
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", "-c", "-o", os.devnull, os.devnull), re.M)
    root = Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1]).resolve()
    for folder in (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return str(folder)
    raise BuildError(
        f"the CUDA toolkit of {nvcc} has no libcudart_static.a (looked under {root}). "
        "Install it completely, or build without CUDA: FASTFS_CUDA=0 pip install ..."
    )


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{result.stderr.strip() or result.stdout.strip()}")
    return result.stdout + result.stderr


# --- headers and ninja -------------------------------------------------------------------------------------------


def mirror_headers(include: Path) -> None:
    """Copies pybind11's headers and dlpack/dlpack.h below `include`, touching only files that changed.

    An isolated build finds them at another temporary path every time; copies at one place keep the build incremental.

    Raises:
      BuildError: one of them is not installed.
    """
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is missing; without build isolation, pip install pybind11 first.") from None
    source = Path(pybind11.get_include())
    wanted = {path.relative_to(source): path for path in sorted(source.rglob("*.h"))}
    wanted[Path("dlpack/dlpack.h")] = _dlpack_header()
    for name, path in wanted.items():
        write_if_changed(include / name, path.read_bytes())


def write_if_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _dlpack_header() -> Path:
    # find_spec imports neither: torch takes seconds, and tvm_ffi loads a library.
    for package, name in (("tvm_ffi", "include/dlpack/dlpack.h"), ("torch", "include/ATen/dlpack.h")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            header = Path(folder) / name
            if header.is_file() and b"DLPackExchangeAPI" in header.read_bytes():
                return header
    raise BuildError(
        "no dlpack.h with DLPackExchangeAPI (DLPack 1.2 or newer); "
        "without build isolation, pip install apache-tvm-ffi first."
    )


def find_ninja() -> str:
    """The ninja program of the `ninja` package, or the one on PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        raise BuildError("ninja is missing; without build isolation, pip install ninja first.") from None
    found = (_executable(Path(BIN_DIR) / "ninja") if BIN_DIR else None) or shutil.which("ninja")
    if found is None:
        raise BuildError("the ninja package brought no ninja program, and there is none on PATH.")
    return found
