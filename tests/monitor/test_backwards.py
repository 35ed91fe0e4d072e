"""Which backwards add to .grad, as it is asked while they run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastfs._monitor.capture.backwards import TrainingBackwards, current

DYNAMO = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # Dynamo's own


class Chain:
    """Three matrices, and the features between them: every gradient of a feature is noted."""

    def __init__(self) -> None:
        self.weights = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
        self.backwards = TrainingBackwards(lambda: self.weights)
        self.numbers: list[int] = []

    def forward(self, wrap: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None) -> list[Tensor]:
        first = torch.randn(2, 4) @ self.weights[0]
        inner = lambda x: torch.tanh(x @ self.weights[1])  # noqa: E731
        second = inner(first) if wrap is None else wrap(inner, first)
        for features in (first, second):
            features.register_hook(lambda _: self.numbers.append(self.backwards.note()))
        return [first, second, (second @ self.weights[2]).sum()]

    def counted(self) -> list[bool]:
        """Of every gradient so far."""
        return [self.backwards.counts(number) for number in self.numbers]


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.mark.parametrize("frozen", [(), (1,), (2,), (1, 2)])
def test_backwards_of_training_count(chain: Chain, frozen: tuple[int, ...]) -> None:
    for i in frozen:
        chain.weights[i].requires_grad_(False)
    first, _, loss = chain.forward()
    torch.autograd.grad(loss, first, retain_graph=True)
    loss.backward()
    assert chain.counted() == [False, False, True, True]


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_backward_for_some_parameters_counts(chain: Chain, wanted: int) -> None:
    first, _, loss = chain.forward()
    torch.autograd.grad(loss, first, retain_graph=True)
    loss.backward(inputs=[chain.weights[wanted]])
    assert chain.counted()[:2] == [False, False]
    assert chain.counted()[2:]
    assert all(chain.counted()[2:])


def test_gradients_of_parameters_that_are_asked_for_do_not_count_beside_a_backward(chain: Chain) -> None:
    _, _, loss = chain.forward()
    torch.autograd.grad(loss, chain.weights, retain_graph=True)
    torch.autograd.grad(loss, chain.weights[0], retain_graph=True)
    assert chain.counted() == [True] * 4  # all that is known of: training without backward()
    loss.backward()
    assert chain.counted() == [False] * 4 + [True] * 2
    chain.backwards.clear()
    assert chain.backwards.counts(chain.numbers[0])


def test_second_order(chain: Chain) -> None:
    first, _, loss = chain.forward()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    (gradient.square().sum() + loss).backward()
    assert chain.counted()[:2] == [False, False]
    assert all(chain.counted()[2:])
    assert len(chain.counted()) >= 4


def test_gradients_of_functions_do_not_count(chain: Chain) -> None:
    """torch.func.grad runs backwards of its own."""

    def loss_of(weights: list[Tensor]) -> Tensor:
        kept, chain.weights = chain.weights, weights
        try:
            return chain.forward()[-1]
        finally:
            chain.weights = kept

    torch.func.grad(loss_of)([w.detach() for w in chain.weights])
    before = len(chain.numbers)
    assert before == 2
    chain.forward()[-1].backward()
    assert chain.counted() == [False] * 2 + [True] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(chain: Chain, reentrant: bool) -> None:
    first, _, loss = chain.forward(lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    if not reentrant:
        torch.autograd.grad(loss, first, retain_graph=True)
    before = len(chain.numbers)
    loss.backward()
    assert chain.counted() == [False] * before + [True] * 2


@pytest.mark.filterwarnings(DYNAMO)
def test_compiled(chain: Chain) -> None:
    wrapped = torch.compile(lambda x: torch.tanh(x @ chain.weights[1]), backend="aot_eager")
    first, _, loss = chain.forward(lambda _f, x: wrapped(x))
    torch.autograd.grad(loss, first, retain_graph=True)
    before = len(chain.numbers)
    loss.backward()
    assert chain.counted() == [False] * before + [True] * 2


def test_a_dtype_that_changes(chain: Chain) -> None:
    """What is asked for leaves nothing behind that remembers the old one."""
    chain.forward()[-1].backward()
    for p in chain.weights:
        p.grad = None
        p.data = p.data.double()
    torch.set_default_dtype(torch.float64)
    try:
        chain.forward()[-1].backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert chain.counted() == [True] * 4
    assert all(p.grad.dtype == torch.float64 for p in chain.weights)


def test_outside_of_a_backward() -> None:
    assert current() == -1
