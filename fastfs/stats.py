"""FeatureStats and UpdateStats: sums of products in, derived quantities out.

Every statistic is a sum over elements, so that parts (micro-batches, ranks, shards, rows) merge exactly by adding;
ratios and angles are taken last, from the total. See the properties for the formulas. In them, of one layer:
f and f' are the features before and after the update of the parameters, df = f' - f, b the backward vector
dLoss/df, g the gradient of a parameter, dw its update. Sections are those of "The Feature Speed Formula"
(Chizat and Netrapalli, arXiv 2311.18718) and of the notes in docs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastfs.text import table

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class Stats:
    """Named sums in the last dimension of one float64 tensor: shape (*shape, len(names)).

    Base of `FeatureStats` and `UpdateStats`. Objects compare equal when all sums are equal (NaN equals NaN);
    comparing, printing and `to_dict` wait for the device, nothing else does.
    """

    __slots__ = ("sums",)
    __hash__ = None  # type: ignore[assignment]

    names: ClassVar[tuple[str, ...]]
    derived: ClassVar[tuple[str, ...]]
    columns: ClassVar[tuple[str, ...]]  # of the table that repr shows

    sums: Tensor

    def __init__(self, sums: Tensor) -> None:
        if sums.dtype != torch.float64 or sums.dim() == 0 or sums.shape[-1] != len(self.names):
            raise ValueError(
                f"{type(self).__name__}: expected a float64 tensor of shape (..., {len(self.names)}), "
                f"got {sums.dtype} of shape {tuple(sums.shape)}"
            )
        self.sums = sums

    # Shape and parts

    @property
    def shape(self) -> torch.Size:
        """Shape of every quantity: () for one tensor, (L,) for L layers, (rows,) for the rows of a layer."""
        return self.sums.shape[:-1]

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self.sums.device

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{type(self).__name__} of shape () has no len(): it describes one tensor")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Self:
        """Part of the layers or rows, with the indices that a tensor of the same shape takes; shares memory."""
        key = (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))
        return type(self)(self.sums[key])

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def total(self) -> Self:
        """All layers (or rows) merged into one: shape ()."""
        return type(self)(self.sums.reshape(-1, len(self.names)).sum(dim=0))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same sums on another device."""
        return type(self)(self.sums.to(device, non_blocking=non_blocking))

    def clone(self) -> Self:
        """A copy that shares no memory with this object."""
        return type(self)(self.sums.clone())

    # Merging

    def __add__(self, other: object) -> Self:
        """The statistics of both parts together, exactly those of the concatenated data (up to rounding in float64).

        Raises:
            ValueError: if the shapes differ.
        """
        if isinstance(other, int) and other == 0:  # the start value of sum()
            return self
        if type(other) is not type(self):
            return NotImplemented
        if other.shape != self.shape:
            name = type(self).__name__
            raise ValueError(f"cannot add {name} of shape {tuple(other.shape)} to {name} of shape {tuple(self.shape)}")
        return type(self)(self.sums + other.sums)

    __radd__ = __add__

    def all_reduce(self, group: ProcessGroup | None = None) -> Self:
        """The sum over all ranks of the group, on every rank, as a new object: one all-reduce of float64.

        Every rank must call it with the same shape. With data-parallel training the backward vector of a rank is
        that of its local mean loss; see the notes on scaling before reading angles across ranks.
        """
        import torch.distributed as dist

        sums = self.sums.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(sums, group=group)
        return type(self)(sums)

    # Reading

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        theirs = other.sums.to(self.device)
        return self.shape == other.shape and torch.allclose(self.sums, theirs, rtol=0, atol=0, equal_nan=True)

    def to_dict(self) -> dict[str, Any]:
        """All sums and derived quantities as plain Python numbers (shape ()) or nested lists, in one transfer.

        Floats may be nan or inf, which strict JSON does not have.
        """
        here = self.to("cpu")
        return {name: getattr(here, name).tolist() for name in (*self.names, *self.derived)}

    def __repr__(self) -> str:
        title = f"{type(self).__name__}(shape={tuple(self.shape)}, device={self.device})"
        if self.sums.is_meta or isinstance(self.sums, FakeTensor):  # no data
            return title
        return "\n".join([title, *table(self.to_dict(), self.columns, self.shape)])

    def _sum(self, name: str) -> Tensor:
        return self.sums[..., self.names.index(name)]

    def _count(self, name: str) -> Tensor:
        return self._sum(name).to(torch.int64)

    def _rms(self, squares: Tensor) -> Tensor:
        return (squares / self._sum("count")).sqrt()

    @property
    def nonfinite(self) -> Tensor:
        """Entries of all input tensors that are NaN or Inf: int64."""
        return self._count("nonfinite")

    @property
    def count(self) -> Tensor:
        """Elements of one of the input tensors: int64."""
        return self._count("count")


