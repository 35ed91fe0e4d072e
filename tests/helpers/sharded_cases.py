"""Models and training loops for tests on several ranks, with the same global batch for every number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from tests.helpers.parallel_cases import Block

SAMPLES, TOKENS, WIDTH, CLASSES = 8, 4, 8, 5  # five outputs do not divide among ranks


def _unchanged(x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """An embedding, blocks, and a head; ``recompute`` checkpoints the blocks."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.recompute = recompute
        self.last: Callable[[Any], Tensor] = _unchanged  # between blocks and head

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(self.last(x)).clone()  # FSDP2 warns of views


def net(dtype: torch.dtype = torch.float64, **options: Any) -> Net:
    """Returns the same network on every rank."""
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Returns the global batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(SAMPLES, TOKENS, 3, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(CLASSES, (SAMPLES, TOKENS), generator=generator)


def mesh(*sizes: int, names: tuple[str, ...] = ("data",)) -> Any:
    """Returns a mesh of all ranks."""
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def shard(model: nn.Module, over: Any, each: bool = True, **options: Any) -> nn.Module:
    """Applies FSDP2 to the blocks and to the model."""
    for block in model.blocks if each else ():
        fully_shard(block, mesh=over, **options)
    fully_shard(model, mesh=over, **options)
    return model


def tensor_parallel(model: nn.Module, over: Any, sequence: bool = False) -> nn.Module:
    """Splits the products of the blocks among ranks."""
    for block in model.blocks:
        if not sequence:
            parallelize_module(block, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
            continue
        plan = {
            "": PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),), use_local_output=False
            ),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(block, over, plan)
    return model


def _fsdp(**options: Any) -> Callable[[nn.Module], tuple[nn.Module, int]]:
    return lambda model: (shard(model, mesh(), **options), dist.get_rank())


