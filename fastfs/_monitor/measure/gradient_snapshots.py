"""Looks at gradients: which tensors they are, their versions, and a few elements of each, or of a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastfs._monitor.capture import fingerprints
from fastfs._monitor.capture.fingerprints import KEPT, Places, Samples, real

__all__ = ["GradientSnapshot", "Gradients", "same"]

_PLAIN = {Tensor, type(None)}
_WITNESSES = 8  # that stand for all gradients, at most


@dataclass
class GradientSnapshot:
    """Gradients at a moment: which tensors, and samples of them.

    Attributes:
        gradients: of every parameter, None where there is none.
        versions: of those tensors.
        kinds: dtypes of the dense ones, layouts of others.
        key: the same object as long as parameters, and kinds and shapes of their gradients, are the same.
        places: of all gradients.
        samples: of all gradients, or of the witnesses.
        witnesses: their indices; None where all were looked at.
    """

    gradients: list[Tensor | None]
    versions: list[int]
    kinds: list[torch.dtype | torch.layout | None]
    key: list[object]
    places: Places
    views: list[list[Any]] | None
    samples: Samples
    witnesses: list[int] | None = None

    @property
    def complete(self) -> bool:
        return self.witnesses is None

    def again(self) -> Samples:
        """Samples of the same tensors now."""
        assert self.views is not None
        return self.samples.places.read(self.views)

    def written(self) -> list[int]:
        """Indices of the tensors whose version is another one now."""
        pairs = zip(self.gradients, self.versions, strict=True)
        return [i for i, (g, version) in enumerate(pairs) if g is not None and g._version != version]

    def treated(self, other: GradientSnapshot) -> bool | None:
        """Whether all gradients have been written to, or replaced, since the other look; None if some of them were."""
        if len(self.gradients) != len(other.gradients):
            return None
        found = set()
        pairs = zip(self.gradients, other.gradients, strict=True)
        for (own, theirs), version, before in zip(pairs, self.versions, other.versions, strict=True):
            if own is None and theirs is None:
                continue
            found.add(version - before if own is theirs else "another")
        if len(found) > 1:
            return None
        return found not in (set(), {0})

    def is_of(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameters' gradients are the same tensors, not written to since."""
        if len(parameters) != len(self.gradients):
            return False
        for p, gradient, version in zip(parameters, self.gradients, self.versions, strict=True):
            now = p.grad
            if now is not gradient or (now is not None and now._version != version):
                return False
        return True


