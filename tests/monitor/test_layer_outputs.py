"""Features in the output of a layer: what is found, and what select= chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.monitor_cases import train, watched

KEYS = ("angle", "update_rms", "feature_rms", "backward_rms", "count")


@dataclasses.dataclass
class Output:
    ids: torch.Tensor
    hidden: torch.Tensor
    more: dict[str, torch.Tensor] | None = None


class Dressed(nn.Module):
    """A layer that puts its features into something, and a model that takes them out."""

    def __init__(self, make: Any, take: Any) -> None:
        super().__init__()
        self.inner = Inner(make)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.inner(x))[:, :3]


class Inner(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return self.make(self.layer(x))


def measured_of(make: Any, take: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    model, optimizer, seen, monitor = watched(layers="inner$", model=Dressed(make, take), **options)
    train(model, optimizer, 1)
    monitor.close()
    (row,) = seen
    return row


def test_dataclasses_and_select() -> None:
    plain = measured_of(lambda x: x, lambda x: x)
    outputs = [
        (lambda x: Output(torch.ones(2, dtype=torch.long), x), lambda out: out.hidden, {}),
        (lambda x: (Output(torch.ones(2, dtype=torch.long), x),), lambda out: out[0].hidden, {}),
        (
            lambda x: Output(torch.ones(2).long(), x * 3, {"out": x}),
            lambda out: out.more["out"] + 0 * out.hidden,
            {"select": lambda out: out.more["out"]},
        ),
        (lambda x: (x * 5, x), lambda out: out[1], {"select": lambda out: out[1]}),
    ]
    for make, take, options in outputs:
        row = measured_of(make, take, **options)
        assert row["valid"]
        assert all(row[key] == plain[key] for key in KEYS)
    other = measured_of(lambda x: (x * 5, x), lambda out: out[1] + 0 * out[0])  # the first floating one
    assert other["feature_rms"] == pytest.approx(5 * plain["feature_rms"])
    assert other["backward_rms"] == 0


@pytest.mark.parametrize(("select", "kind"), [(lambda out: out["ids"], "torch.int64 tensor"), (lambda out: 3, "int")])
def test_select_must_give_features(select: Callable[..., Any], kind: str) -> None:
    model, optimizer, seen, monitor = watched(
        layers="inner$",
        model=Dressed(lambda x: {"ids": torch.ones(2).long(), "x": x}, lambda out: out["x"]),
        select=select,
    )
    with pytest.warns(RuntimeWarning, match=rf"layer 'inner' \(Inner\): .* got dict of .*; select= gave a {kind}"):
        train(model, optimizer, 1)
    monitor.close()
    assert seen == []
