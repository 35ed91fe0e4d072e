"""Calibrated rates: how they are found, and that nothing of the user's is changed."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastfs import scaling
from fastfs.models import MLP, Transformer
from fastfs.scaling._calibrate import _margin
from fastfs.scaling._trials import Trials
from tests.helpers.scaling_cases import cross_entropy

STEPS = 12


def vectors(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 10, generator=generator)
    return x, x[:, :5].argmax(1)


def tokens(step: int) -> tuple[Tensor, Tensor]:
    found = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(step))
    return found, found.roll(1, 1)


def cases() -> dict[str, Any]:
    return {
        "mlp": (MLP(10, 32, 4, 5), vectors),
        "dropout": (Transformer(50, 32, 2, 4, 16, dropout=0.1), tokens),
        "tied": (Transformer(50, 32, 2, 4, 16, tied=True), tokens),
        "normalized": (nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)), vectors),
    }


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("several", [True, False])
def test_nothing_of_the_users_is_changed(name: str, several: bool) -> None:
    model, batch = cases()[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cross_entropy(model, batch(0)).backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    randomness = torch.get_rng_state()
    found = scaling.calibrate(model, cross_entropy, batch if several else batch(0), optimizer=optimizer, steps=STEPS)
    assert torch.equal(torch.get_rng_state(), randomness)
    after = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    assert before[1]["param_groups"] == after[1]["param_groups"]
    for old, new in itertools.chain(
        ((before[0][k], after[0][k]) for k in before[0]),
        zip(before[2], after[2], strict=True),
        ((old, after[1]["state"][i][k]) for i, state in before[1]["state"].items() for k, old in state.items()),
    ):
        assert torch.equal(old, new)
    assert bool(found.trials) is several
    assert found.steps >= sum(trial.steps for trial in found.trials)
    assert found.steps <= 7 * STEPS + 90


def test_the_same_call_gives_the_same_rates() -> None:
    model, batch = cases()["dropout"]
    first, second = (scaling.calibrate(model, cross_entropy, batch, optimizer="adamw", steps=STEPS) for _ in range(2))
    assert first == second


def test_the_largest_rate_of_a_parabola_ends_in_its_minimum() -> None:
    """With L = c w^2 / 2, a step of rate r realizes 1 - r c / 2 of its first-order decrease: one half at r = 1 / c."""

    class Parabola(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))

        def forward(self, curvature: float) -> Tensor:
            return curvature * self.weight.square().sum() / 2

    for curvature in (0.01, 1.0, 300.0):
        model = Parabola()
        found = scaling.calibrate(model, lambda m, c: m(c), curvature, layers=lambda name, module: True)
        # Sums over three steps, with a rate that grows by 1.3 per step, see it at most three steps later.
        assert 1.0 <= found.largest_rate * curvature <= 1.3**3
        assert found.rate == found.largest_rate / 4
        assert found.largest_update == pytest.approx(found.largest_rate * curvature, rel=1e-6)


def test_the_chosen_trial_is_the_best_and_its_rates_are_in_the_groups() -> None:
    model, batch = cases()["mlp"]
    found = scaling.calibrate(model, cross_entropy, batch, steps=STEPS)
    best = min(found.trials, key=lambda trial: trial.loss)
    assert (found.rate, found.factor) == (best.rate, best.factor)
    assert found.trials[0].rate == found.largest_rate / 2
    matrices, others = found.groups()
    assert matrices["lr"] == found.rate
    assert others["lr"] == found.rate * found.factor
    assert [p is model.head.weight for p in others["params"]] == [True]
    again = copy.deepcopy(model)
    optimizer = torch.optim.SGD(found.apply(again))
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(again, batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == list(best.losses)


def test_groups_keep_their_options_order_names_and_ratios() -> None:
    model = Transformer(50, 32, 2, 4, 16)
    vectors_only = [(n, p) for n, p in model.named_parameters() if p.dim() < 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    given = [
        {"params": rest, "weight_decay": 0.1, "lr": 4e-3, "name": "decayed"},
        {"params": vectors_only, "weight_decay": 0.0, "lr": 1e-3, "betas": (0.8, 0.9)},
    ]
    optimizer = torch.optim.AdamW(given)
    found = scaling.calibrate(model, cross_entropy, tokens, optimizer=optimizer, steps=STEPS)
    groups = found.groups()
    assert [g["name"] for g in groups] == ["decayed (matrices)", "decayed (others)", "others"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0]
    assert [g["betas"] for g in groups] == [(0.9, 0.999), (0.9, 0.999), (0.8, 0.9)]
    assert groups[1]["lr"] == pytest.approx(found.rate * found.factor)
    assert groups[2]["lr"] == pytest.approx(groups[1]["lr"] / 4)
    assert groups[1]["param_names"] == ["token.weight", "position.weight", "head.weight"]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert [member.parameters for member in found.members][1] == ("token.weight", "position.weight", "head.weight")
    assert "decayed (others)" in str(found)
    assert found.to_frame()["lr"].tolist() == [g["lr"] for g in groups]
    torch.optim.AdamW([{**g, "params": list(zip(g.pop("param_names"), g["params"], strict=True))} for g in groups])


def test_a_frozen_group_stays_frozen() -> None:
    model = MLP(10, 32, 4, 5)
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], lr=0.5)
    groups = scaling.calibrate(model, cross_entropy, vectors, optimizer=optimizer, steps=STEPS).groups()
    assert groups[0]["lr"] == 0.0
    assert groups[1]["lr"] > 0.0


def test_several_optimizers() -> None:
    model = Transformer(50, 32, 2, 4, 16)
    inside = [p for n, p in model.named_parameters() if n.startswith("blocks") and p.dim() == 2]
    outside = [p for p in model.parameters() if not any(p is q for q in inside)]
    muon = torch.optim.Muon(inside, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outside)
    found = scaling.calibrate(model, cross_entropy, tokens, optimizer=[muon, adamw], steps=STEPS)
    assert found.optimizer == "Muon and AdamW"
    assert [g["lr"] for g in found.groups(muon)] == [found.rate]
    assert [g["lr"] for g in found.groups(adamw)] == [found.rate * found.factor]
    with pytest.raises(ValueError, match="expected one of the 2 that were calibrated"):
        found.groups()
    with pytest.raises(ValueError, match="is not the one that was calibrated"):
        found.groups(torch.optim.SGD(model.parameters()))


def test_a_zero_output_and_zero_branches_have_rates() -> None:
    model = MLP(10, 32, 4, 5)
    nn.init.zeros_(model.head.weight)  # all other gradients are zero in the first step
    found = scaling.calibrate(model, cross_entropy, vectors, optimizer="adamw", steps=40)
    best = min(found.trials, key=lambda trial: trial.loss)
    assert best.loss < 0.8 * best.losses[0]


def test_negative_losses() -> None:
    found = scaling.calibrate(MLP(10, 32, 4, 5), lambda m, b: cross_entropy(m, b) - 10, vectors, steps=STEPS)
    best = min(found.trials, key=lambda trial: trial.loss)
    assert best.loss < 0
    assert (found.rate, found.factor) == (best.rate, best.factor)


def test_rates_that_diverge_are_halved_until_one_does_not() -> None:
    """The curvature after 40 steps is 32 times that of the steps in which the largest rate is measured."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 3.0))

        def forward(self, curvature: float, target: float) -> Tensor:
            return curvature * (self.weight - target).square().sum() / 2

    def batch(step: int) -> tuple[float, float]:
        return 32.0 if step >= 40 else 1.0, 1.0 if step % 2 else -1.0

    everywhere = lambda name, module: True  # noqa: E731
    found = scaling.calibrate(Line(), lambda m, b: m(*b), batch, layers=everywhere)
    assert [trial.reason for trial in found.trials[:3]] == ["diverged"] * 3  # here, up, down
    assert found.trials[2].rate == found.trials[0].rate / 2
    assert found.rate == min(found.trials, key=lambda trial: trial.loss).rate < 2 / 32


