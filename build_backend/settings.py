"""What the person who builds asked for: the FASTFS_* environment variables, checked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

# Ampere, Hopper, Blackwell (data centre), Blackwell (desktop). With PTX, for GPUs to come.
DEFAULT_ARCHITECTURES = ("80", "90", "100", "120")

# Where FASTFS_CUDA=wheel gets the compiler from. One toolkit release, so that the parts fit each other.
CUDA_WHEELS = tuple(
    f"{name}==13.0.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
)


class BuildError(SystemExit):
    """Ends the build with a message instead of a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"\nfastfs cannot be built: {message}\n")


@dataclass(frozen=True)
class Settings:
    """``native``: compile the core at all. ``cuda``: auto, 0, 1 or wheel. ``architectures``: None for the default."""

    native: bool
    cuda: str
    architectures: tuple[str, ...] | None
    ptx: bool


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Reads FASTFS_NATIVE, FASTFS_CUDA and FASTFS_CUDA_ARCHS; empty means not set.

    Raises:
      BuildError: a value that is none of the expected ones.
    """
    env = os.environ if environ is None else environ
    native = env.get("FASTFS_NATIVE", "").strip() or "1"
    if native not in ("0", "1"):
        raise BuildError(f"FASTFS_NATIVE must be 1 (default) or 0 (pure Python), not {native!r}.")
    cuda = env.get("FASTFS_CUDA", "").strip() or "auto"
    if cuda not in ("auto", "0", "1", "wheel"):
        raise BuildError(
            "FASTFS_CUDA must be auto (default: with CUDA if nvcc is found), 0 (without), 1 (fail without nvcc) "
            f"or wheel (nvcc from PyPI), not {cuda!r}."
        )
    archs, ptx = _architectures(env.get("FASTFS_CUDA_ARCHS", "").strip())
    if archs is not None and cuda == "0":
        raise BuildError("FASTFS_CUDA_ARCHS is set although FASTFS_CUDA=0 leaves CUDA out; unset one of them.")
    if native == "0" and cuda in ("1", "wheel"):
        raise BuildError(
            f"FASTFS_NATIVE=0 builds no native code, but FASTFS_CUDA={cuda} asks for CUDA; unset one of them."
        )
    return Settings(native=native == "1", cuda=cuda, architectures=archs, ptx=ptx)


def extra_requirements(settings: Settings) -> list[str]:
    """Build requirements beside those of pyproject.toml."""
    return list(CUDA_WHEELS) if settings.native and settings.cuda == "wheel" else []


def _architectures(text: str) -> tuple[tuple[str, ...] | None, bool]:
    if not text:
        return None, True
    ptx = text.upper().endswith("+PTX")
    names = [name.strip() for name in (text[:-4] if ptx else text).split(",")]
    for name in names:
        if not re.fullmatch(r"[1-9][0-9]{1,2}[af]?", name):
            raise BuildError(
                "FASTFS_CUDA_ARCHS must be compute capabilities without dot, separated by commas, with +PTX at the end "
                f'for code that later GPUs can run, like "80,90" or "90,120+PTX"; {name!r} in {text!r} is none.'
            )
    if len(set(names)) != len(names):
        raise BuildError(f"FASTFS_CUDA_ARCHS names an architecture twice: {text!r}.")
    return tuple(names), ptx
