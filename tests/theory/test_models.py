from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastfs.models import MLP, ResNet, Transformer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def names(model: torch.nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def test_mlp_is_the_chain_of_its_docstring() -> None:
    model = MLP(5, 16, depth=4, out_features=3, generator=seeded())
    x = torch.randn(7, 5, generator=seeded(1))
    f = x @ model.blocks[0].weight.T
    for block in model.blocks[1:]:
        f = F.relu(f) @ block.linear.weight.T
    assert len(model.blocks) == 3
    torch.testing.assert_close(model(x), F.relu(f) @ model.head.weight.T)
    assert sum(p.numel() for p in model.parameters()) == 5 * 16 + 2 * 16 * 16 + 16 * 3


def test_resnet_is_the_chain_of_its_docstring() -> None:
    model = ResNet(5, 16, depth=3, out_features=2, branch_scale=0.6, generator=seeded())
    x = torch.randn(7, 5, generator=seeded(1))
    f = x @ model.stem.weight.T
    for block in model.blocks:
        f = 0.8 * f + 0.6 * F.relu(f) @ block.linear.weight.T
    torch.testing.assert_close(model(x), f @ model.head.weight.T)


@pytest.mark.parametrize("make", [MLP, ResNet])
def test_gaussian_initialization_keeps_the_rms_of_features(make: Any) -> None:
    model = make(64, 256, 20, generator=seeded())
    deviations = {name: p.std().item() for name, p in model.named_parameters()}
    assert deviations.pop("head.weight") == pytest.approx(1 / 256, rel=0.2)
    assert deviations.pop("stem.weight" if make is ResNet else "blocks.0.weight") == pytest.approx(1 / 8, rel=0.05)
    assert list(deviations.values()) == pytest.approx([math.sqrt(2 / 256)] * len(deviations), rel=0.05)
    f = torch.randn(64, 64, generator=seeded(1))
    for layer in ([model.stem] if make is ResNet else []) + list(model.blocks):
        f = layer(f)
        assert 0.4 < f.square().mean().sqrt() < 2.5


def test_explicit_deviations_are_used() -> None:
    model = ResNet(64, 128, 4, input_std=0.3, hidden_std=0.2, output_std=0.1, generator=seeded())
    assert model.stem.weight.std().item() == pytest.approx(0.3, rel=0.05)
    assert model.blocks[2].linear.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("tied", [False, True])
def test_transformer_starts_near_the_uniform_loss_and_is_causal(tied: bool) -> None:
    model = Transformer(width=32, depth=3, heads=2, context=16, tied=tied, generator=seeded())
    tokens = torch.randint(256, (2, 16), generator=seeded(1))
    logits = model(tokens)
    assert logits.shape == (2, 16, 256)
    targets = torch.randint(256, (32,), generator=seeded(2))
    assert F.cross_entropy(logits.flatten(0, 1), targets).item() == pytest.approx(math.log(256), abs=0.1)
    changed = tokens.clone()
    changed[:, 10:] = 0
    torch.testing.assert_close(model(changed)[:, :10], logits[:, :10])
    assert not torch.allclose(model(changed)[:, 10:], logits[:, 10:])
    assert {"blocks.0", "blocks.2"} <= names(model)
    assert ("head" in names(model)) is not tied


def test_transformer_blocks_put_out_the_residual_stream() -> None:
    model = Transformer(width=32, depth=3, heads=2, context=16, generator=seeded())
    tokens = torch.randint(256, (2, 16), generator=seeded(1))
    stream = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, args, out: stream.append((args[0], out)))
    logits = model(tokens)
    for (_, out), (following, _) in pairwise(stream):
        assert out is following
    torch.testing.assert_close(logits, model.head(model.norm(stream[-1][1])))  # type: ignore[misc]


def test_dropout_acts_in_training_only() -> None:
    model = Transformer(width=32, depth=2, heads=2, context=16, dropout=0.5, generator=seeded())
    tokens = torch.randint(256, (2, 16), generator=seeded(1))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    "make",
    [
        lambda g: MLP(3, 8, 3, generator=g),
        lambda g: ResNet(3, 8, 3, generator=g),
        lambda g: Transformer(width=8, depth=1, heads=2, context=4, generator=g),
    ],
)
def test_a_generator_decides_and_spares_the_global_one(make: Callable[..., Any]) -> None:
    before = torch.get_rng_state()
    first, second, other = make(seeded(3)), make(seeded(3)), make(seeded(4))
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(3, 8, 1), "depth"),
        (lambda: MLP(0, 8, 2), "in_features"),
        (lambda: ResNet(3, 8, 0), "depth"),
        (lambda: ResNet(3, 8, 2, branch_scale=1.5), "branch_scale.*1.5"),
        (lambda: Transformer(width=10, heads=4), "multiple of heads, got 10 and 4"),
        (lambda: Transformer(dropout=1.0), "dropout"),
        (
            lambda: Transformer(context=4, width=8, depth=1)(torch.zeros(1, 5, dtype=torch.long)),
            "5 tokens.*context of 4",
        ),
    ],
)
def test_bad_sizes_are_refused(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
