"""Which parameters multiply features, which learn at a rate of their own, and optimizer groups divided accordingly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._network.linearization import Linearization
from fastfs.scaling._groups import output_parameters

__all__ = ["others", "split"]


def others(lin: Linearization, model: nn.Module) -> frozenset[int]:
    """Return the parameters, by id, that are not matrices between features.

    These are tables of embeddings, everything that is added or multiplied entry by entry (biases, norms, positions),
    and the output: its last matrix if that acts on the output alone.

    Args:
        lin: the linearized model.
        model: the same model.

    Returns:
        Ids of its own parameters. Empty if no other parameter would remain.
    """
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found |= {id(p) for p in lin.originals if p.dim() < 2 or p.shape[0] == 1}
    found |= {id(lin.originals[p]) for p in _output(lin)}
    mine = {id(p) for p in lin.originals}
    return frozenset(found & mine) if mine - found else frozenset()


def _output(lin: Linearization) -> list[int]:
    used = [p for p, name in enumerate(lin.names) if name not in set(lin.structure.unreached)]
    upstream = lin.structure.upstream[-1].tolist()
    after = [p for p in used if not upstream[p]]
    if after:
        return output_parameters(lin, after)
    inside = {id(p) for p in lin.layers[-1].module.parameters()}
    own = [p for p in used if id(lin.originals[p]) in inside]
    # The last layer is the output itself if it is a single matrix, rather than a block that nothing trained follows.
    return output_parameters(lin, own) if sum(lin.parameters[p].dim() > 1 for p in own) == 1 else []


def split(optimizer: Optimizer, others: Iterable[int]) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer with all of their options, divided into matrices and others.

    Args:
        optimizer: the optimizer, which is not changed.
        others: ids of parameters.

    Returns:
        Groups in their order. Their rates are relative to the largest one of the optimizer, or 1 if all are zero.
    """
    apart = frozenset(others)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    most = max(rates, default=0.0)
    result = []
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        names = group.get("param_names", [None] * len(group["params"]))
        pairs = list(zip(group["params"], names, strict=True))
        for inside in (False, True):
            chosen = [(p, name) for p, name in pairs if (id(p) in apart) is inside]
            if chosen:
                part = {**group, "params": [p for p, _ in chosen], "lr": rate / most if most > 0 else 1.0}
                if "param_names" in group:
                    part["param_names"] = [name for _, name in chosen]
                part.pop("initial_lr", None)  # of a scheduler, for the rates as given
                result.append(part)
    return result


def is_other(group: dict[str, Any], others: frozenset[int]) -> bool:
    """Return whether a divided group holds others."""
    first: Tensor = group["params"][0]
    return id(first) in others
