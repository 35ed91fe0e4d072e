"""UpdateStats and ParameterStats: how the parameters moved."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastfs._stats.base import Stats, cosine


class UpdateStats(Stats):
    """How the updates of parameters are aligned with their gradients.

    Args:
        sums: float64 tensor (..., 5), columns as in `names`.
    """

    __slots__ = ()
    factors: ClassVar[dict[str, tuple[str, str]]] = {
        "dot": ("gradient", "update"),
        "update_sq": ("update", "update"),
        "gradient_sq": ("gradient", "gradient"),
    }
    names: ClassVar[tuple[str, ...]] = (*factors, "nonfinite", "count")
    derived: ClassVar[tuple[str, ...]] = (
        "aligned_decrease",
        "update_norm",
        "gradient_norm",
        "update_rms",
        "gradient_rms",
        "cos_angle",
        "angle",
    )
    columns: ClassVar[tuple[str, ...]] = (
        "aligned_decrease",
        "angle",
        "cos_angle",
        "update_rms",
        "gradient_rms",
        "nonfinite",
        "count",
    )

    @property
    def dot(self) -> Tensor:
        """<g, dw>: the first-order change of the loss by this update."""
        return self._sum("dot")

    @property
    def update_sq(self) -> Tensor:
        """Sum of dw^2."""
        return self._sum("update_sq")

    @property
    def gradient_sq(self) -> Tensor:
        """Sum of g^2."""
        return self._sum("gradient_sq")

    @property
    def aligned_decrease(self) -> Tensor:
        """-<g, dw>, lr |g|^2 for plain gradient descent.

        Added up over the parameters below a cut it is D, the D of the feature speed formula (section 2).
        """
        return -self.dot

    @property
    def update_norm(self) -> Tensor:
        """|dw|."""
        return self.update_sq.sqrt()

    @property
    def gradient_norm(self) -> Tensor:
        """|g|."""
        return self.gradient_sq.sqrt()

    @property
    def update_rms(self) -> Tensor:
        """rms(dw) = |dw| / sqrt(count)."""
        return self._rms(self.update_sq)

    @property
    def gradient_rms(self) -> Tensor:
        """rms(g) = |g| / sqrt(count)."""
        return self._rms(self.gradient_sq)

    @property
    def cos_angle(self) -> Tensor:
        """Cosine between the update and -g, in [-1, 1]: 1 for plain gradient descent. nan at zero vectors."""
        return cosine(-self.dot, self.update_sq, self.gradient_sq)

    @property
    def angle(self) -> Tensor:
        """Angle between the update and -g, in radians: 0 to pi. nan at zero vectors."""
        return self.cos_angle.acos()


class ParameterStats(UpdateStats):
    """How one step of an optimizer moved parameters: `UpdateStats` that know the parameters too.

    Args:
        sums: float64 tensor (..., len(names)), columns as in `names`.
    """

    __slots__ = ()
    factors: ClassVar[dict[str, tuple[str, str]]] = {
        "dot": ("gradient", "update"),
        "parameter_dot_update": ("parameter", "update"),
        "update_sq": ("update", "update"),
        "gradient_sq": ("gradient", "gradient"),
        "parameter_sq": ("parameter", "parameter"),
    }
    names = (*factors, "nonfinite", "count")
    derived = (*UpdateStats.derived, "parameter_norm", "parameter_rms", "relative_update", "rotation", "radial_growth")
    columns = (
        "aligned_decrease",
        "angle",
        "relative_update",
        "rotation",
        "radial_growth",
        "update_rms",
        "gradient_rms",
        "parameter_rms",
        "nonfinite",
        "count",
    )

    @property
    def parameter_sq(self) -> Tensor:
        """Sum of w^2, of the parameter after the step."""
        return self._sum("parameter_sq")

    @property
    def parameter_norm(self) -> Tensor:
        """|w|, after the step."""
        return self.parameter_sq.sqrt()

    @property
    def parameter_rms(self) -> Tensor:
        """rms(w) = |w| / sqrt(count), after the step."""
        return self._rms(self.parameter_sq)

    @property
    def relative_update(self) -> Tensor:
        """|dw| / |w|, w after the step. inf where only w is zero, nan where both are."""
        return (self.update_sq / self.parameter_sq).sqrt()

    @property
    def parameter_dot_update(self) -> Tensor:
        """<w, dw>, of the parameter after the step."""
        return self._sum("parameter_dot_update")

    @property
    def rotation(self) -> Tensor:
        """Effective rotation: the angle between w - dw and w, the parameter before and after the step, in radians.

        The angular update of Kosson, Messmer and Jaggi, "Rotational Equilibrium" (arXiv 2305.17212), section 2. With
        dw = p w + v, v orthogonal to w, it is that between (1 - p) w - v and w, so that small angles keep their digits.
        nan where the parameter is zero before or after the step.
        """
        p = self.parameter_dot_update / self.parameter_sq
        across = (self.update_sq - p * self.parameter_dot_update).clamp_min(0.0).sqrt()
        angle = torch.atan2(across, (1 - p) * self.parameter_norm)
        return torch.where((self._before_sq > 0) & (self.parameter_sq > 0), angle, torch.nan)

    @property
    def radial_growth(self) -> Tensor:
        """|w| / |w - dw| - 1: by how much of itself the norm of the parameter grew.

        From 2 <w, dw> - |dw|^2, the growth of |w|^2, so that a small one keeps its digits. inf where only w - dw is
        zero, nan where both are.
        """
        before, after = self._before_sq.sqrt(), self.parameter_norm
        return (2 * self.parameter_dot_update - self.update_sq) / (before * (before + after))

    @property
    def _before_sq(self) -> Tensor:
        """Sum of (w - dw)^2, of the parameter before the step."""
        return (self.parameter_sq - 2 * self.parameter_dot_update + self.update_sq).clamp_min(0.0)

    @property
    def nonfinite(self) -> Tensor:
        """Entries of the gradient and the parameter that are NaN or Inf: int64."""
        return self._count("nonfinite")
