"""How parameters and gradients are spread over the ranks of ``torch.distributed``, and what of them this rank holds.

A DTensor has a local part on every rank of its mesh. Along an axis of the mesh it is sharded (each rank has a part of
its own), replicated (all have the same), or partial (the tensor is the sum of the local parts, which is not known
without communication). Nothing here communicates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfs._network.fully_sharded import groups_of
from fastfs._network.wrappers import clean_name, prefixes

__all__ = [
    "ShardClass",
    "check_model",
    "check_parameters",
    "data_ranks",
    "gradient_average",
    "is_distributed",
    "is_partial",
    "local",
    "own_part",
    "placed",
    "placements_of",
    "replay_needs_ranks",
    "same_placements",
    "shard_class",
    "shard_classes",
    "spread",
    "summand",
    "version",
]

_PLAIN = (Tensor, nn.Parameter)
_REPLICATED = ""


@dataclass(frozen=True)
class ShardClass:
    """Parameters that are spread over the ranks in the same way.

    Attributes:
        key: Names and sizes of the mesh axes that the parameters are sharded along, equal on all ranks: ``""`` if there
            is none, ``"fsdp:2"``, ``"tp:2,fsdp:2"``. An axis without a name has its number, and the distance of its
            ranks: ``"0:2@1"``.
        shards: Number of different shards, the product of the sizes of these axes.
        shard: The shard that this rank holds.
    """

    key: str
    shards: int
    shard: int


def is_distributed(tensor: Tensor) -> bool:
    """Return whether the tensor is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank holds, without graph; plain tensors unchanged.

    The part shares memory with the tensor, and it is the same object every time. It may be empty.
    """
    if type(tensor) in _PLAIN or not is_distributed(tensor):
        return tensor
    part: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # to_local() is recorded by autograd
    if hasattr(part, "trigger_wait"):  # the result of a collective that may still be running
        part = part.trigger_wait()
    return part.detach() if part.requires_grad else part


def version(tensor: Tensor) -> int:
    """Return the version of a tensor, which every write raises.

    Operations on a DTensor raise its own version, and FSDP2 also writes to the local part itself.
    """
    if type(tensor) in _PLAIN or not is_distributed(tensor):
        return tensor._version
    return tensor._version + int(tensor._local_tensor._version)  # type: ignore[attr-defined]


def is_partial(tensor: Tensor) -> bool:
    """Return whether the tensor is a sum over ranks of which this one only has its summand."""
    return is_distributed(tensor) and any(each.is_partial() for each in tensor.placements)  # type: ignore[attr-defined]


def placements_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return the placements of a DTensor, None for plain tensors."""
    if type(tensor) in _PLAIN or not is_distributed(tensor):
        return None
    return tuple(tensor.placements)  # type: ignore[attr-defined]


def placed(features: Tensor, rows: int, inputs: Callable[[], Iterable[Tensor]] = tuple) -> str | None:
    """Return what of a layer's features this rank has.

    A plain tensor that ``to_local()`` has just made of a DTensor counts, as tensor-parallel layers return it.

    Args:
        features: the features.
        rows: number of leading dimensions that count rows.
        inputs: returns those of the model. Ranks along an axis over which they are sharded have batches of their own,
            so that only the other axes say what is spread within a batch.

    Returns:
        ``"replicate"`` for all of them, ``"rows"`` for some rows, ``"columns"`` for a part of every row; None if
        placements do not tell.
    """
    found, mesh = placements_of(features), _mesh_of(features)
    if found is None:
        spec = getattr(features.grad_fn, "dtensor_spec", None)
        found, mesh = (None, None) if spec is None else (tuple(spec.placements), spec.mesh)
    if found is None or any(each.is_partial() for each in found):
        return None
    batches = {axis for x in inputs() if _mesh_of(x) == mesh for axis in _sharded_axes(x)}
    dims = {each.dim for axis, each in enumerate(found) if not each.is_replicate() and axis not in batches}
    if not dims:
        return "replicate"
    return "columns" if all(dim >= rows for dim in dims) else "rows"


