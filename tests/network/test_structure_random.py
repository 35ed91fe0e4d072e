"""Random graphs and random steps: cuts and upstream parameters against autograd."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from fastfs._network.structure import DID_NOT_RUN, Structure, analyse, edge_of, join
from tests.helpers.compare import assert_identity
from tests.helpers.structure_cases import NESTED, UNUSED, Forward


class RandomNet:
    """A random graph of small layers, some of which share parameters, to check the identity."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.size = draw.randint(4, 9)
        self.parameters = [
            torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(self.size)
        ]
        self.plan: list[tuple[list[int], int]] = []  # indices of the inputs, and of the parameter
        for i in range(self.size):
            sources = sorted({draw.randint(max(0, i - 2), i) for _ in range(draw.choice([1, 1, 2]))})
            self.plan.append((sources, draw.randrange(self.size) if draw.random() < 0.15 else i))
        self.last = sorted({self.size, *(draw.randint(1, self.size) for _ in range(draw.choice([0, 0, 1])))})
        self.chunk = draw.random() < 0.3
        self.x = torch.randn(2, 3, generator=generator, dtype=torch.float64)

    def run(self, parameters: list[Tensor], taps: list[Tensor] | None = None) -> tuple[Tensor, ...]:
        """Return the values of all layers and the loss; ``taps`` are added to the values to obtain their gradients."""
        values = [self.x]
        for i, (sources, parameter) in enumerate(self.plan):
            total = torch.stack([values[s] for s in sources]).sum(dim=0)
            value = torch.tanh(total @ parameters[parameter])
            if self.chunk and i == 1:
                first, rest = value.split([1, 2], dim=1)
                value = torch.cat([first, rest * first], dim=1)
            values.append(value if taps is None else value + taps[i])
        return (*values[1:], torch.stack([values[i].square().sum() for i in self.last]).sum())


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # raised by torch at the first jvp
@pytest.mark.parametrize("seed", range(60))
def test_cut_means_that_the_identity_holds(seed: Any) -> None:
    net = RandomNet(seed)
    taps = [torch.zeros(2, 3, dtype=torch.float64, requires_grad=True) for _ in net.plan]
    *values, loss = net.run(net.parameters, taps)
    names = [str(i) for i in range(net.size)]
    found = analyse([[edge_of(value)] for value in values], [loss], net.parameters, names)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    backward = torch.autograd.grad(loss, taps, **options)
    gradients = torch.autograd.grad(loss, net.parameters, **options)

    generator = torch.Generator().manual_seed(seed)
    updates = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in net.parameters]
    plain = [p.detach() for p in net.parameters]
    _, moves = torch.func.jvp(lambda *w: net.run(list(w)), tuple(plain), tuple(updates))  # type: ignore[misc]
    for layer, reason in enumerate(found.reason):
        if reason == UNUSED:
            continue
        below = found.upstream[layer].tolist()
        decrease = [(g * dw).sum() for g, dw, here in zip(gradients, updates, below, strict=True) if here]
        actual, expected = (backward[layer] * moves[layer]).sum(), torch.stack(decrease).sum()
        assert_identity(actual, expected, holds=found.cut[layer], what=f"layer {layer}: {reason}")


