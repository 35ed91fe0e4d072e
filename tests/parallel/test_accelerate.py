"""Accelerate and the Trainer of transformers on two ranks: the record is that of one process, training stays bitwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastfs
from tests.helpers.parallel_cases import (
    LAYERS,
    STEPS,
    global_batch,
    make_model,
    make_optimizer,
    parameters_of,
    train,
)
from tests.helpers.processes import run_ranks

EXACT = ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "parameter_norm", "loss")


def accelerated(kind: str, path: str | None, clip: float | None, accumulate: int) -> tuple[list[float], list[Any]]:
    """Trains as ``parallel_cases.train`` does, in float32 and by Accelerate; returns losses and whole parameters."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

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
        options: dict[str, Any] = {"layers": LAYERS, "every": 1, "aligned_fraction": 1.0, "rows": None, "alerts": ()}
        monitor = fastfs.Monitor(model, optimizer, path=Path(path), verbose=False, **options)
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
    found = parameters_of(model)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return losses, found


def on_a_rank(kind: str, path: str, clip: float | None, accumulate: int) -> None:
    """Trains twice; with a monitor it has to be the same, bit by bit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Accelerate and gloo
        warnings.filterwarnings("error", "fastfs")
        losses, parameters = accelerated(kind, None, clip, accumulate)
        watched, others = accelerated(kind, path, clip, accumulate)
    assert losses == watched
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.1, 2)])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_record_is_that_of_one_process(tmp_path: Path, kind: str, clip: float | None, accumulate: int) -> None:
    pytest.importorskip("accelerate")
    path = tmp_path / "many.jsonl"
    run_ranks(on_a_rank, 2, timeout=120, kind=kind, path=str(path), clip=clip, accumulate=accumulate)
    options = {"dtype": torch.float32, "clip": clip, "accumulate": accumulate}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_path = tmp_path / "one.jsonl"
        train("single", str(one_path), **options)
    many, one = fastfs.load(path), fastfs.load(one_path)
    assert len(many) == len(one) > 0
    assert (many["ranks"] == 2).all()
    for column in ("step", "kind", "name", "count", "rows"):
        assert many[column].tolist() == one[column].tolist(), column
    assert many["valid"].all()
    for column in EXACT:
        mine, other = (table[column].to_numpy(dtype=float) for table in (many, one))
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=0, err_msg=column)
