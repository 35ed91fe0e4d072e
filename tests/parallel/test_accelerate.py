"""Accelerate and the Trainer of transformers on two ranks: the record is that of one process."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastfs
from tests.helpers.parallel_cases import (
    BATCH,
    COMPLETE,
    LAYERS,
    STEPS,
    assert_same_valid_rows,
    global_batch,
    make_model,
    make_optimizer,
    parameters_of,
    train,
)
from tests.helpers.processes import reset_accelerate, run_ranks

OPTIONS: dict[str, Any] = {**COMPLETE, "layers": LAYERS}


def accelerated(kind: str, path: str | None, clip: float | None, accumulate: int) -> tuple[list[float], list[Any]]:
    """Trains as ``parallel_cases.train`` does, in float32 and by Accelerate; returns losses and whole parameters."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = None
    if kind == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=accumulate)
    if plugin is not None:
        # Accelerate 1.15 takes the plugin on accelerators only: on CPU it would silently be DistributedDataParallel.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    net = make_model(torch.float32)
    model, optimizer = accelerator.prepare(net, make_optimizer(net, "adamw"))
    sharded = [p for p in model.parameters() if hasattr(p, "full_tensor")]
    assert bool(sharded) == (kind == "fsdp2")
    monitor = None
    if path is not None:
        monitor = fastfs.Monitor(model, optimizer, path=Path(path), **OPTIONS)
    losses = []
    for step in range(STEPS):
        x, y = (part.chunk(2)[accelerator.process_index] for part in global_batch(step, torch.float32))
        for inputs, targets in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                if monitor is not None:
                    monitor.log(loss=loss.detach().double() / accumulate)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    if monitor is not None:
        monitor.close()
    return losses, parameters_of(model)


def trained(path: str | None, folder: str) -> tuple[list[float], list[Any]]:
    """Trains by the Trainer of transformers; returns losses and parameters."""
    from transformers import Trainer, TrainingArguments

    from fastfs.integrations import FastfsCallback

    net, losses = make_model(torch.float32), []

    class Loop(Trainer):  # type: ignore[misc, unused-ignore]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            loss = F.cross_entropy(model(inputs["x"]).flatten(0, -2), inputs["y"].flatten())
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    rows = [{"x": x, "y": y} for step in range(STEPS) for x, y in zip(*global_batch(step, torch.float32), strict=True)]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Loop(
        net,
        arguments,
        train_dataset=rows,
        data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in ("x", "y")},
        optimizers=(make_optimizer(net, "adamw"), None),
        callbacks=[] if path is None else [FastfsCallback(path=path, **OPTIONS)],
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return losses, parameters_of(net)


def on_a_rank(kind: str, path: str, clip: float | None = None, accumulate: int = 1) -> None:
    """Trains twice; with a monitor it has to be the same, bit by bit."""

    def run(path: str | None) -> Any:
        reset_accelerate()
        return trained(path, folder) if kind == "trainer" else accelerated(kind, path, clip, accumulate)

    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of Accelerate and gloo
        warnings.filterwarnings("error", "fastfs")
        losses, parameters = run(None)
        watched, others = run(path)
    assert losses == watched
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.1, 2)])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_record_is_that_of_one_process(tmp_path: Path, kind: str, clip: float | None, accumulate: int) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "many.jsonl"
    run_ranks(on_a_rank, 2, timeout=120, kind=kind, path=str(path), clip=clip, accumulate=accumulate)
    train("single", str(tmp_path / "one.jsonl"), dtype=torch.float32, clip=clip, accumulate=accumulate)
    assert_same(fastfs.load(path), fastfs.load(tmp_path / "one.jsonl"))


def assert_same(many: Any, one: Any) -> None:
    """Asserts that the table of two ranks has the numbers of that of one process."""
    assert len(many) == len(one) > 0
    assert (many["ranks"] == 2).all()
    assert_same_valid_rows(many, one)


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_ranks(on_a_rank, 2, timeout=120, kind="trainer", path=str(tmp_path / "many.jsonl"))
    train("single", str(tmp_path / "one.jsonl"), dtype=torch.float32)
    assert_same(fastfs.load(tmp_path / "many.jsonl"), fastfs.load(tmp_path / "one.jsonl"))
