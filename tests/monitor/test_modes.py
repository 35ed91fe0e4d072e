"""The ways to see an update: each against the same taken by hand, and against each other."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfs
from fastfs.models import Transformer
from fastfs.monitor import Probe
from tests.helpers.monitor_cases import measured_into, rows, sgd, tokens, train, wide_rows
from tests.helpers.monitor_loops import BLOCKS, Net

TINY: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "context": 12}


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


def features(model: nn.Module, x: Tensor, values: dict[str, Tensor] | None = None) -> list[Tensor]:
    """Outputs of the blocks, by hooks of the test's own."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _a, out: found.append(out.clone())) for block in model.blocks]
    try:
        torch.func.functional_call(model, {} if values is None else values, (x,))
    finally:
        for handle in handles:
            handle.remove()
    return found


def backward_vectors(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def tap(index: int) -> Callable[..., None]:
        return lambda _m, _a, out: out.register_hook(lambda g: found.__setitem__(index, g.clone())) and None

    handles = [block.register_forward_hook(tap(i)) for i, block in enumerate(model.blocks)]
    torch.autograd.grad(loss(model(x)), list(model.parameters()), allow_unused=True)
    for handle in handles:
        handle.remove()
    return [found[i].double() for i in range(len(model.blocks))]


def one_step(model: nn.Module, batch: Any, optimizer: Any, autocast: bool = False, **options: Any) -> Any:
    """Rows of one measured step, and the structure."""
    seen: list[dict[str, Any]] = []
    keywords: dict[str, Any] = {"layers": BLOCKS, "every": 1, "rows": None, "verbose": False, "alerts": ()} | options
    x, y = batch
    with fastfs.Monitor(model, optimizer, sinks=[seen.extend], **keywords):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x).flatten(0, -2)
            loss = F.cross_entropy(out.float() if autocast else out, y.flatten())
        loss.backward()
        optimizer.step()
    structure = next(row for row in seen if row["kind"] == "structure")["layers"]
    return [row for row in seen if row["kind"] == "measured"], structure


def check(row: dict[str, Any], f: Tensor, df: Tensor, b: Tensor, rel: float, keys: str = "") -> None:
    f, df, b = f.double(), df.double(), b.double()
    truth = {
        "cos_angle": float(-(df * b).sum() / (df.norm() * b.norm())),
        "update_rms": float(df.square().mean().sqrt()),
        "feature_rms": float(f.square().mean().sqrt()),
        "backward_rms": float(b.square().mean().sqrt()),
        "radial_update": float((f * df).sum() / f.square().sum()),
        "tangential_update": float((df - f * (f * df).sum() / f.square().sum()).norm() / f.norm()),
    }
    for key in keys.split() or truth:
        assert row[key] == pytest.approx(truth[key], rel=rel), key


