"""What the coefficients of a closed form are computed from: hyper-parameters and step counters of a completed step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._monitor.capture.fingerprints import known_equal
from fastfs._monitor.measure.hyper_parameters import Group, Number, double

__all__ = ["CompletedStep"]


@dataclass
class CompletedStep:
    """A step of parameters of one group, right after it.

    All arithmetic is in float64, except for bias corrections that torch computes in the dtype of the step counters.

    Attributes:
        group: Hyper-parameters that the step used.
        counters: Step counters of the parameters, empty for a closed form that does not depend on them.
        known_count: The value of all counters, if the host knows it.
        rewrote_gradients: See `fastfs._monitor.measure.closed_forms.rewrites_gradients`.
    """

    group: Group
    counters: Sequence[Tensor]
    known_count: float | None
    rewrote_gradients: bool

    def count(self, lr: Number) -> Number:
        """Returns the number of steps: a float if it is known to be the same everywhere, else float64 (P,).

        Args:
            lr: The learning rate; the result is on its device, unless that is the CPU.
        """
        if self.known_count is not None and self.known_count > 0:
            return self.known_count
        counts = torch.stack(list(self.counters)).to(self._device(lr), torch.float64, non_blocking=True)
        if known_equal(counts, counts[:1].expand_as(counts)):
            count = counts[0].item()  # on the CPU, so nothing waits
            if count > 0:  # 0: no step has been made
                return count
        return counts

    def bias_corrections(self, lr: Number, betas: Sequence[Number]) -> list[Number]:
        """Returns 1 - beta^t for every beta, each a number or float64 (P,)."""
        group = self.group
        if (group["capturable"] or group["differentiable"]) and not group.get("fused"):
            device = self._device(lr)
            result: list[Number] = []
            for beta in betas:
                if isinstance(beta, Tensor):
                    powers = [beta**t for t in self.counters]
                else:
                    powers = list(torch._foreach_pow(beta, list(self.counters)))
                result.append((1.0 - torch.stack(powers)).to(device, torch.float64, non_blocking=True))
            return result
        count = self.count(lr)
        return [1.0 - double(beta) ** count for beta in betas]

    def _device(self, lr: Number) -> torch.device:
        return lr.device if isinstance(lr, Tensor) and not lr.is_cpu else self.counters[0].device
