"""The overshoot of a step, against the losses and the decrease of copies in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_loops import Net, muon
from tests.helpers.parameter_cases import OPTIMIZERS

Row = dict[str, Any]


class WithLoss(nn.Module):
    """Returns the loss of its labels, as the models of transformers do, among other tensors."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.net = Net(drop=drop)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        if labels is None:
            return logits
        loss = F.cross_entropy(logits, labels)
        return {"aux": logits.square().mean(), "loss": loss, "logits": logits}


class Loop:
    """Trains a copy of a model and notes the loss before and after each step, and D, in float64."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]],
        *,
        dtype: torch.dtype = torch.float64,
        micro_batches: int = 1,
        clip: float | None = None,
        scaler: Any = None,
        logs: float | None = 1.0,
        term: Callable[[WithLoss, Any], Tensor] | None = None,
        probe: bool = False,
        between: Callable[[nn.Module], object] | None = None,
        **monitor: Any,
    ) -> None:
        torch.manual_seed(2)
        model = WithLoss().to(dtype)
        optimizers_of = optimizers(model)
        self.rows: list[Row] = []
        self.seen: list[float | None] = []
        generator = torch.Generator().manual_seed(1)

        def batch() -> tuple[Tensor, Tensor]:
            x = torch.randn(16, 8, generator=generator, dtype=torch.float64)
            return x, torch.randint(3, (16,), generator=generator)

        fixed = batch()
        if probe:
            monitor |= {"mode": "probe", "probe": (fixed[0].to(dtype), lambda out: F.cross_entropy(out, fixed[1]))}
        options: dict[str, Any] = {"every": 1, "layers": r"blocks\.\d+$", "alerts": (), "scaler": scaler} | monitor
        with fastfs.Monitor(model, optimizers_of, sinks=[self.rows.extend], verbose=False, **options) as watch:
            for _ in range(4):
                model.zero_grad()
                batches = [batch() for _ in range(micro_batches)]
                for x, y in batches:
                    found = model(x.to(dtype), labels=y)
                    loss = (found["loss"] + (0.0 if term is None else term(model, found))) / micro_batches
                    (loss if scaler is None else scaler.scale(loss)).backward()
                    if logs is not None:
                        watch.log(loss=logs * loss.detach())
                if between is not None:
                    between(model)
                before = copy.deepcopy(model).double()
                if scaler is not None:
                    scaler.unscale_(optimizers_of[0])
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                for optimizer in optimizers_of:
                    optimizer.step() if scaler is None else scaler.step(optimizer)
                if scaler is not None:
                    scaler.update()
                self.seen.append(overshoot(before, copy.deepcopy(model).double(), [fixed] if probe else batches))

    @property
    def found(self) -> list[float | None]:
        """The overshoots of the record, by step."""
        return list({row["step"]: row["overshoot"] for row in self.rows if row["kind"] == "measured"}.values())


def overshoot(before: nn.Module, after: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float | None:
    """2 (dL + D) / D, from the gradients and losses of two copies in float64; None if D is not positive."""
    losses = []
    for model in (before, after):
        model.zero_grad()
        loss = torch.stack([model(x, labels=y)["loss"] for x, y in batches]).mean()
        loss.backward()
        losses.append(loss.item())
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    decrease = -sum(float((a.grad * (b.detach() - a.detach())).sum()) for a, b in pairs if a.grad is not None)
    return 2 * (losses[1] - losses[0] + decrease) / decrease if decrease > 0 else None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"micro_batches": 3, "clip": 0.05},
        {"amplify": True},
        {"probe": True},
        {"probe": True, "logs": None},
    ],
    ids=["batch", "micro-batches", "amplify", "probe", "probe without a log"],
)
def test_by_hand(optimizer: str, options: dict[str, Any]) -> None:
    run = Loop(OPTIMIZERS[optimizer], **options)
    assert sum(seen is not None for seen in run.seen) >= 2
    for found, seen in zip(run.found, run.seen, strict=True):
        assert found == (None if seen is None else pytest.approx(seen, abs=0.01 if "probe" in options else 1e-7))


def test_meaning() -> None:
    """Of a quadratic loss a step of t times the way to its minimum has an overshoot of t."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return ((self.linear(x) - 1.0) ** 2).mean()

    for t in (0.25, 1.0, 2.0, 3.0):
        model = Quadratic().double()
        rows: list[Row] = []
        optimizer = torch.optim.SGD(model.parameters(), lr=t / 2)  # the curvature is 2
        with fastfs.Monitor(
            model, optimizer, every=1, layers=["linear"], alerts=(), sinks=[rows.extend], verbose=False
        ) as watch:
            loss = model(torch.ones(1, 1, dtype=torch.float64))
            loss.backward()
            watch.log(loss=loss)
            optimizer.step()
        (row,) = (row for row in rows if row["kind"] == "measured")
        assert row["overshoot"] == pytest.approx(t)