def _hybrid(model: nn.Module) -> tuple[nn.Module, int]:
    return shard(model, mesh(2, dist.get_world_size() // 2, names=("copies", "shards"))), dist.get_rank()


def _tensor(model: nn.Module) -> tuple[nn.Module, int]:
    return tensor_parallel(model, mesh(names=("tp",))), -1


def _sequence(model: nn.Module) -> tuple[nn.Module, int]:
    """Blocks take and return DTensors that are sharded along the tokens."""
    over = mesh(names=("tp",))
    parallelize_module(model.embed, over, ColwiseParallel(output_layouts=Shard(1), use_local_output=False))
    parallelize_module(model.head, over, ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()))
    return tensor_parallel(model, over, sequence=True), -1


def _partial(model: nn.Module) -> tuple[nn.Module, int]:
    """The first block returns a partial sum, and the gradient of the last block's output is one."""
    over, first, last = mesh(names=("tp",)), *(model.blocks[i] for i in (0, -1))
    for block in model.blocks:
        parallelize_module(block, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.blocks[0] = _Summand(first, over)
    model.blocks[-1] = _Replicated(last, over)
    model.last = _to_partial
    return model, -1


class _Summand(nn.Module):
    def __init__(self, inner: Any, over: Any) -> None:
        super().__init__()
        self.inner, self.sum = inner, _PartialSum(over)

    def forward(self, x: Tensor) -> Any:
        return self.sum(self.inner(x)).full_tensor()


class _PartialSum(nn.Module):
    def __init__(self, over: Any) -> None:
        super().__init__()
        self.over = over
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Any:
        return DTensor.from_local(x * self.scale / self.over.size(), self.over, [Partial()])


class _Replicated(nn.Module):
    def __init__(self, inner: Any, over: Any) -> None:
        super().__init__()
        self.inner, self.over = inner, over

    def forward(self, x: Tensor) -> Any:
        return DTensor.from_local(self.inner(x), self.over, [Replicate()])


def _to_partial(x: Any) -> Tensor:
    return x.to_local(grad_placements=[Partial()])


def _both(model: nn.Module) -> tuple[nn.Module, int]:
    both = mesh(dist.get_world_size() // 2, 2, names=("dp", "tp"))
    return shard(tensor_parallel(model, both["tp"]), both["dp"]), both.get_coordinate()[0]


def _ddp(model: nn.Module) -> tuple[nn.Module, int]:
    return nn.parallel.DistributedDataParallel(model), dist.get_rank()


def _compiled(model: nn.Module) -> tuple[nn.Module, int]:
    return shard(_compile(model), mesh()), dist.get_rank()


def _compile(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


SETUPS: dict[str, Callable[[nn.Module], tuple[nn.Module, int]]] = {
    "single": lambda model: (model, -1),
    "ddp": _ddp,
    "fsdp": _fsdp(),
    "kept": _fsdp(reshard_after_forward=False),
    "released": _fsdp(reshard_after_forward=True),
    "root only": _fsdp(each=False),
    "offload": _fsdp(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "mixed": _fsdp(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)),
    "compiled": _compiled,
    "hybrid": _hybrid,
    "tensor": _tensor,
    "sequence": _sequence,
    "partial": _partial,
    "compiled alone": lambda model: (_compile(model), -1),
    "both": _both,
}
"""By name: what returns the wrapped model, and the number of this rank's part of the batch, -1 for all of it."""

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "copied": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


class Training:
    """A training loop on this rank.

    Args:
        setup: A name of :data:`SETUPS`.
        optimizer: A name of :data:`OPTIMIZERS`.
        dtype: Of parameters and inputs.
        clip: Whether gradients are clipped.
        evaluate: Whether a forward without gradient comes before each step.
        parts: Micro-batches of a step.
        options: Of :class:`Net`.
    """

    def __init__(
        self,
        setup: str,
        optimizer: str = "adamw",
        dtype: torch.dtype = torch.float64,
        clip: bool = False,
        evaluate: bool = False,
        parts: int = 1,
        **options: Any,
    ) -> None:
        self.dtype, self.clip, self.evaluate, self.parts = dtype, clip, evaluate, parts
        self.inner = net(dtype, **options)
        self.model, self.part = SETUPS[setup](self.inner)
        self.data_ranks = {"both": 2}.get(setup, dist.get_world_size()) if self.part >= 0 else 1
        if setup == "both":
            self.data_ranks = dist.get_world_size() // 2
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.losses: list[float] = []

    def step(self, number: int) -> None:
        """Makes one step."""
        self.backward(number)
        self.optimizer.step()

    def backward(self, number: int) -> None:
        """Computes the gradients of a step."""
        x, y = batch(number, self.dtype)
        if self.part >= 0:
            x, y = x.chunk(self.data_ranks)[self.part], y.chunk(self.data_ranks)[self.part]
        if self.evaluate:
            with torch.no_grad():
                self.model(x)
        self.optimizer.zero_grad()
        for inputs, targets in zip(x.chunk(self.parts), y.chunk(self.parts), strict=True):
            output = self.model(inputs)
            loss = F.cross_entropy(output.flatten(0, -2).to(torch.float64), targets.flatten()) / self.parts
            loss.backward()
            self.losses.append(loss.item())
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def state(self) -> list[Any]:
        """Returns parameters, optimizer state of this rank, and losses, for comparisons of bits."""
        parameters = [local_part(p).detach().clone() for p in self.model.parameters()]
        states = [
            local_part(value).clone()
            for p in self.model.parameters()
            for value in self.optimizer.state[p].values()
            if isinstance(value, Tensor)
        ]
        return [*parameters, *states, torch.tensor(self.losses, dtype=torch.float64)]


def local_part(tensor: Any) -> Tensor:
    """Returns what this rank holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two states have the same bits."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def warned(function: Callable[[], Any]) -> list[str]:
    """Calls a function and returns the texts of its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in found]


def record_of(folder: Path | str, name: str) -> str:
    """Returns a path for the record of this rank."""
    return f"{folder}/{name.replace(' ', '-')}-{dist.get_rank()}.jsonl"
