"""The gradients of an optimizer at a moment: the tensors, their versions, and samples of all or of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture import fingerprints
from fastfs._monitor.capture.fingerprints import KEPT, Places, Samples, real
from fastfs._network.placements import is_distributed, local, spread, version

__all__ = ["GradientSampler", "GradientSnapshot", "same"]

_PLAIN = {Tensor, type(None)}
_REPRESENTATIVES = 8  # gradients that are sampled in the place of all, at most


@dataclass
class GradientSnapshot:
    """The gradients at a moment, with samples of their elements.

    Attributes:
        tensors: The gradient of every parameter, None where there is none.
        versions: Versions of those tensors.
        formats: Dtypes of the dense ones, layouts of the others.
        key: The same object as long as the parameters, and formats and shapes of their gradients, are the same.
        places: Places of the samples in all gradients.
        views: Views of the samples, None where they are not kept.
        samples: Samples of all gradients, or of the representatives.
        representatives: Indices of the gradients that were sampled; None if all were.
    """

    tensors: list[Tensor | None]
    versions: list[int]
    formats: list[torch.dtype | torch.layout | None]
    key: list[object]
    places: Places
    views: list[list[Any]] | None
    samples: Samples
    representatives: list[int] | None = None

    @property
    def complete(self) -> bool:
        """Whether all gradients were sampled."""
        return self.representatives is None

    def resample(self) -> Samples:
        """Returns samples of the same tensors as they are now."""
        assert self.views is not None
        return self.samples.places.read(self.views)

    def written(self) -> list[int]:
        """Returns the indices of the tensors that were written to since."""
        pairs = zip(self.tensors, self.versions, strict=True)
        return [i for i, (g, before) in enumerate(pairs) if g is not None and version(g) != before]

    def all_written_since(self, earlier: GradientSnapshot) -> bool | None:
        """Returns whether gradients were written to, or replaced, since an earlier snapshot.

        Returns:
            True if all were, equally often; False if none was; None if some were.
        """
        if len(self.tensors) != len(earlier.tensors):
            return None
        found = set()
        pairs = zip(self.tensors, earlier.tensors, strict=True)
        for (now, then), after, before in zip(pairs, self.versions, earlier.versions, strict=True):
            if now is None and then is None:
                continue
            found.add(after - before if now is then else "replaced")
        if len(found) > 1:
            return None
        return found not in (set(), {0})

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Returns whether these are still the parameters' gradients, not written to since."""
        if len(parameters) != len(self.tensors):
            return False
        for p, gradient, before in zip(parameters, self.tensors, self.versions, strict=True):
            now = p.grad
            if now is not gradient or (now is not None and version(now) != before):
                return False
        return True


