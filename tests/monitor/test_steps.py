"""One training step from the hooks of optimizers: steps in steps, wrappers, closures, exceptions, interrupts."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfs
from fastfs._monitor.optimizers import TrainingOptimizer, check_optimizers
from fastfs._monitor.steps import OptimizerSteps


class Log:
    """A listener."""

    def __init__(self, broken: str = "") -> None:
        self.calls: list[str] = []
        self.broken = broken

    def _say(self, what: str) -> None:
        self.calls.append(what)
        if what == self.broken:
            raise ZeroDivisionError(what)

    def enter(self, optimizer: int) -> None:
        self._say("enter")

    def evaluate(self, optimizer: int) -> None:
        self._say("evaluate")

    def before(self, optimizer: int, first: bool) -> None:
        self._say(f"before{optimizer}{'!' if first else ''}")

    def after(self, optimizer: int) -> None:
        self._say(f"after{optimizer}")

    def finish(self) -> None:
        self._say("finish")

    def failed(self, error: Exception) -> None:
        self.calls.append(f"failed {type(error).__name__}")

    def take(self) -> list[str]:
        taken, self.calls = self.calls, []
        return taken


class Mine(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class Deeper(Mine):
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return super().step(closure)


class Plain:
    """A class of the loop's own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step() if closure is None else self.inner.step(closure)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


class Slow(torch.optim.Optimizer):
    """A lookahead: the base optimizer, and every second step half of the way back. Its hooks are never called."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()  # as timm does, without Optimizer.__init__
        self._optimizer_step_post_hooks = OrderedDict()
        self.base = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = base.state
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for p, slow in zip((p for g in self.param_groups for p in g["params"]), self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Accumulating(Plain):
    """Steps every second time only."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return self.inner.step() if self.count % 2 == 0 else None


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def watch(model: nn.Module, optimizer: Any, broken: str = "") -> tuple[Log, OptimizerSteps]:
    log = Log(broken)
    return log, OptimizerSteps(check_optimizers(model, optimizer), log)


def give(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)


ONE = ["before0!", "after0", "finish"]
MAKERS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "super": lambda ps: Mine(ps),
    "three levels": lambda ps: Deeper(ps),
    "wrapper": lambda ps: Plain(torch.optim.SGD(ps, lr=0.1)),
    "wrapper of a subclass": lambda ps: Plain(Deeper(ps)),
    "wrapper in a wrapper": lambda ps: Plain(Plain(torch.optim.SGD(ps, lr=0.1))),
    "lookahead": lambda ps: Slow(torch.optim.SGD(ps, lr=0.1)),
    "lookahead in a wrapper": lambda ps: Plain(Slow(torch.optim.SGD(ps, lr=0.1))),
}


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

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
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

    model[2].bias.register_post_accumulate_grad_hook(hook)  # type: ignore[index,union-attr,arg-type]
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


# Which optimizer


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
            self.optimizers = [torch.optim.SGD(model[i].parameters(), lr=0.1) for i in (0, 2)]  # type: ignore[index]

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
