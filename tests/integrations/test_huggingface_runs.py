"""The callback for the Trainer of transformers: trainings that fail, begin again, resume, or have two ranks."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfs
from tests.helpers.processes import run_ranks

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback

from fastfs.integrations import FastfsCallback
from tests.helpers.huggingface_cases import STEPS, assert_same, losses, make, trainer
from tests.helpers.trainer_cases import hooks, measured


class Failing(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Raises once, at an event of a step."""

    def __init__(self, event: str, step: int, error: BaseException) -> None:
        self.step, self.error = step, error
        setattr(self, event, self.fail)

    def fail(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise self.error


class FailingLoss(Trainer):  # type: ignore[misc, unused-ignore]
    fails_at = 2

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == self.fails_at:
            self.fails_at = -1
            raise KeyboardInterrupt
        return loss


def test_a_training_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    failing = trainer(make("llama"), tmp_path, [FastfsCallback(every=1)], kind=FailingLoss)
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    assert hooks(failing.model) == 0
    assert "training_step" not in vars(failing)
    first = measured(tmp_path)
    assert sorted(set(first["step"])) == [0, 1]
    failing.train()
    table = measured(tmp_path)
    assert sorted(set(table[table["run"] != first["run"].iloc[0]]["step"])) == list(range(STEPS))
    assert table["run"].nunique() == 2


class OutOfMemory(FailingLoss):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(*args, **kwargs)
        except KeyboardInterrupt:
            raise RuntimeError("CUDA out of memory.") from None


def test_a_batch_that_does_not_fit(tmp_path: Path) -> None:
    """The trainer begins again with smaller batches, and the callback with another run."""
    trainer(
        make("llama"), tmp_path, [FastfsCallback(every=1, rows=None)], kind=OutOfMemory, auto_find_batch_size=True
    ).train()
    table = measured(tmp_path)
    assert [len(set(part["step"])) for _, part in table.groupby("run", sort=False)] == [2, STEPS]
    assert table.groupby("run", sort=False)["count"].first().tolist() == [4 * 12 * 16, 3 * 12 * 16]


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_an_interrupt_outside_of_a_training_step(tmp_path: Path, event: str) -> None:
    """The next training closes what the interrupted one has left open, and trains as one that was not watched."""
    trained = []
    for folder, callbacks in (("off", []), ("on", [FastfsCallback(every=1)])):
        failing = trainer(make("llama"), tmp_path / folder, [*callbacks, Failing(event, 2, KeyboardInterrupt())])
        with pytest.raises(KeyboardInterrupt):
            failing.train()
        failing.train()
        trained.append(failing)
    assert_same(*trained)
    assert hooks(trained[1].model) == 0
    table = measured(tmp_path / "on")
    assert [len(set(part["step"])) for _, part in table.groupby("run", sort=False)][1:] == [STEPS]


def test_a_trainer_that_has_failed_and_is_dropped(tmp_path: Path) -> None:
    model = make("llama")
    failing = trainer(model, tmp_path, [FastfsCallback(every=1), Failing("on_step_end", 2, ValueError("x"))])
    with pytest.raises(ValueError, match="x"):
        failing.train()
    del failing
    gc.collect()
    assert hooks(model) == 0
    assert sorted(set(measured(tmp_path)["step"])) == [0, 1]


def test_a_model_per_trial(tmp_path: Path) -> None:
    rows: list[Any] = []
    search = trainer(None, tmp_path, [FastfsCallback(every=2, sinks=[rows.extend])], model_init=lambda: make("llama"))
    for _ in range(2):
        search.train()
    runs = [{(r["run"], r["step"], r["loss"]) for r in rows if r["kind"] == "measured"}]
    assert len({run for run, _, _ in runs[0]}) == 2
    assert len(runs[0]) == 4
    assert len({(step, loss) for _, step, loss in runs[0]}) == 2  # the trials are equal


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_only_model": True},
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
        {"restore_callback_states_from_checkpoint": True},
    ],
    ids=["all", "model-only", "best", "restored"],
)
def test_a_resumed_training_continues_the_record(tmp_path: Path, options: dict[str, Any]) -> None:
    """Numbers and steps are those of a training without an interruption; the checkpoint has moved."""
    watch: dict[str, Any] = {"every": 3, "aligned_every": 1}
    whole = trainer(make("llama"), tmp_path / "whole", [FastfsCallback(**watch)], **SAVING, **options)
    whole.train()
    path = tmp_path / "part" / "record.jsonl"
    stopping = Failing("on_step_begin", 3, KeyboardInterrupt())
    part = trainer(
        make("llama"), tmp_path / "part", [FastfsCallback(**watch, path=path), stopping], **SAVING, **options
    )
    with pytest.raises(KeyboardInterrupt):
        part.train()
    moved = tmp_path / "moved"
    (tmp_path / "part" / "checkpoint-2").rename(moved)
    del part
    gc.collect()
    resumed = trainer(make("llama"), tmp_path / "part", [FastfsCallback(**watch, path=path)], **SAVING, **options)
    resumed.train(resume_from_checkpoint=str(moved))
    table, expected = fastfs.load(tmp_path / "part"), fastfs.load(tmp_path / "whole")
    assert table["run"].nunique() == 1
    assert table[["step", "kind", "name"]].values.tolist() == expected[["step", "kind", "name"]].values.tolist()
    headers = table.attrs["headers"]
    assert [each.get("resumed_at") for each in headers if each["run"] == table["run"].iloc[0]] == [None, 2]
    if "save_only_model" not in options:  # otherwise the optimizer begins anew
        assert losses(resumed)[-2:] == losses(whole)[-2:]
        for column in ("loss", "aligned_decrease", "update_rms", "angle"):
            assert table[column].equals(expected[column]), column