def same_placements(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are spread over the ranks in the same way."""
    if not is_distributed(a) and not is_distributed(b):
        return True
    if not is_distributed(a) or not is_distributed(b):
        return False
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)  # type: ignore[attr-defined]


def own_part(parameter: Tensor, gradient: Tensor) -> Tensor | None:
    """Return the part of a gradient that belongs to this rank's shard of the parameter, without communication.

    torch leaves the gradient of a sharded embedding whole on every rank.

    Returns:
        The part; None if this rank does not have it, or the gradient is spread like the parameter.
    """
    if not (is_distributed(parameter) and is_distributed(gradient)) or same_placements(parameter, gradient):
        return None
    pairs = zip(parameter.placements, gradient.placements, strict=True)  # type: ignore[attr-defined]
    held = all(own == given or given.is_replicate() for own, given in pairs)
    if parameter.device_mesh != gradient.device_mesh or not held or is_partial(gradient):  # type: ignore[attr-defined]
        return None
    found: Any = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local(found)


def summand(parameter: Tensor, gradient: Tensor) -> tuple[int, int] | None:
    """Return the number of summands that the gradient of a parameter consists of, and which one this rank has.

    Norm layers under sequence parallelism have such gradients, on ranks that all have the whole parameter: <g, dw> is
    then the sum over ranks of that with the summand.

    Returns:
        None if the gradient is not spread like the parameter except for such sums; (1, 0) if it is spread like it.
    """
    if same_placements(parameter, gradient):
        return 1, 0
    if not (is_distributed(parameter) and is_distributed(gradient)):
        return None
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    coordinates = mesh.get_coordinate()
    if mesh != gradient.device_mesh or coordinates is None:  # type: ignore[attr-defined]
        return None
    count, which = 1, 0
    pairs = zip(parameter.placements, gradient.placements, strict=True)  # type: ignore[attr-defined]
    for axis, (own, of_gradient) in enumerate(pairs):
        if own == of_gradient:
            continue
        if not (own.is_replicate() and of_gradient.is_partial("sum")):
            return None
        count, which = count * mesh.size(axis), which * mesh.size(axis) + coordinates[axis]
    return count, which


def shard_class(parameter: Tensor) -> ShardClass:
    """Return how a parameter is spread over the ranks."""
    if not is_distributed(parameter):
        return ShardClass(_REPLICATED, 1, 0)
    mesh, axes = parameter.device_mesh, _sharded_axes(parameter)  # type: ignore[attr-defined]
    coordinates, shard = mesh.get_coordinate(), 0
    for axis in axes:
        shard = shard * mesh.size(axis) + (0 if coordinates is None else coordinates[axis])
    return ShardClass(_key(mesh, axes), math.prod(mesh.size(axis) for axis in axes), shard)


def shard_classes(parameters: Iterable[Tensor]) -> tuple[list[ShardClass], list[int]]:
    """Return the distinct classes, in the order of first use, and the index of each parameter's class."""
    found: dict[ShardClass, int] = {}
    numbers = [found.setdefault(shard_class(p), len(found)) for p in parameters]
    return list(found), numbers


def spread(tensor: Tensor) -> str | None:
    """Return the placements of a DTensor, None for plain tensors.

    ``"replicate"`` if all ranks have the same, else axis, size and kind of every other placement:
    ``"tp:2:shard"``, ``"dp:2:shard,tp:2:partial"``.
    """
    if type(tensor) in _PLAIN or not is_distributed(tensor):
        return None
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    parts = [
        f"{_axis(mesh, axis)}:{'partial' if each.is_partial() else 'shard'}"
        for axis, each in enumerate(tensor.placements)  # type: ignore[attr-defined]
        if not each.is_replicate()
    ]
    return ",".join(parts) or "replicate"


def check_parameters(names: Mapping[str, Tensor]) -> None:
    """Check that the local sums of parameters say something about the parameters.

    Args:
        names: the parameters by name.

    Raises:
        ValueError: a parameter is a partial sum, is a flat parameter of FullyShardedDataParallel, or belongs to a mesh
            that this rank is not part of.
    """
    for name, p in names.items():
        if getattr(p, "_is_flat_param", False):
            raise ValueError(f"parameter {name!r} is a flat parameter: {_FSDP1}")
        if not is_distributed(p):
            continue
        if is_partial(p):
            raise ValueError(
                f"parameter {name!r} is a partial sum over ranks ({_shown(p)}), expected sharded or replicated "
                "parameters: redistribute it before the optimizer is created"
            )
        if p.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
            raise ValueError(
                f"parameter {name!r} belongs to a mesh that this rank is not part of, expected the parameters of the "
                "ranks that train them"
            )


_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) cannot be measured, since its parameters are flattened and mixed: use "
    "torch.distributed.fsdp.fully_shard"
)


