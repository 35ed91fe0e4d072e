"""The structure of a step with several forwards; traces and signatures of graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastfs._network.structure import DID_NOT_RUN, Structure, join, signature, trace
from tests.helpers.cost import counted
from tests.helpers.structure_cases import NESTED, UNUSED, Forward


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor, head: str) -> Tensor:
        return self.get_submodule(head)(torch.tanh(self.trunk(x)))


def watched(model: nn.Module, layers: Sequence[str], *args: object) -> Forward:
    """Run a forward with hooks; the loss uses all of its outputs."""
    found = Forward(len(layers))
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, i=i: void(found.see(i, first(out))))
        for i, name in enumerate(layers)
    ]
    output = model(*args)
    for handle in handles:
        handle.remove()
    found.outputs = [output] if isinstance(output, Tensor) else list(flat(output))
    found.used = list(range(len(found.outputs)))
    return found


def first(output: object) -> Tensor:
    return next(iter(flat(output)))


def flat(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output for tensor in flat(part)]  # type: ignore[attr-defined]


def void(_value: object) -> None:
    pass


def joined(model: nn.Module, *forwards: Forward) -> Structure:
    parameters = dict(model.named_parameters())
    return join([(f.trace(list(parameters.values())), f.used) for f in forwards], list(parameters))


def test_two_heads_in_one_step() -> None:
    model, layers = TwoHeads(), ["trunk", "a", "b"]
    found = joined(
        model, watched(model, layers, torch.randn(2, 4), "a"), watched(model, layers, torch.randn(2, 4), "b")
    )
    assert found.cut == [True, False, False]
    why = "2 parameters also reach the loss in another forward of the step, where it did not run"
    assert found.reason == [None, why, why]
    assert found.counts == [2, 4, 4]
    assert found.own.sum(dim=1).tolist() == [2, 2, 2]
    # a single head
    found = joined(model, watched(model, layers, torch.randn(2, 4), "a"))
    assert found.reason == [None, None, DID_NOT_RUN]


def test_micro_batches_of_the_same_graph_are_analysed_once() -> None:
    model, layers = TwoHeads(), ["trunk", "a"]
    single = joined(model, watched(model, layers, torch.randn(2, 4), "a"))
    several = joined(model, *(watched(model, layers, torch.randn(2, 4), "a") for _ in range(3)))
    assert several.same_as(single)
    assert several.cut == [True, True]


def test_outputs_that_the_loss_does_not_use() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            y, state = self.rnn(x)
            return self.out(y), state

    model = Net()
    forward = watched(model, ["rnn", "out"], torch.randn(5, 2, 4))
    assert joined(model, forward).cut == [False, False]
    forward.used = [0]
    assert joined(model, forward).reason == [None, None]
    forward.used = [1]
    found = joined(model, forward)
    assert found.reason[1] == UNUSED
    assert found.unreached == ["out.weight", "out.bias"]


def test_a_layer_that_is_the_output_and_outputs_that_are_leaves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.scale, self.frozen = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), torch.zeros(3)

        def forward(self, x: Tensor) -> list[object]:
            return [(self.lin(x),), [self.frozen, self.scale]]

    model = Net()
    forward = watched(model, ["lin"], torch.randn(2, 4))
    assert joined(model, forward).cut == [True]
    assert joined(model, forward).unreached == []
    forward.used = [0, 1]
    assert joined(model, forward).unreached == ["scale"]


def test_a_visit_that_the_loss_does_not_use_is_in_nobodys_way() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.lin(x * 2)
            return self.head(self.lin(x))

    model = Net()
    assert joined(model, watched(model, ["lin", "head"], torch.randn(2, 4))).cut == [True, True]


def test_a_forward_that_goes_on_from_another_one() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            state = torch.tanh(self.cell(x))
            return self.head(state), state

    model, layers = Cell(), ["cell", "head"]
    one = watched(model, layers, torch.randn(2, 4))
    two = watched(model, layers, torch.randn(2, 4) + one.outputs[1])
    one.used = two.used = [0]
    assert joined(model, one, two).reason == [NESTED, None]
    apart = watched(model, layers, torch.randn(2, 4) + one.outputs[1].detach())
    apart.used = [0]
    assert joined(model, one, apart).reason == [None, None]


def test_a_trace_holds_nothing_of_the_graph() -> None:
    model = TwoHeads()
    middle = torch.randn(2, 4, requires_grad=True) * 1
    alive = weakref.ref(middle)
    forward = watched(model, ["trunk", "a"], middle, "a")
    parameters = dict(model.named_parameters())
    kept = forward.trace(list(parameters.values()))
    same = signature(forward.edges, forward.outputs, list(parameters.values()))
    node = weakref.ref(forward.outputs[0])
    del forward, middle
    assert alive() is None  # immediately, because there is no reference cycle
    assert node() is None
    del model, parameters
    gc.collect()
    assert join([(kept, [0])], ["w", "b", "aw", "ab", "bw", "bb"]).cut == [True, True]
    assert hash(same) == hash(same)


def test_products_on_the_way_to_a_layer_that_runs_again() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(5):
                x = torch.tanh(self.cell(x))
            return self.head(x)

    model = Recurrent()
    found = joined(model, watched(model, ["stem", "cell", "head"], torch.randn(2, 3)))
    assert found.products.tolist() == [1, 6, 7]
    assert found.counts == [2, 4, 6]


def test_signatures() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, more: bool = False) -> Tensor:
            x = torch.tanh(self.lin(x))
            return self.head(torch.tanh(x) if more else x)

    model = Net()
    parameters = list(model.parameters())

    def of(*args: object) -> tuple[object, ...]:
        forward = watched(model, ["lin", "head"], *args)
        return signature(forward.edges, forward.outputs, parameters)

    known = of(torch.randn(2, 4))
    state = torch.randn(2, 4, requires_grad=True)
    one = signature([], [], parameters, [state])
    assert one != signature([], [], parameters, [state * 2])
    assert one == signature([], [], parameters, [state.detach()])
    torch.randn(3, requires_grad=True).exp().sum()  # functions in between
    assert of(torch.randn(2, 4)) == known
    assert of(torch.randn(2, 4), True) != known
    model.head.bias.requires_grad_(False)
    assert of(torch.randn(2, 4)) != known


def test_bad_arguments() -> None:
    p = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="2, 1 of them different"):
        trace([], [p], [p, p])
    with pytest.raises(ValueError, match="at least, got none"):
        join([], [])
    one = trace([[]], [p], [p])
    with pytest.raises(ValueError, match="traces of 2 parameters, as names, got one of 1"):
        join([(one, [0])], ["a", "b"])
    with pytest.raises(ValueError, match="traces of 1 layers, got one of 2"):
        join([(one, [0]), (trace([[], []], [p], [p]), [0])], ["a"])
    with pytest.raises(ValueError, match=r"indices of 1 outputs, got \[1\]"):
        join([(one, [1])], ["a"])


class Deep(nn.Module):
    """Residual blocks, and a first layer whose weight is used again at the end."""

    def __init__(self, depth: int, branches: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x) if self.branches else block(x)
        return x @ self.first.weight if self.branches else x


@pytest.mark.slow
@pytest.mark.parametrize("branches", [False, True])
def test_many_layers_take_memory_and_calls_in_proportion(branches: bool) -> None:
    calls, peaks = [], []
    for depth in (500, 4000):
        model = Deep(depth, branches)
        forward = watched(model, ["first", *(f"blocks.{i}" for i in range(depth))], torch.randn(1, 2))
        parameters = dict(model.named_parameters())
        with counted() as cost:
            found = join([(forward.trace(list(parameters.values())), [0])], list(parameters))
        calls.append(cost.calls)
        peaks.append(cost.peak)
        assert len(found.upstream_sets.bounds) <= 3 * (depth + 1)
        assert len(found.own_sets.bounds) <= 3 * (depth + 1)
        assert found.cut == [not branches] * (depth + 1)
    # 8 times as many layers; arrays of layers x layers would show in the memory.
    assert calls[1] < 12 * calls[0]
    assert peaks[1] < 24 * peaks[0]  # at most twice as much per layer
