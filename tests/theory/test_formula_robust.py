"""Robustness of measurements against unusual loss functions, batches, models and optimizers."""

from __future__ import annotations

import collections
import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastfs import formula
from tests.helpers.formula_cases import assert_left, case, leave, squared


def test_a_loss_that_uses_another_model_or_parameters_past_it() -> None:
    model, loss_fn, batch = case("resnet")
    another, parameters = copy.deepcopy(model), list(model.parameters())
    with pytest.raises(ValueError, match="depends on none of the 8 parameters of the model that it is given"):
        formula.measure(model, lambda m, b: loss_fn(another, b), batch, lr=0.1)

    def penalty(m: Any, b: Any) -> Any:
        return loss_fn(m, b) + sum(p.square().sum() for p in parameters)

    with pytest.raises(ValueError, match=r"uses 'stem.weight' from outside of the model"):
        formula.measure(model, penalty, batch, lr=0.1)
    same = formula.measure(model, lambda m, b: loss_fn(model, b), batch, lr=0.1, first_order=True)
    assert torch.equal(same.stats.sums, formula.measure(model, loss_fn, batch, lr=0.1, first_order=True).stats.sums)


@pytest.mark.parametrize("first_order", [True, False])
def test_a_loss_that_does_not_repeat(first_order: bool) -> None:
    model, loss_fn, batch = case("resnet")
    generator = torch.Generator().manual_seed(0)

    def noisy(m: Any, b: Any) -> Any:
        return loss_fn(m, (b[0] + 0.1 * torch.randn(b[0].shape, generator=generator), b[1]))

    with pytest.raises(RuntimeError, match=r"the second time with the same parameters.*a generator of its own"):
        formula.measure(model, noisy, batch, lr=0.1, first_order=first_order)


def test_batches_of_any_kind_are_copied_and_others_refused() -> None:
    @dataclasses.dataclass
    class Batch:
        inputs: torch.Tensor
        targets: torch.Tensor

    model, loss_fn, batch = case("resnet")
    mine = Batch(*batch)

    def scaling_in_place(m: Any, b: Any) -> Any:
        b.inputs *= 2
        return loss_fn(m, (b.inputs, b.targets))

    expected = formula.measure(model, loss_fn, (2 * batch[0], batch[1]), lr=0.1, dtype=torch.float64)
    before = batch[0].clone()
    for kind in (mine, collections.UserDict(inputs=batch[0], targets=batch[1])):
        take = scaling_in_place if kind is mine else lambda m, b: loss_fn(m, (2 * b["inputs"], b["targets"]))
        found = formula.measure(model, take, kind, lr=0.1, dtype=torch.float64)
        assert torch.equal(found.stats.sums, expected.stats.sums)
    assert torch.equal(batch[0], before)
    with pytest.raises(TypeError, match="list_iterator, which cannot be copied"):
        formula.measure(model, lambda m, b: loss_fn(m, next(b)), iter([batch, batch]), lr=0.1)


def test_angles_that_rounding_drowns_are_not_valid() -> None:
    model, loss_fn, batch = case("resnet")
    assert formula.measure(model, loss_fn, batch, lr=1e-1).to_frame()["valid"].all()
    frame = formula.measure(model, loss_fn, batch, lr=1e-7).to_frame()
    assert not frame["valid"].any()
    assert (frame["noise_floor"] > 0).all()


def test_an_optimizer_that_draws_and_hooks_for_all_optimizers() -> None:
    class Noisy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(torch.randn_like(p), alpha=1e-3)

    model, loss_fn, batch = case("mlp")
    before, calls = leave(model), []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(True))
    with handle:
        formula.measure(model, loss_fn, batch, optimizer=torch.optim.Adam(model.parameters()))
        assert not calls
        formula.measure(model, loss_fn, batch, optimizer=Noisy(model.parameters(), lr=0.1))
    assert_left(model, before)


