"""The callback for Lightning: which module is measured, the numbers by hand, the same training bit by bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_by_hand import HandWatch

pytest.importorskip("lightning")

import lightning.pytorch as lightning
from lightning.pytorch.plugins import MixedPrecision

from fastfs.integrations import LightningCallback
from tests.helpers.lightning_cases import (
    BLOCKS,
    OF_LIGHTNING,
    STEPS,
    TASKS,
    Itself,
    Net,
    Task,
    assert_same,
    fit,
    make,
)
from tests.helpers.trainer_cases import measured

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{each}") for each in OF_LIGHTNING]


class ByHand(lightning.Callback):  # type: ignore[misc, unused-ignore]
    """Takes the numbers of one step by clones and a second forward."""

    def __init__(self, step: int, precision: Any) -> None:
        self.at, self.precision = step, precision
        self.watch: HandWatch | None = None
        self.found: dict[str, list[float]] = {}

    def on_train_batch_start(self, trainer: Any, task: Any, *_: Any) -> None:
        if trainer.global_step // len(trainer.optimizers) == self.at and self.watch is None:
            self.watch = HandWatch(task if isinstance(task, Itself) else task.net, BLOCKS)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step // len(trainer.optimizers) == self.at + 1 and not self.found:
            self.found = self.watch.finish(self.precision)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("Task", each) for each in OPTIONS), *((each, "plain") for each in TASKS if each != "Task"), ("Itself", "bf16")],
)
def test_numbers_are_those_by_hand(tmp_path: Path, name: str, options: str) -> None:
    plain = fit(make(name), tmp_path / "off", [], **OPTIONS[options])
    watched = fit(make(name), tmp_path, [LightningCallback(every=2, rows=None)], **OPTIONS[options])
    assert_same(plain, watched)
    assert "forward" not in vars(watched)
    seen = measured(tmp_path)
    assert seen["step"].tolist() == [0, 0, 2, 2]
    assert seen["name"].tolist() == BLOCKS * 2
    assert seen.attrs["headers"][0]["model"] == ("Itself" if name == "Itself" else "Net")
    parts = OPTIONS[options].get("accumulate_grad_batches", 1)
    for step in (0, 2):
        precision = torch.autocast("cpu", torch.bfloat16) if options == "bf16" else nullcontext()
        hand = ByHand(step, precision)
        fit(make(name), tmp_path / "hand", [hand], **OPTIONS[options])
        for number, (_, row) in enumerate(seen[seen["step"] == step].iterrows()):
            losses = plain.losses[step * parts : (step + 1) * parts]
            assert row["loss"] == pytest.approx(sum(losses) / parts, rel=1e-6)
            assert row["micro_batches"] == (2 if name == "Manual" else parts)
            assert options == "bf16" or row["valid"], row["why"]
            for column in ("cos_angle", "update_rms", "feature_rms", "backward_rms"):
                assert row[column] == pytest.approx(hand.found[column][number], rel=1e-5), column
            assert row["aligned_decrease"] == pytest.approx(hand.found["aligned_decrease"][number], rel=1e-3)


def test_float16_with_a_gradient_scaler(tmp_path: Path) -> None:
    """The scale is divided out of the loss, too. Steps that the scaler skips are in the record."""
    trained = []
    for callbacks in ([], [LightningCallback(every=1)]):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        trained.append(fit(make("Task"), tmp_path, callbacks, plugins=[precision], max_steps=8))
    assert_same(*trained)
    seen = measured(tmp_path)
    skipped = seen.attrs["skipped"]
    assert len(skipped) >= 1
    assert len(set(seen["step"])) == 8 - len(skipped)
    assert seen.groupby("step")["loss"].first().tolist() == pytest.approx(trained[0].losses[len(skipped) :], rel=1e-6)
    assert (seen["loss_scale"] <= 2.0**21).all()
    assert (seen["micro_batches"] == 1).all()


class Adversarial(Task):
    """Two networks with an optimizer each; the loss of one is no loss of the other."""

    def make(self) -> None:
        self.net = Net()
        self.other = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, _index: int) -> Any:
        optimizers: Any = self.optimizers()
        first, second = optimizers
        self.toggle_optimizer(second)
        judged = self.other(self.net(batch[0]).detach())
        second.zero_grad()
        self.manual_backward(judged.square().mean())
        second.step()
        self.untoggle_optimizer(second)
        self.toggle_optimizer(first)
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) - self.other(self.net(batch[0])).mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.net.parameters(), lr=1e-2), torch.optim.SGD(self.other.parameters(), lr=1e-2)]


def test_two_networks(tmp_path: Path) -> None:
    TASKS["Adversarial"] = Adversarial
    try:
        plain = fit(make("Adversarial"), tmp_path, [])
        paths = [str(tmp_path / f"{name}.jsonl") for name in ("net", "other")]
        callbacks = [
            LightningCallback("net", every=1, path=paths[0]),
            LightningCallback("other", every=1, path=paths[1], layers=r"^\d$"),
        ]
        watched = fit(make("Adversarial"), tmp_path, callbacks)
        with pytest.raises(ValueError, match=r"Adversarial has no forward, .* any of net, other: expected module=NAME"):
            fit(make("Adversarial"), tmp_path, [LightningCallback()])
    finally:
        del TASKS["Adversarial"]
    assert_same(plain, watched)
    assert callbacks[0].state_key != callbacks[1].state_key
    for path in paths:
        seen = measured(Path(path))
        assert sorted(set(seen["step"])) == list(range(STEPS))
        assert seen["loss"].isna().all()
        assert seen["valid"].all(), seen["why"].tolist()


def test_what_cannot_be_attached(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"module: Task has no 'model'. Candidates: net, net.stem"):
        fit(make("Task"), tmp_path, [LightningCallback("model")])
    with pytest.raises(TypeError, match=r"LightningCallback: expected arguments of fastfs.Monitor .* got 'evry'"):
        LightningCallback(evry=1)
    with pytest.raises(ValueError, match=r"the LightningModule is compiled .* self.model = torch.compile"):
        fit(torch.compile(make("Task"), backend="eager"), tmp_path, [LightningCallback()])


@pytest.mark.filterwarnings("ignore:fastfs.Monitor:RuntimeWarning")
def test_a_forward_that_the_training_step_does_not_call(tmp_path: Path) -> None:
    """The record says so."""

    class Apart(Itself):
        def predict(self, x: Tensor) -> Any:
            return Net.forward(self, x)  # type: ignore[arg-type, unused-ignore]

    TASKS["Apart"] = Apart
    try:
        fit(make("Apart"), tmp_path, [LightningCallback(every=1)])
    finally:
        del TASKS["Apart"]
    reasons = {each["reason"] for each in fastfs.load(tmp_path).attrs["skipped"]}
    assert reasons == {"no forward and backward of the model was seen before the step"}


def test_a_compiled_network(tmp_path: Path) -> None:
    def compiled() -> Any:
        task = make("Task")
        task.net = torch.compile(task.net, backend="eager")
        return task

    plain = fit(compiled(), tmp_path / "off", [])
    assert_same(plain, fit(compiled(), tmp_path, [LightningCallback(every=1)]))
    seen = measured(tmp_path)
    assert seen["name"].tolist() == BLOCKS * STEPS
    assert seen["valid"].all()
