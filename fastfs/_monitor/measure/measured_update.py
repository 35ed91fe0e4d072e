"""The result of measuring a step, with a reason for every parameter whose update is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._monitor.measure.update_plans import Call, ParameterOrder
from fastfs._record import decrease_reasons
from fastfs._stats import ParameterStats, span

__all__ = ["OF_STEP", "OF_UPDATE", "MeasuredUpdate", "UpdateAssembler", "refuted", "without_gradients"]

OF_UPDATE = span(ParameterStats, "update")
"""The columns of the sums that depend on the update."""

OF_STEP = span(ParameterStats, "update", "gradient")
"""The columns of the sums that depend on the update or the gradient."""

_WIDTH = len(ParameterStats.names)


@dataclass
class MeasuredUpdate:
    """What a step did to P parameters.

    Attributes:
        stats: ParameterStats of shape (P,); NaN where the update, or the gradient, is not known.
        reason: int64 (P,), on the same device: why not, a code of :mod:`fastfs._record.decrease_reasons`.
        fine: Whether the host knows that all reasons are `FINE`.
        sampling: If the sums are estimates, float64 (P, 2), on the same device, with the columns `SAMPLING`: variance
            of the sum <g, dw>, 0 for parameters that were read completely, and whether a parameter was not. None if all
            were read completely.
    """

    stats: ParameterStats
    reason: Tensor
    fine: bool = False
    sampling: Tensor | None = None


class UpdateAssembler:
    """Puts the results of the calls of a step together."""

    def __init__(self) -> None:
        self._order = ParameterOrder()
        self._fine = torch.zeros(0, dtype=torch.int64)

    def __call__(
        self,
        calls: Sequence[Call],
        sums: Sequence[Tensor],
        codes: Sequence[Tensor | None],
        preserved: Tensor | None,
        count: int,
        device: torch.device,
    ) -> MeasuredUpdate:
        """Returns the update of all parameters.

        Args:
            calls: The calls.
            sums: Sums of each call, with the columns `SAMPLING` or without.
            codes: Codes of each call's parameters; None if all are `FINE`.
            preserved: Whether the gradients after the step are those before it, bool (P,); None if all are.
            count: P.
            device: Of the result.
        """
        width = max((part.shape[1] for part in sums), default=_WIDTH)
        found_sums = [(call.indices, _widened(part, width)) for call, part in zip(calls, sums, strict=True)]
        total = self._order(found_sums, count, device)
        total, sampling = (total, None) if width == _WIDTH else (total[:, :_WIDTH], total[:, _WIDTH:])
        found = [(call.indices, code) for call, code in zip(calls, codes, strict=True) if code is not None]
        if not found and preserved is None:
            if self._fine.shape[0] != total.shape[0] or self._fine.device != total.device:
                self._fine = torch.full(
                    (total.shape[0],), decrease_reasons.FINE, dtype=torch.int64, device=total.device
                )
            return MeasuredUpdate(ParameterStats(total), self._fine, fine=True, sampling=sampling)
        reason = torch.zeros(count, dtype=torch.int64, device=total.device)
        if found:
            reason = self._order(found, count, device)
        bad = reason != decrease_reasons.FINE
        if preserved is None:
            unknown = bad[:, None]
        else:
            preserved = preserved.to(total.device, non_blocking=True)
            unknown = torch.stack(_unknown(bad, ~preserved), dim=1)
            reason = torch.where(bad | preserved, reason, decrease_reasons.REWRITTEN)
        total[:, OF_STEP].masked_fill_(unknown, torch.nan)
        return MeasuredUpdate(ParameterStats(total), reason, sampling=sampling)


def refuted(found: MeasuredUpdate, codes: list[int]) -> MeasuredUpdate:
    """Returns the update of a step that was not verified and did not pass the checks on the host.

    Args:
        found: The update.
        codes: Of every parameter, from the checks.
    """
    reason = torch.tensor(codes, dtype=torch.int64, device="cpu").to(found.reason.device, non_blocking=True)
    sums = found.stats.sums
    sums[:, OF_STEP].masked_fill_((reason != decrease_reasons.FINE)[:, None], torch.nan)
    reason = torch.where(found.reason == decrease_reasons.FINE, reason, found.reason)
    return MeasuredUpdate(ParameterStats(sums), reason, sampling=found.sampling)


def without_gradients(found: MeasuredUpdate, indices: Sequence[int], summed: Sequence[int]) -> MeasuredUpdate:
    """Returns the update without sums over the gradients of some parameters, which are not known on this rank.

    Args:
        found: The update.
        indices: Parameters whose gradients are not known.
        summed: Parameters of whose gradients this rank has a summand: <g, dw> is a summand, too, and |g| is not known.
    """
    device, count = found.reason.device, found.reason.shape[0]
    flags = torch.zeros((2, count), dtype=torch.bool, device="cpu")
    flags[0, list(indices)] = True
    flags[1, list(summed)] = True
    unknown, partial = flags.to(device, non_blocking=True)
    sums = found.stats.sums.clone()
    sums[:, OF_STEP].masked_fill_(torch.stack(_unknown(torch.zeros_like(unknown), unknown), dim=1), torch.nan)
    sums[:, ParameterStats.names.index("gradient_sq")].masked_fill_(partial, torch.nan)
    reason = torch.where(unknown & (found.reason == decrease_reasons.FINE), decrease_reasons.SPREAD, found.reason)
    return MeasuredUpdate(ParameterStats(sums), reason, sampling=found.sampling)


def _widened(sums: Tensor, width: int) -> Tensor:
    missing = width - sums.shape[1]
    return torch.nn.functional.pad(sums, (0, missing)) if missing else sums


def _unknown(update: Tensor, gradient: Tensor) -> list[Tensor]:
    """Whether the sums of each parameter are unknown, by column of `OF_STEP`, if its update or gradient is."""
    return [
        update | gradient if {"update", "gradient"} <= {*pair} else update if "update" in pair else gradient
        for pair in list(ParameterStats.factors.values())[OF_STEP]
    ]
