"""Totals of groups of layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.models import ResNet
from tests.helpers.monitor_cases import rows, sgd, small_transformer, tokens, train, watched


def test_group_totals_are_the_sums_of_their_layers() -> None:
    torch.manual_seed(0)
    parts = {"attention": r"\.attention$", "mlp": r"mlp_out$", "first": r"blocks\.0\."}
    model, optimizer, seen, monitor = watched(
        layers=r"\.attention$|mlp_out$", model=small_transformer().double(), groups=parts, aligned_every=1
    )
    train(model, optimizer, 2, tokens)
    monitor.close()
    members = {
        "attention": [f"blocks.{i}.attention" for i in range(3)],
        "mlp": [f"blocks.{i}.mlp_out" for i in range(3)],
        "first": ["blocks.0.attention", "blocks.0.mlp_out"],
    }
    for step in range(2):
        at = {row["name"]: row for row in seen if row["step"] == step}
        assert [name for name, row in at.items() if row["group"]] == list(parts)
        assert [row["layer"] for row in at.values()] == list(range(6 + 3))
        for group, names in members.items():
            total, each = at[group], [at[name] for name in names]
            count = sum(row["count"] for row in each)

            def squares(key: Any, each: Any = each) -> Any:
                return sum(row["count"] * row[key] ** 2 for row in each)

            dot = sum(r["cos_angle"] * r["update_rms"] * r["backward_rms"] * r["count"] for r in each)
            assert total["count"] == count
            for key in ("update_rms", "backward_rms", "feature_rms"):
                assert total[key] == pytest.approx(math.sqrt(squares(key) / count), rel=1e-12), (group, key)
            cosine = dot / math.sqrt(squares("update_rms") * squares("backward_rms"))
            assert total["cos_angle"] == pytest.approx(cosine, rel=1e-10)
            assert total["angle"] == pytest.approx(math.acos(cosine), rel=1e-10)
            relative = math.sqrt(squares("update_rms") / squares("feature_rms"))
            assert total["relative_update"] == pytest.approx(relative, rel=1e-12)
            assert total["valid"]
            assert all(total[key] is None for key in ("rows", "aligned_decrease", "residual", "parameter_norm"))


def test_a_group_is_as_valid_as_its_worst_layer() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            self.blocks[2](x)  # leads nowhere
            return self.blocks[1](self.blocks[0](x))[:, :3]

    model, optimizer, seen, monitor = watched(model=Apart(), groups={"all": "blocks", "good": r"[01]$"})
    train(model, optimizer, 1)
    monitor.close()
    assert [(row["name"], row["valid"]) for row in seen[-3:]] == [("blocks.2", False), ("all", False), ("good", True)]
    assert seen[-2]["why"] == seen[-3]["why"] is not None


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (
            {"mlp": "mlp"},
            ValueError,
            r"'mlp' \('mlp'\) matches no watched layer. Watched: blocks.0, blocks.1, blocks.2",
        ),
        ({"head": "head"}, ValueError, "matches no watched layer"),  # a module, but not a watched one
        ({"a": "["}, ValueError, r"groups: '\[' is not a regular expression"),
        (["blocks"], TypeError, r"groups: expected a dictionary of name -> regular expression, got \['blocks'\]"),
        ({"a": 3}, TypeError, "groups: expected a dictionary"),
        ({3: "blocks"}, TypeError, "groups: expected a dictionary"),
    ],
)
def test_errors_of_groups(groups: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        watched(groups=groups)


def test_groups_are_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    model = ResNet(8, 16, 3, 3)
    optimizer = sgd(model)
    with fastfs.Monitor(model, optimizer, path=path, every=1, groups={"late": "[12]$"}):
        x, y = rows(0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    table = fastfs.load(path)
    assert table.attrs["headers"][0]["groups"] == {"late": ["blocks.1", "blocks.2"]}
    assert table["name"].tolist() == ["blocks.0", "blocks.1", "blocks.2", "late"]
    assert table["group"].tolist() == [False, False, False, True]
