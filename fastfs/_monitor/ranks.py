"""Where this process stands among those of the run, and what they decide together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._monitor.pipeline import StageLink, check_pipeline
from fastfs._network import placements
from fastfs._record.ranks.part import Place, Share
from fastfs._record.ranks.run_store import RankError, RunStore

__all__ = ["Ranks", "Weight", "in_a_group"]

Weight = float | Callable[[], float] | None
"""w in "gradient used = w times the sum over ranks of their gradients": a number, or a function that returns it."""

_ATTACH_SECONDS = 120.0  # longest time to wait for the other ranks when the monitor is attached


class Ranks:
    """The ranks of the run. A process without a group is a run of one rank.

    Args:
        model: The module that the training loop calls.
        names: The parameters that the optimizers update, by name.
        weight: w as the user declares it; None to take it from the wrappers of the model.
        own: Regular expression on the names of parameters of which every rank holds its own; None for none.
        timeout: Longest time to wait for another rank, in seconds.
        pipeline: The stage of a pipeline that the model is; None without a pipeline.

    Attributes:
        link: To the neighbours of the stage; None without a pipeline.
        store: Keys shared with the other ranks; None for a run of one rank.
        together: Whether second forwards run collectives, so that all ranks have to take part.
        meetings: How often this rank has been asked before a step, whatever it has answered.

    Raises:
        RankError: The store of the process group does not answer, or other ranks do not attach.
        ValueError: A parameter, or the model, is spread over ranks in a way that cannot be measured.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, Tensor],
        weight: Weight,
        own: str | None,
        timeout: float,
        pipeline: Any = None,
    ) -> None:
        if pipeline is not None:
            check_pipeline(pipeline, model)
        self.link = None if pipeline is None else StageLink(pipeline)
        self._model = model
        self._own = None if own is None else re.compile(own)
        self._weight = weight
        self._kinds: Tensor | None = None  # bool (P, C) on the host
        self._on_device: Tensor | None = None
        self._names: dict[str, Tensor] = {}
        self._summed: list[int] = []
        self.store: RunStore | None = None
        self.together = self._gathers = False
        self.meetings = 0
        self._asked: tuple[int, int] = (-1, 0)  # the last step before which it was, and how often: closures repeat
        self._meeting: str | None = None  # the step that all ranks have agreed to measure
        self.place = Place(weight=self._given_weight())
        if in_a_group():
            placements.check_model(model)
            placements.check_parameters(names)
            distributed = torch.distributed
            ranks = tuple(range(distributed.get_world_size()))
            rank = distributed.get_rank()
            self.place = replace(self.place, rank=rank, ranks=ranks, peers=_peers(model, names, rank))
            apart = self.link is not None or own is not None or bool(_ignored(model))
            self.together = self._gathers = apart or placements.replay_needs_ranks(model)
            if self.link is not None:
                self.place = replace(self.place, stage=self.link.number, stages=self.link.stages)
            self.store = RunStore(ranks, rank, timeout)
        self.note_parameters(names)

    def attach(self, layers: Sequence[str]) -> list[str]:
        """Waits until all ranks have attached a monitor, if they have to measure together or have layers of their own.

        Args:
            layers: Names of the layers that this rank watches.

        Returns:
            Names of the layers of the record, stage by stage.

        Raises:
            RankError: A rank has not attached one; the message names it.
        """
        if not self._gathers or self.store is None:
            return list(layers)
        store = self.store.other_connection()
        store.timeout = _ATTACH_SECONDS
        try:
            answers = [json.loads(each) for each in store.gather("attach", json.dumps([self.place.stage, *layers]))]
        except RankError as error:
            raise RankError(
                f"fastfs.Monitor: {error}: the ranks measure {type(self._model).__name__} together, so every rank has "
                "to attach a Monitor"
            ) from None
        names = list(dict.fromkeys(name for _, *own in sorted(answers, key=lambda each: each[0]) for name in own))
        if names != list(layers):
            places = {name: number for number, name in enumerate(names)}
            self.place = replace(self.place, layers=tuple(places[name] for name in layers))
        return names

    def release(self) -> None:
        """Undoes the attachment, which has failed."""
        if self.store is not None:
            self.store.release()

    # Parameters

    @property
    def alone(self) -> bool:
        """Whether the run has one rank."""
        return len(self.place.ranks) == 1

    def note_parameters(self, names: Mapping[str, Tensor]) -> None:
        """Notes how the parameters are spread over the ranks."""
        self._names = dict(names)
        self._summed = []
        self._note_shares()

    def note_summed(self, indices: Sequence[int]) -> None:
        """Notes the parameters whose gradients are sums over ranks, of which this one has a summand."""
        if indices != self._summed:
            self._summed = list(indices)
            self._note_shares()

    def _note_shares(self) -> None:
        found: dict[Share, int] = {}
        summed = set(self._summed)
        numbers = [
            found.setdefault(self._share(name, p, number in summed), len(found))
            for number, (name, p) in enumerate(self._names.items())
        ]
        self.place = replace(self.place, shares=tuple(found) or (Share("", 1, 0),))
        self._on_device = None
        self._kinds = None
        if len(found) > 1:
            self._kinds = torch.tensor(numbers)[:, None] == torch.arange(len(found))

    def kinds(self, device: torch.device) -> Tensor | None:
        """Returns which parameters are of each kind of `Place.shares`, bool (P, C); None if all are of one."""
        if self._kinds is not None and (self._on_device is None or self._on_device.device != device):
            self._on_device = self._kinds.to(device, non_blocking=True)
        return self._on_device

    def _share(self, name: str, parameter: Tensor, summed: bool) -> Share:
        rank, ranks = self.place.rank, self.place.ranks
        if len(ranks) > 1 and (name in _ignored(self._model) or (self._own is not None and self._own.search(name))):
            return Share(f"own:{len(ranks)}", len(ranks), ranks.index(rank))
        found = placements.shard_class(parameter)
        if not summed or parameter.grad is None:
            return Share(found.key, found.shards, found.shard)
        count, which = placements.summand(parameter, parameter.grad) or (1, 0)
        key = f"{found.key}, sums of {count}"
        return Share(key, found.shards * count, found.shard * count + which, count)

    # The weight

    def refresh(self) -> Place:
        """Returns the place of this rank, with the weight as it is at this step."""
        if callable(self._weight):
            self.place = replace(self.place, weight=self._given_weight())
        return self.place

    def _given_weight(self) -> float | None:
        value = self._weight() if callable(self._weight) else self._weight
        if value is None:
            return placements.gradient_average(self._model) if in_a_group() else 1.0
        number = float(value)
        if not math.isfinite(number) or number <= 0:
            raise ValueError(f"loss_weight: expected a positive number, got {value!r}")
        return number

    # Agreement

    def meet(self, step: int, vote: str, refusal: str | None = None) -> None:
        """Decides with the other ranks, before the optimizers step, whether to measure a step together.

        Args:
            step: Number of the step.
            vote: What the ranks have to have in common.
            refusal: Why this rank cannot; None if it can.

        Raises:
            RankError: The step is not measured; the message says why.
        """
        self.meetings += 1
        self._meeting = None
        self._asked = (step, self._asked[1] + 1 if self._asked[0] == step else 0)
        if not self.together or self.store is None:
            return
        name = f"{step}/{self._asked[1]}"
        self._decide(f"{name}/before", vote, refusal)
        self._meeting = name

    def meet_again(self, refusal: str | None = None) -> None:
        """Decides once more, after the optimizers have stepped, if all had agreed before.

        Raises:
            RankError: The step is not measured; the message says why.
        """
        name, self._meeting = self._meeting, None
        if name is not None:
            self._decide(f"{name}/after", "", refusal)

    def _decide(self, name: str, vote: str, refusal: str | None) -> None:
        assert self.store is not None
        try:
            reason = self.store.decide(name, vote, refusal)
        except Exception as error:
            raise RankError(f"the ranks could not agree to measure ({type(error).__name__}: {error})") from error
        if reason is not None:
            raise RankError(reason)


