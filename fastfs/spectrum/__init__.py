"""The spectrum of the backward-to-feature kernel, and the backward-feature angle that it predicts.

Section 3 of "The Feature Speed Formula", arXiv 2311.18718: ``df_l = -K_l b_l`` for gradient descent, so the angle
between the feature update and -b is a property of the kernel K_l. The functions of this package use products of K_l
with vectors and form the matrix only on request.
"""

try:
    import scipy  # noqa: F401
except ImportError as missing:
    raise ImportError('fastfs.spectrum needs scipy: pip install "fastfs[spectrum]"') from missing
else:
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


def __dir__() -> list[str]:
    return __all__