def test_sparse_gradients_and_their_optimizer() -> None:
    model = nn.Sequential(nn.Embedding(50, 16, sparse=True), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 50))
    sparse = torch.optim.SparseAdam(model[0].parameters())
    dense = torch.optim.Adam(model[1:].parameters())
    found = scaling.calibrate(model, cross_entropy, tokens, optimizer=[sparse, dense], steps=STEPS)
    assert [g["lr"] for g in found.groups(sparse)] == [found.rate * found.factor]


def test_a_parameter_that_the_loss_does_not_use() -> None:
    model = MLP(10, 32, 4, 5)
    model.extra = nn.Linear(3, 3)
    found = scaling.calibrate(model, cross_entropy, vectors, steps=STEPS)
    assert {name for member in found.members for name in member.parameters} >= {"extra.weight", "extra.bias"}


def test_loaders_start_again_and_keep_their_generator() -> None:
    model = MLP(10, 32, 4, 5)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(*vectors(0)), batch_size=8, shuffle=True, generator=generator)
    before = generator.get_state()
    first, second = (scaling.calibrate(model, cross_entropy, loader, steps=STEPS) for _ in range(2))
    assert first == second
    assert torch.equal(generator.get_state(), before)
    assert first.trials


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": iter([vectors(0)])}, TypeError, "got an iterator .*, which the trials would use up"),
        ({"steps": 5}, ValueError, "steps: expected at least 10, got 5"),
        ({"optimizer": "lion"}, ValueError, "expected one of sgd, adam, adamw"),
        ({"optimizer": 3}, TypeError, "expected a name, an optimizer, several"),
        (
            {"optimizer": lambda groups, lr: torch.optim.LBFGS(groups[0]["params"])},
            TypeError,
            "LBFGS evaluates the loss",
        ),
        ({"optimizer": []}, TypeError, "expected a name, an optimizer, several"),
        ({"optimizer": lambda groups, lr: 3}, TypeError, "that returns an optimizer, got int"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, ValueError, "does not have blocks"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = MLP(10, 16, 3, 5)
    randomness = torch.get_rng_state()
    with pytest.raises(error, match=message):
        scaling.calibrate(**{"model": model, "loss_fn": cross_entropy, "batch": vectors, **arguments})
    assert torch.equal(torch.get_rng_state(), randomness)


def test_a_copy_and_another_model() -> None:
    model = MLP(10, 16, 3, 5)
    found = scaling.calibrate(model, cross_entropy, vectors(0))
    twin = copy.deepcopy(model)
    assert {id(p) for g in found.apply(twin) for p in g["params"]} == {id(p) for p in twin.parameters()}
    with pytest.raises(ValueError, match="it has no parameter"):
        found.apply(nn.Linear(2, 2))


def mixtral() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


def language_loss(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def test_experts_without_forward_mode_derivatives() -> None:
    model = mixtral()
    batches = lambda step: tokens(step)[0] % 32  # noqa: E731
    found = scaling.calibrate(model, language_loss, batches, optimizer="adamw", steps=STEPS)
    assert {member.name for member in found.members} == {"matrices", "others"}
    first = scaling.first_step(model, language_loss, batches(0), optimizer="adamw", target_loss_decrease=0.01)
    assert first.before.decrease == pytest.approx(0.01, rel=0.01)


def test_the_norm_of_a_tied_model_has_a_usual_rate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    found = scaling.calibrate(model, language_loss, tokens(0)[0] % 32, optimizer="adamw")
    rates = {name: member.lr for member in found.members for name in member.parameters}
    assert rates["transformer.ln_f.weight"] == rates["transformer.wte.weight"] == 4 * found.rate
    assert 1e-4 < found.rate < 1e-2


def test_adapters_are_all_matrices() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*\.(qkv|mlp_in)")
    model = peft.get_peft_model(Transformer(50, 32, 2, 4, 16), config)
    found = scaling.calibrate(model, cross_entropy, tokens, optimizer="adamw", steps=STEPS)
    (member,) = found.members
    assert (member.name, len(member.parameters), found.factor) == ("matrices", 8, 1.0)


def test_finite_steps_agree_with_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MLP(10, 32, 4, 5).double()
    batch = vectors(0)[0].double(), vectors(0)[1]
    exact = scaling.first_step(model, cross_entropy, batch, target_loss_decrease=0.01)

    def missing(*_: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr("fastfs._network.linearization.Linearization.jvp", missing)
    finite = scaling.first_step(model, cross_entropy, batch, target_loss_decrease=0.01)
    assert finite.before.sensitivity == pytest.approx(exact.before.sensitivity, rel=1e-3)
    assert finite.before.cos_angle == pytest.approx(exact.before.cos_angle, rel=1e-3)
    assert F.l1_loss(torch.tensor(finite.output_scale), torch.tensor(exact.output_scale)) < 1e-2 * exact.output_scale


class Quartic(nn.Module):
    """A parameter w with the loss w^4. From w = 1, gradient descent diverges at rates above 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w) ** 2


@pytest.mark.parametrize(("rate", "expected"), [(0.3, 1.0), (0.45, 1.4)])
def test_rates_have_a_margin_to_those_that_diverge(rate: float, expected: float) -> None:
    model = Quartic()
    trials = Trials(model, lambda m, x: m(x).square().mean(), lambda step: torch.ones(2, 1), 30)
    trials.of([torch.optim.SGD(model.parameters())], frozenset())
    best = trials.run(rate, 1.0)
    assert best.reason == ""
    assert _margin(trials, best) == expected
    assert trials.done[-1].rate == pytest.approx(1.4 * rate)
    assert trials.done[-1].reason == ("diverged" if expected > 1 else "")


def test_the_text_says_that_rates_were_divided() -> None:
    found = scaling.calibrate(MLP(10, 32, 4, 5), cross_entropy, vectors, optimizer="sgd", steps=STEPS)
    divided = dataclasses.replace(found, rate=found.rate * found.margin / 1.4, margin=1.4)
    text = str(divided)
    assert "A rate 1.4 times as large diverged" in text
    assert text.count("chosen") == 1
    assert divided.members[0].lr == pytest.approx(found.members[0].lr * found.margin / 1.4)
    assert "diverged, so that" not in str(dataclasses.replace(found, margin=1.0))
