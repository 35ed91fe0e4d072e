"""The monitor for the Trainer of torchtitan, on CPU: its own loop, compiled blocks, and its checkpoints."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfs
from fastfs.integrations import watch_torchtitan
from tests.helpers.processes import run_ranks
from tests.parallel.test_torchtitan import Batch, global_batch, make_loop, on_cpu, trainer_config

torchtitan = pytest.importorskip("torchtitan.trainer", exc_type=ImportError)

STEPS, STOP = 4, 2


class Data:
    """A data loader whose place checkpoints carry."""

    def __init__(self, **_: Any) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            tokens, labels = global_batch(self.next)
            self.next += 1
            yield {"input": tokens}, labels

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def trained(folder: str, steps: int, watch: bool, meshes: list[Any], **options: Any) -> tuple[list[float], list[Any]]:
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.config import CompileConfig

    losses: list[float] = []
    config = trainer_config(1, "partial_dtensor")
    config.dump_folder, config.training.steps = folder, steps
    config.checkpoint = CheckpointManager.Config(enable=True, interval=1, last_save_model_only=False)
    config.compile = CompileConfig(enable=options.get("compiled", False), components=["model"], backend="aot_eager")
    config.tokenizer = types.SimpleNamespace(build=lambda **_: None)
    config.dataloader = types.SimpleNamespace(build=Data)
    loop = make_loop(config, losses, meshes)
    config.training.disable_cuda_graphs = False
    with pytest.raises(ValueError, match=r"CUDA graphs .* set training.disable_cuda_graphs"), watch_torchtitan(loop):
        pass
    config.training.disable_cuda_graphs = True
    with watch_torchtitan(loop, every=2, aligned_every=1) if watch else nullcontext():
        loop.train()
    assert "forward_backward_step" not in vars(loop)
    assert "fastfs" not in loop.checkpointer.states
    parameters = [p.full_tensor().detach().clone() for p in loop.model_parts[0].parameters()]
    loop.close()
    return losses, parameters


def on_a_rank(folder: str, compiled: bool) -> None:
    meshes: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchtitan
        warnings.filterwarnings("error", "fastfs")
        on_cpu()
        plain = trained(f"{folder}/off", STEPS, False, meshes, compiled=compiled)
        watched = trained(f"{folder}/whole", STEPS, True, meshes, compiled=compiled)
        first = trained(f"{folder}/part", STOP, True, meshes, compiled=compiled)
        rest = trained(f"{folder}/part", STEPS, True, meshes, compiled=compiled)
        assert plain[0] == watched[0] == first[0] + rest[0]
        for others in (watched[1], rest[1]):
            assert all(torch.equal(a, b) for a, b in zip(plain[1], others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_its_loop_and_its_checkpoints(tmp_path: Path, compiled: bool) -> None:
    run_ranks(on_a_rank, 1, timeout=240, folder=str(tmp_path), compiled=compiled)
    part, whole = fastfs.load(tmp_path / "part"), fastfs.load(tmp_path / "whole")
    assert part["run"].nunique() == 1
    measured = part[part["kind"] == "measured"]
    assert measured["step"].tolist() == [0, 0, 2, 2]
    assert measured["valid"].all(), measured["why"].tolist()
    for column in ("step", "kind", "name", "loss", "angle", "aligned_decrease", "update_rms"):
        assert part[column].equals(whole[column]), column
