"""Attention logits, dead and saturated features, and tokens of experts, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.detail_cases import Attending, gpt2, llama, mixtral, text

BATCH, HEADS, QUERIES, KEYS, WIDTH = 3, 4, 7, 9, 8


class Attention(nn.Module):
    """Calls torch's attention with the settings that it is given."""

    def __init__(self, key_heads: int = HEADS, keys: int = KEYS, **settings: Any) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(HEADS, QUERIES, WIDTH))
        self.key = nn.Parameter(torch.randn(key_heads, keys, WIDTH))
        self.settings = settings

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query * x[:, :1, None, None], self.key * x[:, 1:2, None, None]
        return F.scaled_dot_product_attention(query, key, key.cos(), **self.settings).transpose(1, 2)


class Inside(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.block = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def recorded(model: nn.Module, loss: Any, path: Path, steps: int = 1, **settings: Any) -> pd.DataFrame:
    """What is recorded of a few steps with a small learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with fastfs.Monitor(
        model, optimizer, every=1, details=True, path=path, alerts=(), verbose=False, **{"rows": None, **settings}
    ):
        for step in range(steps):
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
    return fastfs.monitor.load_details(path)


def of(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return table[table["quantity"] == quantity]


def generated(seed: int) -> tuple[dict[str, Any], Tensor]:
    """Settings of attention, and the logits that are masked: bool, broadcast to (samples, heads, queries, keys)."""
    generator = torch.Generator().manual_seed(seed)
    settings: dict[str, Any] = {}
    masked = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    kind = ("none", "causal", "bool", "float", "per head")[seed % 5]
    if kind == "causal":
        settings["is_causal"] = True
        masked = torch.ones(QUERIES, KEYS).tril() == 0
    elif kind != "none":
        shape = {"bool": (QUERIES, KEYS), "float": (BATCH, 1, QUERIES, KEYS), "per head": (HEADS, QUERIES, KEYS)}[kind]
        masked = torch.rand(shape, generator=generator) < 0.6
        masked[..., 0] = False
        settings["attn_mask"] = ~masked if kind == "bool" else torch.zeros(shape).masked_fill(masked, -math.inf)
    if seed % 2:
        settings |= {"key_heads": 2, "enable_gqa": True}
    if seed % 3 == 1:
        settings["scale"] = 0.7
    return settings, masked


@pytest.mark.parametrize("seed", range(15))
def test_logits_of_torchs_attention(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    settings, masked = generated(seed)
    model = Inside(Attention(**settings))
    x = torch.randn(BATCH, 3)
    query, key = model.block.query.detach().double().clone(), model.block.key.detach().double().clone()
    table = recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl")
    logits = torch.empty(BATCH, HEADS, QUERIES, KEYS, dtype=torch.float64)
    for sample in range(BATCH):
        for head in range(HEADS):
            own = key[head * len(key) // HEADS]
            logits[sample, head] = query[head] @ own.t() * x[sample, 0].double() * x[sample, 1].double()
    logits *= settings.get("scale", 1 / math.sqrt(WIDTH))
    want = logits.masked_fill(masked, -math.inf).amax(dim=(0, 2, 3))
    found = of(table, "attention_logit_max")
    assert found["index"].tolist() == list(range(HEADS))
    assert set(found["name"]) == {"block"}
    assert np.allclose(found["value"], want, rtol=1e-5)
    columns = fastfs.load(tmp_path / "a.jsonl")
    assert columns["attention_logit_max"].item() == found["value"].max()


@pytest.mark.parametrize("make", [llama, mixtral, gpt2])
def test_eager_attention_has_the_same_logits(make: Any, tmp_path: Path) -> None:
    found = {}
    for kind in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = make().eval()
        model.set_attn_implementation(kind)
        tokens, _ = text(0)
        padding = torch.ones_like(tokens)
        padding[0, :6] = 0
        table = recorded(
            model,
            lambda m, _, t=tokens, p=padding: m(input_ids=t, attention_mask=p).logits.square().mean(),
            tmp_path / f"{kind}.jsonl",
        )
        found[kind] = of(table, "attention_logit_max")
    assert len(found["sdpa"]) == 8
    assert found["eager"][["name", "index"]].equals(found["sdpa"][["name", "index"]])
    assert np.allclose(found["eager"]["value"], found["sdpa"]["value"], rtol=1e-4)


def test_attention_with_its_weights_has_the_same_logits(tmp_path: Path) -> None:
    found = []
    for need_weights in (False, True):
        torch.manual_seed(0)
        model = Attending(need_weights).eval()
        x = torch.randn(4, 12, 8)
        table = recorded(model, lambda m, _, x=x: m(x).square().mean(), tmp_path / f"{need_weights}.jsonl")
        found.append(of(table, "attention_logit_max"))
    assert found[0]["name"].value_counts().to_dict() == {"blocks.0.self_attn": 4, "blocks.1.self_attn": 4, "cross": 2}
    assert np.allclose(found[0]["value"], found[1]["value"], rtol=1e-5)


def test_kept_queries_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3)
    model = Inside(Attention())
    every = of(recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl"), "attention_logit_max")
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3)
    model = Inside(Attention())
    some = of(recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "b.jsonl", rows=6), "attention_logit_max")
    assert (some["value"].to_numpy() <= every["value"].to_numpy()).all()
    assert (some["value"].to_numpy() < every["value"].to_numpy()).any()


class Units(nn.Module):
    """Activations of every kind after one product, some in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 12)
        self.act = nn.GELU()
        self.halved = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        return self.act(y) + self.halved(3 * y)


