"""Find the layers that are cuts, at which the feature speed formula holds, and the parameters shared across layers."""

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
    """The result of :func:`cuts` for L layers.

    Attributes:
        layers: names of the layers.
        cut: whether every path from the upstream parameters to the output passes through the layer exactly once.
        reason: why the layer is not a cut, or None.
        upstream: per layer, the names of the parameters that its features depend on.
        shared: parameter name -> the layers between its uses, which are not cuts for this reason.
    """

    layers: list[str]
    cut: list[bool]
    reason: list[str | None]
    upstream: list[list[str]]
    shared: dict[str, str]

    def to_frame(self) -> pandas.DataFrame:
        """Return one row per layer: name, cut, reason, number of upstream parameters.

        Returns:
            A DataFrame with the columns ``layer``, ``cut``, ``reason`` and ``upstream``.

        Raises:
            ImportError: pandas is not installed.
        """
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
    """Determine which layers of a model are cuts, from the autograd graph of one forward on an example input.

    No loss is needed: all floating-point outputs count. If the loss also uses parameters or inner tensors besides the
    outputs (penalties, auxiliary losses), pass a ``forward`` that returns the loss.

    Args:
        model: any network. It is not changed.
        batch: example input: a tensor, a tuple of positional arguments or a dictionary of keyword arguments.
        layers: the layers to classify, as for :class:`fastfs.Monitor`.
        forward: function of the model and the batch that returns the outputs; None calls the model on the batch.

    Returns:
        Per layer, whether it is a cut, why not, and its upstream parameters.

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
