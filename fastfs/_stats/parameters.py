"""UpdateStats and ParameterStats: how the parameters moved."""

from __future__ import annotations

from typing import ClassVar

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
        "update_sq": ("update", "update"),
        "gradient_sq": ("gradient", "gradient"),
        "parameter_sq": ("parameter", "parameter"),
    }
    names = (*factors, "nonfinite", "count")
    derived = (*UpdateStats.derived, "parameter_norm", "parameter_rms", "relative_update")
    columns = (
        "aligned_decrease",
        "angle",
        "relative_update",
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
    def nonfinite(self) -> Tensor:
        """Entries of the gradient and the parameter that are NaN or Inf: int64."""
        return self._count("nonfinite")
