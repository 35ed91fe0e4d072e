"""The simulator of the paper's networks against the models, with autograd and an actual step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastfs._reproduce.paper.chains import Chains, Network, Rates, Weights
from fastfs._reproduce.paper.steps import simulate
from fastfs.models import MLP, ResNet

WIDTH, INPUTS = 48, 6
AUTOMATIC = [Network(5, 1 / math.sqrt(5)), Network(9, 0.1), Network(7, 0.9), Network(9, 0.5, readout=2)]
TRAINED = [
    Network(6, 0.3, rates=Rates(stem=3.0, hidden=0.7, head=0.01)),
    Network(9, 0.05, output_std=0.2, rates=Rates(stem=0.5, hidden=2.0, head=0.02)),
]
MLPS = [
    Network(4, 1.0, output_std=0.1, rates=Rates(stem=0.2, hidden=0.05, head=0.03)),
    Network(8, 1.0),
    Network(6, 1.0),
]
CASES = [(AUTOMATIC, False), (TRAINED, False), (MLPS, True)]


def model_of(weights: Weights, seed: int, network: Network, mlp: bool) -> nn.Module:
    """Return the fastfs model with the same weights, in float64."""
    std = 1 / WIDTH if network.output_std is None else network.output_std
    model: nn.Module
    if mlp:
        model = MLP(INPUTS, WIDTH, network.depth + 2).double()
        matrices = [model.blocks[0].weight, *(block.linear.weight for block in model.blocks[1:])]
    else:
        model = ResNet(INPUTS, WIDTH, network.depth, branch_scale=network.branch_scale).double()
        matrices = [model.stem.weight, *(block.linear.weight for block in model.blocks)]
    sources = [weights.stem[seed], *weights.hidden[seed, : network.depth]]
    with torch.no_grad():
        for matrix, source in zip(
            [*matrices, model.head.weight], [*sources, std * weights.head[seed, network.readout][None]], strict=True
        ):
            matrix.copy_(source)
    return model


def by_autograd(
    model: nn.Module, x: Tensor, network: Network, step: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor], float]:
    """Return features, backward vectors and feature updates of l = 0..L, and the change of the loss."""
    layers = list(model.blocks) if isinstance(model, MLP) else [model.stem, *model.blocks]  # type: ignore[misc]
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _module, _args, output: seen.append(output)) for layer in layers]
    loss = (model(x) - 1).square().sum() / 2
    matrices = list(model.parameters())
    found = torch.autograd.grad(loss, [*seen, *matrices])
    backward, gradients = found[: len(seen)], found[len(seen) :]
    before = [f.detach() for f in seen]
    seen.clear()
    with torch.no_grad():
        for i, (matrix, gradient) in enumerate(zip(matrices, gradients, strict=True)):
            hidden = 0 < i < len(matrices) - 1
            if network.rates is None:
                rate = step / (network.depth * gradient.square().sum()) if hidden else 0.0
            elif hidden:
                rate = step * network.rates.hidden
            else:
                rate = step * (network.rates.stem if i == 0 else network.rates.head)
            matrix -= rate * gradient  # type: ignore[misc]
        change = (model(x) - 1).square().sum() / 2 - loss
    for hook in hooks:
        hook.remove()
    return before, list(backward), [a - b for a, b in zip(seen, before, strict=True)], float(change)


def assert_near(actual: Tensor, expected: Tensor, relative: float, what: str) -> None:
    error = float((actual - expected).norm() / expected.norm())
    assert error <= relative, f"{what}: off by {error:.2e}, allowed {relative:.0e}"


@pytest.mark.parametrize(("networks", "mlp"), CASES, ids=["automatic rates", "all trained", "mlp"])
@pytest.mark.parametrize("step", [1e-3, 0.3])
def test_vectors_of_every_layer_are_those_of_the_model(networks: Sequence[Network], mlp: bool, step: float) -> None:
    # A step of 0.3 flips ReLUs: the difference of the second forward is that of the finite step, not a linear one.
    weights = Weights.draw([3, 4], 9, WIDTH, INPUTS, readouts=3, dtype=torch.float64)
    chains = Chains.run(weights, networks, mlp=mlp, step=step)
    for s in range(2):
        for n, network in enumerate(networks):
            model = model_of(weights, s, network, mlp)
            f, b, df, change = by_autograd(model, weights.x[s][None], network, step)
            for layer in range(network.depth + 1):
                at = f"seed {s}, network {n}, layer {layer}"
                assert_near(chains.features[layer, s, n], f[layer][0], 1e-12, f"{at}: features")
                assert_near(chains.backward[layer, s, n], b[layer][0], 1e-12, f"{at}: backward")
                if layer > 0 or network.rates is not None:
                    # The reference is a difference, with the rounding of the features.
                    rounding = 1e-15 * float(f[layer].norm() / df[layer].norm())
                    assert_near(chains.updates[layer, s, n], df[layer][0], 1e-10 + rounding, f"{at}: update")
                    cosine = -torch.dot(df[layer][0], b[layer][0]) / df[layer].norm() / b[layer].norm()
                    ours = torch.linalg.vecdot(-chains.updates[layer, s, n], b[layer][0])
                    ours = ours / chains.updates[layer, s, n].norm() / b[layer].norm()
                    assert abs(float(cosine - ours)) <= 1e-10, f"{at}: cosine {float(ours)}, expected {float(cosine)}"
            assert float(chains.loss_change[s, n]) == pytest.approx(change, rel=1e-9)
            assert not chains.features[network.depth + 1 :, s, n].any()


def test_own_part_of_an_update_is_what_the_layers_own_matrix_does() -> None:
    weights = Weights.draw([0], 4, WIDTH, INPUTS, dtype=torch.float64)
    network = Network(4, 0.6)
    chains = Chains.run(weights, [network])
    # With all rates but that of the last matrix at zero nothing is carried over.
    for layer in range(1, 5):
        below = chains.features[layer - 1, 0, 0]
        moved = below + chains.updates[layer - 1, 0, 0]
        gradient = 0.6 * torch.outer(chains.backward[layer, 0, 0], below.relu())
        assert float(chains.gradient_sq[layer, 0, 0]) == pytest.approx(float(gradient.square().sum()), rel=1e-12)
        made = -chains.rates[layer, 0, 0] * 0.6 * gradient @ moved.relu()
        assert_near(-chains.own[layer, 0, 0] * chains.backward[layer, 0, 0], made, 1e-12, f"layer {layer}")


# If every ReLU has the same sign in both, float32 is accurate to 1e-4 even in a deep MLP. Rounding flips one of the
# 20,000 ReLUs of the last network: a discrete change of b, still below the variation over seeds (0.03).
@pytest.mark.parametrize(
    ("scales", "mlp", "seeds", "cosine", "relative"),
    [
        ([1 / 100, 0.1, 0.3], False, [0, 1], 2e-5, 2e-4),
        ([1.0], True, [0], 2e-5, 2e-4),
        ([1.0], True, [1], 1e-2, 6e-2),
    ],
)
def test_single_precision_is_near_double(
    scales: list[float], mlp: bool, seeds: list[int], cosine: float, relative: float
) -> None:
    networks = [Network(100, scale) for scale in scales]
    single, double = (
        simulate(networks, width=200, seeds=seeds, mlp=mlp, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    assert np.nanmax(np.abs(single.cos_angle - double.cos_angle)) < cosine
    for name in ("feature_rms", "update_rms", "backward_norm", "own_norm", "read_rms", "loss_change"):
        a, b = getattr(single, name), getattr(double, name)
        trained = b != 0
        assert np.nanmax(np.abs(a[trained] / b[trained] - 1)) < relative, name


def test_networks_do_not_depend_on_their_company() -> None:
    networks = [Network(3, 0.2), Network(8, 1.0), Network(8, 0.4), Network(1, 0.7)]
    together = simulate(networks, width=32, seeds=[5, 6, 7], dtype=torch.float64)
    for n, network in enumerate(networks):
        alone = simulate([network], width=32, seeds=[6], dtype=torch.float64)
        size = network.depth + 1
        np.testing.assert_allclose(together.cos_angle[1, n, :size], alone.cos_angle[0, 0], rtol=1e-10)
        assert np.isnan(together.cos_angle[1, n, size:]).all()


def test_matrices_depend_on_seed_and_layer_alone() -> None:
    few, many = Weights.draw([1], 2, 16, 3), Weights.draw([0, 1], 5, 16, 3, readouts=2)
    assert torch.equal(few.hidden[0], many.hidden[1, :2])
    assert torch.equal(few.x[0], many.x[1])
    assert torch.equal(few.head[0], many.head[1, :1])
    assert torch.unique(many.hidden.flatten(0, 1)[:, 0, 0]).numel() == 10
    large = Weights.draw([0], 3, 400, 3)
    assert float(large.hidden.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.01)
    unit = Weights.draw([0, 1], 1, 64, 3, unit_input=True)
    assert unit.x.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"branch_scale: expected a number in \(0, 1\], got 1.5"):
        Network(3, 1.5)
    with pytest.raises(ValueError, match="depth: expected at least 1 hidden matrix, got 0"):
        Network(0, 0.5)
    with pytest.raises(ValueError, match="2 hidden matrices, but a network is 3 deep"):
        Chains.run(Weights.draw([0], 2, 8, 2), [Network(3, 0.5)])
    with pytest.raises(ValueError, match="1 readouts, but a network has number 1"):
        Chains.run(Weights.draw([0], 2, 8, 2), [Network(2, 0.5, readout=1)])
    with pytest.raises(ValueError, match="networks: expected at least one"):
        Chains.run(Weights.draw([0], 2, 8, 2), [])
    with pytest.raises(ValueError, match="expected networks, seeds and a width, got 1, 0 and 8"):
        simulate([Network(3, 0.5)], width=8, seeds=[])
