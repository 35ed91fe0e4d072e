"""The Trainer of torchtitan on two and on four ranks, on CPU: the record is that of one process."""

from __future__ import annotations

import dataclasses
import logging
import types
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs.integrations import watch_torchtitan
from tests.helpers.parallel_cases import COMPLETE, assert_same_valid_rows
from tests.helpers.processes import run_ranks

BATCH, TOKENS, VOCABULARY, STEPS, CLIP, RATE = 8, 16, 2048, 3, 0.5, 1e-3
IGNORED = -100  # the label of tokens that do not count
LAYERS = r"^(tok_embeddings|layers\.\d+(\.attention(\.wo|_norm)?|\.feed_forward(\.w1)?)?|norm)$"
OPTIONS: dict[str, Any] = {**COMPLETE, "layers": LAYERS}

Batch = tuple[dict[str, Tensor], Tensor]


def model_spec() -> Any:
    """Returns the debug model with two blocks, and attention that has a backward on CPU."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=TOKENS)
    return spec


def whole_model() -> Any:
    """Returns the model with the same weights on every rank, not parallelized."""
    torch.manual_seed(0)
    model = model_spec().model.build()
    model.init_states()
    return model


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and labels of all ranks; the ranks do not have the same number of labels that count."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :5] = labels[5, 3:9] = labels[6] = IGNORED
    return tokens[:, :-1].contiguous(), labels


def on_cpu() -> None:
    """Without an accelerator torchtitan assumes CUDA, and asks for the memory of the device."""
    from torchtitan.components import metrics
    from torchtitan.distributed import parallel_dims
    from torchtitan.distributed import utils as distributed_utils
    from torchtitan.tools import utils

    utils.device_type = parallel_dims.device_type = "cpu"
    utils.device_module = torch.cpu
    stats = metrics.DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)
    monitor = types.SimpleNamespace(
        device_name="cpu", device_capacity=1, get_peak_stats=lambda: stats, reset_peak_stats=lambda: None
    )
    metrics.build_device_memory_monitor = lambda: monitor
    distributed_utils.set_pg_timeouts = lambda **_: None  # with a barrier of the device
    logging.disable(logging.WARNING)


def optimizer_config() -> Any:
    from torchtitan.components.optimizer import default_adamw

    config = default_adamw(lr=RATE)
    config.implementation = "foreach"
    return config


def schedule_config() -> Any:
    from torchtitan.components.optimizer import LRSchedulersContainer

    return LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.0)


def trainer_config(tensor: int, backend: str) -> Any:
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.trainer import Trainer

    return Trainer.Config(
        model_spec=model_spec(),
        loss=ChunkedLossWrapper.Config(num_chunks=2, loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCABULARY)),
        optimizer=optimizer_config(),
        lr_scheduler=schedule_config(),
        training=TrainingConfig(
            local_batch_size=BATCH * tensor // dist.get_world_size(),
            seq_len=TOKENS,
            steps=STEPS,
            max_norm=CLIP,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(tensor_parallel_degree=tensor, spmd_backend=backend),
        metrics=MetricsProcessor.Config(log_freq=1),
    )


def make_loop(config: Any, losses: list[float], meshes: list[Any]) -> Any:
    """Returns the trainer of a configuration, with the weights of the whole model. It notes losses of this rank."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import distribute_tensor
    from torchtitan.trainer import Trainer

    class Loop(Trainer):  # type: ignore[misc, unused-ignore]
        def init_distributed(self) -> Any:  # the process group exists, and DTensor keeps the first of equal meshes
            if not meshes:
                from torchtitan.distributed import ParallelDims

                meshes.append(ParallelDims.from_config(self.config.parallelism, dist.get_world_size()))
                meshes[0].build_mesh()
            return meshes[0]

        def forward_backward_step(self, **batch: Any) -> Any:
            loss = super().forward_backward_step(**batch)
            own = loss.to_local() if hasattr(loss, "to_local") else loss
            losses.append(own.item())
            return loss

    loop = Loop(config)
    (model,) = loop.model_parts
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply in a reduction
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), whole_model().parameters(), strict=True):
            parameter.copy_(distribute_tensor(value.detach(), parameter.device_mesh, parameter.placements))
    return loop


