"""The native core as an extension; everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # for `python setup.py`; build front ends find it through backend-path

from build_backend.command import BuildNative, BuildPy, native_sources  # noqa: E402
from build_backend.settings import read_settings  # noqa: E402

extensions = [Extension("fastfs._C", sources=native_sources(ROOT))] if read_settings().native else []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "build_py": BuildPy})
