"""One training on many meshes: the same model, global batches and optimizer on one process and on several."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fastfs

BATCH, TOKENS, WIDTH, CLASSES, STEPS = 24, 4, 8, 5, 3
LAYERS = r"^(embed|blocks\.\d+|blocks\.\d+\.(up|down)|norm)$"

COMPLETE: dict[str, Any] = {"every": 1, "aligned_fraction": 1.0, "rows": None, "alerts": (), "verbose": False}
"""Options of a monitor that measures every step, with all rows and elements."""


class Block(nn.Module):
    """A residual MLP whose hidden width tensor parallelism can split."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Tokens -> blocks -> classes; the head has an odd number of outputs, so that it is sharded unevenly."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def make_model(dtype: torch.dtype = torch.float64) -> Net:
    """Returns the model with the same weights on every rank."""
    torch.manual_seed(0)
    return Net().to(dtype)


def global_batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns the inputs and targets of all ranks together."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, TOKENS, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, CLASSES, (BATCH, TOKENS), generator=generator)


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """Returns an optimizer: ``sgd``, ``adamw``, ``adamw_foreach`` or ``adamw_fused``."""
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"adamw": {"foreach": False}, "adamw_foreach": {"foreach": True}, "adamw_fused": {"fused": True}}
    return torch.optim.AdamW(model.parameters(), lr=1e-3, **options[name])


# Meshes: each prepares the model and returns (what the loop calls, ranks that have batches of their own, this one's)

Prepared = tuple[nn.Module, int, int]


def single(model: Net) -> Prepared:
    return model, 1, 0


def ddp(model: Net) -> Prepared:
    return nn.parallel.DistributedDataParallel(model), dist.get_world_size(), dist.get_rank()


def _fully_shard(model: Net, mesh: Any, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    whole: Any = fully_shard(model, mesh=mesh, **options)
    module: nn.Module = whole
    return module


def fsdp(model: Net, **options: Any) -> Prepared:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    return _fully_shard(model, mesh, **options), dist.get_world_size(), dist.get_rank()


def hsdp(model: Net) -> Prepared:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
    return _fully_shard(model, mesh), dist.get_world_size(), dist.get_rank()


def offload(model: Net) -> Prepared:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def fsdp_compiled(model: Net) -> Prepared:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return fsdp(model)


def fsdp_recomputed(model: Net) -> Prepared:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return fsdp(model)


def _parallelize(model: Net, mesh: Any, *, sequence: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    for block in model.blocks:
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan = {
                "norm": SequenceParallel(use_local_output=True),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1)),
            }
        parallelize_module(block, mesh, plan)
    if sequence:
        outer: dict[str, Any] = {
            "embed": ColwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(use_local_output=True),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, outer)


def tp(model: Net, *, sequence: bool = False) -> Prepared:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    _parallelize(model, mesh, sequence=sequence)
    return model, 1, 0


def tp_fsdp(model: Net, *, sequence: bool = False) -> Prepared:
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (half, 2), mesh_dim_names=("fsdp", "tp"))
    _parallelize(model, mesh["tp"], sequence=sequence)
    return _fully_shard(model, mesh["fsdp"]), half, mesh.get_local_rank("fsdp")


MESHES: dict[str, Callable[[Net], Prepared]] = {
    "single": single,
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp_compiled": fsdp_compiled,
    "fsdp_recomputed": fsdp_recomputed,
    "fsdp_keep": functools.partial(fsdp, reshard_after_forward=False),
    "hsdp": hsdp,
    "offload": offload,
    "tp": tp,
    "tp_sequence": functools.partial(tp, sequence=True),
    "tp_fsdp": tp_fsdp,
    "tp_sequence_fsdp": functools.partial(tp_fsdp, sequence=True),
}


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Returns the whole parameters, in the order of the model."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def train(
    mesh: str,
    path: str | None,
    *,
    optimizer: str = "adamw",
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains on a mesh.

    Args:
        mesh: One of ``MESHES``.
        path: Of the record; None trains without a monitor.
        optimizer: See :func:`make_optimizer`.
        accumulate: Micro-batches per step.
        clip: Norm to which gradients are clipped; None for no clipping.
        dtype: Of parameters and inputs.
        prepare: Called with the model before the mesh is applied.
        **options: Of the monitor.

    Returns:
        The losses of this rank, the whole parameters at the end, and the names of the watched layers.
    """
    net = make_model(dtype)
    if prepare is not None:
        prepare(net)
    model, batches, own = MESHES[mesh](net)
    optim = make_optimizer(model, optimizer)
    monitor = None
    if path is not None:
        monitor = fastfs.Monitor(model, optim, path=Path(path), **{**COMPLETE, "layers": LAYERS, **options})
    losses = []
    for step in range(STEPS):
        optim.zero_grad()
        x, y = (part.chunk(batches)[own] for part in global_batch(step, dtype))
        total = torch.zeros((), dtype=torch.float64)
        micro = list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))
        for number, (inputs, targets) in enumerate(micro):
            with last_syncs(model, number == len(micro) - 1):
                loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()) / accumulate
                loss.backward()
            total += loss.detach()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if monitor is not None:
            monitor.log(loss=total)
        optim.step()
        losses.append(total.item())
    names: list[str] = []
    if monitor is not None:
        names = list(monitor.layers)
        monitor.close()
    return {"losses": losses, "parameters": parameters_of(net), "layers": names}


def last_syncs(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Returns a context in which DistributedDataParallel communicates only if it is the last micro-batch."""
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def with_and_without(mesh: str, path: str, **options: Any) -> dict[str, Any]:
    """Trains twice and returns the result with the monitor; both trainings have to be the same, bit by bit."""
    with warnings.catch_warnings():
        # torch's own, of DTensor and gloo.
        warnings.simplefilter("default")
        warnings.filterwarnings("error", "fastfs")
        plain = train(
            mesh, None, **{k: v for k, v in options.items() if k in ("optimizer", "accumulate", "clip", "dtype")}
        )
        watched = train(mesh, path, **options)
    assert plain["losses"] == watched["losses"]
    for a, b in zip(plain["parameters"], watched["parameters"], strict=True):
        assert torch.equal(a, b)
    return watched


def assert_same_valid_rows(many: Any, one: Any) -> None:
    """Asserts that a float32 training by somebody else's trainer has valid rows with the numbers of one process."""
    for column in ("step", "kind", "name", "count", "rows"):
        assert many[column].tolist() == one[column].tolist(), column
    assert many["valid"].all()
    for column in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "parameter_norm", "loss"):
        mine, other = (table[column].to_numpy(dtype=float) for table in (many, one))
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=0, err_msg=column)
