"""A failed attach leaves nothing behind: no hook, no thread, no file, no changed optimizer."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastfs
from fastfs._monitor.capture.capture import Capture
from fastfs._monitor.engine import Engine
from fastfs._monitor.step_runner import StepRunner
from fastfs._monitor.steps import OptimizerSteps


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[int]:
    counts = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    counts += [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return [*counts, len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)]


@pytest.mark.parametrize(
    "where",
    [(Capture, "_attach"), (Engine, "__post_init__"), (OptimizerSteps, "__init__"), (StepRunner, "_arm")],
    ids=["capture", "engine", "steps", "monitor"],
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left(where: tuple[Any, ...], error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, threads = hooks(model, optimizer), threading.active_count()

    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error("attach")

    with monkeypatch.context() as patch:
        patch.setattr(*where, fail)
        with pytest.raises(error, match="attach"):
            fastfs.Monitor(model, optimizer, path=tmp_path / "new" / "record.jsonl", verbose=False)
    assert hooks(model, optimizer) == before
    assert threading.active_count() == threads
    assert list(tmp_path.iterdir()) == []
    with fastfs.Monitor(model, optimizer, path=tmp_path / "record.jsonl", every=1, verbose=False):
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    table = fastfs.load(tmp_path / "record.jsonl")
    assert (table["kind"] == "measured").all()
    assert len(table)


@pytest.mark.parametrize("select", [3, "x", torch.Tensor])
def test_select_is_checked(select: Any) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="select: expected a function"):
        fastfs.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), select=select, sinks=[print])


def test_an_optimizer_that_is_used_in_another_way_is_told_at_the_end() -> None:
    class Sharp(torch.optim.SGD):
        def second_step(self) -> None:
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p -= group["lr"] * p.grad

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = Sharp(model.parameters(), lr=0.1)
    monitor = fastfs.Monitor(model, optimizer, every=1, sinks=[lambda rows: None], verbose=False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.second_step()
    with pytest.warns(RuntimeWarning, match=r"backwards of the model were seen, but no step\(\) of Sharp"):
        monitor.close()
