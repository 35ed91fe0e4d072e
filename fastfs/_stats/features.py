"""Statistics of the features of layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastfs._stats.base import Stats, cosine


class FeatureStats(Stats):
    """Statistics of how the features of layers moved, and how their update is aligned with the backward pass.

    Args:
        sums: float64 tensor (..., 9), columns as in `names`.
    """

    __slots__ = ()
    names = (
        "update_dot_backward",
        "update_sq",
        "backward_sq",
        "before_sq",
        "before_dot_update",
        "abs_update_dot_backward",
        "rounding_sq",
        "nonfinite",
        "count",
    )
    factors: ClassVar[dict[str, tuple[str, str]]] = {
        "update_dot_backward": ("update", "backward"),
        "update_sq": ("update", "update"),
        "backward_sq": ("backward", "backward"),
        "before_sq": ("before", "before"),
        "before_dot_update": ("before", "update"),
    }
    derived = (
        "update_norm",
        "backward_norm",
        "feature_norm",
        "update_rms",
        "backward_rms",
        "feature_rms",
        "relative_update",
        "cos_angle",
        "angle",
        "radial_update",
        "tangential_update",
        "dot_conditioning",
        "noise_floor",
        "valid",
    )
    columns = (
        "angle",
        "cos_angle",
        "relative_update",
        "noise_floor",
        "feature_rms",
        "update_rms",
        "backward_rms",
        "valid",
        "nonfinite",
        "count",
    )

    @property
    def update_dot_backward(self) -> Tensor:
        """Sum of df b: the first-order change of the loss through this layer.

        At a cut it is -D, D the aligned decrease: <b, df> = sum over the parameters below of <g, dw> = -D (section 2,
        identity).
        """
        return self._sum("update_dot_backward")

    @property
    def update_sq(self) -> Tensor:
        """Sum of df^2, of the values as stored, rounding noise included."""
        return self._sum("update_sq")

    @property
    def backward_sq(self) -> Tensor:
        """Sum of b^2."""
        return self._sum("backward_sq")

    @property
    def before_sq(self) -> Tensor:
        """Sum of f^2."""
        return self._sum("before_sq")

    @property
    def before_dot_update(self) -> Tensor:
        """Sum of f df."""
        return self._sum("before_dot_update")

    @property
    def abs_update_dot_backward(self) -> Tensor:
        """Sum of |df b|: the terms of the dot product without cancellation."""
        return self._sum("abs_update_dot_backward")

    @property
    def rounding_sq(self) -> Tensor:
        """Sum of (ulp(f)^2 + ulp(f')^2) / 12: the expected contribution of rounding to update_sq.

        ulp is the spacing of the storage dtype at the value. The estimate assumes that both roundings are independent.
        """
        return self._sum("rounding_sq")

    @property
    def update_norm(self) -> Tensor:
        """|df|. At a cut |df| = D / (cos(angle) |b|): the feature speed formula (section 2)."""
        return self.update_sq.sqrt()

    @property
    def backward_norm(self) -> Tensor:
        """|b|."""
        return self.backward_sq.sqrt()

    @property
    def feature_norm(self) -> Tensor:
        """|f|."""
        return self.before_sq.sqrt()

    @property
    def update_rms(self) -> Tensor:
        """rms(df) = |df| / sqrt(count): the feature speed (section 1). nan for an empty layer."""
        return self._rms(self.update_sq)

    @property
    def backward_rms(self) -> Tensor:
        """rms(b) = |b| / sqrt(count)."""
        return self._rms(self.backward_sq)

    @property
    def feature_rms(self) -> Tensor:
        """rms(f) = |f| / sqrt(count)."""
        return self._rms(self.before_sq)

    @property
    def relative_update(self) -> Tensor:
        """|df| / |f|. inf where only f is zero, nan where both are."""
        return (self.update_sq / self.before_sq).sqrt()

    @property
    def cos_angle(self) -> Tensor:
        """Cosine of the backward-feature angle: -<df, b> / (|df| |b|), in [-1, 1] (section 1).

        With respect to -b: 1 is steepest descent. nan where df or b is zero or not finite.
        """
        return cosine(-self.update_dot_backward, self.update_sq, self.backward_sq)

    @property
    def angle(self) -> Tensor:
        """Backward-feature angle, between df and -b, in radians: 0 to pi (section 1). nan as for `cos_angle`."""
        return self.cos_angle.acos()

    @property
    def radial_update(self) -> Tensor:
        """<f, df> / |f|^2: relative growth of the features."""
        return self.before_dot_update / self.before_sq

    @property
    def tangential_update(self) -> Tensor:
        """|df - (radial_update) f| / |f|: the component of the relative update across the features.

        relative_update^2 is radial_update^2 + tangential_update^2.
        """
        return (self.relative_update.square() - self.radial_update.square()).clamp_min(0.0).sqrt()

    @property
    def dot_conditioning(self) -> Tensor:
        """|<df, b>| / sum |df b|, in [0, 1]: near 0, almost all terms of the dot product cancel."""
        return self.update_dot_backward.abs() / self.abs_update_dot_backward

    @property
    def noise_floor(self) -> Tensor:
        """sqrt(rounding_sq) / |f|: the relative update that rounding alone would show."""
        return (self.rounding_sq / self.before_sq).sqrt()

    @property
    def valid(self) -> Tensor:
        """Whether |df| and the angle are accurate: bool.

        True if everything is finite, df and b are not zero, and update_sq >= 25 rounding_sq: rounding noise below a
        fifth of the update, so that |df| is accurate to about 2%. Rounding noise averages out of the dot product.
        """
        finite = (self._sum("nonfinite") == 0) & self.sums.isfinite().all(dim=-1)
        nonzero = (self.update_sq > 0) & (self.backward_sq > 0)
        return finite & nonzero & (self.update_sq >= 25 * self.rounding_sq)