def in_a_group() -> bool:
    """Returns whether this process is one of several in a process group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _ignored(model: nn.Module) -> set[str]:
    """Returns the names of parameters that DistributedDataParallel leaves alone: every rank has its own."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return set(model.parameters_to_ignore)
    return set()


def _peers(model: nn.Module, names: Mapping[str, Tensor], rank: int) -> tuple[int, ...]:
    """Returns the ranks that hold parts of the same copy of the model: those along axes that are not data-parallel."""
    data = set(placements.data_ranks(model) or ())
    found = {rank}
    meshes: list[Any] = [getattr(p, "device_mesh", None) for p in names.values() if placements.is_distributed(p)]
    for mesh in {id(mesh): mesh for mesh in meshes}.values():
        coordinates = mesh.get_coordinate()
        if coordinates is None:
            continue
        place: list[Any] = list(coordinates)
        for axis in range(mesh.ndim):
            line = mesh.mesh[tuple(slice(None) if i == axis else c for i, c in enumerate(coordinates))].tolist()
            if not (len(line) > 1 and set(line) <= data):
                place[axis] = slice(None)
        found.update(mesh.mesh[tuple(place)].flatten().tolist())
    return tuple(sorted(found))


def describe(place: Place) -> dict[str, Any]:
    """Returns what the header says of the ranks."""
    if len(place.ranks) == 1:
        return {} if place.weight in (None, 1.0) else {"loss_weight": place.weight}
    kinds: Sequence[str] = [share.key for share in place.shares if share.key]
    return {"ranks": len(place.ranks), "shards": list(kinds), "loss_weight": place.weight}
