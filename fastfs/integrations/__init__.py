"""What attaches the monitor to a trainer in one line: of Hugging Face Transformers, of Lightning, of torchtitan.

Callbacks need their package, and say so when they are imported. ``docs/trainers.md`` has an example of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfs._utils.lazy import lazy_attribute

if TYPE_CHECKING:
    from fastfs.integrations._huggingface import FastfsCallback
    from fastfs.integrations._lightning import LightningCallback
    from fastfs.integrations._torchtitan import watch_torchtitan

__all__ = ["FastfsCallback", "LightningCallback", "watch_torchtitan"]

_MODULES = {
    "FastfsCallback": "fastfs.integrations._huggingface",
    "LightningCallback": "fastfs.integrations._lightning",
    "watch_torchtitan": "fastfs.integrations._torchtitan",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, _MODULES, name)
