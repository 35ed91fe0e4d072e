"""Which optimizer is found in what the user gives, and whose update is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfs
from fastfs._monitor.optimizers import TrainingOptimizer, check_optimizers
from fastfs._monitor.steps import OptimizerSteps
from tests.helpers.step_cases import MAKERS, ONE, Log, Plain, Slow, give, watch


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def found(model: nn.Module, optimizer: Any) -> TrainingOptimizer:
    return check_optimizers(model, optimizer)[0]


def test_what_is_found(model: nn.Module) -> None:
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    assert (found(model, inner).optimizer, found(model, inner).copied) == (inner, False)
    for wrapper in (Plain(inner), Slow(inner), Plain(Slow(inner))):
        each = found(model, wrapper)
        assert each.outer is wrapper
        assert each.real == (inner,)
        assert each.copied
        assert each.name == type(wrapper).__name__
        assert list(map(id, each.parameters)) == list(map(id, model.parameters()))

    class Accelerated(Plain):
        pass

    Accelerated.__module__, Accelerated.__qualname__ = "accelerate.optimizer", "AcceleratedOptimizer"
    each = found(model, Accelerated(inner))
    assert (each.outer, each.optimizer, each.copied) == (inner, inner, False)
    each = found(model, Accelerated(Slow(inner)))
    assert (type(each.outer), each.copied) == (Slow, True)


def test_several_in_one_wrapper(model: nn.Module) -> None:
    class Both:
        def __init__(self) -> None:
            self.optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]

        def step(self) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

    optimizer = Both()
    log, steps = watch(model, optimizer)
    give(model)
    optimizer.step()
    assert log.take() == ONE
    assert len(found(model, optimizer).parameters) == 4
    steps.close()


def test_a_class_of_its_own(model: nn.Module) -> None:
    class Own:
        def __init__(self) -> None:
            self.param_groups = [{"params": list(model.parameters())}]

        @torch.no_grad()
        def step(self) -> None:
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)

    optimizer = Own()
    log, steps = watch(model, optimizer)
    give(model)
    optimizer.step()
    assert log.take() == ONE
    steps.close()


def test_what_is_refused(model: nn.Module) -> None:
    expected = (
        r"optimizer: expected a torch.optim.Optimizer, an object with a step\(\) that holds one, or a list of them"
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in (
        3,
        "sgd",
        None,
        object(),
        torch.optim.lr_scheduler.ExponentialLR(inner, 0.5),
        torch.amp.GradScaler("cpu"),
    ):
        with pytest.raises(TypeError, match=f"{expected}, got {type(wrong).__name__}"):
            check_optimizers(model, wrong)
    lbfgs = torch.optim.LBFGS(model.parameters())
    for each in (lbfgs, Plain(lbfgs), Plain(Plain(lbfgs))):
        with pytest.raises(
            ValueError, match=r"optimizer: LBFGS(, which Plain holds,)? evaluates the loss several times"
        ):
            check_optimizers(model, each)
    with pytest.raises(ValueError, match=r"expected every parameter in one optimizer, got some in several"):
        check_optimizers(model, [inner, Plain(inner)])
    other = torch.optim.SGD([torch.zeros(3)], lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer: Plain updates no parameter of Sequential"):
        check_optimizers(model, Plain(other))

    class Slots:
        __slots__ = ("inner",)

        def __init__(self) -> None:
            self.inner = inner

        def step(self) -> None:
            self.inner.step()

    with pytest.raises(TypeError, match="expected an object on which step can be set, got Slots"):
        OptimizerSteps(check_optimizers(model, Slots()), Log())


@pytest.mark.parametrize("name", ["super", "lookahead", "lookahead in a wrapper", "wrapper of a subclass"])
def test_the_update_is_that_of_the_outermost_step(name: str, model: nn.Module, threads: Callable[[int], None]) -> None:
    """Measured and predicted steps, against copies; and training goes on as without the monitor."""
    threads(1)
    model.double()
    twin = copy.deepcopy(model)
    x = torch.randn(16, 4, dtype=torch.float64)
    seen: list[dict[str, Any]] = []
    optimizer, other = MAKERS[name](model.parameters()), MAKERS[name](twin.parameters())
    truth = []
    with fastfs.Monitor(
        model, optimizer, layers=["0", "2"], every=2, aligned_every=1, sinks=[seen.extend], verbose=False, rows=None
    ):
        for _ in range(4):
            for each, opt in ((twin, other), (model, optimizer)):
                for p in each.parameters():
                    p.grad = None
                each(x).square().mean().backward()
                nn.utils.clip_grad_norm_(each.parameters(), 0.1)
                old = [p.detach().clone() for p in each.parameters()]
                opt.step()
            moved = [p.detach() - q for p, q in zip(model.parameters(), old, strict=True)]
            truth.append([math_norm(moved[:2]), math_norm(moved[2:])])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [row for row in seen if row["kind"] in ("measured", "predicted")]
    assert len(rows) == 8
    for row in rows:
        assert row["parameter_update_norm"] == pytest.approx(truth[row["step"]][row["layer"]], rel=1e-6)
        assert row["aligned_decrease"] is not None


def math_norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


@pytest.mark.filterwarnings("ignore")  # what Dynamo says of hooks
@pytest.mark.parametrize("name", ["plain", "super"])
def test_a_compiled_step_is_one_step(name: str, model: nn.Module) -> None:
    torch._dynamo.reset()
    optimizer = MAKERS[name](model.parameters())
    log, steps = watch(model, optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        give(model)
        step()
        assert log.take() == ONE
    steps.close()
