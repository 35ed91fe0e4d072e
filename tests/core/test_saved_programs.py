"""Programs that contain ops of fastfs, saved in one process and loaded in another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastfs

LOADING = """
import sys
import torch
from fastfs import feature_stats
inputs, expected, kind, program = *torch.load("tensors.pt"), *sys.argv[1:]
load = {"export": lambda: torch.export.load(program).module(), "jit": lambda: torch.jit.load(program)}[kind]
assert torch.equal(load()(*inputs), expected)
"""


class Speed(torch.nn.Module):
    def forward(self, before: Tensor, after: Tensor, backward: Tensor) -> Tensor:
        return fastfs.feature_stats(before, after, backward).update_rms


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated")
@pytest.mark.parametrize("kind", ["export", "jit"])
def test_a_saved_program_loads_after_the_name_of_the_op_is_imported(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(3, 5, 64))
    if kind == "export":
        torch.export.save(torch.export.export(Speed(), inputs), tmp_path / "program.pt2")
    else:
        torch.jit.trace(Speed(), inputs).save(tmp_path / "program.pt2")
    torch.save((inputs, Speed()(*inputs)), tmp_path / "tensors.pt")
    command = [sys.executable, "-c", LOADING, kind, "program.pt2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
