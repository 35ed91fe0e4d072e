"""Samples of the elements of tensors, by which writes to them are detected later.

A write through ``.data`` changes neither the identity of a tensor nor its version or address, so the content has to be
compared: up to 64 elements of each tensor, gathered by one concatenation per device and dtype. A write that leaves
these elements unchanged is not detected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from fastfs._network.placements import local, version

__all__ = ["ELEMENTS", "Fingerprint", "Places", "Samples", "Views", "real"]

ELEMENTS = 64
"""Number of elements of a tensor that are sampled, at most."""

KEPT = 2**26
"""Bytes of tensors up to which views of them are kept between steps, which keeps their memory, too."""

_PLAIN = {Tensor}
_OF_NUMPY = (
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def real(tensor: Tensor) -> Tensor:
    """Returns the real numbers that this rank holds of a tensor: its local part, complex numbers as pairs."""
    tensor = local(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach() if tensor.requires_grad else tensor


def readable(tensor: Tensor) -> bool:
    """Returns whether the tensor has elements in memory that can be sampled."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta or not tensor.numel():
        return False
    return tensor.data_ptr() != 0


Pick = Callable[[], Tensor]
"""Returns the sampled elements of a tensor of which they cannot be a view."""


@dataclass
class _Block:
    """The tensors of one device and dtype.

    Attributes:
        device, dtype: Of the tensors.
        order: Indices of the tensors, ascending.
        pick: For each tensor a function that returns its sampled elements.
        width: Largest number of sampled elements of a tensor.
        index: (P, width) indices into the flat samples followed by a zero; None if the samples are rows of that width.
        zero: That zero.
        place: `order` on the device.
    """

    device: torch.device
    dtype: torch.dtype
    order: list[int] = field(default_factory=list)
    pick: list[Callable[[Tensor], Tensor | Pick]] = field(default_factory=list)
    width: int = ELEMENTS
    index: Tensor | None = None
    zero: Tensor = field(default_factory=lambda: torch.zeros(1))
    place: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