def test_a_checkpoint_without_the_callback_or_of_other_layers(tmp_path: Path) -> None:
    trainer(make("llama"), tmp_path / "bare", [], max_steps=2, save_strategy="steps", save_steps=1).train()
    resumed = trainer(make("llama"), tmp_path / "bare", [FastfsCallback(every=1)])
    resumed.train(resume_from_checkpoint=True)
    assert sorted(set(measured(tmp_path / "bare")["step"])) == [0, 1]

    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(make("llama"), tmp_path / "all", [FastfsCallback(every=1)], **options).train()
    resumed = trainer(make("llama"), tmp_path / "all", [FastfsCallback(every=1, layers=r"mlp$")])
    with pytest.warns(RuntimeWarning, match=r"FastfsCallback: the checkpoint's record cannot be continued, a new run"):
        resumed.train(resume_from_checkpoint=True)
    assert measured(tmp_path / "all")["run"].nunique() == 2


def test_two_callbacks_continue_their_own_runs(tmp_path: Path) -> None:
    watch = [
        {"every": 1, "layers": r"mlp$", "path": str(tmp_path / "mlp.jsonl")},
        {"every": 1, "layers": r"layers\.\d$", "path": str(tmp_path / "blocks.jsonl")},
    ]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(make("llama"), tmp_path, [FastfsCallback(**each) for each in watch], max_steps=2, **options).train()
    resumed = trainer(make("llama"), tmp_path, [FastfsCallback(**each) for each in reversed(watch)], **options)
    resumed.train(resume_from_checkpoint=True)
    for name in ("mlp", "blocks"):
        table = measured(tmp_path / f"{name}.jsonl")
        assert table["run"].nunique() == 1
        assert sorted(set(table["step"])) == list(range(STEPS))


def test_callbacks_made_from_json_keep_their_options(tmp_path: Path) -> None:
    assert FastfsCallback(every=3, path=tmp_path).state() == {
        "args": {"every": 3, "path": str(tmp_path)},
        "attributes": {},
    }
    json.dumps(FastfsCallback(sinks=[print]).state())
    with pytest.raises(ValueError, match=r"restore_callback_states_from_checkpoint=True .* cannot hold sinks"):
        trainer(make("llama"), tmp_path, [FastfsCallback(sinks=[print])], restore_callback_states_from_checkpoint=True)


# Two ranks


def on_a_rank(folder: str, resume: bool, watch: bool) -> Any:
    """Trains on this rank; returns losses and parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Accelerate and gloo
        warnings.filterwarnings("error", "fastfs")
        callbacks = [FastfsCallback(every=1, rows=None)] if watch else []
        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        saving = {} if resume else {"save_strategy": "steps", "save_steps": 1}
        done = trainer(make("llama"), Path(folder), callbacks, ddp_backend="gloo", **options, **saving)
        if resume:
            last = sorted(Path(folder).glob("checkpoint-*"))[1]
            done.train(resume_from_checkpoint=str(last))
        else:
            done.train()
    return losses(done), [p.detach().clone() for p in done.model.parameters()]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Losses are scaled by the number of labels on all ranks; the record is that of one process, and is continued."""
    plain = run_ranks(on_a_rank, 2, folder=str(tmp_path / "off"), resume=False, watch=False)
    watched = run_ranks(on_a_rank, 2, folder=str(tmp_path / "on"), resume=False, watch=True)
    for one, other in zip(plain, watched, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    single = trainer(
        make("llama"), tmp_path / "one", [FastfsCallback(every=1, rows=None)], gradient_accumulation_steps=2
    )
    single.train()
    many, one = measured(tmp_path / "on"), measured(tmp_path / "one")
    assert (many["ranks"] == 2).all()
    assert many["valid"].all()
    for column in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "loss"):
        assert many[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-4), column
    run_ranks(on_a_rank, 2, folder=str(tmp_path / "on"), resume=True, watch=True)
    again = measured(tmp_path / "on")
    assert again["run"].nunique() == 1
    for column in ("step", "name", "angle", "loss"):
        assert again[column].tolist() == many[column].tolist(), column