# Along the real update, to first order


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_jvp_is_the_derivative_along_the_real_update(kind: str) -> None:
    torch.manual_seed(1)
    model = Net().double()
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.3) if kind == "sgd" else torch.optim.AdamW(model.parameters(), lr=0.1)
    )
    x, y = wide_rows(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    old = copy.deepcopy(model)
    seen, structure = one_step(model, (x, y), optimizer, mode="jvp")
    change = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    f, df = torch.func.jvp(lambda values: tuple(features(old, x, values)), (before,), (change,))  # type: ignore[misc]
    b = backward_vectors(old, x, lambda out: F.cross_entropy(out, y))
    assert structure["cut"] == [True] * 3
    for row, *parts in zip(seen, f, df, b, strict=True):
        check(row, *parts, rel=1e-9)  # type: ignore[misc]
        assert row["method"] == "jvp"
        assert row["valid"]
        assert abs(row["residual"]) < 1e-5


def test_batch_converges_to_jvp_as_the_step_shrinks() -> None:
    """First order: the difference is proportional to the step."""
    errors = []
    for lr in (1e-2, 1e-3, 1e-4):
        found = []
        for mode in ("batch", "jvp"):
            torch.manual_seed(1)
            model = Net().double()
            found.append(one_step(model, wide_rows(0), torch.optim.SGD(model.parameters(), lr=lr), mode=mode)[0])
        errors.append(sum(abs(a["update_rms"] / b["update_rms"] - 1) for a, b in zip(*found, strict=True)))
        assert max(abs(a["angle"] - b["angle"]) for a, b in zip(*found, strict=True)) < 2 * lr
    for large, small in itertools.pairwise(errors):
        assert large / small == pytest.approx(10, rel=0.1)


# On a probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_probe_is_measured_in_float32_whatever_the_loop_does(dtype: torch.dtype) -> None:
    """Under autocast, and with parameters in 16 bits; `.grad` holds the loop's gradient alone."""
    torch.manual_seed(1)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = rows(7)
    seen: list[dict[str, Any]] = []
    probe = (x, lambda out: F.cross_entropy(out, y))
    twin = copy.deepcopy(model)
    with fastfs.Monitor(
        model, optimizer, layers=BLOCKS, every=1, mode="probe", probe=probe, sinks=[seen.extend], verbose=False
    ):
        for step in range(3):
            results = []
            for each in (model, twin):
                each.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(each(rows(step)[0].to(dtype)).float(), rows(step)[1])
                loss.backward()
                results.append([p.grad.clone() for p in each.parameters()])
            old = copy.deepcopy(model).float()
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), results[1], strict=True))
            twin.load_state_dict(model.state_dict())
            now = copy.deepcopy(model).float()
            f, after = features(old, x), features(now, x)
            b = backward_vectors(old, x, probe[1])
            x.add_(0)  # the probe has copies
            results.append((f, after, b))
            expected = [(a.detach(), (c - a).detach(), d) for a, c, d in zip(f, after, b, strict=True)]
            seen.append({"kind": "truth", "step": step, "parts": expected})
    truths = {row["step"]: row["parts"] for row in seen if row["kind"] == "truth"}
    measured = [row for row in seen if row["kind"] == "measured"]
    assert len(measured) == 9
    for row in measured:
        assert row["valid"], row["why"]
        check(row, *truths[row["step"]][row["layer"]], rel=1e-4)  # type: ignore[misc]
        assert abs(row["residual"]) < 0.2


def test_the_rows_of_a_probe_are_fixed() -> None:
    torch.manual_seed(1)
    model = Net(drop=0.5)
    x, y = rows(7)
    seen: list[dict[str, Any]] = []
    probe = Probe(x, lambda out: F.cross_entropy(out, y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options: dict[str, Any] = {
        "mode": "probe",
        "probe": probe,
        "rows": 4,
        "sinks": [seen.extend],
        "verbose": False,
        "alerts": (),
    }
    with fastfs.Monitor(model, optimizer, layers=BLOCKS, every=1, **options):
        for step in range(3):
            F.cross_entropy(model(rows(step)[0]), rows(step)[1]).backward()
            optimizer.step()
            x.zero_()  # the probe has copies
    measured = [row for row in seen if row["kind"] == "measured"]
    for key in ("feature_rms", "backward_rms"):
        for layer in range(3):
            assert len({row[key] for row in measured if row["layer"] == layer}) == 1  # also the dropout masks


@pytest.mark.parametrize("mode", ["jvp", "probe"])
def test_a_recurrent_network(mode: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LSTM(8, 8, batch_first=True)
            self.second = nn.LSTM(8, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)[0])[0])

    torch.manual_seed(1)
    model = Recurrent().double()
    x, y = torch.randn(4, 5, 8, dtype=torch.float64), torch.randint(3, (4, 5))
    options: dict[str, Any] = {"mode": mode, "layers": ["first", "second", "head"]}
    if mode == "probe":
        options["probe"] = Probe(x, lambda out: F.cross_entropy(out.flatten(0, 1), y.flatten()), dtype=torch.float64)
    seen, structure = one_step(model, (x, y), torch.optim.SGD(model.parameters(), lr=1e-4), **options)
    assert [row["name"] for row in seen] == ["first", "second", "head"]
    for row, cut in zip(seen, structure["cut"], strict=True):
        assert row["valid"], row["why"]
        assert cut
        assert abs(row["residual"]) < (1e-5 if mode == "jvp" else 1e-3)


# Cuts and what is none


def test_the_residual_is_nothing_at_cuts_and_null_inside_of_branches() -> None:
    torch.manual_seed(1)
    model = Transformer(**TINY).double()
    layers = r"blocks\.\d+$|mlp_out|attention$"
    seen, structure = one_step(model, tokens(0), torch.optim.SGD(model.parameters(), lr=0.1), layers=layers, mode="jvp")
    inside = [row["name"].count(".") > 1 for row in seen]
    assert structure["cut"] == [not branch for branch in inside]
    for row, branch, reason in zip(seen, inside, structure["reason"], strict=True):
        if branch:
            assert math.isnan(row["residual"])
            assert "inside a residual branch" in reason
        else:
            assert abs(row["residual"]) < 1e-5
            assert reason is None


def test_a_tied_embedding_flags_every_layer_between_and_gives_no_prediction() -> None:
    torch.manual_seed(1)
    model = Transformer(**TINY, tied=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[dict[str, Any]] = []
    options: dict[str, Any] = {"every": 2, "aligned_every": 1, "sinks": [seen.extend], "verbose": False}
    with fastfs.Monitor(model, optimizer, layers=BLOCKS, **options):
        for step in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens(step)[0]).flatten(0, 1), tokens(step)[1].flatten()).backward()
            optimizer.step()
    structure = next(row for row in seen if row["kind"] == "structure")["layers"]
    assert structure["cut"] == [False, False]
    assert all("token.weight" in reason for reason in structure["reason"])
    assert all(math.isnan(row["residual"]) for row in seen if row["kind"] == "measured")
    predicted = [row for row in seen if row["kind"] == "predicted"]
    assert len(predicted) == 4
    assert all(math.isnan(row["update_rms"]) for row in predicted)


