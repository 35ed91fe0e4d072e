"""What `Monitor(details=True)` does not call valid: rows that have moved, computed weights, numbers that mislead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import fastfs
from tests.monitor.test_details_inside import of, recorded

Fill = Callable[[Tensor, Tensor], Tensor]
# Rows in an order that a score decides, of its signs `on` and without a sort: written or read by index, or sliced.
PLACED: dict[str, Fill] = {
    "index_put": lambda x, on: torch.zeros_like(x).index_put((places(on),), x),
    "assigned": lambda x, on: assigned(x, on),
    "index_copy": lambda x, on: torch.zeros_like(x).index_copy(0, places(on), x),
    "index_add": lambda x, on: torch.zeros_like(x).index_add(0, places(on), x),
    "scatter": lambda x, on: torch.zeros_like(x).scatter(0, places(on)[:, None].expand_as(x), x),
    "scatter_add_": lambda x, on: torch.zeros_like(x).scatter_add_(0, places(on)[:, None].expand_as(x), x),
    "scatter_reduce": lambda x, on: torch.zeros_like(x).scatter_reduce(0, places(on)[:, None].expand_as(x), x, "sum"),
    "one_hot": lambda x, on: F.one_hot(places(on), len(x)).to(x) @ x,
    "embedding": lambda x, on: F.embedding(places(on), x),
    "take": lambda x, on: torch.take(x, places(on)[:, None] * x.shape[1] + torch.arange(x.shape[1])),
    "sliced": lambda x, on: torch.cat([x[int(on.sum()) :], x[: int(on.sum())]]),
}


def places(on: Tensor) -> Tensor:
    """Where each row goes: those with True to the front."""
    return torch.where(on, on.long().cumsum(0) - 1, on.sum() + (~on).long().cumsum(0) - 1)


def assigned(x: Tensor, on: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[places(on)] = x
    return y


class Placing(nn.Module):
    def __init__(self, fill: Fill) -> None:
        super().__init__()
        self.score, self.inner = nn.Linear(4, 1), nn.Linear(4, 4)
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.fill(x, self.score(x).squeeze(1) > 0.0))
        return y


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("how", PLACED)
def test_rows_that_are_placed_elsewhere(how: str, changed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Placing(PLACED[how]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    path, x = tmp_path / "a.jsonl", torch.randn(16, 4)
    with fastfs.Monitor(model, optimizer, every=1, details=True, rows=None, path=path, alerts=(), verbose=False):
        model(x).square().mean().backward()
        model[0].score.weight.grad = 1e7 * torch.randn(1, 4) if changed else None
        optimizer.step()
    inner = fastfs.monitor.load_details(path).query("name == '0.inner.weight'").set_index("quantity")
    why = "the step has changed which rows the matrix is applied to"
    assert inner.loc["own_motion", "why"] == (why if changed else None)
    assert inner.loc["weight_alignment", "value"] > 0


class Counting(nn.Module):
    """Reads a number that it changes afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.calls: Tensor
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2.0 if self.calls.item() == 0 else x
        y = self.inner(y)
        self.calls += 1
        return y


def test_a_counter_is_no_choice_of_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    table = recorded(Counting(), lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl", steps=2, layers=["inner"])
    assert len(of(table, "own_motion")) == 2
    assert of(table, "own_motion")["value"].notna().all()


class Merged(nn.Module):
    """Computes a weight of two factors, and multiplies expanded queries with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))
        self.base, self.query = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))
        self.of_queries = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base.weight + self.up @ self.down)
        queries: Tensor = self.of_queries(self.query.expand(len(x), -1, -1))
        return queries * y[:, None]


def test_a_product_of_two_parameters_has_no_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    table = recorded(Merged(), lambda model, _: model(x).square().mean(), tmp_path / "a.jsonl", layers=[""])
    known = table.groupby("name")["value"].count()
    assert known[["down", "up", "base.weight", "query"]].sum() == 0
    assert known["of_queries.weight"] == 7
    reasons = set(table[table["name"].isin(["up", "down"])]["why"])
    assert reasons == {"it is multiplied with another parameter, as for a weight that is computed of both"}


UNREAD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.tensordot": lambda x, w: torch.tensordot(x, w, ([1], [1])),
    "torch.inner": torch.inner,
    "torch.mv": lambda x, w: w.mv(x[0]),
    "torch.bmm": lambda x, w: x[None].bmm(w[None])[0],
    "torch.linalg.multi_dot": lambda x, w: torch.linalg.multi_dot([x, w]),
    "F.conv_transpose1d": lambda x, w: F.conv_transpose1d(x[:, :, None], w[:, :, None])[:, :, 0],
}


class Twice(nn.Module):
    """Uses a matrix in a product that is read, and in another one."""

    def __init__(self, other: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(4, 4), other

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + self.other(x, self.inner.weight) + self.inner.weight.square().sum()


@pytest.mark.parametrize("name", UNREAD)
def test_calls_that_are_read_do_not_stand_for_others(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    table = recorded(Twice(UNREAD[name]), lambda m, _: m(x).square().mean(), tmp_path / "a.jsonl", layers=["inner"])
    assert table["value"].isna().all()
    assert set(table["why"]) == {f"it is used in {name}, which is not read"}


def test_updates_whose_squares_are_below_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False)), torch.randn(8, 4) * 1e-22
    before = model[0].weight.detach().double()
    table = recorded(model, lambda m, _: m(x).sum() * 1e-3, tmp_path / "a.jsonl").set_index("quantity")["value"]
    want = (x.double() @ before.t()).norm() / (before.norm() * x.double().norm())
    assert table["weight_alignment"] == pytest.approx(want.item(), rel=1e-6)

    with torch.no_grad():
        model[0].weight.zero_()
    x = torch.randn(8, 4)
    table = recorded(model, lambda m, _: m(x).sum() * 1e-22, tmp_path / "b.jsonl").set_index("quantity")["value"]
    update = model[0].weight.detach().double()
    want = (x.double() @ update.t()).norm() / (update.norm() * x.double().norm())
    assert table["update_alignment"] == pytest.approx(want.item(), rel=1e-6)


class Gated(nn.Module):
    """Activation functions of features and, if it is asked to, of a parameter."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.inner, self.act, self.gate = nn.Linear(4, 4), nn.ReLU(), nn.Parameter(torch.full((3, 4), 30.0))
        self.gated = gate

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.inner(x))
        return y * torch.sigmoid(self.gate)[0] if self.gated else y