class RandomStep:
    """A step of random forwards over the same layers: residual, repeated, shared, skipped, and with unused heads.

    Layer l uses parameter l, and sometimes that of another layer. Each forward draws a new plan or keeps the last one.
    """

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.layers = draw.randint(2, 6)

        def numbers(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.parameters = [numbers(3, 3).requires_grad_() for _ in range(self.layers + 1)]
        self.forwards: list[Forward] = []
        state: Tensor | None = None
        plan = self._plan()
        for _ in range(draw.choice([1, 1, 2, 3])):
            if draw.random() < 0.5:
                plan = self._plan()
            x = numbers(2, 3).requires_grad_(draw.random() < 0.2)
            if state is not None and draw.random() < 0.25:  # continues from the result of the previous forward
                x = x + state
            self.forwards.append(self._run(plan, x))
            state = draw.choice(self.forwards[-1].outputs)
        self.loss = torch.stack(
            [(f.outputs[i] * numbers(2, 3)).square().sum() for f in self.forwards for i in f.used]
        ).sum()

    def _plan(self) -> list[tuple[int, list[int], list[int], str]]:
        """Return layer, inputs, parameters and operation of each call, followed by the outputs."""
        draw, plan = self.draw, []
        order = [layer for layer in range(self.layers) if draw.random() < 0.9]
        if draw.random() < 0.5:
            order.insert(draw.randint(0, len(order)), draw.randrange(self.layers))
        for number, layer in enumerate(order):
            sources = sorted({draw.randint(max(0, number - 2), number) for _ in range(draw.choice([1, 1, 2]))})
            own = [layer] + ([draw.randrange(self.layers + 1)] if draw.random() < 0.15 else [])
            plan.append((layer, sources, own, draw.choice(["", "", "", "residual", "split", "transposed"])))
        count = draw.choice([1, 1, 2, 3])
        plan.append((-1, sorted({draw.randint(max(len(order) - 2, 0), len(order)) for _ in range(count)}), [], ""))
        return plan

    def _run(self, plan: list[tuple[int, list[int], list[int], str]], x: Tensor) -> Forward:
        found = Forward(self.layers)
        values = [x]
        for layer, sources, own, form in plan[:-1]:
            total = torch.stack([values[s] for s in sources]).sum(dim=0)
            value = total
            for parameter in own:
                matrix = self.parameters[parameter]
                value = torch.tanh(value @ (matrix.t() if form == "transposed" else matrix))
            if form == "split":
                first, rest = torch.tanh(torch.cat([value, value], dim=1)).split([3, 3], dim=1)
                value = found.see(layer, first)
                value = value if self.draw.random() < 0.5 else value * rest
            else:
                value = found.see(layer, value)
            values.append(total + value if form == "residual" else value)
        found.outputs = [torch.tanh(values[i] @ self.parameters[-1]) if self.draw.random() < 0.3 else values[i]
                         for i in plan[-1][1]]  # fmt: skip
        found.used = [i for i, output in enumerate(found.outputs) if self.draw.random() < 0.8 and output.requires_grad]
        if not found.used:
            found.outputs.append(values[-1] @ self.parameters[0])
            found.used = [len(found.outputs) - 1]
        return found

    def structure(self) -> Structure:
        steps = [(f.trace(self.parameters), f.used) for f in self.forwards]
        return join(steps, [str(i) for i in range(len(self.parameters))])


@pytest.mark.parametrize("start", range(0, 400, 20))
def test_a_cut_is_where_the_vector_jacobian_product_is_the_gradient(start: Any) -> None:
    for seed in range(start, start + 20):
        step = RandomStep(seed)
        found = step.structure()
        options = {"retain_graph": True, "allow_unused": True}
        gradients = torch.autograd.grad(step.loss, step.parameters, **options)
        earlier = torch.zeros(len(step.parameters), dtype=torch.bool)
        for layer in range(step.layers):
            what = f"seed {seed}, layer {layer}: {found.reason[layer]}"
            visits = [value for f in step.forwards for value in f.values[layer]]
            inside = [value for value in visits if value.requires_grad]
            if not inside:
                assert found.reason[layer] == ("outside the autograd graph" if visits else DID_NOT_RUN), what
                continue
            upstream = torch.zeros(len(step.parameters), dtype=torch.bool)
            through = [torch.zeros(3, 3, dtype=torch.float64) for _ in step.parameters]
            arrived = 0
            for value in inside:
                (backward,) = torch.autograd.grad(step.loss, [value], **options)
                arrived += backward is not None
                b = torch.zeros_like(value) if backward is None else backward
                for i, part in enumerate(torch.autograd.grad([value], step.parameters, [b], **options)):
                    if part is not None:
                        upstream[i] = True
                        through[i] = through[i] + part
            assert torch.equal(found.upstream[layer], upstream), what
            wrong = [
                i
                for i, (g, t) in enumerate(zip(gradients, through, strict=True))
                if upstream[i] and not torch.allclose(t, torch.zeros_like(t) if g is None else g, rtol=1e-7, atol=1e-10)
            ]
            if not arrived:
                assert found.reason[layer] == UNUSED, what
            elif found.reason[layer] == NESTED:
                assert len(inside) > 1, what
                assert wrong, what
            else:
                assert found.cut[layer] == (not wrong), what
                assert found.bypass.count[layer] == len(wrong), what
                shared = found.shared[layer].nonzero().flatten().tolist()
                assert set(shared) <= set(wrong), what
                assert len(shared) == found.bypass.twice.get(layer, 0), what
        for row, own in zip(found.upstream, found.own, strict=True):
            assert not (own & ~row).any()
            assert not (own & earlier).any()
            earlier |= own
        assert torch.equal(earlier, found.upstream.any(dim=0))
        assert found.counts == found.upstream.sum(dim=1).tolist()
        assert all(a >= b for a, b in zip(found.products.tolist(), found.counts, strict=True))  # all are matrices
        assert found.unreached == [str(i) for i, g in enumerate(gradients) if g is None]
        del step, visits, inside
