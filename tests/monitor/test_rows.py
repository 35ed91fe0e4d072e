"""Kept rows: which ones, how well they estimate all of them, and their quantiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._monitor.capture.sampling import RowChoice, RowSampler
from fastfs.models import ResNet
from tests.helpers.monitor_cases import measured_into, rows, sgd, small_transformer, tokens, train, watched

CPU = torch.device("cpu")

# Estimates


def many(step: int, size: int = 192) -> tuple[Any, ...]:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 8, generator=generator) * torch.rand(size, 1, generator=generator).exp()
    return x, torch.randint(3, (size,), generator=generator)


def both(steps: int, kept: Any, micro_batches: int = 1) -> list[Any]:
    """The last block's rows of every step, from `kept` rows and from all."""
    torch.manual_seed(0)
    model = ResNet(8, 16, 2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    seen: dict[Any, list[Any]] = {kept: [], None: []}
    monitors = [
        fastfs.Monitor(
            model, optimizer, layers=["blocks.1"], every=1, rows=count, sinks=[measured_into(found)], alerts=()
        )
        for count, found in seen.items()
    ]
    for step in range(steps):
        x, y = many(step)
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            (F.cross_entropy(model(part), labels) / micro_batches).backward()
        optimizer.step()
    for monitor in monitors:
        monitor.close()
    return list(zip(seen[kept], seen[None], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "micro_batches"), [(48, 1), (144, 1), (32, 3)], ids=["a quarter", "three quarters", "micro-batches"]
)
def test_estimates_agree_with_all_rows_within_their_standard_errors(
    kept: int, micro_batches: int, threads: Any
) -> None:
    """Student's t with at least 47 degrees of freedom: 94.9% are within two standard errors.

    Of 200 that is 189.7 +- 3.1, if errors are right: 175 and more are allowed (4 sigma). The mean of the squares is
    1.04 +- 0.11 then, also held to 4 sigma: errors that are too large do not pass either.
    """
    threads(1)
    number = 200
    found = both(number, kept, micro_batches)
    assert len(found) == number
    for key, error in (("angle", "angle_se"), ("update_rms", "update_rms_se"), ("residual", "residual_se")):
        z = np.array([(some[key] - every[key]) / some[error] for some, every in found])
        if key == "residual":  # 1 - D / <b, df>, of which the last is estimated: what is linear in the sample is tested
            z *= [(1 - some[key]) / (1 - every[key]) for some, every in found]
        assert (np.abs(z) < 2).sum() >= 175, key
        assert 0.6 < np.mean(z**2) < 1.5, key
        assert abs(z.mean()) < 0.4, key  # 4 sigma, and the bias of a ratio
        assert all(every[error] is None for _, every in found)
    for some, every in found:
        assert (some["rows"], every["rows"]) == (kept * micro_batches, 192)
        assert (some["count"], every["count"]) == (192 * 16, 192 * 16)


def features_by_hand(model: Any, optimizer: torch.optim.Optimizer, batch: Any, layer: Any) -> tuple[Any, ...]:
    """Before, backward and after of a layer in one training step."""
    kept = []
    handle = layer.register_forward_hook(lambda _m, _a, out: kept.append(out))
    x, y = batch
    loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
    optimizer.zero_grad()
    (backward,) = torch.autograd.grad(loss, kept, retain_graph=True)
    loss.backward()
    optimizer.step()
    before = kept.pop().detach().clone()
    with torch.no_grad():
        model(x)
    handle.remove()
    return before, backward, kept.pop()


def cosine(df: Any, b: Any) -> Any:
    return -(df * b).sum(-1) / (df.norm(dim=-1) * b.norm(dim=-1))


def test_the_three_tensors_have_the_same_rows_and_the_subset_is_the_same_in_every_step() -> None:
    torch.manual_seed(0)
    model = ResNet(8, 16, 3, 3).double()
    twin = ResNet(8, 16, 3, 3).double()
    twin.load_state_dict(model.state_dict())
    other = sgd(twin)
    model, optimizer, seen, monitor = watched(model=model, rows=5)
    for step in range(4):
        batch = rows(step)[0].double(), rows(step)[1]
        train(model, optimizer, 1, lambda _, batch=batch: batch)  # type: ignore[misc]
        before, backward, after = features_by_hand(twin, other, batch, twin.blocks[1])
        subset = RowSampler(5).rows_of(RowChoice(16, 5), CPU)
        assert len(set(subset.tolist())) == 5
        f, b, df = before[subset], backward[subset], (after - before)[subset]
        monitor.flush()
        row = next(row for row in seen if row["step"] == step and row["name"] == "blocks.1")
        assert row["feature_rms"] == pytest.approx(f.square().mean().sqrt().item(), rel=1e-10)
        assert row["update_rms"] == pytest.approx(df.square().mean().sqrt().item(), rel=1e-9)
        assert row["backward_rms"] == pytest.approx(b.square().mean().sqrt().item(), rel=1e-10)
        assert row["cos_angle"] == pytest.approx(cosine(df.flatten(), b.flatten()).item(), rel=1e-9)
        assert (row["rows"], row["count"]) == (5, 16 * 16)
    monitor.close()


def test_all_layers_and_all_runs_have_the_same_subset() -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
            for block in self.blocks:
                nn.init.eye_(block.weight)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    found = []
    for _ in range(2):
        model, optimizer, seen, monitor = watched(model=Same(), rows=3, alerts=())
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(model, optimizer, 3, lambda _: rows(0))
        train(model, optimizer, 1, lambda _: (rows(0)[0].flip(0), rows(0)[1]))
        monitor.close()
        found.append([row["feature_rms"] for row in seen])
    assert found[0] == found[1]
    assert len(set(found[0][:9])) == 1
    assert found[0][9] != found[0][0]  # other rows are there now


def test_rows_none_keeps_all() -> None:
    seen = {}
    for kept in (None, 16, 10**6):
        torch.manual_seed(0)
        model, optimizer, seen[kept], monitor = watched(rows=kept)
        train(model, optimizer, 2)
        monitor.close()
    for every, exactly, more in zip(*seen.values(), strict=True):
        assert every["rows"] == exactly["rows"] == more["rows"] == 16
        for key in ("angle", "update_rms", "feature_rms", "backward_rms"):
            assert every[key] == exactly[key] == more[key]
        assert every["angle_se"] is every["update_rms_se"] is every["residual_se"] is None


@pytest.mark.parametrize("value", [0, 1, -3, 2.5, True, "all"])
def test_rows_must_be_a_number_of_rows(value: Any) -> None:
    with pytest.raises(ValueError, match=r"rows: expected an integer >= 2 \(rows kept of a layer, or None for all\)"):
        watched(rows=value)


# Shapes


class Shaped(nn.Module):
    """Features of any shape, from a linear map."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), Reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return F.pad(out.reshape(-1)[:, None], (0, 2)) if out.numel() < 48 else out.reshape(16, -1)[:, :3]


class Reshape(nn.Module):
    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(x)


@pytest.mark.parametrize(
    ("shape", "total", "width"),
    [
        (lambda x: x.sum(), 1, 1),
        (lambda x: x[:, 0], 16, 1),
        (lambda x: x, 16, 8),
        (lambda x: x.reshape(4, 8, 4), 32, 4),
        (lambda x: x.reshape(8, 2, 4, 2), 8, 16),
        (lambda x: x.reshape(4, 2, 2, 4, 2), 4, 32),
    ],
    ids=["0-d", "1-d", "2-d", "3-d", "4-d", "5-d"],
)
def test_what_a_row_is(shape: Callable[..., Any], total: int, width: int) -> None:
    """Tokens up to three dimensions; samples (images, clips) from four on."""
    torch.manual_seed(0)
    model = Shaped(shape).double()
    twin = Shaped(shape).double()
    twin.load_state_dict(model.state_dict())
    other = sgd(twin)
    x = rows(0)[0].double()
    y = rows(0)[1][: twin(x).shape[0]]
    model, optimizer, seen, monitor = watched(layers="inner$", model=model, rows=3)
    train(model, optimizer, 1, lambda _: (x, y))
    monitor.close()
    (row,) = seen
    kept = min(3, total)
    assert (row["rows"], row["count"]) == (kept, total * width)
    before, backward, after = features_by_hand(twin, other, (x, y), twin.inner)
    subset = RowSampler(3).rows_of(RowChoice(total, kept), CPU)
    f, b, df = (t.reshape(total, width)[subset] for t in (before, backward, after - before))
    assert row["feature_rms"] == pytest.approx(f.square().mean().sqrt().item(), rel=1e-10)
    assert row["backward_rms"] == pytest.approx(b.square().mean().sqrt().item(), rel=1e-10)
    assert row["update_rms"] == pytest.approx(df.square().mean().sqrt().item(), rel=1e-8)
    assert (row["angle_se"] is None) == (total <= 3)


@pytest.mark.parametrize("kept", [None, 6])
def test_quantiles_are_those_of_the_rows(kept: int | None) -> None:
    torch.manual_seed(0)
    model = small_transformer().double().eval()
    twin = small_transformer().double().eval()
    twin.load_state_dict(model.state_dict())
    other = sgd(twin)
    wanted = (0.0, 0.1, 0.5, 0.975, 1.0)
    model, optimizer, seen, monitor = watched(model=model, rows=kept, quantiles=wanted)
    train(model, optimizer, 1, tokens)
    monitor.close()
    before, backward, after = features_by_hand(twin, other, tokens(0), twin.blocks[2])
    number = 24 if kept is None else kept
    subset = RowSampler(kept).rows_of(RowChoice(24, number), CPU)
    df, b = ((after - before).reshape(24, 16)[subset], backward.reshape(24, 16)[subset])
    row = next(row for row in seen if row["name"] == "blocks.2")
    for quantile, suffix in zip(wanted, ("q0", "q10", "q50", "q97.5", "q100"), strict=True):
        assert row[f"cos_angle_{suffix}"] == pytest.approx(np.quantile(cosine(df, b).numpy(), quantile), rel=1e-8)
        speeds = df.square().mean(dim=1).sqrt().numpy()
        assert row[f"update_rms_{suffix}"] == pytest.approx(np.quantile(speeds, quantile), rel=1e-8)


@pytest.mark.parametrize(
    ("value", "error"),
    [([2], ValueError), ([-0.1], ValueError), (["a"], ValueError), ("0.5", TypeError), (3, TypeError)],
)
def test_wrong_quantiles(value: Any, error: Any) -> None:
    with pytest.raises(error, match="quantiles: expected numbers between 0 and 1"):
        watched(quantiles=value)
