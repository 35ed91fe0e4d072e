"""Names of a package that are imported at first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["lazy_attribute"]


def lazy_attribute(package: str, modules: Mapping[str, str], name: str) -> Any:
    """Import an attribute of a package, for its ``__getattr__``, and keep it there.

    Args:
        package: full name of the package.
        modules: full name of the module of each attribute.
        name: the attribute.

    Returns:
        The attribute.

    Raises:
        AttributeError: the package has no such attribute.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(modules[name]), name)
    setattr(sys.modules[package], name, found)
    return found
