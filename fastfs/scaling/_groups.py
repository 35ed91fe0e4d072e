"""Partition the parameters of a model into groups along the forward: input, each watched layer, output."""

from __future__ import annotations

from dataclasses import dataclass

from fastfs._network.linearization import Linearization

__all__ = ["INPUT", "OUTPUT", "Partition", "output_parameters", "partition"]

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Partition:
    """Groups of parameters, by index, in the order of the forward.

    Attributes:
        groups: name -> indices of parameters: ``"input"`` before the first watched layer, the name of a layer, or
            ``"output"`` after the last one.
        hidden: index of the layer that holds the last hidden features.
        output: indices of the parameters that set the output scale: its last matrix and the bias of that, or if the
            output has no matrix, all of its parameters. Empty if all parameters after the hidden features are shared.
        shared: names of parameters that act both before and after the last hidden features.
    """

    groups: dict[str, list[int]]
    hidden: int
    output: list[int]
    shared: list[str]


def partition(lin: Linearization) -> Partition:
    """Return the groups of a linearized model.

    If nothing follows the last watched layer, that layer is the output, and the layer before it holds the last hidden
    features.

    Args:
        lin: the linearized model.

    Returns:
        The groups.

    Raises:
        ValueError: a parameter is unused, or there is no hidden layer.
    """
    unreached = lin.structure.unreached
    if unreached:
        raise ValueError(
            f"the loss does not use {', '.join(unreached)}: exclude them with requires_grad_(False), because no "
            "learning rate can be derived for them"
        )
    count = len(lin.names)
    upstream = lin.structure.upstream.tolist()
    hidden = len(lin.layers) - 1
    after = [p for p in range(count) if not upstream[hidden][p]]
    if not after and not _shared(lin, hidden):
        hidden -= 1
        if hidden < 0:
            raise ValueError(
                f"layers: {lin.layers[0].name!r} is the only layer and nothing follows it; a hidden layer is required"
            )
        after = [p for p in range(count) if not upstream[hidden][p]]
    groups: dict[str, list[int]] = {}
    taken = set(after)
    for layer in lin.layers[: hidden + 1]:
        inside = {id(p) for p in layer.module.parameters()}
        own = [p for p in range(count) if upstream[layer.index][p] and p not in taken]
        taken.update(own)
        before = [p for p in own if id(lin.originals[p]) not in inside]
        here = [p for p in own if id(lin.originals[p]) in inside]
        if before and not groups:  # parameters between two later layers belong to the second one
            groups[INPUT], before = before, []
        if before or here:
            groups[layer.name] = before + here
    last = lin.layers[hidden + 1].name if hidden + 1 < len(lin.layers) else OUTPUT
    if after:
        groups[last] = after
    return Partition(groups, hidden, output_parameters(lin, after), _shared(lin, hidden))


def _shared(lin: Linearization, layer: int) -> list[str]:
    return [name for name, twice in zip(lin.names, lin.structure.shared[layer].tolist(), strict=True) if twice]


def output_parameters(lin: Linearization, after: list[int]) -> list[int]:
    """Return the parameters of the module with the last matrix in the forward, or all if there is no matrix.

    Args:
        lin: the linearized model.
        after: indices of the parameters to choose from.

    Returns:
        Indices of parameters.
    """
    matrices = [p for p in lin.structure.order if p in after and lin.parameters[p].dim() > 1]
    if not matrices:
        return after
    owner = _owner(lin.names[matrices[-1]])
    return [p for p in after if _owner(lin.names[p]) == owner]


def _owner(parameter: str) -> str:
    """Return the name of the module that a parameter belongs to, whether it is parametrized or not."""
    module, parametrized, _ = parameter.partition(".parametrizations.")
    return module if parametrized else parameter.rpartition(".")[0]
