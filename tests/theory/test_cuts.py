"""Which layers are cuts and which parameters are shared, with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs import formula
from fastfs.models import MLP, ResNet, Transformer


@pytest.mark.parametrize(
    ("model", "batch", "layers"),
    [
        (MLP(5, 8, 4), torch.randn(3, 5), 3),
        (ResNet(5, 8, 4), torch.randn(3, 5), 4),
        (Transformer(20, 16, 2, 2, 8), torch.randint(0, 20, (2, 8)), 2),
    ],
)
def test_blocks_of_our_models_are_cuts(model: Any, batch: Any, layers: int) -> None:
    found = formula.cuts(model, batch)
    assert found.cut == [True] * layers
    assert found.reason == [None] * layers
    assert found.shared == {}
    assert len(found.upstream[0]) < len(found.upstream[-1])


def test_a_tied_embedding_is_shared_across_all_blocks() -> None:
    found = formula.cuts(Transformer(20, 16, 5, 2, 8, tied=True), torch.randint(0, 20, (2, 8)))
    assert found.cut == [False] * 5
    assert all("used before and after it: token.weight" in reason for reason in found.reason)
    assert list(found.shared) == ["token.weight"]
    assert found.shared["token.weight"] == "acts before and after blocks.0, blocks.1, blocks.2 and 2 more"
    assert "shared: token.weight" in str(found)


def test_inside_of_branches_and_shared_between_two_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, *, scale: Any) -> Tensor:
            x = self.first(x)
            x = x + scale * self.middle(x)
            return F.linear(F.relu(self.last(x)), self.first.weight)

    batch = {"x": torch.randn(2, 4), "scale": torch.tensor(0.5)}
    found = formula.cuts(Model(), batch, layers=["first", "middle", "last"])
    assert found.cut == [False, False, False]
    assert "residual branch" in found.reason[1]
    assert list(found.shared) == ["first.weight"]
    frame = found.to_frame()
    assert list(frame["layer"]) == ["first", "middle", "last"]


def test_a_layer_that_runs_on_its_own_result() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return self.head(x)

    found = formula.cuts(Recurrent(), torch.randn(2, 4), layers=["cell", "head"])
    assert found.cut == [False, True]
    assert "several times" in found.reason[0]


def test_the_loss_can_be_given_where_it_uses_more_than_the_outputs() -> None:
    model, batch = MLP(5, 8, 4), torch.randn(3, 5)

    def penalised(model: Any, x: Any) -> Any:
        return model(x).square().mean() + sum(p.square().sum() for p in model.parameters())

    assert formula.cuts(model, batch).cut == [True] * 3
    assert formula.cuts(model, batch, forward=penalised).cut == [False] * 3


def test_bad_input() -> None:
    model = MLP(5, 8, 4)
    with pytest.raises(TypeError, match="floating-point tensor in the outputs, got NoneType"):
        formula.cuts(model, torch.randn(3, 5), forward=lambda model, x: None)
    with pytest.raises(ValueError, match="matches no module"):
        formula.cuts(model, torch.randn(3, 5), layers="nothing")
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        formula.cuts(model.requires_grad_(False), torch.randn(3, 5))


def test_outputs_in_a_dataclass_and_masked_logits() -> None:
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        length: int

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Output:
            logits = self.head(torch.relu(self.body(x)))
            return Output(logits.masked_fill(torch.tensor([False, True, False]), -torch.inf), 3)

    found = formula.cuts(Model(), torch.randn(2, 4), layers=["body", "head"])
    assert found.cut == [True, True]
