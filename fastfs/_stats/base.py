"""Base class of statistics: named sums of products, merging, and conversion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastfs._utils.formatting import table

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


class Stats:
    """Named sums in the last dimension of one float64 tensor: shape (*shape, len(names)).

    Base of `FeatureStats`, `UpdateStats`, `ParameterStats`. Objects compare equal when all sums are equal (NaN equals
    NaN); only comparing, printing and `to_dict` synchronize with the device.
    """

    __slots__ = ("sums",)
    __hash__ = None  # type: ignore[assignment]

    names: ClassVar[tuple[str, ...]]
    factors: ClassVar[dict[str, tuple[str, str]]]  # of the sums of products: which two vectors, by name
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
        """Device of the sums."""
        return self.sums.device

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"{type(self).__name__} of shape () has no len(): it describes one tensor")
        return self.shape[0]

    def __getitem__(self, index: Any) -> Self:
        """Returns a part of the layers or rows, by the indices of a tensor of the same shape; shares memory."""
        key = (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))
        return type(self)(self.sums[key])

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))

    def total(self) -> Self:
        """Returns all layers (or rows) merged into one: shape ()."""
        return type(self)(self.sums.reshape(-1, len(self.names)).sum(dim=0))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Returns the same sums on another device.

        Args:
            device: The device.
            non_blocking: As of ``torch.Tensor.to``.

        Returns:
            Statistics of the same shape; they share memory with these if the device is the same.
        """
        return type(self)(self.sums.to(device, non_blocking=non_blocking))

    def clone(self) -> Self:
        """Returns a copy that shares no memory with this object."""
        return type(self)(self.sums.clone())

    # Merging

    def __add__(self, other: object) -> Self:
        """Merges two parts: the result is that of the concatenated data, up to rounding in float64.

        Args:
            other: Statistics of the same kind and shape.

        Returns:
            The merged statistics.

        Raises:
            ValueError: If the shapes differ.
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
        """Merges the statistics of all ranks of a process group, by one all-reduce of float64.

        Every rank has to call it, with the same shape. In data-parallel training the backward vector of a rank is that
        of its local mean loss; see the notes on scaling before comparing angles across ranks.

        Args:
            group: The process group; None for the default one.

        Returns:
            The merged statistics, as a new object on every rank.
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
        """Copies all sums and derived quantities to the host, in one transfer.

        Returns:
            Name to number for shape (), else to nested lists. Numbers may be nan or inf, which strict JSON lacks.
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


def cosine(dot: Tensor, first_sq: Tensor, second_sq: Tensor) -> Tensor:
    """dot / (|first| |second|) within [-1, 1]; nan where a vector is zero or its square not finite."""
    norms = first_sq.sqrt() * second_sq.sqrt()
    defined = (norms > 0) & norms.isfinite()
    return torch.where(defined, dot / norms, torch.nan).clamp(-1.0, 1.0)


def span(kind: type[Stats], *vectors: str) -> slice:
    """Finds the columns of the sums of products that contain any of some vectors; they have to be adjacent.

    Args:
        kind: The class of statistics.
        *vectors: Names of vectors, as in ``factors``.

    Returns:
        The columns.

    Raises:
        ValueError: The columns are not adjacent in the order of ``factors``, or there are none.
    """
    columns = [kind.names.index(name) for name, pair in kind.factors.items() if set(pair) & set(vectors)]
    if not columns or columns[-1] - columns[0] + 1 != len(columns):
        raise ValueError(f"{kind.__name__}: expected the sums of {', '.join(vectors)} side by side, got {columns}")
    return slice(columns[0], columns[-1] + 1)