def test_features_that_are_not_finite_are_not_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    x[3] = torch.nan
    table = recorded(Gated(False), lambda model, _: model(x).sum(), tmp_path / "a.jsonl", layers=["inner", "act"])
    shares = table[table["quantity"].isin(["dead_share", "saturated_share"])]
    assert len(shares) == 2
    assert shares["value"].isna().all()


def test_a_function_of_a_parameter_has_no_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    table = recorded(Gated(True), lambda model, _: model(x).sum(), tmp_path / "a.jsonl", layers=["inner"])
    assert of(table, "saturated_share")["name"].tolist() == ["act"]


class SelfAttention(nn.Module):
    """Hands queries and keys of two heads to a function."""

    def __init__(self, attend: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 8), nn.Linear(4, 8)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        query, key = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key))
        return self.attend(query, key)


def logits(attend: Callable[[Tensor, Tensor], Tensor], path: Path) -> tuple[pd.DataFrame, Tensor, Tensor]:
    """The recorded logits, and queries and keys in float64."""
    torch.manual_seed(0)
    model, x = SelfAttention(attend), torch.randn(3, 5, 4)
    copy = SelfAttention(lambda query, key: torch.stack([query, key]))
    copy.load_state_dict(model.state_dict())
    table = recorded(model, lambda m, _: m(x).square().sum(), path, layers=[""])
    query, key = copy.double()(x.double()).detach()
    return of(table, "attention_logit_max"), query, key


def test_logits_without_the_largest_of_each_query(tmp_path: Path) -> None:
    """As GPT-OSS subtracts it: 0 is not the largest logit."""

    def attend(query: Tensor, key: Tensor) -> Tensor:
        product = query @ key.transpose(-1, -2)
        return (product - product.amax(dim=-1, keepdim=True)).softmax(dim=-1) @ key

    table, _, _ = logits(attend, tmp_path / "a.jsonl")
    assert table["value"].isna().all()
    assert set(table["why"]) == {"the largest logit of every query is 0, as after its subtraction, or there are NaN"}


ATTENTION: dict[str, tuple[slice, slice]] = {
    "queries of one sample": (slice(0, 1), slice(None)),
    "keys of one sample": (slice(None), slice(0, 1)),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_of_all_samples_with_one(kind: str, tmp_path: Path) -> None:
    of_queries, of_keys = ATTENTION[kind]

    def attend(query: Tensor, key: Tensor) -> Tensor:
        key = key[of_keys]
        empty = F.scaled_dot_product_attention(query[:0], key[:0], key[:0]).sum()  # a routed part without tokens
        return F.scaled_dot_product_attention(query[of_queries], key, key) + empty

    table, query, key = logits(attend, tmp_path / "a.jsonl")
    want = (query[of_queries] @ key[of_keys].transpose(-1, -2)).amax(dim=(0, 2, 3)) / 2.0
    assert table["value"].tolist() == pytest.approx(want.tolist(), rel=1e-5)


class Scaling(TorchFunctionMode):
    """Scales what a product returns that is called by itself, as a mode around the training loop may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return output * 1.5 if func is F.linear else output


def test_a_function_mode_of_the_loop_sees_the_same_calls(tmp_path: Path) -> None:
    ends = []
    for details in (False, True):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        path = tmp_path / f"{details}.jsonl"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = fastfs.Monitor(
            model, optimizer, every=1, layers=["linear2"], details=details, path=path, alerts=(), verbose=False
        )
        with monitor, Scaling():
            model(torch.randn(3, 5, 8))[..., 0].sum().backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
        assert fastfs.load(path)["valid"].all()
    assert all(map(torch.equal, *ends))
