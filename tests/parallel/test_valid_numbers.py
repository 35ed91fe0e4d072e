"""Numbers that are called valid are those of the global batch: late reductions, models of the ranks' own."""

from __future__ import annotations

import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._record import decrease_reasons
from fastfs._record.ranks.merging import merge_parameters
from fastfs._record.ranks.part import Share
from tests.helpers.parallel_cases import LAYERS, MESHES, global_batch, make_model, parameters_of
from tests.helpers.processes import run_ranks

SUMS = ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "loss", "count")


def accumulating(mesh: str, path: str | None, steps: int = 3) -> list[Tensor]:
    """Trains with three micro-batches, of which FSDP2 reduces only the last; returns the parameters at the end."""
    net = make_model()
    model, batches, own = MESHES[mesh](net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = attach(model, optimizer, path, every=2, aligned_every=1, aligned_fraction=1.0)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = (part.chunk(batches)[own] for part in global_batch(step))
        total = 0.0
        for number in range(3):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(number == 2)
            loss = F.cross_entropy(model(x[number::3]).flatten(0, -2), y[number::3].flatten()) / 3
            loss.backward()
            total += loss.item()
        if monitor is not None:
            monitor.log(loss=total)
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return parameters_of(net)


def sweep(rank: int, path: str, width: int, noise: float, **options: Any) -> None:
    """Trains models that have nothing to do with each other, with noise on their gradients."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = attach(model, optimizer, path, layers=r"", **options)
    assert monitor is not None
    for step in range(4):
        optimizer.zero_grad()
        x, y = global_batch(step, torch.float32)
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad += noise * torch.randn_like(p.grad)
        optimizer.step()
    monitor.close()


def attach(model: nn.Module, optimizer: Any, path: str | None, **options: Any) -> fastfs.Monitor | None:
    settings = {"layers": LAYERS, "every": 1, "rows": None, "verbose": False, "alerts": (), **options}
    return None if path is None else fastfs.Monitor(model, optimizer, path=Path(path), **settings)


def trainings(folder: str) -> bool:
    rank = torch.distributed.get_rank()
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # torch's own, of DTensor and gloo
        warnings.filterwarnings("error", "fastfs")
        plain = accumulating("fsdp", None)
        watched = accumulating("fsdp", f"{folder}/fsdp.jsonl")
    sweep(rank, f"{folder}/noise.jsonl", width=8, noise=0.1)
    # Predicted steps read a sample of large parameters.
    sweep(rank, f"{folder}/sampled.jsonl", width=600, noise=0.0, every=2, aligned_every=1)
    return all(map(torch.equal, plain, watched))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("valid")
    accumulating("single", f"{path}/single.jsonl")
    assert run_ranks(trainings, 2, folder=str(path)) == [True, True]
    return path


def test_micro_batches_whose_gradients_wait_for_a_reduction_count(folder: Path) -> None:
    mine, theirs = (fastfs.load(folder / f"{name}.jsonl") for name in ("fsdp", "single"))
    assert not mine.attrs["skipped"]
    measured = mine["kind"] == "measured"
    assert mine["valid"][measured].all()
    assert mine["aligned_decrease"].notna().all()
    assert (mine["update_rms"].notna() == theirs["update_rms"].notna()).all()
    for name in SUMS:
        np.testing.assert_allclose(mine[name].to_numpy(), theirs[name].to_numpy(), rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", ["noise", "sampled"])
def test_models_of_their_own_are_not_one_run(folder: Path, name: str) -> None:
    table = fastfs.load(folder / f"{name}.jsonl")
    assert not table["valid"].fillna(False).any()
    assert table["aligned_decrease"].isna().all()
    assert table["update_rms"][table["kind"] == "predicted"].isna().all()
    assert set(table["decrease_why"]) == {"ranks that should hold the same parameters report different sums"}


@pytest.mark.parametrize(("factor", "differ"), [(1.0, True), (1.0 + 5e-9, False), (float("nan"), True)])
def test_the_factor_of_clipping_may_be_rounded_differently(factor: float, differ: bool) -> None:
    def part(factor: float, gradient: float) -> Any:
        arrays = {"aligned": np.array([[[gradient, 2.0, 0.5, 4.0 * gradient**2]]]), "decrease_reason": np.zeros(1)}
        place = types.SimpleNamespace(shares=(Share("", 1, 0),))
        return types.SimpleNamespace(arrays=arrays, place=place, scalars={"gradient_factor": factor})

    # Both ranks have divided the same sums by the factor that they have found.
    merged = merge_parameters([part(0.3, 1.0), part(0.3 * factor, 1.0 / (1.0 + 5e-9))])
    assert np.isnan(merged.decrease[0]) == differ
    assert (merged.reason[0] == decrease_reasons.RANKS_DIFFER) == differ
