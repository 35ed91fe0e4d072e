"""How much a step changes the loss that was differentiated, on the same batch.

Along the step the loss is, to second order, L(t) = L - t D + t^2 h / 2 with h = <dw, H dw>, and at t = 1 it has changed
by dL = -D + h / 2. The record's overshoot is h / D = 2 (dL + D) / D: the inverse of the t at which L(t) is smallest.

The loss of a training batch is known if the model returns it: a scalar output at which the backward arrives before all
other scalars, with the derivative c of what the loop differentiated with respect to it. Over the micro-batches of a
step sum c L is then the differentiated loss, and sum c dL its change, in the scale of the gradients, whatever that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._stats import FeatureStats

__all__ = ["LossChange", "of_outputs"]

_SAME = 1e-5  # relative difference up to which the logged loss is that of the outputs, if these are not in 16 bits
_ROUNDINGS = 4.0  # spacings by which the loss, or features before it, may be off in each of two forwards


@dataclass(frozen=True)
class LossChange:
    """A loss before the step, and by how much the step has changed it.

    Attributes:
        before: float64 (), with the loss scale.
        change: float64 (), with the loss scale.
        spacing: Spacing at 1 of the numbers in which the loss is given.
        certain: Whether this is the loss that was differentiated, however the loop logs it.
    """

    before: Tensor
    change: Tensor
    spacing: float
    certain: bool = False

    def fields(self, logged: Tensor | None, scale: Tensor, features: FeatureStats, eps: Tensor) -> dict[str, Tensor]:
        """Returns what the payload has of it: the change, NaN if the loss may be another one, and its rounding error.

        Args:
            logged: The loss that the loop has logged; None if there is none.
            scale: The loss scale, float64 ().
            features: Sums over the features, with the loss scale, (L,).
            eps: Spacing at 1 of the coarsest numbers in each layer, float64 (L,).
        """
        if logged is None and not self.certain:
            return {}
        before, change = self.before / scale, self.change / scale
        if logged is not None and not self.certain:  # else the loop may have added terms that the outputs do not have
            away = (logged.to(before.device, torch.float64) - before).abs()
            same = away <= max(_SAME, 2 * self.spacing) * before.abs()
            change = torch.where(same, change, torch.nan)
        of_features = features.backward_sq * features.before_sq / features.count * eps.square()
        noise = eps.amax().clamp_min(self.spacing) * self.before.abs() + of_features.nan_to_num().sum().sqrt()
        return {"loss_change": torch.stack([change, _ROUNDINGS * noise / scale])}


def of_outputs(
    forwards: Sequence[ForwardCapture], after: Sequence[Mapping[int, Tensor]], device: torch.device
) -> LossChange | None:
    """Returns the change of the loss that the model returns, None if it returns none.

    Args:
        forwards: The training forwards of the step.
        after: Of each the scalar outputs of the second forward, by their number.
        device: Of the result.
    """
    spacing = 0.0
    before: list[Tensor] = []
    change: list[Tensor] = []
    for captured, scalars in zip(forwards, after, strict=True):
        if captured.samples is not None or not captured.losses:
            return None
        for output, derivative in captured.losses.values():
            if output not in scalars:
                return None
            spacing = max(spacing, torch.finfo(scalars[output].dtype).eps)
            first, second, c = (
                x.detach().to(device, torch.float64, non_blocking=True).reshape(())
                for x in (captured.scalars[output], scalars[output], derivative)
            )
            before.append(c * first)
            change.append(c * (second - first))
    if not before:
        return None
    return LossChange(torch.stack(before).sum(), torch.stack(change).sum(), spacing)