def test_a_loss_that_differentiates_inside() -> None:
    model, loss_fn, batch = case("mlp")

    def penalised(m: Any, b: Any) -> Any:
        inputs = b[0].requires_grad_()
        (slope,) = torch.autograd.grad(m(inputs).sum(), inputs, create_graph=True)
        return loss_fn(m, b) + 0.1 * slope.square().sum()

    found = formula.measure(model, penalised, batch, lr=1e-5, dtype=torch.float64)
    assert math.isclose(-found.loss_change, found.total_decrease, rel_tol=1e-2)


@pytest.mark.parametrize("first_order", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "lstm"])
def test_fused_modules(kind: str, first_order: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16)
    fastpath, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        padding = torch.zeros(4, 5, dtype=torch.bool)
        padding[0, 3:] = True

        def loss_fn(m: Any, b: Any) -> Any:
            return (m(b, src_key_padding_mask=padding) - b).square().mean()
    else:
        model = nn.LSTM(16, 16, batch_first=True)

        def loss_fn(m: Any, b: Any) -> Any:
            return m(b)[0].square().mean()

    layers = "auto" if kind == "encoder" else [""]
    if kind == "lstm":
        model, layers = nn.Sequential(collections.OrderedDict(rnn=model)), ["rnn"]
    found = formula.measure(model, loss_fn, x, layers=layers, lr=0.1, first_order=first_order)
    assert (found.residual.abs() < (1e-4 if first_order else 0.5)).all()
    assert torch.backends.mha.get_fastpath_enabled() == fastpath
    assert torch.backends.mkldnn.enabled == onednn


def test_operations_without_a_forward_mode_derivative_are_said() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 1))
    batch = torch.randn(3, 4), torch.randn(3, 1)
    with pytest.raises(NotImplementedError, match=r"Sequential has an operation without.*first_order=False"):
        formula.measure(model, squared, batch, lr=0.1, first_order=True)
    assert (formula.measure(model, squared, batch, lr=1e-3).residual.abs() < 0.1).all()


def test_inference_mode_and_closures_are_refused() -> None:
    class Needy(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            super().step(closure)

    model, loss_fn, batch = case("mlp")
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside of torch.inference_mode"):
        formula.measure(model, loss_fn, batch, lr=0.1)
    with pytest.raises(TypeError, match="Needy evaluates the loss in its step"):
        formula.measure(model, loss_fn, batch, optimizer=Needy(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"expected a tensor for head\.weight, got float"):
        formula.measure(model, loss_fn, batch, updates={"head.weight": 0.1})  # type: ignore[dict-item]


def test_learning_rates_of_other_number_types() -> None:
    model, loss_fn, batch = case("mlp")
    sums = [
        formula.measure(model, loss_fn, batch, lr=lr).stats.sums for lr in (0.5, np.float32(0.5), torch.tensor(0.5))
    ]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_an_optimizer_steps_in_the_dtype_of_the_measurement() -> None:
    model, loss_fn, batch = case("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)  # below the rounding of the parameters
    loss_fn(model, batch).backward()
    optimizer.step()  # gives the optimizer a state
    before = leave(model)
    small = formula.measure(model, loss_fn, batch, optimizer=optimizer, dtype=torch.float64)
    assert_left(model, before)
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    large = formula.measure(model, loss_fn, batch, optimizer=optimizer, dtype=torch.float64, first_order=True)
    assert torch.allclose(small.stats.cos_angle, large.stats.cos_angle, rtol=1e-5)
    assert torch.allclose(small.stats.update_rms * 1e4, large.stats.update_rms, rtol=1e-5)


def test_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, reentrant: Any) -> None:
            super().__init__()
            self.reentrant, self.stem = reentrant, nn.Linear(10, 8)
            self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant).relu()
            return self.head(x)

    _, loss_fn, batch = case("mlp")
    found = formula.measure(Checkpointed(False), loss_fn, batch, lr=0.1, dtype=torch.float64)
    assert found.cut == [True, True]
    with pytest.raises(RuntimeError, match=r"expected checkpoint\(\.\.\., use_reentrant=False\)"):
        formula.measure(Checkpointed(True), loss_fn, batch, lr=0.1)
