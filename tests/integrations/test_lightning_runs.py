"""The callback for Lightning: trainings that fail, begin again, resume, or have two ranks."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastfs
from tests.helpers.processes import run_ranks

pytest.importorskip("lightning")

import lightning.pytorch as lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from fastfs.integrations import LightningCallback
from tests.helpers.lightning_cases import (
    BATCH,
    OF_LIGHTNING,
    STEPS,
    fit,
    loader,
    make,
    trainer,
    without_dropout,
)
from tests.helpers.trainer_cases import hooks, measured

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{each}") for each in OF_LIGHTNING]


class Failing(lightning.Callback):  # type: ignore[misc, unused-ignore]
    def __init__(self, step: int) -> None:
        self.at = step

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, index: int) -> None:
        if trainer.global_step == self.at:
            self.at = -1
            raise ValueError("interrupted")


@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_a_training_that_raises_leaves_no_hook(tmp_path: Path, name: str) -> None:
    task, callback = make(name), LightningCallback(every=1)
    with pytest.raises(ValueError, match="interrupted"):
        fit(task, tmp_path, [callback, Failing(2)])
    assert hooks(task) == 0
    assert "forward" not in vars(task)
    assert sorted(set(measured(tmp_path)["step"])) == [0, 1]
    fit(task, tmp_path, [callback])
    table = measured(tmp_path)
    assert [sorted(set(part["step"])) for _, part in table.groupby("run", sort=False)] == [[0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_a_resumed_training_continues_the_record(tmp_path: Path, name: str) -> None:
    watch: dict[str, Any] = {"every": 3, "aligned_every": 1}
    epochs: dict[str, Any] = {"limit_train_batches": 2}  # of two steps
    whole = fit(without_dropout(make(name)), tmp_path / "whole", [LightningCallback(**watch)], **epochs)
    path = tmp_path / "record.jsonl"
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)
    fit(without_dropout(make(name)), tmp_path, [LightningCallback(**watch), saving], max_steps=2, **epochs)
    resumed = without_dropout(make(name))
    again = trainer(tmp_path, [LightningCallback(**watch)], **epochs)
    again.fit(resumed, loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert fastfs.load(path)["run"].nunique() == 1
    table, expected = fastfs.load(path), fastfs.load(tmp_path / "whole")
    assert table[["step", "kind", "name"]].values.tolist() == expected[["step", "kind", "name"]].values.tolist()
    assert resumed.losses == whole.losses[2:]
    for column in ("loss", "aligned_decrease", "update_rms", "angle"):
        assert table[column].equals(expected[column]), column
    # What a later checkpoint holds is what the last training has left.
    again.save_checkpoint(tmp_path / "end.ckpt")
    state = torch.load(tmp_path / "end.ckpt", weights_only=False)["callbacks"]
    (state,) = (each for name, each in state.items() if name.startswith("LightningCallback"))
    assert state["run"]["step"] == STEPS
    assert state["run"]["recorder"]["run"] == table["run"].iloc[0]


def test_two_callbacks_continue_their_own_runs(tmp_path: Path) -> None:
    def callbacks() -> list[LightningCallback]:
        blocks = LightningCallback(every=1, path=tmp_path / "blocks.jsonl")
        heads = LightningCallback(every=1, layers=lambda name, _module: name == "head", path=tmp_path / "heads.jsonl")
        return [blocks, heads]

    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    epochs: dict[str, Any] = {"limit_train_batches": 2}  # of two steps
    fit(make("Task"), tmp_path, [*callbacks(), saving], max_steps=2, **epochs)
    again = trainer(tmp_path, callbacks(), **epochs)
    again.fit(make("Task"), loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    for name, layers in (("blocks", ["blocks.0", "blocks.1"]), ("heads", ["head"])):
        table = measured(tmp_path / f"{name}.jsonl")
        assert table["run"].nunique() == 1
        assert table["name"].tolist() == layers * STEPS


def test_a_checkpoint_that_was_loaded_to_validate_is_not_continued(tmp_path: Path) -> None:
    task, callback = make("Task"), LightningCallback(every=1)
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    fit(task, tmp_path, [callback, saving])
    again = trainer(tmp_path, [callback])
    again.validate(task, loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    again.fit(task, loader(), loader())
    assert measured(tmp_path).groupby("run")["step"].max().tolist() == [STEPS - 1] * 2


@pytest.mark.slow
def test_both_names_of_the_package(tmp_path: Path) -> None:
    """A process that has imported the old name only does not import the other one."""
    pytest.importorskip("pytorch_lightning")
    code = (
        "import sys, pytorch_lightning as pl\n"
        "from pytorch_lightning.demos.boring_classes import BoringModel\n"
        "from fastfs.integrations import LightningCallback\n"
        "assert 'lightning.pytorch' not in sys.modules and issubclass(LightningCallback, pl.Callback)\n"
        f"pl.Trainer(max_steps=2, accelerator='cpu', logger=False, default_root_dir={str(tmp_path)!r}, "
        "enable_checkpointing=False, callbacks=[LightningCallback(every=1)]).fit(BoringModel())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert measured(tmp_path)["step"].tolist() == [0, 1]


# Two ranks


def distributed(name: str, folder: str, watch: bool) -> tuple[list[float], list[Tensor]]:
    """Trains on this rank's half of the batches; returns losses and parameters."""
    from lightning.pytorch.plugins.environments import LightningEnvironment  # type: ignore[attr-defined]
    from lightning.pytorch.strategies import DDPStrategy

    sampler = torch.utils.data.DistributedSampler
    task = without_dropout(make(name))
    callbacks = [LightningCallback(every=1, rows=None)] if watch else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "fastfs")
        options: dict[str, Any] = {"plugins": [LightningEnvironment()], "strategy": DDPStrategy(), "devices": 2}
        own = trainer(Path(folder), callbacks, use_distributed_sampler=False, **options)
        data = loader().dataset
        rank = torch.distributed.get_rank()
        split = torch.utils.data.DataLoader(data, batch_size=BATCH // 2, sampler=sampler(data, 2, rank, shuffle=False))
        own.fit(task, split)
    return task.losses, [p.detach().clone() for p in task.parameters()]


def on_a_rank(name: str, folder: str) -> list[float]:
    losses, parameters = distributed(name, folder, watch=False)
    watched, others = distributed(name, folder, watch=True)
    assert losses == watched
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Task", "Itself"])
def test_two_ranks(tmp_path: Path, name: str) -> None:
    """The record is that of one process, also if the LightningModule is the network, which DDP calls to train."""
    run_ranks(on_a_rank, 2, timeout=120, name=name, folder=str(tmp_path / "many"))
    fit(without_dropout(make(name)), tmp_path / "one", [LightningCallback(every=1, rows=None)])
    many, one = measured(tmp_path / "many"), measured(tmp_path / "one")
    assert (many["ranks"] == 2).all()
    assert many["valid"].all()
    for column in ("step", "name", "count", "rows"):
        assert many[column].tolist() == one[column].tolist(), column
    for column in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "loss"):
        assert many[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-5), column
