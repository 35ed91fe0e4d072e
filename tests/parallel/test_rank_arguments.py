"""Arguments about the ranks of a run: what is wrong is said by name, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastfs


@pytest.mark.parametrize(
    ("argument", "value", "error", "says"),
    [
        ("own_parameters", 3, TypeError, "own_parameters: expected a regular expression, got int"),
        ("own_parameters", "(", ValueError, r"own_parameters: '\(' is not a regular expression"),
        ("merge", "rank0", ValueError, "merge: expected 'store' or 'files', got 'rank0'"),
        ("rank_timeout", 0, ValueError, "rank_timeout: expected a number of seconds above 0, got 0"),
        ("rank_timeout", float("inf"), ValueError, "rank_timeout: expected a number of seconds above 0, got inf"),
        ("rank_timeout", True, ValueError, "rank_timeout: expected a number of seconds above 0, got True"),
        ("loss_weight", 0.0, ValueError, "loss_weight: expected a positive number, got 0.0"),
        ("loss_weight", float("nan"), ValueError, "loss_weight: expected a positive number, got nan"),
        ("loss_weight", lambda: -1.0, ValueError, "loss_weight: expected a positive number, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: Any, error: Any, says: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=says):
        fastfs.Monitor(model, optimizer, path=tmp_path / "new" / "record.jsonl", **{argument: value})
    assert list(tmp_path.iterdir()) == []
    assert not model._forward_hooks
