"""Function-space learning rates, against Jacobians in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs import formula
from tests.helpers.parameter_cases import MODELS, OPTIMIZERS

INPUTS = torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
LABELS = torch.randint(3, (6,), generator=torch.Generator().manual_seed(6))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), LABELS)


def exact(model: nn.Module, moves: dict[str, Tensor]) -> tuple[list[float], float]:
    """rms(J_T dw_T) for each tensor, and of all together, by forward differentiation."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def along(given: dict[str, Tensor]) -> Tensor:
        directions = {name: given.get(name, torch.zeros_like(p)) for name, p in values.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(lambda v: torch.func.functional_call(model, v, (INPUTS,)), (values,), (directions,))[
                1
            ]

    def rms(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    return [rms(along({name: moves[name]})) for name in values], rms(along(moves))


@pytest.mark.parametrize("name", MODELS)
def test_as_near_as_the_standard_errors_say(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    moves = {key: 0.01 * torch.randn_like(p) for key, p in model.named_parameters()}
    rates, total = exact(model, moves)
    near = []
    for seed in range(40):
        found = formula.function_learning_rates(model, loss_of, INPUTS, updates=moves, seed=seed, probes=50)
        assert found.parameters == list(moves)
        assert found.count == 18
        assert torch.allclose(found.standard_errors, found.rates / 10)
        both = zip([*found.rates, found.total], [*rates, total], strict=True)
        near += [abs(float(a) - b) <= 2 * float(a) / 10 for a, b in both]
    assert sum(near) >= 0.9 * len(near)


def test_many_probes_converge() -> None:
    torch.manual_seed(0)
    model = MODELS["mlp"]().double()
    moves = {key: 0.01 * torch.randn_like(p) for key, p in model.named_parameters()}
    found = formula.function_learning_rates(model, loss_of, INPUTS, updates=moves, probes=5000)
    rates, total = exact(model, moves)
    assert torch.allclose(found.rates, torch.tensor(rates, dtype=torch.float64), rtol=0.04)
    assert float(found.total) == pytest.approx(total, rel=0.04)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_step_of_an_optimizer(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS["mlp"]().double()
    (optimizer, *others) = OPTIMIZERS[name](model)
    state = [p.detach().clone() for p in model.parameters()]
    found = formula.function_learning_rates(model, loss_of, INPUTS, optimizer=optimizer, probes=50)
    before = torch.get_rng_state()
    again = formula.function_learning_rates(model, loss_of, INPUTS, optimizer=optimizer, probes=50)
    assert torch.equal(found.rates, again.rates)
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, state, (p.detach() for p in model.parameters())))
    loss_of(model, INPUTS).backward()
    optimizer.step()
    moves = {key: p.detach() - old for (key, p), old in zip(model.named_parameters(), state, strict=True)}
    for (_, p), old in zip(model.named_parameters(), state, strict=True):
        p.data.copy_(old)
    rates, _ = exact(model, moves)
    for a, b in zip(found.rates.tolist(), rates, strict=True):
        assert a == pytest.approx(b, rel=0.4)  # four standard errors of 50 probes
    assert sum(rate > 0 for rate in rates) >= 3
    assert not others or min(rates) == 0.0


def test_a_layer_inside() -> None:
    torch.manual_seed(0)
    model: Any = MODELS["mlp"]().double()
    found = formula.function_learning_rates(model, loss_of, INPUTS, lr=0.1, layer="blocks.1", probes=20)
    assert found.count == 6 * 8
    by_name = dict(zip(found.parameters, found.rates.tolist(), strict=True))
    assert by_name["blocks.1.linear.weight"] > 0
    assert by_name["head.weight"] == by_name["blocks.2.linear.weight"] == 0


@pytest.mark.parametrize("probes", [0, -1, True, 1.5, None, math.nan])
def test_numbers_of_probes_that_are_none(probes: Any) -> None:
    with pytest.raises(ValueError, match=r"^probes: expected an integer >= 1, got"):
        formula.function_learning_rates(MODELS["mlp"](), loss_of, INPUTS, lr=0.1, probes=probes)
