"""Layers inside of wrappers: compiled, checkpointed, sharded, and in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fastfs.models import ResNet
from tests.helpers.monitor_cases import train, watched

KEYS = ("angle", "update_rms", "feature_rms", "backward_rms", "count")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def resnet() -> Any:
    torch.manual_seed(0)
    return ResNet(8, 16, 2, 3)


def checkpointed(implementation: Any = CheckpointImpl.NO_REENTRANT) -> Any:
    model = resnet()
    for index in range(2):
        model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=implementation)
    return model


def compiled_blocks() -> Any:
    model = resnet()
    for index in range(2):
        model.blocks[index] = torch.compile(model.blocks[index], backend="eager")
    return model


def sharded(**options: Any) -> Any:
    model = resnet()
    policy = ModuleWrapPolicy({type(model.blocks[0])})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)


WRAPPED = {
    "compile": lambda: torch.compile(resnet(), backend="eager"),
    "blocks compiled": compiled_blocks,
    "checkpoint": checkpointed,
    "reentrant checkpoint": lambda: checkpointed(CheckpointImpl.REENTRANT),
    "ddp": lambda: nn.parallel.DistributedDataParallel(resnet()),
    "ddp of checkpoint": lambda: nn.parallel.DistributedDataParallel(checkpointed()),
    "ddp of compile": lambda: nn.parallel.DistributedDataParallel(torch.compile(resnet(), backend="eager")),
    "compile of ddp": lambda: torch.compile(nn.parallel.DistributedDataParallel(resnet()), backend="eager"),
    "fsdp": lambda: sharded(use_orig_params=True),
    "fsdp, flat parameters": lambda: sharded(use_orig_params=False),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # a reentrant second forward
@pytest.mark.parametrize(
    "wrap",
    [pytest.param(wrap, id=k, marks=[pytest.mark.graphs] * ("compile" in k.split())) for k, wrap in WRAPPED.items()],
)
def test_names_and_numbers_are_those_without_the_wrapper(wrap: Any, alone: None) -> None:
    seen = {}
    for make in (resnet, wrap):
        model, optimizer, seen[make], monitor = watched(layers="auto", model=make())
        assert monitor.layers == ("blocks.0", "blocks.1")
        train(model, optimizer, 2)
        monitor.close()
    for plain, wrapped in zip(seen[resnet], seen[wrap], strict=True):
        assert wrapped["valid"], wrapped["why"]
        assert wrapped["name"] == plain["name"]
        for key in KEYS:
            assert wrapped[key] == pytest.approx(plain[key], rel=1e-5), key
