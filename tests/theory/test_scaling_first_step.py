"""The first-step rule: its results hold in independent measurements, and it makes a deep network trainable."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs import formula, scaling
from fastfs.models import MLP, ResNet, Transformer
from tests.helpers.scaling_cases import cross_entropy


def batch_of_vectors() -> tuple[Any, ...]:
    return torch.randn(24, 10), torch.randint(0, 5, (24,))


def batch_of_tokens() -> tuple[Any, ...]:
    tokens = torch.randint(0, 50, (4, 16))
    return tokens, tokens.roll(1, 1)


def sequence() -> Any:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


MODELS = {
    "mlp": (lambda: MLP(10, 64, 8, 5), batch_of_vectors),
    "resnet": (lambda: ResNet(10, 64, 6, 5), batch_of_vectors),
    "sequence": (sequence, batch_of_vectors),
    "transformer": (lambda: Transformer(50, 32, 3, 4, 16), batch_of_tokens),
}

OPTIMIZERS = {
    "sgd": (lambda model: "sgd", torch.optim.SGD),
    "adam": (lambda model: "adam", torch.optim.Adam),
    "factory": (
        lambda model: lambda groups, lr: torch.optim.Adam(groups, lr=lr, betas=(0.8, 0.9)),
        lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.9)),
    ),
    "instance": (
        lambda model: torch.optim.AdamW(model.parameters(), lr=7.0, weight_decay=0.02),
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.02),
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_what_it_promises_holds_when_measured(name: Any, optimizer: Any) -> None:
    make, data = MODELS[name]
    model, batch = make(), data()
    given, build = OPTIMIZERS[optimizer]
    before = copy.deepcopy(model.state_dict())
    found = scaling.first_step(model, cross_entropy, batch, optimizer=given(model), target_loss_decrease=0.01)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    groups = found.apply(model)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    names = {group.name: "|".join(f"^{p}$" for p in group.parameters) for group in found.members}
    moved = formula.measure(model, cross_entropy, batch, optimizer=build(groups), groups=names, first_order=True)
    shares = torch.stack([moved.groups[group.name] for group in found.members])
    hidden = moved.layers.index(found.hidden)
    # In float32 the optimizer's real update is a difference of parameters.
    assert moved.total_decrease.item() == pytest.approx(0.01, rel=5e-3)  # LD
    assert torch.allclose(shares, shares.mean(), rtol=0.01)  # BC
    assert moved.sensitivity[hidden].item() == pytest.approx(1.0, rel=0.03)  # FL
    # The feature speed formula, from the measured norms and angle, says the same.
    after = found.after
    assert moved.cut[hidden]
    share = moved.aligned_decrease[hidden].item() / moved.total_decrease.item()
    assert share / (after.elements**0.5 * after.backward_norm * after.cos_angle) == pytest.approx(1.0, rel=0.03)


def test_rates_follow_from_gradients() -> None:
    model, batch = MLP(10, 32, 5, 5).double(), batch_of_vectors()
    batch = (batch[0].double(), batch[1])
    found = scaling.first_step(model, cross_entropy, batch, target_loss_decrease=0.02)
    groups = found.apply(model)
    cross_entropy(model, batch).backward()
    for group in groups:
        square = sum(p.grad.square().sum() for p in group["params"]).item()
        assert group["lr"] == pytest.approx(0.02 / (len(groups) * square), rel=1e-9)


@pytest.mark.parametrize("target", [0.25, 4.0])
def test_another_sensitivity(target: float) -> None:
    model, batch = ResNet(10, 64, 4, 5), batch_of_vectors()
    found = scaling.first_step(model, cross_entropy, batch, target_loss_decrease=0.01, target_sensitivity=target)
    moved = formula.measure(
        model, cross_entropy, batch, optimizer=torch.optim.SGD(found.apply(model)), first_order=True
    )
    assert moved.sensitivity[-1].item() == pytest.approx(target, rel=0.03)


def test_groups_of_a_transformer() -> None:
    model = Transformer(50, 32, 2, 4, 16)
    found = scaling.first_step(model, cross_entropy, batch_of_tokens())
    assert [group.name for group in found.members] == ["input", "blocks.0", "blocks.1", "output"]
    assert found.members[0].parameters == ("token.weight", "position.weight")
    assert found.members[-1].parameters == ("norm.weight", "norm.bias", "head.weight")
    assert found.output == ("head.weight",)
    assert found.target_loss_decrease == pytest.approx(0.1 * found.before.loss)
    frame = found.to_frame()
    assert frame["lr"].tolist() == [group["lr"] for group in found.groups()]


def test_tied_parameters_are_said() -> None:
    model = Transformer(50, 32, 2, 4, 16, tied=True)
    found = scaling.first_step(model, cross_entropy, batch_of_tokens())
    assert found.shared == ("token.weight",)
    assert found.output == ("norm.weight", "norm.bias")
    assert "token.weight acts before and after blocks.1" in str(found)
    assert "Feature speed formula" not in str(found)
    found.apply(model)
    assert model.norm.weight[0].item() == pytest.approx(found.output_scale)


def test_dry_run_explains_each_number() -> None:
    found = scaling.first_step(MLP(10, 64, 4, 5), cross_entropy, batch_of_vectors(), target_loss_decrease=0.0123)
    text = str(found)
    assert "lr = D / (n c), c = |g|^2, D = 0.0123, n = 4 groups\n" in text
    assert f"multiply head.weight by {found.output_scale:.4g}" in text
    assert f"|b| = {found.before.backward_norm:.4g}" in text
    assert f"cos {found.before.cos_angle:.3f}" in text
    for group in found.members:
        assert f"{group.lr:.4g}" in text
        assert f"{group.gradient_norm_before:.4g}" in text


def test_apply_is_for_the_measured_model_and_once() -> None:
    model, batch = MLP(10, 16, 3, 5), batch_of_vectors()
    found = scaling.first_step(model, cross_entropy, batch)
    with pytest.raises(ValueError, match="no parameter"):
        found.apply(sequence())
    found.apply(copy.deepcopy(model))
    found.apply(model)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"head\.weight: the norm was .* already scaled"):
        found.apply(model)
    assert torch.equal(before, model.head.weight)


class Normalized(nn.Module):
    """Its output does not depend on the scale of its last matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(10, 16, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.inner(x), dim=-1)


