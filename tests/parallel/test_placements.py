"""What is known of how a model is spread over ranks, without communication."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fastfs._network import placements
from fastfs._network.fully_sharded import GraphLeaves, optimized_parameters
from fastfs._network.placements import ShardClass
from tests.helpers.processes import run_ranks
from tests.helpers.sharded_cases import SETUPS, Training, mesh, net

OLD = (
    "FullyShardedDataParallel (FSDP1) cannot be measured, since its parameters are flattened and mixed: use "
    "torch.distributed.fsdp.fully_shard"
)


def described(setup: str) -> dict[str, Any]:
    """Returns what the module says of a model."""
    model, _ = SETUPS[setup](net())
    classes, numbers = placements.shard_classes(model.parameters())
    placements.check_model(model)
    placements.check_parameters(dict(model.named_parameters()))
    return {
        "classes": [(each.key, each.shards, each.shard) for each in classes],
        "first": numbers[:4],
        "replay": placements.replay_needs_ranks(model),
        "average": placements.gradient_average(model),
        "ranks": placements.data_ranks(model),
    }


def message(function: Any, *arguments: Any) -> str:
    """Returns the message of a ValueError."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def tensors() -> dict[str, Any]:
    """Single tensors: local parts, versions, and what is refused."""
    over = mesh(2, 2, names=("a", "b"))
    weight = nn.Parameter(distribute_tensor(torch.arange(5.0), over, [Shard(0), Shard(0)]))
    before = placements.version(weight)
    with torch.no_grad():
        weight.add_(1.0)
    after = placements.version(weight)
    placements.local(weight).add_(1.0)
    partial = DTensor.from_local(torch.ones(2), over, [Partial(), Partial()])
    plain = torch.ones(2, requires_grad=True)
    half = dist.device_mesh.DeviceMesh("cpu", [0, 1])
    of_some = distribute_tensor(torch.ones(4), half, [Shard(0)])
    unnamed = distribute_tensor(torch.ones(4), dist.device_mesh.init_device_mesh("cpu", (2, 2)), [Shard(0), Shard(0)])
    return {
        "local": placements.local(weight).tolist(),
        "grad": placements.local(weight).requires_grad,
        "same": placements.local(weight) is placements.local(weight),
        "plain": placements.local(plain) is plain,
        "moved": (after > before, placements.version(weight) > after),
        "classes": [placements.shard_class(x) for x in (weight, plain, unnamed)],
        "spread": [placements.spread(x) for x in (weight, plain, partial)],
        "placed": [
            placements.placed(
                DTensor.from_local(torch.ones(2, 2), over, [Shard(0), within]), 1, functools.partial(list, x)
            )
            for within in (Replicate(), Shard(0), Shard(1))
            for x in ([], [DTensor.from_local(torch.ones(2), over, [Shard(0), Replicate()])])
        ],
        "partial": message(placements.check_parameters, {"fine": weight, "blocks.0.weight": partial}),
        "outside": message(placements.check_parameters, {"blocks.1.weight": of_some}),
    }


def wrappers() -> dict[str, Any]:
    """Wrappers of data parallelism."""
    found: dict[str, Any] = {}
    hooked = nn.parallel.DistributedDataParallel(net())
    hooked.register_comm_hook(None, allreduce_hook)
    found["hooked"] = placements.gradient_average(hooked), placements.data_ranks(hooked)
    divided, _ = SETUPS["fsdp"](net())
    for module in divided.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(8.0)
    found["divided"] = placements.gradient_average(divided)
    part = net()
    fully_shard(part.blocks[0], mesh=mesh())
    found["part"] = placements.gradient_average(part), placements.replay_needs_ranks(part)
    found["norm"] = placements.replay_needs_ranks(nn.Sequential(nn.SyncBatchNorm(3)))
    old = nn.Sequential(nn.Linear(3, 3), FullyShardedDataParallel(nn.Linear(3, 3), device_id=torch.device("cpu")))
    found["old"] = message(placements.check_model, old)
    flat = dict(old.named_parameters())
    found["flat"] = message(placements.check_parameters, flat)
    return found