# Tiny steps in 16 bits


@pytest.mark.parametrize("lr", [3e-1, 3e-2, 3e-3, 3e-4])
def test_amplified_under_autocast_is_right_or_flagged(lr: float) -> None:
    """Relative updates of 1e-2 to 1e-5, against first-order and plain updates in float64."""
    torch.manual_seed(1)
    model = Transformer(**TINY)
    truth = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x, _ = batch = tokens(0)
    f = features(truth, x)
    f = [x.detach() for x in f]
    b = backward_vectors(truth, x, lambda out: F.cross_entropy(out.flatten(0, 1), batch[1].flatten()))
    seen, _ = one_step(model, batch, optimizer, autocast=True, amplify=True)
    after = features(copy.deepcopy(model).double(), x)
    right = 0
    for row, before, later, vector in zip(seen, f, after, b, strict=True):
        df = later.detach() - before
        if row["valid"]:
            right += 1
            assert row["update_rms"] == pytest.approx(float(df.square().mean().sqrt()), rel=0.02)
            angle = math.acos(float(-(df * vector).sum() / (df.norm() * vector.norm())))
            assert row["angle"] == pytest.approx(angle, rel=0.02)
    assert right == len(seen) or lr == 3e-1


class Checkpointed(nn.Module):
    """Blocks that are computed again in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x[:, :3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_of_a_model_with_checkpoints(dtype: torch.dtype) -> None:
    model = Checkpointed().to(dtype)
    optimizer = sgd(model)
    x, y = rows(0)
    seen: list[dict[str, Any]] = []
    probe = x.to(dtype), lambda output: F.cross_entropy(output, y)
    with fastfs.Monitor(
        model, optimizer, mode="probe", probe=probe, every=1, sinks=[measured_into(seen)], verbose=False
    ):
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    assert [row["name"] for row in seen] == ["blocks.0", "blocks.1", "blocks.2"]
    for row in seen:
        assert row["valid"], row["why"]
        assert abs(row["residual"]) < 0.05


def test_an_enlarged_update_through_batch_norm_is_valid_in_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model.append(nn.Linear(16, 3))
    optimizer = sgd(model)
    seen: list[dict[str, Any]] = []
    with fastfs.Monitor(
        model, optimizer, layers=["1", "4"], amplify=True, every=1, sinks=[measured_into(seen)], verbose=False
    ):
        train(model, optimizer, 3)
    assert [row["why"] for row in seen] == [None] * 6
