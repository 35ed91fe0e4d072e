"""Trainers with their own loggers, and the monitor as one more sender to the same run: nobody loses a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lightning")
pytest.importorskip("wandb")
pytest.importorskip("mlflow")

import lightning.pytorch as lightning
import mlflow
import wandb
from lightning.pytorch.loggers import WandbLogger
from transformers import TrainerCallback

from fastfs.integrations import FastfsCallback, LightningCallback
from fastfs.monitor import MlflowSink
from tests.helpers.huggingface_cases import STEPS, assert_same, losses, make, trainer
from tests.helpers.lightning_cases import OF_LIGHTNING, Task, loader
from tests.helpers.wandb_runs import history

ANGLE = "fastfs/angle/median"

pytestmark = [
    pytest.mark.usefixtures("local_trackers"),
    *(pytest.mark.filterwarnings(f"ignore:.*{each}") for each in (*OF_LIGHTNING, "You defined a")),
]


class OwnValue(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Logs a value of its own to the run, as users do."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wandb.log({"own": state.global_step})


@pytest.mark.parametrize("logging_steps", [1, 3, 1000])
def test_the_trainer_of_transformers_with_wandb(tmp_path: Path, logging_steps: int) -> None:
    alone = trainer(make("llama"), tmp_path / "alone", [], logging_steps=logging_steps)
    alone.train()
    callbacks = [OwnValue(), FastfsCallback(every=1, sinks=["wandb"])]
    done = trainer(make("llama"), tmp_path / "out", callbacks, logging_steps=logging_steps, report_to=["wandb"])
    done.train()
    wandb.finish()
    assert_same(alone, done)
    rows = history(tmp_path)
    assert [row["fastfs/step"] for row in rows if ANGLE in row] == list(range(STEPS))
    assert [row["own"] for row in rows if "own" in row] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == losses(done)


def test_the_trainer_of_transformers_with_mlflow(tmp_path: Path) -> None:
    done = trainer(make("llama"), tmp_path / "out", [FastfsCallback(every=1, sinks=["mlflow"])], report_to=["mlflow"])
    done.train()
    (run,) = mlflow.search_runs(output_format="list")
    client = mlflow.MlflowClient()
    assert [point.step for point in client.get_metric_history(run.info.run_id, ANGLE)] == list(range(STEPS))
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")] == losses(done)


def fit(tmp_path: Path, callbacks: list[Any], logger: Any) -> Any:
    task = Task()
    lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    ).fit(task, loader())
    return task


def test_lightning_with_wandb(tmp_path: Path) -> None:
    fit(tmp_path, [LightningCallback(every=1, sinks=["wandb"])], WandbLogger(save_dir=tmp_path, offline=True))
    wandb.finish()
    rows = history(tmp_path)
    assert [row["fastfs/step"] for row in rows if ANGLE in row] == list(range(STEPS))
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == [1, 3]


def test_lightning_with_mlflow(tmp_path: Path) -> None:
    """Its logger activates no run: the sink is given the run's id."""
    logger = lightning.loggers.MLFlowLogger(tracking_uri=f"file:{tmp_path / 'store'}")
    fit(tmp_path, [LightningCallback(every=1, sinks=[MlflowSink(logger.run_id)])], logger)
    points = mlflow.MlflowClient().get_metric_history(logger.run_id, ANGLE)
    assert [point.step for point in points] == list(range(STEPS))
