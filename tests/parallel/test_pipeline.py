"""Stages of a pipeline: one record, whose numbers are those of the whole network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.parallel_cases import Block, Net, global_batch, parameters_of
from tests.helpers.processes import run_ranks
from tests.parallel.test_meshes import assert_same_record

MICRO, STEPS = 4, 3
LAYERS = r"^(embed|blocks\.\d+|blocks\.\d+\.up|norm)$"


def network() -> Net:
    torch.manual_seed(0)
    return Net(depth=4).double()


class Stage(nn.Module):
    """A part of the network, with the names of the whole."""

    def __init__(self, whole: Net, first: int, last: int) -> None:
        super().__init__()
        if first == 0:
            self.embed = whole.embed
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in range(first, last)})
        if last == len(whole.blocks):
            self.norm, self.head = whole.norm, whole.head

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "embed"):
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if hasattr(self, "head") else x


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def alone(path: str | None) -> list[Tensor]:
    """The same losses on one process: the gradients of the micro-batches add up."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = fastfs.Monitor(model, optimizer, path=path, **options()) if path else None
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(*(part.chunk(MICRO) for part in global_batch(step)), strict=True):
            loss_of(model(x), y).backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return parameters_of(model)


def options() -> dict[str, Any]:
    return {"layers": LAYERS, "every": 2, "aligned_every": 1, "aligned_fraction": 1.0, "rows": None, "verbose": False}


def piped(path: str | None, schedule: str) -> list[Tensor]:
    from torch.distributed import pipelining

    warnings.simplefilter("default")
    rank, count = dist.get_rank(), dist.get_world_size()
    each = 4 // count
    module = Stage(network(), rank * each, rank * each + each)
    stage = pipelining.PipelineStage(module, rank, count, torch.device("cpu"))
    plan = getattr(pipelining, schedule)(stage, MICRO, loss_fn=loss_of, scale_grads=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    monitor = fastfs.Monitor(module, optimizer, path=path, pipeline=stage, **options()) if path else None
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = global_batch(step)
        if rank == 0:
            plan.step(x)
        elif rank == count - 1:
            plan.step(target=y)
        else:
            plan.step()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return parameters_of(module)


def twice(path: str, schedule: str) -> list[Tensor]:
    plain, watched = piped(None, schedule), piped(path, schedule)
    for a, b in zip(plain, watched, strict=True):
        assert torch.equal(a, b)
    return watched


@pytest.mark.parametrize(("schedule", "ranks"), [("ScheduleGPipe", 2), ("Schedule1F1B", 4)])
def test_a_pipeline_is_recorded_as_one_network(schedule: str, ranks: int, tmp_path: Path) -> None:
    path, one = tmp_path / "many.jsonl", tmp_path / "one.jsonl"
    alone(str(one))
    run_ranks(twice, ranks, path=str(path), schedule=schedule)
    many, single = fastfs.load(path), fastfs.load(one)
    columns = ("angle", "update_rms", "feature_rms", "backward_rms", "relative_update", "aligned_decrease")
    many["rows"], single["rows"] = many["rows"].fillna(0), single["rows"].fillna(0)
    assert_same_record(many, single, columns)


def test_what_is_no_stage_is_refused() -> None:
    model = Block(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"pipeline: expected a torch.distributed.pipelining.PipelineStage, got str"):
        fastfs.Monitor(model, optimizer, pipeline="gpipe", sinks=[print])
