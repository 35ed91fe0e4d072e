"""What casts take of a step: all elements by hand, in float64, against samples of the monitor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfs
from fastfs._monitor.measure.casts import BLOCKS, cast
from tests.helpers.monitor_loops import Net
from tests.helpers.parameter_cases import MODELS, OPTIMIZERS, Steps, own_parameters

CASTS = ("bfloat16", "float8_e4m3fn", "mxfp8")
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)
    torch.manual_seed(3)


def rounded(x: float, bits: int, least: int) -> float:
    """The nearest number with so many bits after the first, ties to even, exponents from `least`."""
    if x == 0.0:
        return 0.0
    exponent = max(math.frexp(x)[1] - 1, least)
    spacing = math.ldexp(1.0, exponent - bits)
    return round(x / spacing) * spacing  # Python rounds ties to even


def by_hand(name: str, w: Tensor) -> Tensor:
    """A cast of a parameter and back, number by number."""
    single = w.to(torch.float32)
    rows = single.reshape(-1, w.shape[-1]).tolist()
    if name == "bfloat16":
        return torch.tensor([[rounded(x, 7, -126) for x in row] for row in rows], dtype=torch.float64).reshape(w.shape)

    def e4m3(x: float) -> float:
        return math.copysign(min(abs(rounded(x, 3, -6)), 448.0), x)

    if name == "float8_e4m3fn":
        scale = torch.tensor(448.0 / max(float(single.abs().max()), 1e-12), dtype=torch.float32)
        scaled = (single * scale).reshape(-1, w.shape[-1]).tolist()
        found = torch.tensor([[e4m3(x) for x in row] for row in scaled], dtype=torch.float64)
        return (found / float(scale)).reshape(w.shape)
    result: list[list[float]] = []
    for row in rows:
        result.append([])
        for first in range(0, len(row), 32):
            block = row[first : first + 32]
            largest = max(map(abs, block))
            shared = 2.0 ** (math.floor(math.log2(largest)) - 8) if largest else 1.0
            result[-1] += [e4m3(x / shared) * shared for x in block]
    return torch.tensor(result, dtype=torch.float64).reshape(w.shape)


def loss_by_hand(name: str, before: list[Tensor], after: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.dim() > 1]
    moved = torch.cat([(by_hand(name, b) - by_hand(name, a)).flatten() for a, b in pairs])
    update = torch.cat([(b.double() - a.double()).flatten() for a, b in pairs])
    if not moved.any():
        return 1.0 if update.any() else math.nan
    cosine = float(moved @ update / (moved.norm() * update.norm()))
    return 1.0 - max(cosine, 0.0) ** 2


class Casts(Steps):
    """Steps that keep the own matrices of each layer."""

    def __init__(self, model: nn.Module, optimizers: Any, **options: Any) -> None:
        self.kept: list[list[tuple[list[Tensor], list[Tensor]]]] = []
        super().__init__(model, optimizers, every=1, casts=CASTS, **options)

    def note(self, before: nn.Module, after: nn.Module) -> None:
        """Keeps copies."""
        copies = [
            tuple([p.detach().clone() for p in own_parameters(each, layer)] for each in (before, after))
            for layer in range(len(before.blocks))
        ]
        self.kept.append(copies)


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_casts_number_by_number(name: str, dtype: torch.dtype) -> None:
    w = torch.randn(7, 64).to(dtype) * torch.logspace(-6, 3, 7).to(dtype)[:, None]
    w[0, :32] = 0
    w[1, 0] = 2.0**-140
    w[2, :32] = 500.0 / 256
    blocks = w.reshape(-1, 32)
    wide = blocks if dtype == torch.float64 else blocks.float()
    largest = w.abs().max().float().expand(len(blocks), 1)
    assert torch.equal(cast(name, wide, largest).reshape(w.shape), by_hand(name, w))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_small_parameters_are_read_completely(model: str, optimizer: str) -> None:
    net = MODELS[model]()
    run = Casts(net, OPTIMIZERS[optimizer](net), steps=3)
    for (step, layer), row in run.by_place.items():
        for name in CASTS:
            expected = loss_by_hand(name, *run.kept[step][layer])
            assert row[f"cast_loss_{name}"] == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True), name
            assert row[f"cast_loss_{name}_se"] == 0.0 or math.isnan(expected)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_samples_are_as_near_as_their_standard_errors_say(optimizer: str) -> None:
    distances = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = Net(width=200 + 8 * seed)
        assert net.blocks[0].linear.weight.numel() > 2 * 32 * BLOCKS
        run = Casts(net, OPTIMIZERS[optimizer](net), steps=2)
        for (step, layer), row in run.by_place.items():
            for name in CASTS:
                error = row[f"cast_loss_{name}_se"]
                assert 0.0 < error < 0.1
                expected = loss_by_hand(name, *run.kept[step][layer])
                distances.append(abs(row[f"cast_loss_{name}"] - expected) / error)
    assert sum(x <= 2 for x in distances) >= 0.8 * len(distances)


def test_the_smaller_the_step_the_more_is_lost() -> None:
    losses = []
    for lr in (1.0, 1e-2, 1e-4):
        torch.manual_seed(0)
        net = Net()
        run = Casts(net, [torch.optim.SGD(net.parameters(), lr=lr)], steps=1)
        losses.append([run.by_place[0, 2][f"cast_loss_{name}"] for name in CASTS])
    for large, middle, small in zip(*losses, strict=True):
        assert large < middle < small
        assert small > 0.9
    assert losses[0][0] < losses[0][2] < 0.5


def test_parameters_in_16_bits_lose_nothing_by_their_own_cast() -> None:
    net = Net().bfloat16()
    run = Casts(net, OPTIMIZERS["adamw"](net), steps=2)
    assert all(row["cast_loss_bfloat16"] == pytest.approx(0.0, abs=1e-12) for row in run.by_place.values())


def test_frozen_layers_have_none() -> None:
    net = Net()
    net.blocks[1].requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    run = Casts(net, [torch.optim.AdamW(trained, lr=0.01)], steps=1)
    for (_, layer), row in run.by_place.items():
        assert all(math.isnan(row[f"cast_loss_{name}"]) == (layer == 1) for name in CASTS)


def test_few_rows_of_an_embedding_that_move_are_too_few() -> None:
    """Of 6400 blocks 256 are read; 6 blocks move, and most likely none or one of them is read."""

    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(6400, 32)
            self.blocks = nn.ModuleList([nn.Linear(32, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.embedding((x.abs() * 1000).long()[:, 0]))

    net = Rare()
    run = Casts(net, [torch.optim.SGD(net.parameters(), lr=10.0)], steps=3, layers=["embedding", "blocks.0"])
    for (_, layer), row in run.by_place.items():
        assert math.isnan(row["cast_loss_bfloat16"]) == (layer == 0)


def test_training_stays_what_it_is() -> None:
    weights = []
    for casts in ((), CASTS):
        torch.manual_seed(0)
        net = Net(drop=0.2)
        Steps(net, OPTIMIZERS["sgd"](net), steps=4, casts=casts)
        weights.append([*(p.detach() for p in net.parameters()), torch.rand(3)])
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize(
    ("casts", "kind", "message"),
    [
        ("bfloat16", TypeError, "casts: expected a sequence of 'bfloat16', 'float8_e4m3fn', 'mxfp8', got 'bfloat16'"),
        (None, TypeError, "casts: expected a sequence of 'bfloat16', 'float8_e4m3fn', 'mxfp8', got None"),
        (("fp8",), ValueError, "casts: expected some of 'bfloat16', 'float8_e4m3fn', 'mxfp8', got 'fp8'"),
        (("mxfp8", "mxfp8"), ValueError, "casts: expected each name once, got ('mxfp8', 'mxfp8')"),
    ],
)
def test_arguments(casts: Any, kind: type[Exception], message: str) -> None:
    net = Net()
    with pytest.raises(kind) as error:
        fastfs.Monitor(net, torch.optim.SGD(net.parameters()), casts=casts, sinks=[print])
    assert str(error.value) == message
