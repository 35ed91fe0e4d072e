"""Try an installed wheel in its environment, outside of the source tree: `make wheel-test` and cibuildwheel run this.

Needs fastfs and its dependencies alone. FASTFS_CUDA=0 says that the wheel was built without CUDA.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fastfs
from fastfs._core import ops

STEPS = 3


def check_installation() -> None:
    """It is the installed package, and the core has what it was built with."""
    assert Path(fastfs.__file__).is_relative_to(sys.prefix), fastfs.__file__
    assert importlib.metadata.version("fastfs") == fastfs.__version__
    info = ops.build_info()
    assert info["version"] == fastfs.__version__, info
    assert (info["cuda"] is None) == (os.environ.get("FASTFS_CUDA") == "0"), info
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA kernels: {info['cuda']}")


def check_doctor() -> None:
    """The command is installed, and the kernels agree with the reference."""
    command = Path(sys.prefix) / "bin" / "fastfs"
    output = subprocess.run([command, "doctor"], capture_output=True, text=True, check=False)
    print(output.stdout + output.stderr)
    assert output.returncode == 0
    assert "native agrees with reference" in output.stdout
    assert "Nothing is wrong" in output.stdout


def train(path: Path | None) -> torch.nn.Module:
    """Train a small network, watched if there is a path for the record."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU()) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None if path is None else fastfs.Monitor(model, optimizer, every=1, path=path)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    if monitor is not None:
        monitor.close()
    return model


def check_monitor() -> None:
    """Three watched steps give valid angles for every layer, and the same parameters as without the monitor."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.jsonl"
        watched = train(path)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    for parameter, other in zip(train(None).parameters(), watched.parameters(), strict=True):
        assert torch.equal(parameter, other)
    measured = [row["layers"] for row in rows if row["kind"] == "measured"]
    print(f"{len(measured)} measured steps; angles of the last one: {measured[-1]['angle']}")
    assert len(measured) == STEPS
    for layers in measured:
        assert layers["valid"] == [True] * 3, layers
        assert all(0.0 < angle < math.pi for angle in layers["angle"]), layers


if __name__ == "__main__":
    check_installation()
    check_doctor()
    check_monitor()
    print("The wheel works.")
