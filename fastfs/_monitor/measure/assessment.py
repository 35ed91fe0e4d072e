"""Assesses measured steps: collects what `trust` needs, and keeps the amplification from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.measure import trust
from fastfs._monitor.measure.kappa import choose_kappa, first_kappa, largest_kappa, target_for
from fastfs._monitor.measure.row_sums import LayerSums
from fastfs._monitor.measure.update_estimates import CentralProbe, curvature
from fastfs._network.precision import SINGLE, coarseness, product_coarseness
from fastfs._network.structure import Structure
from fastfs._record.row_reasons import OTHER_MASKS
from fastfs._stats import FeatureStats, ParameterStats

__all__ = ["ProbeSums", "UpdateAssessor"]

_FIRST_ROUNDS = 3  # of amplification at the first measured step, where no kappa is known yet
_OTHER_FUNCTION = 0.1  # |f compiled - f eager| / |f| above which dropout masks differ


class ProbeSums:
    """Sums of the three differences of the central amplified probe, of all layers."""

    def __init__(self, minus: LayerSums, plus: LayerSums, central: LayerSums) -> None:
        self.minus = minus
        self.plus = plus
        self.central = central


class UpdateAssessor:
    """Decides for each layer what the feature update was and whether it can be trusted.

    Args:
        parameters: Parameters that the optimizers update.
        device: Of the sums.

    Attributes:
        kappa: The amplification of the next probe, 0-d; None before the first.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        dtypes = {p.dtype for p in parameters if p.is_floating_point()}
        self._parameter_eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=SINGLE)
        self._device = device
        self.kappa: Tensor | None = None

    def assess_replay(self, found: LayerSums, eps: Tensor, depth: Tensor) -> trust.AssessedUpdate:
        """Returns the assessed update of a plain replay.

        Args:
            found: Its sums.
            eps: See :func:`trust.assess`.
            depth: See :func:`trust.assess`.
        """
        rows, width = found.one_visit()
        return trust.assess(found.stats, eps=eps, depth=depth, rows=rows, width=width)

    def assess_amplified(
        self,
        found: LayerSums,
        eps: Tensor,
        depth: Tensor,
        coarsest: float,
        updates: ParameterStats,
        decrease: Tensor,
        probe: Callable[[Tensor], ProbeSums],
        exact: Callable[[], FeatureStats],
    ) -> tuple[trust.AssessedUpdate, LayerSums, Tensor]:
        """Assesses a plain replay with the central probe, at an amplification that follows from the last one.

        Args:
            found: Sums of the plain replay.
            eps: See :func:`trust.assess`.
            depth: See :func:`trust.assess`.
            coarsest: The largest of `eps`, on the host.
            updates: Of the parameters.
            decrease: Aligned decrease in the scale of the backward vectors, NaN for a layer that is no cut.
            probe: Measures at a given amplification.
            exact: Returns the features of a float32 forward; called only if the precision is below that.

        Returns:
            The assessed update; the plain replay with the standard errors and quantiles of the probe; and the curvature
            of the step, see :func:`update_estimates.curvature`, float64 (L,).
        """
        target = target_for(coarsest)
        largest = largest_kappa(self._parameter_eps)
        before_sq = exact().before_sq if coarsest > SINGLE else None
        rows, width = found.one_visit()
        rounds = 1
        if self.kappa is None:
            rounds = _FIRST_ROUNDS
            norms = updates.update_norm.nan_to_num(0.0), updates.parameter_norm
            self.kappa = first_kappa(*norms, target).clamp_max(largest)
        for _ in range(rounds):
            kappa = self.kappa
            sums = probe(kappa)
            parts = CentralProbe(sums.minus.stats, sums.plus.stats, sums.central.stats, kappa)
            update = trust.assess(
                found.stats,
                parts,
                eps=eps,
                depth=depth,
                rows=rows,
                width=width,
                aligned_decrease=decrease,
                exact_before_sq=before_sq,
                dot_margin=sums.central.dot_margin,
            )
            self.kappa = choose_kappa(kappa, update.stats.relative_update, target, largest)
        return update, sums.central.in_place_of(found, 1 / (2 * kappa)), curvature(parts)

    def assess_tangent(self, found: LayerSums, eps: Tensor, decrease: Tensor) -> trust.AssessedUpdate:
        """Assesses a first-order update, whose only rounding noise is that of the derivative itself."""
        return trust.assess_tangent(found.stats, eps=eps, aligned_decrease=decrease, dot_margin=found.dot_margin)

    @staticmethod
    def refuse_other_masks(update: trust.AssessedUpdate, difference: FeatureStats) -> trust.AssessedUpdate:
        """Returns the update without layers whose features from compiled and eager execution are different functions.

        torch.compile draws other random numbers than eager execution: the backward vectors are of other dropout masks.
        """
        return trust.refuse(update, OTHER_MASKS, ~(difference.relative_update <= _OTHER_FUNCTION))

    def precision(self, layers: int, forwards: Sequence[ForwardCapture], seen: list[float] | None) -> list[float]:
        """Returns for each layer the spacing at 1 of the coarsest numbers that its features are computed from.

        Args:
            layers: Number of layers.
            forwards: Captured forwards.
            seen: What second forwards computed with; None where compiled graphs hide it, so that the parameters and
                the autocast settings around the model have to tell.
        """
        if seen is None:
            common = self._parameter_eps
            for captured in forwards:
                if captured.state is not None:
                    enabled = [dtype for on, dtype in captured.state.autocast.values() if on]
                    common = max([common, *map(coarseness, enabled)])
            products = [product_coarseness(operation, self._device.type) for operation in ("matmul", "conv")]
            seen = [max(common, *products) if common > torch.finfo(torch.float64).eps else common] * layers
        found = list(seen)
        for captured in forwards:
            for index, calls in enumerate(captured.calls):
                for call in calls:
                    if call.before is not None:
                        found[index] = max(found[index], coarseness(call.before.values.dtype))
        return found

    def depth(self, structure: Structure | None, layers: int) -> Tensor:
        """Returns the number of layers before each one: matrix products upstream of it, where that is known."""
        depth = torch.arange(layers, dtype=torch.float64)
        if structure is not None:
            depth = torch.maximum(depth, structure.products.to(torch.float64) - 1.0)
        return depth.to(self._device, non_blocking=True)
