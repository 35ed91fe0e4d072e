"""What the tests of all trainers compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastfs


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Asserts that two modules have the same parameters and buffers, bit by bit."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def measured(folder: Path) -> Any:
    """Returns the rows of measured steps in the record of a folder."""
    table = fastfs.load(folder)
    return table[table["kind"] == "measured"]


def hooks(model: nn.Module) -> int:
    """Returns how many hooks around forwards the modules of a model have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
