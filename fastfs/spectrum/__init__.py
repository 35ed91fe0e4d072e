"""The spectrum of the backward-to-feature kernel, and the angle that it predicts.

Section 3 of "The Feature Speed Formula", arXiv 2311.18718: ``df_l = -K_l b_l`` for gradient descent, so the angle
between the feature update and -b is a property of the kernel K_l. Everything here multiplies K_l with vectors and
forms it only where that is asked for.
"""

try:
    import scipy  # noqa: F401
except ImportError as missing:
    raise ImportError('fastfs.spectrum needs scipy: pip install "fastfs[spectrum]"') from missing
else:
    from fastfs.spectrum.angles import Angles, angles
    from fastfs.spectrum.conditioning import Conditioning, conditioning, kantorovich
    from fastfs.spectrum.extremes import Extremes, extremes
    from fastfs.spectrum.jacobians import LayerJacobian, SingularValues, singular_values
    from fastfs.spectrum.lanczos import Quadrature, quadrature
    from fastfs.spectrum.moments import Moments, moments
    from fastfs.spectrum.operator import BFK

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
