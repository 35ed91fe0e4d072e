"""PEP 517 / PEP 660 hooks: setuptools', plus the CUDA compiler as build requirement when it is asked for.

``FASTFS_CUDA=wheel`` takes nvcc from PyPI wheels, so they have to be build requirements; no static list in
pyproject.toml can say that. Wrong settings are reported here already, before anything is compiled.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from .settings import extra_requirements, read_settings

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *extra_requirements(read_settings())]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *extra_requirements(read_settings())]
