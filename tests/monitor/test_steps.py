"""One training step from the hooks of optimizers: steps in steps, wrappers, closures, exceptions, interrupts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfs
from tests.helpers.step_cases import MAKERS, ONE, Accumulating, Mine, Plain, Slow, give, watch


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_one_step(name: str, model: nn.Module) -> None:
    torch.optim.AdamW([torch.zeros(1)]), Mine([torch.zeros(1)])  # torch hooks the classes that were instantiated
    optimizer = MAKERS[name](model.parameters())
    log, steps = watch(model, optimizer)
    for _ in range(3):
        give(model)
        optimizer.step()
        assert log.take() == ONE
    steps.close()
    optimizer.step()
    assert log.take() == []
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_raised_is_forgotten(name: str, error: type[BaseException], model: nn.Module) -> None:
    optimizer = MAKERS[name](model.parameters())
    log, steps = watch(model, optimizer)
    inner = optimizer
    while isinstance(inner, (Plain, Slow)):
        inner = inner.inner if isinstance(inner, Plain) else inner.base

    def interrupt(*_: Any) -> None:
        raise error

    give(model)
    handle = inner.register_step_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(error):
            optimizer.step()
        log.take()
    handle.remove()
    for _ in range(2):
        optimizer.step()
        assert log.take() == ONE
    steps.close()


@pytest.mark.parametrize("name", MAKERS)
def test_the_last_evaluation_of_a_closure_counts(name: str, model: nn.Module) -> None:
    optimizer = MAKERS[name](model.parameters())
    log, steps = watch(model, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert log.take() == ["enter", "evaluate", *ONE]
    steps.close()


def test_a_closure_that_is_called_twice_or_not_at_all(model: nn.Module) -> None:
    class Twice(torch.optim.SGD):
        times = 2

        def step(self, closure: Any = None) -> Any:
            for _ in range(self.times):
                closure()
            return super().step()

    optimizer = Twice(model.parameters(), lr=0.1)
    log, steps = watch(model, optimizer)
    optimizer.step(lambda: give(model))
    assert log.take() == ["enter", "evaluate", "before0!", "evaluate", *ONE]
    optimizer.times = 0
    optimizer.step(lambda: give(model))
    assert log.take() == ["enter", "failed RuntimeError"]
    optimizer.times = 1
    optimizer.step(closure=lambda: give(model))
    assert log.take() == ["enter", "evaluate", *ONE]
    steps.close()


def test_a_wrapper_that_does_not_step_is_no_step(model: nn.Module) -> None:
    optimizer = Accumulating(torch.optim.SGD(model.parameters(), lr=0.1))
    log, steps = watch(model, optimizer)
    give(model)
    for _ in range(2):
        optimizer.step()
        assert log.take() == ["before0!"]
        optimizer.step()
        assert log.take() == ONE
    optimizer.inner.step()  # past the wrapper
    assert log.take() == ONE
    steps.close()


@pytest.mark.parametrize("broken", ["before0!", "after0", "finish", "enter", "evaluate"])
@pytest.mark.parametrize("name", ["plain", "lookahead"])
def test_nothing_that_a_listener_raises_reaches_the_loop(broken: str, name: str, model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    for each, monitored in ((model, True), (twin, False)):
        optimizer = MAKERS[name](each.parameters())
        if monitored:
            log, steps = watch(each, optimizer, broken)

        def closure(each: nn.Module = each) -> None:
            give(each)

        closure()
        optimizer.step()
        optimizer.step(closure)
    assert "failed ZeroDivisionError" in log.take()
    steps.close()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_in_a_backward_that_fails(model: nn.Module) -> None:
    """The next backward ends its step all the same."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    log, steps = watch(model, [optimizer])
    fail = [True]

    def hook(_: Tensor) -> None:
        optimizer.step()
        if fail[0]:
            raise ZeroDivisionError

    model[2].bias.register_post_accumulate_grad_hook(hook)
    with pytest.raises(ZeroDivisionError):
        model(torch.ones(2, 4)).sum().backward()
    log.take()
    fail[0] = False
    steps.forward_begins()
    log.take()
    model(torch.ones(2, 4)).sum().backward()
    assert log.take() == ONE
    steps.close()


# Wrappers as objects


@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_a_wrapped_step_goes_with_schedulers(when: str, model: nn.Module) -> None:
    optimizer = Slow(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = None
    if when == "before":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    log, steps = watch(model, optimizer)
    if when == "after":
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    give(model)
    optimizer.step()
    assert log.take() == ONE
    if scheduler is not None:
        scheduler.step()  # warns if it has not seen the optimizer step
    steps.close()
    optimizer.step()
    assert log.take() == []
    assert ("step" in vars(optimizer)) == (when != "never")


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("make", [Plain, Slow])
def test_a_copy_of_a_wrapper_is_not_watched(how: Any, make: Any, model: nn.Module) -> None:
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1))
    log, steps = watch(model, optimizer)
    give(model)
    twin = how(optimizer)
    if make is Plain:  # of an Optimizer torch itself copies groups and state only
        twin.step()
    assert log.take() == []
    optimizer.step()
    assert log.take() == ONE
    steps.close()


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_only_creates_the_state_of_the_optimizer(every: int) -> None:
    """torch.distributed.checkpoint takes a step at learning rate 0 before it loads an optimizer."""
    from torch.distributed.checkpoint import state_dict as checkpoints

    def run(state: Any = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows: list[dict[str, Any]] = []
        monitor = fastfs.Monitor(model, optimizer, every=every, aligned_every=1, sinks=[rows.extend], verbose=False)
        if state is not None:
            checkpoints.set_optimizer_state_dict(model, optimizer, state["optimizer"])
            model.load_state_dict(state["model"])
            monitor.load_state_dict(state["monitor"])
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()
        saved = {
            "optimizer": checkpoints.get_optimizer_state_dict(model, optimizer),
            "model": copy.deepcopy(model.state_dict()),
            "monitor": monitor.state_dict(),
        }
        monitor.close()
        return rows, saved

    first, state = run()
    second, _ = run(state)
    numbers = [row["step"] for row in (*first, *second) if row["kind"] in ("measured", "predicted")]
    assert sorted(set(numbers)) == [0, 1, 2, 3]
    assert not [row for row in (*first, *second) if row["kind"] == "skipped"]