def trained(path: str | None, tensor: int, backend: str, meshes: list[Any]) -> tuple[list[float], list[Tensor]]:
    """Trains by the Trainer; returns losses of this rank and whole parameters."""
    losses: list[float] = []
    config = trainer_config(tensor, backend)
    config.tokenizer = config.dataloader = types.SimpleNamespace(build=lambda **_: None)
    loop = make_loop(config, losses, meshes)
    batches = loop.batch_generator(own_batches(loop))
    with nullcontext() if path is None else watch_torchtitan(loop, path=path, **OPTIONS):
        for step in range(STEPS):
            loop.step = step + 1
            loop.train_step(batches)
    parameters = [p.full_tensor().detach().clone() for p in loop.model_parts[0].parameters()]
    loop.close()
    return losses, parameters


def own_batches(loop: Any) -> Iterator[Batch]:
    """Yields the part of every global batch that is of this rank."""
    dims = loop.parallel_dims
    count, own = 1, 0
    if dims.dp_enabled:
        mesh = dims.get_mesh("batch")
        count, own = mesh.size(), mesh.get_local_rank()
    for step in range(STEPS):
        tokens, labels = (part.chunk(count)[own] for part in global_batch(step))
        yield {"input": tokens}, labels


def on_a_rank(path: str, tensor: int, backend: str) -> None:
    """Trains twice; with a monitor it has to be the same, bit by bit."""
    meshes: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchtitan, DTensor and gloo
        warnings.filterwarnings("error", "fastfs")
        on_cpu()
        losses, parameters = trained(None, tensor, backend, meshes)
        watched, others = trained(path, tensor, backend, meshes)
    assert losses == watched
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def on_one_process(path: str) -> None:
    """Trains the same model on the global batches, without the Trainer and not parallelized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = whole_model()
    # The same class of optimizer: its update is taken from the parameters before and after, as they were rounded, while
    # that of AdamW itself is recomputed from the gradients. That differs by 1.2e-5 here.
    optimizer = optimizer_config().build(model_parts=[model])
    schedule = schedule_config().build(optimizers=optimizer, training_steps=STEPS)
    monitor = fastfs.Monitor(model, optimizer, path=Path(path), **OPTIONS)
    for step in range(STEPS):
        tokens, labels = global_batch(step)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        monitor.log(loss=loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    monitor.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "tensor", "backend"),
    [
        (2, 1, "partial_dtensor"),
        (2, 2, "partial_dtensor"),
        (4, 2, "partial_dtensor"),
        (2, 1, "full_dtensor"),
        (2, 2, "full_dtensor"),
        (4, 2, "full_dtensor"),
    ],
)
def test_the_record_is_that_of_one_process(tmp_path: Path, ranks: int, tensor: int, backend: str) -> None:
    pytest.importorskip("torchtitan.trainer", exc_type=ImportError)
    path = tmp_path / "many.jsonl"
    run_ranks(on_a_rank, ranks, timeout=240, path=str(path), tensor=tensor, backend=backend)
    on_one_process(str(tmp_path / "one.jsonl"))
    many, one = fastfs.load(path), fastfs.load(tmp_path / "one.jsonl")
    assert len(many) == len(one) > 0
    assert (many["ranks"] == ranks).all()
    if tensor > 1:
        # The last norm's output is whole on every rank, and its backward vector a sum over them.
        last = many["name"] == "norm"
        assert not many["valid"][last].any()
        assert many["why"][last].str.contains("partial sum over ranks").all()
        many, one = (table[table["name"] != "norm"] for table in (many, one))
    assert_same_valid_rows(many, one)
