"""Which layers are cuts, where the feature speed formula holds, and which parameters are shared across layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastfs._network.feature_tensors import floating
from fastfs._network.layers import AUTO, Selection, unwrapped
from fastfs._network.linearization import Linearization
from fastfs._utils.extras import frame

if TYPE_CHECKING:
    import pandas

__all__ = ["Cuts", "cuts"]


@dataclass(frozen=True)
class Cuts:
    """What :func:`cuts` found, for L layers.

    Attributes:
        layers: names.
        cut: whether every path from the parameters upstream to the output passes through the layer, exactly once.
        reason: why not, or None.
        upstream: names of the parameters that the features depend on.
        shared: name of a parameter -> where else it acts. It makes all layers in between no cuts.
    """

    layers: list[str]
    cut: list[bool]
    reason: list[str | None]
    upstream: list[list[str]]
    shared: dict[str, str]

    def to_frame(self) -> pandas.DataFrame:
        """One row per layer: name, cut, reason, number of parameters upstream."""
        counts = [len(names) for names in self.upstream]
        return frame({"layer": self.layers, "cut": self.cut, "reason": self.reason, "upstream": counts})

    def __str__(self) -> str:
        width = max((len(name) for name in self.layers), default=0)
        lines = [
            f"{name:<{width}}  {'cut' if cut else 'no cut: ' + str(reason)}"
            for name, cut, reason in zip(self.layers, self.cut, self.reason, strict=True)
        ]
        return "\n".join([*lines, *(f"shared: {name}: {why}" for name, why in self.shared.items())])


def cuts(
    model: nn.Module,
    batch: Any,
    *,
    layers: Selection = AUTO,
    forward: Callable[[Any, Any], Any] | None = None,
) -> Cuts:
    """Tells which layers of a model are cuts, from the graph of one forward on an example input.

    The formula needs no loss for that: all floating-point outputs count. Where the loss also uses parameters or inner
    tensors past the outputs (penalties, auxiliary losses), give ``forward`` that returns the loss.

    Args:
        model: any network.
        batch: an example input: a tensor, a tuple of positional or a dictionary of keyword arguments.
        layers: which layers to look at, as for :class:`fastfs.Monitor`.
        forward: function of the model and the batch that gives the outputs; calls the model on the batch if None.

    Raises:
        TypeError: the outputs hold no floating-point tensor.
        ValueError: no layer matches, or no output depends on a parameter.

    Source: "cut" in section 2 of "The Feature Speed Formula", arXiv 2311.18718: the chain f_l = T_l(f_{l-1}; w_l).
    """

    def scalar(inner: nn.Module, inputs: Any) -> Tensor:
        outputs = _call(inner, inputs) if forward is None else forward(inner, inputs)
        found = [x.nan_to_num(0.0, 0.0, 0.0) for x in floating(outputs)]  # masked logits are -inf
        if not found:
            raise TypeError(f"cuts: expected a floating-point tensor in the outputs, got {type(outputs).__name__}")
        total = found[0].sum()
        for output in found[1:]:
            total = total + output.sum()
        return total

    structure = (lin := Linearization(unwrapped(model), scalar, batch, layers=layers)).structure
    names = [layer.name for layer in lin.layers]
    shared = {}
    for column, parameter in enumerate(lin.names):
        between = [names[i] for i in structure.shared[:, column].nonzero().flatten().tolist()]
        if between:
            some = ", ".join(between[:3]) + (f" and {len(between) - 3} more" if len(between) > 3 else "")
            shared[parameter] = f"acts before and after {some}"
    upstream = [[lin.names[i] for i in row.nonzero().flatten().tolist()] for row in structure.upstream]
    return Cuts(names, list(structure.cut), list(structure.reason), upstream, shared)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
