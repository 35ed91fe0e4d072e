"""The parameters of a model in groups along the signal: input, each watched layer, output."""

from __future__ import annotations

from dataclasses import dataclass

from fastfs._network.linearization import Linearization

__all__ = ["INPUT", "OUTPUT", "Partition", "partition"]

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class Partition:
    """Groups of parameters, by their indices, in the order of the signal.

    Attributes:
        groups: name -> indices of parameters; ``"input"`` before the first watched layer, the name of a layer, or
            ``"output"`` after the last one.
        hidden: index of the layer that holds the last hidden features.
        output: indices of the parameters whose scale is the output's: its last matrix and that one's bias, or where
            the output has no matrix, all of it. Empty if all that acts after the hidden features is shared.
        shared: names of parameters that act both before and after the last hidden features.
    """

    groups: dict[str, list[int]]
    hidden: int
    output: list[int]
    shared: list[str]


def partition(lin: Linearization) -> Partition:
    """The groups of a linearised model.

    Where nothing is after the last watched layer, that one is the output and the layer before has the last hidden
    features.

    Raises:
        ValueError: a parameter without any use, or no hidden layer.
    """
    unreached = lin.structure.unreached
    if unreached:
        raise ValueError(
            f"the loss does not use {', '.join(unreached)}: leave them out with requires_grad_(False), they have no "
            "learning rate to be found"
        )
    count = len(lin.names)
    upstream = lin.structure.upstream.tolist()
    hidden = len(lin.layers) - 1
    after = [p for p in range(count) if not upstream[hidden][p]]
    if not after and not _shared(lin, hidden):
        hidden -= 1
        if hidden < 0:
            raise ValueError(
                f"layers: {lin.layers[0].name!r} is the only layer and nothing is after it; a hidden one is needed"
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
        if before and not groups:  # of a later layer: what is between two layers belongs to the second
            groups[INPUT], before = before, []
        if before or here:
            groups[layer.name] = before + here
    last = lin.layers[hidden + 1].name if hidden + 1 < len(lin.layers) else OUTPUT
    if after:
        groups[last] = after
    return Partition(groups, hidden, _output(lin, after), _shared(lin, hidden))


def _shared(lin: Linearization, layer: int) -> list[str]:
    return [name for name, twice in zip(lin.names, lin.structure.shared[layer].tolist(), strict=True) if twice]


def _output(lin: Linearization, after: list[int]) -> list[int]:
    matrices = [p for p in lin.structure.order if p in after and lin.parameters[p].dim() > 1]
    if not matrices:
        return after
    owner = _owner(lin.names[matrices[-1]])
    return [p for p in after if _owner(lin.names[p]) == owner]


def _owner(parameter: str) -> str:
    """Name of the module that a parameter belongs to, whether it is parametrised or not."""
    module, parametrised, _ = parameter.partition(".parametrizations.")
    return module if parametrised else parameter.rpartition(".")[0]
