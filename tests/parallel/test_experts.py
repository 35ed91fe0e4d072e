"""Experts and parts of a context that only one rank has: the record is that of one process."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd, all_to_all_single_autograd

import fastfs
from tests.helpers.parallel_cases import parameters_of
from tests.helpers.processes import run_ranks
from tests.parallel.test_meshes import assert_same_record

WIDTH, EXPERTS, TOKENS, STEPS = 6, 4, 24, 3
OPTIONS: dict[str, Any] = {"aligned_every": 1, "aligned_fraction": 1.0, "rows": None, "verbose": False, "every": 2}


class Experts(nn.Module):
    """A residual layer whose tokens go to one of several experts, which are spread over the ranks of a group."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        every = {
            str(i): nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))
            for i in range(EXPERTS)
        }
        each = EXPERTS // ranks
        self.experts = nn.ModuleDict({str(i): every[str(i)] for i in range(rank * each, rank * each + each)})
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        probability, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=EXPERTS)
        sent, kinds = x[order], chosen[order]
        if self.ranks > 1:
            out = counts.view(self.ranks, -1).sum(1).tolist()
            into = torch.empty(self.ranks, dtype=torch.int64)
            dist.all_to_all_single(into, torch.tensor(out))
            received = into.tolist()
            sent = all_to_all_single_autograd(sent, received, out, dist.group.WORLD)
            kinds = all_to_all_single_autograd(kinds.double(), received, out, dist.group.WORLD).long()
        done = torch.zeros_like(sent)
        for name, expert in self.experts.items():
            mine = (kinds == int(name)).nonzero().flatten()
            done = done.index_add(0, mine, expert(sent[mine]))
        if self.ranks > 1:
            done = all_to_all_single_autograd(done, out, received, dist.group.WORLD)
        back = torch.zeros_like(x).index_add(0, order, done)
        return x + back * probability[:, None]


class Routed(nn.Module):
    def __init__(self, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, WIDTH)
        self.mixture = Experts(ranks, rank)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixture(self.embed(x)))


class Attention(nn.Module):
    """Attention over a sequence of which every rank has a part: keys and values are gathered."""

    def __init__(self, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        key, value = self.key(x), self.value(x)
        if self.ranks > 1:
            key, value = (all_gather_tensor_autograd(each, 0, dist.group.WORLD) for each in (key, value))
        weights = (self.query(x) @ key.mT / WIDTH**0.5).softmax(-1)
        out: Tensor = self.head(x + weights @ value)
        return out


MODELS = {"experts": Routed, "context": Attention}
LAYERS = {"experts": r"^(embed|mixture|mixture\.experts\.\d)$", "context": r"^(embed|query|key|value)$"}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(TOKENS, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (TOKENS,), generator=generator)


def train(kind: str, path: str | None, ranks: int) -> list[Tensor]:
    rank = dist.get_rank() if ranks > 1 else 0
    net = MODELS[kind](ranks, rank).double()
    model: nn.Module = net
    if ranks > 1:
        own = [name for name, _ in net.named_parameters() if "experts." in name]
        for name, p in net.named_parameters():
            if name in own:  # the sum of all ranks' losses has arrived; the others are averaged
                p.register_post_accumulate_grad_hook(_averaged)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, own)
        model = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = fastfs.Monitor(model, optimizer, path=path, layers=LAYERS[kind], **OPTIONS) if path else None
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (part.chunk(ranks)[rank] for part in batch(step))
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return parameters_of(net)


def _averaged(p: Tensor) -> None:
    assert p.grad is not None
    p.grad /= dist.get_world_size()


def twice(kind: str, path: str, ranks: int) -> None:
    warnings.simplefilter("default")
    for a, b in zip(train(kind, None, ranks), train(kind, path, ranks), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def table(kind: str) -> Any:
        path = tmp_path_factory.mktemp("alone") / "record.jsonl"
        train(kind, str(path), 1)
        return fastfs.load(path)

    return table


def test_experts_of_one_rank_alone(tmp_path: Path, alone: Any) -> None:
    """Tokens of all ranks count for an expert, and D of what follows contains all experts."""
    path = tmp_path / "record.jsonl"
    run_ranks(twice, 2, kind="experts", path=str(path), ranks=2)
    many, one = fastfs.load(path), alone("experts")
    assert set(many["name"]) == {"embed", "mixture", *(f"mixture.experts.{i}" for i in range(EXPERTS))}
    assert many.sort_values(["step", "name"])["valid"].tolist() == one.sort_values(["step", "name"])["valid"].tolist()
    for name in sorted(set(one["name"])):
        mine, other = (table[table["name"] == name].reset_index(drop=True) for table in (many, one))
        for column in ("angle", "update_rms", "feature_rms", "backward_rms", "count"):
            np.testing.assert_allclose(mine[column].to_numpy(float), other[column].to_numpy(float), rtol=1e-10)
    trunk = ("embed", "mixture")
    mine, other = (table[table["name"].isin(trunk)].reset_index(drop=True) for table in (many, one))
    assert_same_record(mine, other)


def test_a_context_that_is_spread_over_ranks(tmp_path: Path, alone: Any) -> None:
    path = tmp_path / "record.jsonl"
    run_ranks(twice, 2, kind="context", path=str(path), ranks=2)
    many, one = fastfs.load(path), alone("context")
    first = many[many["step"] == 0]
    assert first.empty  # a forward that communicates is noticed when it is repeated for the first time
    assert "from the next measured step on, all ranks measure together" in path.read_text()
    later = one[one["step"] > 0].reset_index(drop=True)
    found = many[many["step"] > 0].reset_index(drop=True)
    measured = found["kind"] == "measured"
    assert_same_record(found[measured].reset_index(drop=True), later[measured].reset_index(drop=True))