def check_model(model: nn.Module) -> None:
    """Check that the model has no wrapper whose parameters cannot be measured.

    Raises:
        ValueError: FullyShardedDataParallel (FSDP1) wraps the model or a part of it.
    """
    old = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if old is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, old):
            part = clean_name(name, prefixes(model))
            raise ValueError(f"model{f', {part!r}' if part else ''}: {_FSDP1}")


def replay_needs_ranks(model: nn.Module) -> bool:
    """Return whether a forward of the model needs the other ranks, since it runs collectives.

    So do modules of FSDP2, layers with DTensor parameters, and synchronized batch norm. DistributedDataParallel around
    the model does not count, whose own forward an extra forward leaves out.
    """
    modules = list(model.modules())
    if groups_of(modules) or any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        return True
    return any(is_distributed(p) for p in (*model.parameters(), *model.buffers()))


def gradient_average(model: nn.Module) -> float | None:
    """Return w, for gradients that are w times the sum over ranks of the gradients of the local losses.

    1 / (number of data-parallel ranks) for DistributedDataParallel and FSDP2, unless a factor was set there.

    Returns:
        None if it is not known: without such a wrapper, with hooks that may scale, or with several factors.
    """
    wrappers, groups = _data_parallel(model), groups_of(model.modules())
    if len(wrappers) + bool(groups) != 1:
        return None
    if wrappers:
        return None if wrappers[0]._comm_hooks else 1.0 / wrappers[0].process_group.size()
    managed = {id(p.sharded_param) for group in groups for p in group.fsdp_params}
    managed |= {id(leaf) for group in groups for p in group.fsdp_params if (leaf := _unsharded(p)) is not None}
    if any(p.requires_grad and id(p) not in managed for p in model.parameters()):
        return None
    factors = {group.gradient_divide_factor or float(group.mesh_info.mesh.size()) for group in groups}
    hooked = any(group._all_reduce_hook is not None for group in groups)
    return None if hooked or len(factors) != 1 else 1.0 / factors.pop()


def data_ranks(model: nn.Module) -> Sequence[int] | None:
    """Return the global ranks whose gradients are averaged with those of this rank, ascending.

    Returns:
        None without DistributedDataParallel or FSDP2, or if parts of the model have groups that do not contain each
        other.
    """
    found = [set(torch.distributed.get_process_group_ranks(w.process_group)) for w in _data_parallel(model)]
    found += [set(group.mesh_info.mesh.mesh.flatten().tolist()) for group in groups_of(model.modules())]
    most = max(found, key=len, default=None)
    if most is None or not all(each <= most for each in found):
        return None
    return sorted(most)


def _data_parallel(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]


def _unsharded(parameter: Any) -> Tensor | None:
    found: Tensor | None = getattr(parameter, "_unsharded_param", None)
    return found


def _mesh_of(tensor: Tensor) -> Any:
    return tensor.device_mesh if is_distributed(tensor) else None  # type: ignore[attr-defined]


def _sharded_axes(tensor: Any) -> list[int]:
    return [axis for axis, each in enumerate(tensor.placements) if not (each.is_replicate() or each.is_partial())]


def _key(mesh: Any, axes: Sequence[int]) -> str:
    return ",".join(_axis(mesh, axis) for axis in axes)


def _axis(mesh: Any, axis: int) -> str:
    size = mesh.size(axis)
    if mesh.mesh_dim_names is not None:
        return f"{mesh.mesh_dim_names[axis]}:{size}"
    line = mesh.mesh.movedim(axis, -1).reshape(-1, size)[0].tolist()
    return f"{axis}:{size}@{line[1] - line[0] if size > 1 else 1}"


def _shown(tensor: Any) -> str:
    return f"DTensor with placements {tuple(tensor.placements)}"