class Gradients:
    """Looks at the gradients of one optimizer's parameters."""

    def __init__(self) -> None:
        self._key: list[object] = []
        self._places = Places(())
        self._last: tuple[list[Tensor | None], list[int], list[list[Any]]] | None = None
        self._known: tuple[list[int], list[torch.dtype | torch.layout | None]] = [], []  # the key's ids and kinds
        self._witnesses: list[int] = []
        self._few = Places(())
        self._few_last: tuple[list[Tensor], list[int], list[list[Any]]] | None = None

    def look(
        self,
        parameters: Sequence[Tensor],
        *,
        keep: bool = False,
        complete: bool = True,
        like: GradientSnapshot | None = None,
    ) -> GradientSnapshot:
        """The gradients now.

        Args:
            parameters: whose.
            keep: keep what it takes to look at the same tensors again; else only where they are small.
            complete: look at all of them; else at the witnesses, if there are any for such gradients.
            like: the last look, perhaps at the same tensors.
        """
        gradients = [p.grad for p in parameters]
        versions = [0 if g is None else g._version for g in gradients]
        with torch.no_grad():
            if (
                not complete
                and like is not None
                and like.witnesses is self._witnesses
                and like.key is self._key
                and len(gradients) == len(like.gradients)
                and all(map(same, gradients, like.gradients))
            ):
                found = self._glance(gradients, versions, like.kinds)
                if found is not None:
                    return found
            kinds = [None if g is None else g.dtype if g.layout is torch.strided else g.layout for g in gradients]
            if not complete and self._witnesses and self._known == (list(map(id, parameters)), kinds):
                found = self._glance(gradients, versions, kinds)
                if found is not None:
                    return found
            plain, different = gradients, set(kinds)
            if any(isinstance(kind, torch.layout) for kind in different):
                pairs = zip(kinds, gradients, strict=True)
                plain = [None if isinstance(kind, torch.layout) else g for kind, g in pairs]
            odd = any(isinstance(kind, torch.dtype) and kind.is_complex for kind in different)
            if odd or not _PLAIN.issuperset(map(type, plain)):
                plain = [None if g is None else real(g) for g in plain]
            self._refresh(parameters, plain, kinds)
            pointers = [0 if g is None else g.data_ptr() for g in plain]
            last = self._last
            if last is not None and last[1] == pointers and all(map(same, last[0], gradients)):
                views = last[2]
            else:
                views = self._places.views(plain)
            kept = keep or self._places.bytes <= KEPT
            self._last = (gradients, pointers, views) if kept else None
            return GradientSnapshot(
                gradients, versions, kinds, self._key, self._places, views if kept else None, self._places.read(views)
            )

    def choose(self, look: GradientSnapshot) -> None:
        """Witnesses for the looks to come, from a complete one: large and small ones, the first and the last.

        On the host those whose elements are all zero are left out. On a device that is not known: there a factor is
        not found if they all are.
        """
        self._witnesses = []
        if any(isinstance(kind, torch.layout) for kind in look.kinds):
            return
        filled: list[int] = []
        for number, block in enumerate(look.places.blocks):
            flat = fingerprints.on_host(look.samples.flats[number])
            if isinstance(flat, Tensor):
                filled += block.order
            else:
                there = look.places.arranged(number, look.samples.flats[number])[0].ne(0).any(dim=1).tolist()
                filled += [index for index, any_ in zip(block.order, there, strict=True) if any_]
        if not filled:
            return
        filled.sort()
        by_size = sorted(filled, key=lambda i: look.gradients[i].numel())  # type: ignore[union-attr]
        chosen = [filled[0], filled[-1], *by_size[-2:], *by_size[:2], *by_size[:: max(len(by_size) // 3, 1)]]
        self._witnesses = sorted(list(dict.fromkeys(chosen))[:_WITNESSES])
        self._few = Places([real(look.gradients[i]) for i in self._witnesses])  # type: ignore[arg-type]
        self._few_last = None

    def _glance(
        self,
        gradients: list[Tensor | None],
        versions: list[int],
        kinds: list[torch.dtype | torch.layout | None],
    ) -> GradientSnapshot | None:
        if not _PLAIN.issuperset(map(type, gradients)):
            return None
        chosen: list[Tensor] = [gradients[i] for i in self._witnesses]  # type: ignore[misc]
        if any(kinds[i].is_complex for i in self._witnesses):  # type: ignore[union-attr]
            return None
        pointers = [g.data_ptr() for g in chosen]
        last = self._few_last
        if last is not None and last[1] == pointers and all(map(same, last[0], chosen)):
            views = last[2]
        else:
            views = self._few.views([g.detach() if g.requires_grad else g for g in chosen])
            self._few_last = chosen, pointers, views
        samples = self._few.read(views)
        return GradientSnapshot(gradients, versions, kinds, self._key, self._places, views, samples, self._witnesses)

    def forget(self) -> None:
        """Let go of the gradients."""
        self._last = self._few_last = None

    def _refresh(self, parameters: Sequence[Tensor], plain: Sequence[Tensor | None], kinds: Sequence[Any]) -> None:
        key = [*map(id, parameters), *kinds, *(None if g is None else g.shape for g in plain)]
        key += [p.dtype for p in parameters]
        if key != self._key:
            self._key = key
            self._known = list(map(id, parameters)), list(kinds)
            self._witnesses = []
            self._places = Places([None if g is None else real(p) for p, g in zip(parameters, plain, strict=True)])
            self._last = None


def same(a: object, b: object) -> bool:
    return a is b
