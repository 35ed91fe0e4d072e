"""What a monitor measures on each rank of a training run, read inside the monitor, and put together over the ranks."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import fastfs
from fastfs._network.placements import shard_classes
from tests.helpers.sharded_cases import Training, record_of, same, warned

__all__ = ["layers_of", "measured", "over_shards"]

LAYERS = r"^embed$|^head$|blocks\.\d+(\.sum)?$"


def measured(
    setup: str,
    optimizer: str = "adamw",
    steps: int = 3,
    every: int = 2,
    monitor: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains with and without a monitor, and returns what the monitor has seen on this rank.

    Args:
        setup: A name of `SETUPS`.
        optimizer: A name of `OPTIMIZERS`.
        steps: Number of steps.
        every: Every so many-th is measured.
        monitor: More arguments of the monitor.
        **options: Of the training.

    Returns:
        ``same``: whether training has the same bits, and FSDP2 the same state; ``warnings``; ``parameters``: sums
        (P, C) of every step; ``classes``: shard class of every parameter; ``reasons`` (P,) of the last step;
        ``features``: sums (L, C) of every measured step; ``codes``: why layers have no rows; ``spread`` of their
        features; ``cut``, ``why`` and ``upstream`` of the structure.
    """
    plain = Training(setup, optimizer, **options)
    internals: list[Any] = []
    for number in range(steps):
        plain.step(number)
        internals.append(internals_of(plain.model))
    watched = Training(setup, optimizer, **options)
    found: dict[str, Any] = {"parameters": [], "features": [], "codes": [], "placed": [], "internals": []}

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            arguments = {"every": every, "aligned_every": 1, "layers": LAYERS, "verbose": False, **(monitor or {})}
            with fastfs.Monitor(
                watched.model, watched.optimizer, path=record_of(folder, setup), **arguments
            ) as attached:
                engine = attached._engine
                _listen(engine, found)
                for number in range(steps):
                    watched.step(number)
                    found["internals"].append(internals_of(watched.model))
                structure = next(iter(engine.learned._structures.values()), None)
                if structure is not None:
                    found.update(cut=structure.cut, why=structure.reason, upstream=structure.counts)
                found["names"] = list(engine.capture._parameters)

    found["warnings"] = warned(train)
    found["same"] = same(plain.state(), watched.state()) and found.pop("internals") == internals
    classes, numbers = shard_classes(watched.optimizer.param_groups[0]["params"])
    found["classes"] = [classes[number] for number in numbers]
    found["ranks"] = watched.data_ranks
    dist.barrier()
    return found


def internals_of(model: nn.Module) -> list[Any]:
    """Returns what FSDP2 knows of a model: states, what is gathered, and which memory that takes."""
    found: list[Any] = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        root = state._state_ctx.iter_forward_root
        found.append((state._training_state.name, state._is_root, root is None, state._comm_ctx.all_gather_state))
        found.append((len(state._comm_ctx.post_forward_order), len(state._comm_ctx.reduce_scatter_states)))
        for group in state._fsdp_param_groups:
            found.append((group._training_state.name, group._sharded_state.name, tuple(group._post_forward_indices)))
            found.append(group._all_gather_result is None)
            for p in group.fsdp_params:
                found.append([x.untyped_storage().size() for x in p.all_gather_outputs])
                found.append(getattr(p._module_info.module, p._module_info.param_name) is p.sharded_param)
    return found


def _listen(engine: Any, found: dict[str, Any]) -> None:
    """Keeps what the parts of a measurement return."""
    take, observe = engine.parameters.take, engine.mode.observe

    def taken(device: torch.device) -> Any:
        update = take(device)
        found["parameters"].append(update.stats.sums.clone())
        found["reasons"] = update.reason.tolist()
        return update

    def observed(*arguments: Any) -> Any:
        seen = observe(*arguments)
        found["features"].append(seen.sums.stats.sums.clone())
        found["codes"].append(list(seen.absent))
        calls = [calls[0] if calls else None for calls in arguments[0].forwards[0].calls]
        found["placed"].append([None if call is None else call.placed for call in calls])
        return seen

    engine.parameters.take, engine.mode.observe = taken, observed


def over_shards(ranks: list[dict[str, Any]], step: int) -> Tensor:
    """Returns the sums over parameters of a step, (P, C): over their different shards, each of which counts once."""
    rows = []
    for index in range(len(ranks[0]["classes"])):
        shards = {rank["classes"][index].shard: rank["parameters"][step][index] for rank in ranks}
        assert len(shards) == ranks[0]["classes"][index].shards
        rows.append(torch.stack(list(shards.values())).sum(0))
    return torch.stack(rows)


def layers_of(ranks: list[dict[str, Any]], step: int) -> Tensor:
    """Returns the sums over features of a measured step, (L, C), of all ranks that hold different samples.

    Backward vectors are put on the scale of the mean over all samples.
    """
    from fastfs._stats import FeatureStats

    count = ranks[0]["ranks"]
    distance = len(ranks) // count
    total = torch.stack([rank["features"][step] for rank in ranks[::distance]]).sum(0)
    for name, power in (("update_dot_backward", 1), ("abs_update_dot_backward", 1), ("backward_sq", 2)):
        total[:, FeatureStats.names.index(name)] /= count**power
    return total