class Places:
    """The places of the sampled elements, the same for all lists of tensors of these shapes.

    Args:
        tensors: Results of :func:`real`. None, and those of which nothing can be read (sparse, nested, meta, empty,
            without memory), have no sampled elements.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.count = len(tensors)
        self.home = next((t.device for t in tensors if t is not None), torch.device("cpu"))
        self.bytes = 0
        found: dict[tuple[torch.device, torch.dtype], _Block] = {}
        sizes: dict[int, int] = {}
        for index, tensor in enumerate(tensors):
            if tensor is None or not readable(tensor):
                continue
            block = found.setdefault((tensor.device, tensor.dtype), _Block(tensor.device, tensor.dtype))
            block.order.append(index)
            block.pick.append(_picker(tensor))
            sizes[index] = min(tensor.numel(), ELEMENTS)
            self.bytes += tensor.nbytes
        self.blocks = list(found.values())
        for block in self.blocks:
            _arrange(block, sizes)
        order = [index for block in self.blocks for index in block.order]
        places = {index: place for place, index in enumerate(order)}
        self._order: Tensor | None = None
        if order != list(range(self.count)):
            rows = [places.get(index, len(order)) for index in range(self.count)]
            self._order = _on(self.home, rows)

    @property
    def whole(self) -> bool:
        """Whether all tensors are in one block."""
        return len(self.blocks) == 1 and len(self.blocks[0].order) == self.count

    def views(self, tensors: Sequence[Any]) -> list[list[Any]]:
        """Returns views of the sampled elements of tensors of these shapes, per block, for :meth:`read`."""
        return [[pick(tensors[i]) for i, pick in zip(block.order, block.pick, strict=True)] for block in self.blocks]

    def read(self, *views: list[list[Any]]) -> Samples:
        """Returns a copy of the elements in one or several lists of views."""
        flats = []
        for number, block in enumerate(self.blocks):
            parts: list[Any] = []
            for each in views:
                parts += each[number]
                if block.index is not None:
                    parts.append(block.zero)
            if not _PLAIN.issuperset(map(type, parts)):
                parts = [part() if callable(part) else part for part in parts]
            flats.append(torch.cat(parts).view(len(views), -1))
        return Samples(self, flats)

    def rows(self, number: int, flat: Tensor) -> Tensor:
        """Returns flat samples (lists, elements) of a block as float64 (lists, tensors, width), padded with zeros."""
        return self.arranged(number, flat).to(torch.float64)

    def host_rows(self, number: int, *flats: Tensor) -> Any:
        """Returns :meth:`rows` of concatenated flat samples, as an array of NumPy if they are on the host."""
        block, found = self.blocks[number], [on_host(flat) for flat in flats]
        if isinstance(found[0], Tensor):
            return self.rows(number, torch.cat(flats))
        rows = numpy.concatenate(found)
        if block.index is not None:
            rows = rows.take(block.index.numpy(), 1)
        return rows.reshape(len(rows), -1, block.width).astype(numpy.float64)

    def arranged(self, number: int, flat: Tensor) -> Tensor:
        """Returns the same as :meth:`rows` in the dtype of the samples."""
        block = self.blocks[number]
        if block.index is not None:
            flat = flat.index_select(1, block.index)
        return flat.view(flat.shape[0], -1, block.width)

    def gather(self, parts: Sequence[Tensor], missing: float = 0.0) -> Tensor:
        """Puts results of all blocks, with a row for each tensor, into the order of the tensors."""
        moved = [part.to(self.home, non_blocking=True) for part in parts]
        if self._order is None and len(moved) == 1:
            return moved[0]
        if not moved:
            return torch.full((self.count,), missing, device=self.home)
        if self._order is None:
            return torch.cat(moved)
        rest = moved[0].new_full((1, *moved[0].shape[1:]), missing)
        return torch.cat([*moved, rest]).index_select(0, self._order)


class Views:
    """Views of sampled elements, kept while the tensors stay where they are and are not large."""

    def __init__(self) -> None:
        self._of: tuple[Places | None, list[Tensor], list[int]] = (None, [], [])
        self._views: list[list[Any]] = []

    def of(self, places: Places, tensors: list[Tensor]) -> list[list[Any]]:
        """Returns the views of these tensors."""
        if places.bytes > KEPT:
            return places.views(tensors)
        pointers = [t.data_ptr() for t in tensors]
        known, last, addresses = self._of
        if known is not places or addresses != pointers or list(map(id, last)) != list(map(id, tensors)):
            views = places.views(tensors)  # a failure leaves both attributes unchanged
            self._of, self._views = (places, tensors, pointers), views
        return self._views


class Samples:
    """Elements of tensors at a moment: for each block of ``places`` a tensor (lists of views, elements)."""

    def __init__(self, places: Places, flats: list[Tensor]) -> None:
        self.places = places
        self.flats = flats

    def rows(self, number: int) -> Tensor:
        """Returns :meth:`Places.rows` of one block."""
        return self.places.rows(number, self.flats[number])

    def wide(self) -> Tensor:
        """Returns the first list of views, a row for each tensor: float64 (P, ``ELEMENTS``), padded with zeros."""
        parts = []
        for number, block in enumerate(self.places.blocks):
            parts.append(torch.nn.functional.pad(self.rows(number)[0], (0, ELEMENTS - block.width)))
        if not parts:
            return torch.zeros((self.places.count, ELEMENTS), dtype=torch.float64, device=self.places.home)
        return self.places.gather(parts)

    def bits(self) -> Tensor:
        """Returns the bits of the first list of views: int64 (P, ``ELEMENTS``), padded with zeros."""
        parts = []
        for number, (block, flat) in enumerate(zip(self.places.blocks, self.flats, strict=True)):
            rows = self.places.arranged(number, _bits(flat[:1]))[0].to(torch.int64)
            parts.append(torch.nn.functional.pad(rows, (0, ELEMENTS - block.width)))
        if not parts:
            return torch.zeros((self.places.count, ELEMENTS), dtype=torch.int64, device=self.places.home)
        return self.places.gather(parts)

    def known_same(self, other: Samples) -> bool:
        """Returns whether the other samples are known to have the same bits, without waiting for a device."""
        pairs = zip(self.flats, other.flats, strict=True)
        return self.places is other.places and all(known_equal(_bits(a), _bits(b)) for a, b in pairs)

    def changed(self, other: Samples) -> Tensor:
        """Returns which tensors have other bits in the other samples, of the same places: bool (P,)."""
        parts = []
        for number, (block, a, b) in enumerate(zip(self.places.blocks, self.flats, other.flats, strict=True)):
            if a.dtype != b.dtype:
                parts.append(torch.ones(len(block.order), dtype=torch.bool, device=a.device))
                continue
            differ = self.places.arranged(number, _bits(a) != _bits(b)).any(dim=2)
            parts.append(differ[0] if len(differ) == 1 else differ.any(dim=0))
        if not parts:
            return torch.zeros(self.places.count, dtype=torch.bool, device=self.places.home)
        return self.places.gather(parts, missing=False)


def on_host(tensor: Tensor) -> Any:
    """Returns a tensor as an array of NumPy if its elements can be read without waiting for a device, else as is."""
    return tensor.numpy() if tensor.is_cpu and tensor.dtype in _OF_NUMPY else tensor


def known_equal(a: Tensor, b: Tensor) -> bool:
    """Returns whether the elements are known to be equal, without waiting for a device."""
    return a.is_cpu and b.is_cpu and torch.equal(a, b)


class Fingerprint:
    """Identity, version, address and sampled content of tensors at a moment.

    Args:
        tensors: Tensors of any kind. The content of sparse, nested, meta and empty ones is not sampled.
        like: Another fingerprint, perhaps of the same tensors, whose places and views are then shared.
    """

    def __init__(self, tensors: Sequence[Tensor], like: Fingerprint | None = None) -> None:
        self.ids = list(map(id, tensors))
        self.versions = list(map(version, tensors))
        self._form: list[object]
        self._places: Places
        self._views: list[list[Any]]
        self._tensors = list(tensors)  # kept, since the id of a deleted tensor may be reused
        with torch.no_grad():
            reals = [real(t) for t in tensors]
            self.pointers = [t.data_ptr() if readable(t) else 0 for t in reals]
            form: list[object] = [(t.shape, t.stride() if t.layout is torch.strided else None, t.dtype) for t in reals]
            if like is not None and like._form == form and like.pointers == self.pointers:
                self._places, self._views = like._places, like._views
            else:
                self._places = Places(reals)
                self._views = self._places.views(reals)
            self._form = form
            self._samples = self._places.read(self._views)

    def changed_objects(self, other: Fingerprint) -> list[int]:
        """Returns the indices of the tensors in both fingerprints whose version or address differs."""
        theirs = dict(zip(other.ids, zip(other.versions, other.pointers, strict=True), strict=True))
        own = zip(self.ids, self.versions, self.pointers, strict=True)
        return [i for i, (key, *state) in enumerate(own) if key in theirs and tuple(state) != theirs[key]]

    def differs(self, other: Fingerprint) -> Tensor:
        """Returns whether the content of a tensor in both fingerprints differs: bool (), on the device."""
        return self.differing(other).any()

    def differing(self, other: Fingerprint) -> Tensor:
        """Returns the same for each tensor: bool (P,); False for those that are not in the other fingerprint."""
        if self._places is other._places and self.ids == other.ids:
            return self._samples.changed(other._samples)
        theirs = {key: index for index, key in enumerate(other.ids)}
        home = self._places.home
        pairs = [(i, theirs[key]) for i, key in enumerate(self.ids) if key in theirs]
        # If shape or dtype have changed, the samples are at other places.
        anew = {i for i, j in pairs if self._form[i] != other._form[j]}
        pairs = [(i, j) for i, j in pairs if i not in anew]

        def on_device(values: Sequence[int | bool], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device="cpu").to(home, non_blocking=True)

        found = on_device([i in anew for i in range(len(self.ids))], torch.bool)
        if pairs:
            own = on_device([i for i, _ in pairs], torch.int64)
            now = self._samples.bits().index_select(0, own)
            then = other._samples.bits().to(home).index_select(0, on_device([j for _, j in pairs], torch.int64))
            found = found.index_copy(0, own, (now != then).any(dim=1))
        return found


def _picker(tensor: Tensor) -> Callable[[Tensor], Tensor | Pick]:
    """Returns a function that samples tensors with the shape of this one, in the order of its memory."""
    count, distance = min(tensor.numel(), ELEMENTS), _distance(tensor)
    shape, strides = tensor.shape, tensor.stride()
    size, step = (count,), (distance,)
    contiguous, dense = tensor.is_contiguous(), _dense(tensor)

    def pick(other: Tensor) -> Tensor | Pick:
        if other.is_contiguous() if contiguous else (dense and other.stride() == strides):
            return other.as_strided(size, step)
        return lambda: other[coordinates(other.device)]

    def coordinates(device: torch.device) -> tuple[Tensor, ...]:
        """The coordinates of the same elements, for any strides."""
        places = torch.arange(0, count * distance, distance, device=device)
        order = sorted(range(len(shape)), key=lambda d: -strides[d]) if dense else range(len(shape))
        found: dict[int, Tensor] = {}
        for dim in reversed(order):
            found[dim] = places % shape[dim]
            places = places // shape[dim]
        return tuple(found[dim] for dim in range(len(shape)))

    return pick


def _distance(tensor: Tensor) -> int:
    """Distance of the sampled elements: coprime to the width, so that they are not all in one column."""
    distance = max(tensor.numel() // ELEMENTS, 1)
    width = tensor.shape[-1] if tensor.dim() else 1
    while distance > 1 and math.gcd(distance, width) > 1:
        distance -= 1
    return distance


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a contiguous piece of memory, without overlap."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _arrange(block: _Block, sizes: dict[int, int]) -> None:
    """Sets how the flat samples of a block, of these sizes by index, become rows."""
    block.place = _on(block.device, block.order)
    block.width = max(sizes[i] for i in block.order)
    end = sum(sizes[i] for i in block.order)
    if end == block.width * len(block.order):
        return
    index: list[int] = []
    begin = 0
    for i in block.order:
        index += [*range(begin, begin + sizes[i]), *([end] * (block.width - sizes[i]))]
        begin += sizes[i]
    block.zero = torch.zeros(1, dtype=block.dtype, device=block.device)
    block.index = _on(block.device, index)


def _on(device: torch.device, values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def _bits(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else x.view(_BITS[x.element_size()])
