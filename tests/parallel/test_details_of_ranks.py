"""`Monitor(details=True)` in runs of several ranks: sums of their batches, and nothing of sharded models."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastfs
from tests.helpers.detail_cases import mixtral, text
from tests.helpers.parallel_cases import train, with_and_without
from tests.helpers.processes import run_ranks


def on_meshes(folder: str) -> None:
    for mesh in ("ddp", "fsdp", "tp"):
        with_and_without(mesh, f"{folder}/bits_{mesh}.jsonl", details=True)
        details(mesh, f"{folder}/{mesh}.jsonl")
    details("ddp", f"{folder}/sampled.jsonl", rows=24)
    details("ddp", f"{folder}/files.jsonl", merge="files")
    experts(f"{folder}/experts.jsonl", dist.get_rank(), 2)


def saturated(model: Any) -> None:
    """Makes some hidden units of the blocks saturated on all rows, and some on many."""
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight[8:] *= 5
            block.up.bias[:8] = 20


def details(mesh: str, path: str, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of DTensor and gloo
        train(mesh, path, details=True, prepare=saturated, **options)


def experts(path: str, rank: int, ranks: int) -> None:
    """One step of a routed model; the ranks have halves of the batch."""
    torch.manual_seed(0)
    model: Any = mixtral()
    model = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastfs.Monitor(model, optimizer, every=1, details=True, rows=None, path=path, alerts=(), verbose=False):
        tokens, targets = (part.chunk(ranks)[rank] for part in text(0))
        output = model(input_ids=tokens)
        F.cross_entropy(output.logits.flatten(0, -2), targets.flatten()).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("details")
    run_ranks(on_meshes, 2, timeout=240, folder=str(path))
    details("single", str(path / "single.jsonl"))
    experts(str(path / "experts_single.jsonl"), 0, 1)
    return path


class Halves(torch.nn.Module):
    """Ranks use one of two experts each, and both the head."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.idle = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        used = self.experts[which](x)
        out: torch.Tensor = self.head(used + 0 * torch.stack([p.sum() for p in self.parameters()]).sum())
        return out


def apart(path: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of gloo
        model = torch.nn.parallel.DistributedDataParallel(Halves())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastfs.Monitor(
        model, optimizer, layers=["head"], every=1, details=True, rows=None, path=path, alerts=(), verbose=False
    ):
        model(torch.randn(8, 4), dist.get_rank()).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
def test_experts_that_one_rank_uses_have_the_numbers_of_this_rank(tmp_path: Path) -> None:
    run_ranks(apart, 2, path=str(tmp_path / "a.jsonl"))
    table = fastfs.monitor.load_details(tmp_path / "a.jsonl").set_index("name")
    for name in ("experts.0.weight", "experts.1.weight", "head.weight"):
        own = table.loc[name].set_index("quantity")
        assert own.loc["own_motion", "value"] > 0
        assert own["why"].dropna().index.tolist() in ([], ["motion_cosine"])
    assert set(table.loc["idle.weight", "why"]) == {"no product with it was seen in the forward"}


def tables(folder: Path, *names: str) -> list[Any]:
    return [fastfs.monitor.load_details(folder / f"{name}.jsonl") for name in names]


@pytest.mark.slow
def test_two_batches_are_those_of_one_process(folder: Path) -> None:
    one, two, files = tables(folder, "single", "ddp", "files")
    assert len(one) > 0
    assert one["why"].isna().sum() > 0.9 * len(one)
    keys = ["step", "name", "quantity", "index"]
    for many in (two, files):
        assert many[keys].equals(one[keys])
        units = many["quantity"] == "dead_share"
        assert many[units]["why"].eq("not known of the batches of several ranks together").all()
        assert many[~units]["why"].equals(one[~units]["why"])
        assert np.allclose(many[~units]["value"], one[~units]["value"], rtol=1e-6, equal_nan=True)
    columns = [fastfs.load(folder / f"{name}.jsonl") for name in ("single", "ddp")]
    for name in ("weight_alignment", "own_motion", "inherited_motion", "saturated_share"):
        assert columns[0][name].notna().any()
        assert np.allclose(columns[0][name], columns[1][name], rtol=1e-6, equal_nan=True)
    assert columns[1]["dead_share"].isna().all()


@pytest.mark.slow
def test_standard_errors_are_those_of_both_samples(folder: Path) -> None:
    one, two = tables(folder, "single", "sampled")
    known = two["standard_error"] > 0
    assert known.sum() > 50
    away = (two["value"] - one["value"])[known].abs() / two["standard_error"][known]
    assert (away > 2).mean() < 0.1
    assert away.max() < 6


@pytest.mark.slow
def test_tokens_of_experts_add_up_and_logits_are_the_largest(folder: Path) -> None:
    one, two = tables(folder, "experts_single", "experts")
    for quantity in ("expert_tokens", "expert_load_max", "attention_logit_max"):
        a, b = (table[table["quantity"] == quantity] for table in (one, two))
        assert a["name"].tolist() == b["name"].tolist()
        assert len(a) > 0
        assert np.allclose(a["value"], b["value"], rtol=1e-5)


@pytest.mark.slow
def test_matrices_of_fsdp_have_a_reason_and_activations_are_those_of_all_batches(folder: Path) -> None:
    one, many = tables(folder, "single", "fsdp")
    shares = many["quantity"] == "saturated_share"
    assert many[shares]["value"].min() > 0.3
    assert np.allclose(many[shares]["value"], one[one["quantity"] == "saturated_share"]["value"], rtol=1e-9)
    assert many[~shares]["value"].isna().all()
    assert many[many["name"].str.endswith("weight")]["why"].str.contains("it is sharded").all()


@pytest.mark.slow
def test_tensor_parallel_layers_have_a_reason(folder: Path) -> None:
    (table,) = tables(folder, "tp")
    assert len(table) > 0
    assert table["value"].isna().all()
    assert table["why"].str.contains("the ranks hold parts of one model").all()


@pytest.mark.slow
def test_a_missing_rank_leaves_nothing_that_is_of_the_others_alone(folder: Path, tmp_path: Path) -> None:
    (first, _) = sorted(folder.glob("files*.jsonl"))
    shutil.copy(first, tmp_path / first.name)
    table = fastfs.monitor.load_details(tmp_path / first.name)
    assert len(table) > 0
    assert set(table["why"]) == {"ranks of the run are missing: the numbers are those of the others"}