def test_a_scale_without_effect_is_an_error() -> None:
    model, batch = Normalized(), batch_of_vectors()
    found = scaling.first_step(model, cross_entropy, batch, target_sensitivity=1e-3)
    assert not found.converged
    assert "did NOT reach" in str(found)
    with pytest.raises(ValueError, match="a normalization after it"):
        found.apply(model)


def zero_output() -> Any:
    model = MLP(10, 16, 4, 5)
    nn.init.zeros_(model.head.weight)
    return model


def unused() -> Any:
    model = MLP(10, 16, 4, 5)
    model.extra = nn.Linear(3, 3)
    return model


@pytest.mark.parametrize(
    ("model", "arguments", "error", "message"),
    [
        (zero_output(), {}, ValueError, "group 'blocks.0' .*: the gradient is zero"),
        (unused(), {}, ValueError, "does not use extra.weight, extra.bias"),
        (MLP(10, 16, 4, 5), {"optimizer": "lion"}, ValueError, "expected one of sgd, adam, adamw"),
        (MLP(10, 16, 4, 5), {"optimizer": 3}, TypeError, "expected a name, an optimizer"),
        (MLP(10, 16, 4, 5), {"optimizer": lambda groups, lr: 3}, TypeError, "that returns an optimizer, got int"),
        (MLP(10, 16, 4, 5), {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, ValueError, "does not have"),
        (MLP(10, 16, 4, 5), {"target_loss_decrease": -1.0}, ValueError, "target_loss_decrease"),
        (MLP(10, 16, 4, 5), {"target_sensitivity": 0.0}, ValueError, "target_sensitivity"),
        (MLP(10, 16, 4, 5), {"layers": "nothing"}, ValueError, "matches no module"),
        (nn.Linear(10, 5), {}, ValueError, "only layer and nothing follows it"),
        (nn.Sequential(nn.Linear(10, 5)), {}, ValueError, "only layer and nothing follows it"),
    ],
)
def test_errors(model: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        scaling.first_step(model, cross_entropy, batch_of_vectors(), **arguments)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_update_that_raises_the_loss_is_said() -> None:
    ascent = lambda groups, lr: torch.optim.SGD(groups, lr=lr, maximize=True)  # noqa: E731
    with pytest.raises(ValueError, match=r"group 'blocks\.0': the loss increases along the update of <lambda>"):
        scaling.first_step(MLP(10, 16, 4, 5), cross_entropy, batch_of_vectors(), optimizer=ascent)


# Training

STEPS = 200


def digits() -> tuple[Any, ...]:
    """Return 128 images of digits with norm sqrt(64)."""
    from fastfs._reproduce import data

    inputs, labels = data.digits()
    inputs = inputs[:128] - inputs[:128].mean(0)
    return 8 * F.normalize(inputs, dim=1), labels[:128]


def train(model: Any, optimizer: torch.optim.Optimizer, batch: Any) -> Any:
    """Return the lowest loss, because gradient descent at a constant learning rate has spikes."""
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return min(losses)


def standard(depth: int) -> tuple[Any, ...]:
    torch.manual_seed(0)
    model = MLP(64, 128, depth, 10)
    groups = scaling.apply(model, scaling.mlp(depth, 128, 64, 10, scheme="standard"))
    return model, [p for group in groups for p in group["params"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lr", "bound"), [(torch.optim.SGD, 0.3, 0.7), (torch.optim.Adam, 1e-2, 0.05)], ids=["sgd", "adam"]
)
def test_a_deep_network_trains_after_calibration(kind: Any, lr: float, bound: float) -> None:
    """A learning rate that suits 4 layers fails for 32; calibration with the same targets suits both."""
    batch = digits()
    model, parameters = standard(4)
    assert train(model, kind(parameters, lr=lr), batch) < 0.05
    model, parameters = standard(32)
    assert train(model, kind(parameters, lr=lr), batch) > 1.5
    for depth, most in ((4, 0.05), (32, bound)):
        model, _ = standard(depth)
        name = kind.__name__.lower()
        found = scaling.first_step(model, cross_entropy, batch, optimizer=name, target_loss_decrease=0.05)
        assert train(model, kind(found.apply(model)), batch) < most


def test_an_optimizer_in_use_keeps_its_state() -> None:
    """Balance refers to the update of the next step, including momentum; the optimizer is not changed."""
    model, batch = MLP(10, 32, 4, 5), batch_of_vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    found = scaling.first_step(model, cross_entropy, batch, optimizer=optimizer, target_loss_decrease=0.01)
    after = optimizer.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for index, state in before["state"].items():
        assert torch.equal(state["momentum_buffer"], after["state"][index]["momentum_buffer"])
    found.apply(model)
    names = {group.name: "|".join(f"^{p}$" for p in group.parameters) for group in found.members}
    gradients = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
    updates = {
        name: -rate * (0.9 * optimizer.state[p]["momentum_buffer"] + g)
        for (name, p), g, rate in zip(
            model.named_parameters(), gradients, [group["lr"] for group in found.groups()], strict=True
        )
    }
    moved = formula.measure(model, cross_entropy, batch, updates=updates, groups=names, first_order=True)
    shares = torch.stack(list(moved.groups.values()))
    assert torch.allclose(shares, torch.tensor(0.01 / 4, dtype=shares.dtype), rtol=0.01)
    assert moved.sensitivity[-1].item() == pytest.approx(1.0, rel=0.03)


def test_optimizers_whose_update_is_not_in_proportion_to_the_rate_are_refused() -> None:
    model = MLP(4, 16, 4, generator=torch.Generator().manual_seed(0))
    batch = torch.randn(8, 4), torch.randn(8, 1)

    def loss_fn(model: Any, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean()

    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    with pytest.raises(ValueError, match="expected updates proportional to the learning rate"):
        scaling.first_step(model, loss_fn, batch, optimizer=optimizer)


class Doubled(nn.Module):
    def forward(self, weight: Any) -> Tensor:
        return weight * 2.0 * 0.5 * 2.0


@pytest.mark.parametrize("parametrized", [False, True])
def test_the_output_is_what_acts_last_not_what_is_registered_last(parametrized: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.norm, self.proj = nn.Linear(16, 1), nn.LayerNorm(16), nn.Linear(16, 16)
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            if parametrized:  # its graph is deeper than those of preceding layers
                for _ in range(3):
                    nn.utils.parametrize.register_parametrization(self.head, "weight", Doubled())

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.head(self.norm(self.proj(x)))

    def loss_fn(model: Any, batch: Any) -> Any:
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    model, batch = Model(), (torch.randn(8, 16), torch.randn(8, 1))
    calibration = scaling.first_step(model, loss_fn, batch)
    bias_and_weight = {"head.bias", "head.parametrizations.weight.original"}
    assert set(calibration.output) == (bias_and_weight if parametrized else {"head.weight", "head.bias"})
    assert calibration.converged
