"""A process group of one rank, on every backend that the device has: FSDP2 of a single process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastfs
from tests.helpers.parallel_cases import LAYERS, STEPS, global_batch, make_model

BACKENDS = [pytest.param(("gloo", "cpu"), id="gloo"), pytest.param(("nccl", "cuda"), id="nccl", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    backend, kind = request.param
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield kind
    dist.destroy_process_group()


def record(device: str, sharded: bool, path: Path) -> Any:
    model: Any = make_model().to(device)
    if sharded:
        mesh = init_device_mesh(device, (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with fastfs.Monitor(model, optimizer, layers=LAYERS, every=2, aligned_every=1, path=path, verbose=False):
        for step in range(STEPS):
            x, y = (part.to(device) for part in global_batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
    return fastfs.load(path)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_the_record_is_that_without_a_group(device: str, tmp_path: Path) -> None:
    found, plain = (record(device, sharded, tmp_path / f"{sharded}.jsonl") for sharded in (True, False))
    assert found["valid"].tolist() == plain["valid"].tolist()
    for column in ("angle", "update_rms", "aligned_decrease", "gradient_norm", "backward_rms"):
        assert found[column].tolist() == pytest.approx(plain[column].tolist(), rel=1e-9, nan_ok=True), column