class GradientSampler:
    """Takes snapshots of the gradients of one optimizer's parameters."""

    def __init__(self) -> None:
        self._key: list[object] = []
        self._places = Places(())
        self._last: tuple[list[Tensor | None], list[int], list[list[Any]]] | None = None
        self._known: tuple[list[int], list[torch.dtype | torch.layout | None]] = [], []  # ids and formats in the key
        self._representatives: list[int] = []
        self._few = Places(())
        self._few_last: tuple[list[Tensor], list[int], list[list[Any]]] | None = None

    def take(
        self,
        parameters: Sequence[Tensor],
        *,
        keep: bool = False,
        complete: bool = True,
        like: GradientSnapshot | None = None,
    ) -> GradientSnapshot:
        """Returns a snapshot of the gradients.

        Args:
            parameters: The parameters.
            keep: Keep what resampling takes, also of large tensors.
            complete: Sample all gradients; else the representatives, if there are any for such gradients.
            like: The last snapshot, perhaps of the same tensors.
        """
        gradients = [p.grad for p in parameters]
        versions = [0 if g is None else version(g) for g in gradients]
        with torch.no_grad():
            if (
                not complete
                and like is not None
                and like.representatives is self._representatives
                and like.key is self._key
                and len(gradients) == len(like.tensors)
                and all(map(same, gradients, like.tensors))
            ):
                found = self._take_few(gradients, versions, like.formats)
                if found is not None:
                    return found
            formats = [None if g is None else g.dtype if g.layout is torch.strided else g.layout for g in gradients]
            if not complete and self._representatives and self._known == (list(map(id, parameters)), formats):
                found = self._take_few(gradients, versions, formats)
                if found is not None:
                    return found
            plain, different = gradients, set(formats)
            if any(isinstance(each, torch.layout) for each in different):
                pairs = zip(formats, gradients, strict=True)
                plain = [None if isinstance(each, torch.layout) else g for each, g in pairs]
            odd = any(isinstance(each, torch.dtype) and each.is_complex for each in different)
            if odd or not _PLAIN.issuperset(map(type, plain)):
                plain = [None if g is None else real(g) for g in plain]
            self._refresh(parameters, plain, formats)
            pointers = [0 if g is None else g.data_ptr() for g in plain]
            last = self._last
            if last is not None and last[1] == pointers and all(map(same, last[0], gradients)):
                views = last[2]
            else:
                views = self._places.views(plain)
            kept = keep or self._places.bytes <= KEPT
            self._last = (gradients, pointers, views) if kept else None
            return GradientSnapshot(
                gradients, versions, formats, self._key, self._places, views if kept else None, self._places.read(views)
            )

    def choose_representatives(self, snapshot: GradientSnapshot) -> None:
        """Chooses from a complete snapshot the gradients to sample from now on: large and small ones, first and last.

        On the host those whose samples are all zero are left out. On a device that is not known; a common factor is
        not found if the samples of all representatives are zero.
        """
        self._representatives = []
        if any(isinstance(each, torch.layout) for each in snapshot.formats):
            return
        filled: list[int] = []
        for number, block in enumerate(snapshot.places.blocks):
            flat = fingerprints.on_host(snapshot.samples.flats[number])
            if isinstance(flat, Tensor):
                filled += block.order
            else:
                rows = snapshot.places.arranged(number, snapshot.samples.flats[number])[0]
                nonzero = rows.ne(0).any(dim=1).tolist()
                filled += [index for index, any_ in zip(block.order, nonzero, strict=True) if any_]
        if not filled:
            return
        filled.sort()
        by_size = sorted(filled, key=lambda i: local(snapshot.tensors[i]).numel())  # type: ignore[arg-type]
        chosen = [filled[0], filled[-1], *by_size[-2:], *by_size[:2], *by_size[:: max(len(by_size) // 3, 1)]]
        self._representatives = sorted(list(dict.fromkeys(chosen))[:_REPRESENTATIVES])
        self._few = Places([real(snapshot.tensors[i]) for i in self._representatives])  # type: ignore[arg-type]
        self._few_last = None

    def _take_few(
        self,
        gradients: list[Tensor | None],
        versions: list[int],
        formats: list[torch.dtype | torch.layout | None],
    ) -> GradientSnapshot | None:
        """Samples the representatives; None if they have to be converted first."""
        chosen: list[Tensor] = [local(gradients[i]) for i in self._representatives]  # type: ignore[arg-type]
        if not _PLAIN.issuperset(map(type, chosen)):
            return None
        if any(formats[i].is_complex for i in self._representatives):  # type: ignore[union-attr]
            return None
        pointers = [g.data_ptr() for g in chosen]
        last = self._few_last
        if last is not None and last[1] == pointers and all(map(same, last[0], chosen)):
            views = last[2]
        else:
            views = self._few.views([g.detach() if g.requires_grad else g for g in chosen])
            self._few_last = chosen, pointers, views
        samples = self._few.read(views)
        return GradientSnapshot(
            gradients, versions, formats, self._key, self._places, views, samples, self._representatives
        )

    def forget(self) -> None:
        """Releases the gradients."""
        self._last = self._few_last = None

    def _refresh(self, parameters: Sequence[Tensor], plain: Sequence[Tensor | None], formats: Sequence[Any]) -> None:
        """Chooses the places anew if parameters, formats or shapes are others than last time."""
        key = [*map(id, parameters), *formats, *(None if g is None else g.shape for g in plain)]
        key += [p.dtype for p in parameters]
        key += [spread(g) for p in parameters if (g := p.grad) is not None and is_distributed(g)]
        if key != self._key:
            self._key = key
            self._known = list(map(id, parameters)), list(formats)
            self._representatives = []
            self._places = Places([None if g is None else real(p) for p, g in zip(parameters, plain, strict=True)])
            self._last = None


def same(a: object, b: object) -> bool:
    return a is b
