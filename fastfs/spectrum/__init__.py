"""The spectrum of the backward-to-feature kernel, and the backward-feature angle that it predicts.

Section 3 of "The Feature Speed Formula", arXiv 2311.18718: ``df_l = -K_l b_l`` for gradient descent, so the angle
between the feature update and -b is a property of the kernel K_l. The functions of this package use products of K_l
with vectors and form the matrix only on request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastfs._utils.extras import load
from fastfs._utils.lazy import lazy_attribute

if TYPE_CHECKING:
    from fastfs.spectrum._angles import Angles, angles
    from fastfs.spectrum._conditioning import Conditioning, conditioning, kantorovich
    from fastfs.spectrum._extremes import Extremes, extremes
    from fastfs.spectrum._jacobians import LayerJacobian, SingularValues, singular_values
    from fastfs.spectrum._lanczos import Quadrature, quadrature
    from fastfs.spectrum._moments import Moments, moments
    from fastfs.spectrum._operator import BFK

__all__ = [
    "BFK",
    "Angles",
    "Conditioning",
    "Extremes",
    "LayerJacobian",
    "Moments",
    "Quadrature",
    "SingularValues",
    "angles",
    "conditioning",
    "extremes",
    "kantorovich",
    "moments",
    "quadrature",
    "singular_values",
]

# Imported at first use, so that `from fastfs import *` and `help(fastfs)` do not need SciPy.
_MODULES = {
    "BFK": "fastfs.spectrum._operator",
    "Angles": "fastfs.spectrum._angles",
    "Conditioning": "fastfs.spectrum._conditioning",
    "Extremes": "fastfs.spectrum._extremes",
    "LayerJacobian": "fastfs.spectrum._jacobians",
    "Moments": "fastfs.spectrum._moments",
    "Quadrature": "fastfs.spectrum._lanczos",
    "SingularValues": "fastfs.spectrum._jacobians",
    "angles": "fastfs.spectrum._angles",
    "conditioning": "fastfs.spectrum._conditioning",
    "extremes": "fastfs.spectrum._extremes",
    "kantorovich": "fastfs.spectrum._conditioning",
    "moments": "fastfs.spectrum._moments",
    "quadrature": "fastfs.spectrum._lanczos",
    "singular_values": "fastfs.spectrum._jacobians",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        load("scipy", "spectrum", "fastfs.spectrum")
    return lazy_attribute(__name__, _MODULES, name)
