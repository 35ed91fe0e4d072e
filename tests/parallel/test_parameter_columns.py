"""Overshoot, and what casts take of a step, of a run on two ranks: those of one process on the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fastfs
from fastfs._record.ranks.merging import merge_parameters
from fastfs._record.ranks.part import RankPart
from tests.helpers.monitor_loops import Net
from tests.helpers.processes import run_ranks

CASTS = ("bfloat16", "float8_e4m3fn", "mxfp8")


class WithLoss(nn.Module):
    """Returns the loss of its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(width=40)

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return F.cross_entropy(logits, labels), logits


def train(mesh: str, path: str, ranks: int = 1, rank: int = 0, **options: Any) -> None:
    torch.manual_seed(0)
    inner = WithLoss().double()
    model: nn.Module = inner
    if mesh == "ddp":
        model = nn.parallel.DistributedDataParallel(inner)
    if mesh == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in inner.net.blocks:
            fully_shard(block, mesh=init_device_mesh("cpu", (ranks,)))
        fully_shard(inner, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    settings: dict[str, Any] = {"every": 1, "rows": None, "alerts": (), "verbose": False, "casts": CASTS} | options
    with fastfs.Monitor(model, optimizer, layers=r"blocks\.\d+$", path=Path(path), **settings) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(24, 8, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (24,), generator=generator)
            for inputs, labels in zip(x.chunk(ranks)[rank].chunk(2), y.chunk(ranks)[rank].chunk(2), strict=True):
                loss = model(inputs, labels)[0] / 2
                loss.backward()
                monitor.log(loss=loss)
            optimizer.step()


def both(folder: str) -> bool:
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for mesh in ("ddp", "fsdp"):
        train(mesh, f"{folder}/{mesh}.jsonl", ranks, rank)
    train("ddp", f"{folder}/files/ddp.jsonl", ranks, rank, merge="files")
    train("ddp", f"{folder}/weight.jsonl", ranks, rank, loss_weight=1.0)
    train("ddp", f"{folder}/unlike.jsonl", ranks, rank, casts=CASTS[rank:])
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parameters")
    train("single", str(path / "single.jsonl"))
    assert run_ranks(both, 2, folder=str(path)) == [True, True]
    return path


@pytest.mark.parametrize("name", ["ddp.jsonl", "fsdp.jsonl", "files"])
def test_two_ranks_are_one_run(folder: Path, name: str) -> None:
    found, one = fastfs.load(folder / name), fastfs.load(folder / "single.jsonl")
    assert found["valid"].all()
    assert one["overshoot"].notna().all()
    for column in ("overshoot", "parameter_rotation", "parameter_radial_update", "parameter_cos_angle"):
        np.testing.assert_allclose(found[column], one[column], rtol=1e-7, err_msg=column)
    for cast in CASTS:
        column = f"cast_loss_{cast}"
        assert one[column].between(0, 1).all()
        if name == "fsdp.jsonl" and cast == "float8_e4m3fn":  # max |w| of the whole parameter is not known
            assert found[column].isna().all()
        else:
            np.testing.assert_allclose(found[column], one[column], rtol=1e-5, atol=1e-6, err_msg=column)


def test_losses_with_another_weight_than_the_gradients_have_no_overshoot(folder: Path) -> None:
    assert fastfs.load(folder / "weight.jsonl")["overshoot"].isna().all()


def test_ranks_with_different_casts_have_none_together(folder: Path) -> None:
    table = fastfs.load(folder / "unlike.jsonl")
    assert table["valid"].all()
    assert table["overshoot"].notna().all()
    assert table["cast_loss_mxfp8"].isna().all()


def test_parts_of_older_files_lack_the_sums() -> None:
    arrays = {"aligned": np.array([[[1.0, 4.0, 9.0, 16.0]]]), "decrease_reason": np.zeros(1)}
    old = merge_parameters([RankPart("measured", 0, 0.0, arrays=arrays)])
    assert old.decrease.tolist() == [1.0]
    assert old.norms.tolist() == [[2.0, 3.0, 4.0]]
    assert np.isnan(old.dots).all()
    assert old.casts.shape == (1, 0)