def test_a_gradient_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = Loop(OPTIMIZERS["sgd"], scaler=scaler, micro_batches=2)
    assert run.found == [pytest.approx(seen, rel=1e-7) for seen in run.seen]


def test_single_precision_within_the_stated_rounding() -> None:
    run = Loop(OPTIMIZERS["sgd"], dtype=torch.float32)
    assert run.found == [pytest.approx(seen, abs=0.01) for seen in run.seen]


def test_rounding_that_could_be_mistaken_for_curvature_is_null() -> None:
    small = Loop(lambda model: [torch.optim.SGD(model.parameters(), lr=1e-6)], dtype=torch.float32)
    assert small.found == [None] * 4
    coarse = Loop(lambda model: [torch.optim.SGD(model.parameters(), lr=0.01)], dtype=torch.bfloat16)
    assert coarse.found == [None] * 4
    large = Loop(muon, dtype=torch.bfloat16)
    for found, seen in zip(large.found, large.seen, strict=True):
        assert found is None or found == pytest.approx(seen, abs=0.06)


@pytest.mark.parametrize(
    "options",
    [
        {"logs": None},
        {"logs": 2.0},
        {"term": lambda model, found: 0.1 * found["aux"]},
        {"term": lambda model, found: 0.1 * found["logits"].square().mean()},
        {"term": lambda model, found: 0.1 * sum(p.square().sum() for p in model.parameters())},
        {"samples": 4},
        {"mode": "jvp"},
        {"between": lambda model: [p.data.mul_(0.99) for p in model.parameters()]},
    ],
    ids=["no log", "another loss", "a scalar", "logits", "a penalty", "samples", "jvp", "written"],
)
def test_null_if_it_is_not_known(options: dict[str, Any]) -> None:
    assert Loop(OPTIMIZERS["sgd"], **options).found == [None] * 4


def test_null_if_the_loss_is_computed_outside_the_model() -> None:
    model = Net()
    rows: list[Row] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastfs.Monitor(model, optimizer, every=1, sinks=[rows.extend], alerts=(), verbose=False) as watch:
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        watch.log(loss=loss)
        optimizer.step()
    assert [row["overshoot"] for row in rows if row["kind"] == "measured"] == [None] * 3


def test_a_model_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 31}
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, **drops)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.randint(31, (4, 12))
    rows: list[Row] = []
    seen = []
    with fastfs.Monitor(model, optimizer, every=1, alerts=(), sinks=[rows.extend], verbose=False) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            watch.log(loss=loss)
            old = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            with torch.no_grad():
                change = model(input_ids=tokens, labels=tokens).loss - loss
            pairs = zip(model.parameters(), old, strict=True)
            decrease = -sum((p.grad * (p.detach() - before)).sum() for p, before in pairs if p.grad is not None)
            seen.append(float(2 * (change + decrease) / decrease))
    found = list({row["step"]: row["overshoot"] for row in rows if row["kind"] == "measured"}.values())
    assert found == [pytest.approx(each, rel=1e-5) for each in seen]