def gathered() -> dict[str, Any]:
    """A model whose outermost parameters stay gathered after a forward without a backward."""
    training = Training("fsdp")
    own = [id(p) for p in training.model.parameters()]
    with torch.no_grad():
        training.model(torch.randn(2, 4, 3, dtype=torch.float64))
    held = list(training.model.parameters())
    names = optimized_parameters(training.model)
    leaves = GraphLeaves(training.model, [p for _, p in names])
    return {
        "swapped": sum(id(p) not in own for p in held),
        "same": [id(p) for _, p in names] == own,
        "leaves": [
            type(p) is nn.Parameter and tuple(p.shape) == tuple(q.shape)
            for p, q in zip(leaves.now(), held, strict=True)
        ],
        "ungathered": len(leaves.ungathered),
    }


def everything() -> dict[str, Any]:
    """All of these on the same ranks."""
    found: dict[str, Any] = {setup: described(setup) for setup in ("single", "ddp", "fsdp", "hybrid", "tensor", "both")}
    return {**found, "tensors": tensors(), "wrappers": wrappers(), "gathered": gathered()}


def test_plain_tensors_and_models() -> None:
    p = nn.Parameter(torch.ones(2))
    assert placements.shard_class(p) == ShardClass("", 1, 0)
    assert placements.shard_classes([p, p]) == ([ShardClass("", 1, 0)], [0, 0])
    assert placements.spread(p) is None
    placements.check_parameters({"p": p})
    placements.check_model(nn.Linear(2, 2))
    assert not placements.replay_needs_ranks(nn.Linear(2, 2))
    assert placements.gradient_average(nn.Linear(2, 2)) is None
    assert placements.data_ranks(nn.Linear(2, 2)) is None


@pytest.mark.slow
def test_four_ranks() -> None:
    ranks = run_ranks(everything, 4)
    for rank, found in enumerate(ranks):
        row, column = divmod(rank, 2)
        everyone = [0, 1, 2, 3]
        none = {"replay": False, "average": None, "ranks": None}
        assert found["single"] == {"classes": [("", 1, 0)], "first": [0] * 4, **none}
        assert found["ddp"] == {**found["single"], "average": 0.25, "ranks": everyone}
        sharded = {"first": [0] * 4, "replay": True, "average": 0.25, "ranks": everyone}
        assert found["fsdp"] == {"classes": [("data:4", 4, rank)], **sharded}
        assert found["hybrid"] == {"classes": [("shards:2", 2, column)], **sharded}
        of_tensor = {"classes": [("", 1, 0), ("tp:4", 4, rank)], "first": [0] * 4, "replay": True}
        assert found["tensor"] == {**of_tensor, "average": None, "ranks": None}
        both = [("dp:2", 2, row), ("dp:2,tp:2", 4, rank)]
        ranks_of_data = [column, column + 2]
        assert found["both"] == {**sharded, "classes": both, "average": 0.5, "ranks": ranks_of_data}
        check_tensors(found["tensors"], rank)
        assert found["wrappers"] == {
            "hooked": (None, everyone),
            "divided": 0.125,
            "part": (None, True),
            "norm": True,
            "old": f"model, '1': {OLD}",
            "flat": f"parameter '1._fsdp_wrapped_module._flat_param' is a flat parameter: {OLD}",
        }
        seen = found["gathered"]
        assert seen["swapped"] == 4  # embedding and head
        assert seen["same"]
        assert seen["ungathered"] == 0


def check_tensors(found: dict[str, Any], rank: int) -> None:
    # Five elements: three and two along the first axis, then two and one, one and one along the second.
    assert found["local"] == [[2.0, 3.0], [4.0], [5.0], [6.0]][rank]
    assert not found["grad"]
    assert found["same"]
    assert found["plain"]
    assert found["moved"] == (True, True)
    named, plain, unnamed = found["classes"]
    assert named == ShardClass("a:2,b:2", 4, rank)
    assert plain == ShardClass("", 1, 0)
    assert unnamed == ShardClass("0:2@2,1:2@1", 4, rank)
    assert found["spread"] == ["a:2:shard,b:2:shard", None, "a:2:partial,b:2:partial"]
    # Ranks along the first axis have batches of their own where the inputs are sharded over it.
    assert found["placed"] == ["rows", "replicate", "rows", "rows", "rows", "columns"]
    assert found["partial"].startswith(
        "parameter 'blocks.0.weight' is a partial sum over ranks (DTensor with placements"
    )
    assert found["outside"].startswith("parameter 'blocks.1.weight' belongs to a mesh" if rank > 1 else "")
    assert bool(found["outside"]) == (rank > 1)