def test_dead_and_saturated_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Inside(Units())
    with torch.no_grad():
        model.block.w.bias[:5] = -8.0
        model.block.w.bias[5] = 100.0
    x = torch.randn(40, 6)
    with torch.no_grad():
        y = model.block.w(x).double()
    table = recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl", layers=["block"])
    normal = torch.distributions.Normal(0.0, 1.0)
    slopes = {
        "block.act": normal.cdf(y) + y * normal.log_prob(y).exp(),
        "block.halved": ((3 * y > 0) & (3 * y < 6)).double(),
    }
    for name, slope in slopes.items():
        tiny = slope.abs() <= 1e-3
        values = table[table["name"] == name].set_index("quantity")["value"]
        assert values["dead_share"] == pytest.approx(tiny.all(dim=0).double().mean().item())
        assert values["saturated_share"] == pytest.approx(tiny.double().mean().item())
    columns = fastfs.load(tmp_path / "a.jsonl").iloc[0]
    assert of(table, "dead_share")["value"].tolist() == [5 / 12, 6 / 12]
    assert columns["dead_share"] == pytest.approx(11 / 24)
    assert columns["saturated_share"] == pytest.approx(of(table, "saturated_share")["value"].mean())


class Written(nn.Module):
    """Writes what functions return, and what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.w(x)
        if torch.is_grad_enabled():
            return torch.tanh(y).mul(1.0).sigmoid_()
        return torch.tanh(y, out=torch.empty_like(y)).sigmoid_()


def test_functions_that_write(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Inside(Written())
    x = 9 * torch.randn(20, 6)
    with torch.no_grad():
        y = model.block.w(x)
    table = recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl", layers=["block"])
    slope = y.tanh().sigmoid() * (1 - y.tanh().sigmoid())
    tiny = torch.cat([1 - y.tanh().square() <= 1e-3, slope <= 1e-3])
    assert of(table, "saturated_share")["value"].item() == pytest.approx(tiny.double().mean().item())
    assert fastfs.load(tmp_path / "a.jsonl")["valid"].all()


def test_channels_are_units_of_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2))
    with torch.no_grad():
        model[0].bias[:2] = -1000.0
    x = torch.randn(10, 3, 6, 6)
    share = (model[0](x) <= 0).double().mean().item()
    table = recorded(model, lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl")
    assert of(table, "dead_share")["value"].tolist() == [2 / 5]
    assert of(table, "saturated_share")["value"].tolist() == [pytest.approx(share)]


def test_an_activation_of_several_functions_is_taken_as_a_whole(tmp_path: Path) -> None:
    """GPT-2's GELU computes a tanh, which is saturated where the GELU is linear."""
    torch.manual_seed(0)
    model = gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.bias[:32] = 10.0
            block.mlp.c_fc.bias[32:40] = -10.0
    tokens, _ = text(0)
    table = recorded(model, lambda m, _: m(input_ids=tokens).logits.square().mean(), tmp_path / "a.jsonl")
    assert of(table, "dead_share")["value"].tolist() == [8 / 128, 8 / 128]


@pytest.mark.parametrize("kind", ["eager", "grouped_mm", "batched_mm"])
def test_tokens_of_experts(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mixtral(kind)
    chosen: dict[str, Tensor] = {}

    def note(name: str, indices: Tensor) -> None:
        chosen.setdefault(name, indices.clone())

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _m, _a, out, n=name: note(n, out[2]))
    tokens, _ = text(0)
    table = recorded(model, lambda m, _: m(input_ids=tokens).logits.square().mean(), tmp_path / "a.jsonl")
    assert len(chosen) == 2
    for name, indices in chosen.items():
        own = table[table["name"] == name]
        assert of(own, "expert_tokens")["value"].tolist() == torch.bincount(indices.flatten(), minlength=4).tolist()
        counts = torch.bincount(indices.flatten(), minlength=4).double()
        assert of(own, "expert_load_max")["value"].item() == pytest.approx((counts.max() / counts.mean()).item())
    experts = table[table["name"].str.contains("gate_up_proj")]
    reasons = set(experts["why"].dropna())
    assert (reasons == set()) == (kind == "eager")
    if kind != "eager":
        assert all("not read" in why or "no product" in why for why in reasons)
        assert experts["value"].isna().all()