class FeatureStats(Stats):
    """How the features of layers moved, and how the move is aligned with the backward pass.

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
        """Sum of |df b|: what the dot product is made of, before cancellation."""
        return self._sum("abs_update_dot_backward")

    @property
    def rounding_sq(self) -> Tensor:
        """Sum of (ulp(f)^2 + ulp(f')^2) / 12: what rounding f and f' to their dtype alone adds to update_sq.

        ulp is the spacing of the storage dtype at the value. The estimate takes the two roundings as independent.
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

        Against -b, so 1 is a move straight down the loss. nan where df or b is zero or not finite.
        """
        return _cosine(-self.update_dot_backward, self.update_sq, self.backward_sq)

    @property
    def angle(self) -> Tensor:
        """Backward-feature angle, between df and -b, in radians: 0 to pi (section 1). nan as for `cos_angle`."""
        return self.cos_angle.acos()

    @property
    def radial_update(self) -> Tensor:
        """<f, df> / |f|^2: relative growth of the features; what is left of relative_update turns them."""
        return self.before_dot_update / self.before_sq

    @property
    def dot_conditioning(self) -> Tensor:
        """|<df, b>| / sum |df b|, in [0, 1]: near 0 the dot product is the small rest of a large cancellation."""
        return self.update_dot_backward.abs() / self.abs_update_dot_backward

    @property
    def noise_floor(self) -> Tensor:
        """sqrt(rounding_sq) / |f|: the relative update that rounding alone would show."""
        return (self.rounding_sq / self.before_sq).sqrt()

    @property
    def valid(self) -> Tensor:
        """Can |df| and the angle be trusted? bool.

        True if everything is finite, df and b are not zero, and update_sq >= 25 rounding_sq: rounding noise below a
        fifth of the update, so that |df| is right to about 2%. The dot product needs no such care, since rounding
        noise averages out of it.
        """
        finite = (self._sum("nonfinite") == 0) & self.sums.isfinite().all(dim=-1)
        nonzero = (self.update_sq > 0) & (self.backward_sq > 0)
        return finite & nonzero & (self.update_sq >= 25 * self.rounding_sq)


class UpdateStats(Stats):
    """How the updates of parameters are aligned with their gradients.

    Args:
        sums: float64 tensor (..., 5), columns as in `names`.
    """

    __slots__ = ()
    names = ("dot", "update_sq", "gradient_sq", "nonfinite", "count")
    derived = (
        "aligned_decrease",
        "update_norm",
        "gradient_norm",
        "update_rms",
        "gradient_rms",
        "cos_angle",
        "angle",
    )
    columns = ("aligned_decrease", "angle", "cos_angle", "update_rms", "gradient_rms", "nonfinite", "count")

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
        return _cosine(-self.dot, self.update_sq, self.gradient_sq)

    @property
    def angle(self) -> Tensor:
        """Angle between the update and -g, in radians: 0 to pi. nan at zero vectors."""
        return self.cos_angle.acos()


def _cosine(dot: Tensor, first_sq: Tensor, second_sq: Tensor) -> Tensor:
    """dot / (|first| |second|) within [-1, 1]; nan where a vector is zero or its square not finite."""
    norms = first_sq.sqrt() * second_sq.sqrt()
    defined = (norms > 0) & norms.isfinite()
    return torch.where(defined, dot / norms, torch.nan).clamp(-1.0, 1.0)
