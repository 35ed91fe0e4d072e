"""How much to trust a measured step: brings together what trust.py asks for, and remembers the amplification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs._monitor.capture.forward_capture import ForwardCapture
from fastfs._monitor.measure import trust
from fastfs._monitor.measure.kappa import choose_kappa, first_kappa, largest_kappa, target_for
from fastfs._monitor.measure.row_sums import LayerSums
from fastfs._monitor.row_reasons import OTHER_MASKS
from fastfs._network.precision import SINGLE, coarseness, product_coarseness
from fastfs._network.structure import Structure
from fastfs._stats import FeatureStats, ParameterStats

__all__ = ["Amplified", "Judge"]

_FIRST_ROUNDS = 3  # of amplification at the first measured step, where nothing is known yet
_OTHER_FUNCTION = 0.1  # |f compiled - f eager| / |f| above which they are two functions: other dropout masks


class Amplified:
    """Sums of the three differences of the central amplified probe, of all layers."""

    def __init__(self, minus: LayerSums, plus: LayerSums, central: LayerSums) -> None:
        self.minus = minus
        self.plus = plus
        self.central = central


class Judge:
    """Decides per layer what the feature update was and whether it can be trusted.

    Args:
        parameters: those that the optimizers update.
        device: of the sums.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        dtypes = {p.dtype for p in parameters if p.is_floating_point()}
        self._parameter_eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=SINGLE)
        self._device = device
        self.kappa: Tensor | None = None

    def plain(self, found: LayerSums, eps: Tensor, depth: Tensor) -> trust.Trusted:
        """Of a replay alone; ``eps`` and ``depth`` of the layers as for :func:`trust.judge`."""
        rows, width = found.one_visit()
        return trust.judge(found.stats, eps=eps, depth=depth, rows=rows, width=width)

    def amplified(
        self,
        found: LayerSums,
        eps: Tensor,
        depth: Tensor,
        coarsest: float,
        updates: ParameterStats,
        decrease: Tensor,
        probe: Callable[[Tensor], Amplified],
        exact: Callable[[], FeatureStats],
    ) -> tuple[trust.Trusted, LayerSums, Tensor]:
        """With the central amplified probe, at an amplification that fits what the last one saw.

        Args:
            found: the plain replay.
            eps, depth: of the layers as for :func:`trust.judge`.
            coarsest: the largest of ``eps``, on the host.
            updates: of the parameters.
            decrease: aligned decrease in the scale of the backward vectors, nan for a layer that is no cut.
            probe: measures at a given amplification.
            exact: features of a float32 forward; asked only where the precision is below that.

        Returns:
            The verdict; the plain replay with the standard errors and quantiles of the probe; and the curvature of the
            step: what is of second order in the update, relative to the first, at most, float64 (L,).
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
            parts = trust.CentralProbe(sums.minus.stats, sums.plus.stats, sums.central.stats, kappa)
            verdict = trust.judge(
                found.stats,
                parts,
                eps=eps,
                depth=depth,
                rows=rows,
                width=width,
                aligned_decrease=decrease,
                exact_before_sq=before_sq,
                dot_se=sums.central.dot_se,
            )
            self.kappa = choose_kappa(kappa, verdict.stats.relative_update, target, largest)
        return verdict, sums.central.in_place_of(found, 1 / (2 * kappa)), trust.curvature(parts)

    def tangent(self, found: LayerSums, eps: Tensor, decrease: Tensor) -> trust.Trusted:
        """Of the first-order update, which has no rounding noise but that of the derivative itself."""
        return trust.judge_tangent(found.stats, eps=eps, aligned_decrease=decrease, dot_se=found.dot_se)

    @staticmethod
    def same_function(verdict: trust.Trusted, difference: FeatureStats) -> trust.Trusted:
        """Not valid where features from a compiled graph and from eager execution are no roundings of each other.

        torch.compile draws other random numbers than eager execution: backward vectors are then of other dropout masks.
        """
        return trust.refuse(verdict, OTHER_MASKS, ~(difference.relative_update <= _OTHER_FUNCTION))

    def precision(self, layers: int, forwards: Sequence[ForwardCapture], seen: list[float] | None) -> list[float]:
        """Spacing at 1 of the coarsest numbers that each layer's features come from.

        Args:
            layers: how many.
            forwards: what was captured.
            seen: what the second forwards computed with; None where compiled graphs hide it. Then parameters and
                autocast around the model tell.
        """
        if seen is None:
            common = self._parameter_eps
            for captured in forwards:
                if captured.state is not None:
                    enabled = [kind for on, kind in captured.state.autocast.values() if on]
                    common = max([common, *map(coarseness, enabled)])
            products = [product_coarseness(kind, self._device.type) for kind in ("matmul", "conv")]
            seen = [max(common, *products) if common > torch.finfo(torch.float64).eps else common] * layers
        found = list(seen)
        for captured in forwards:
            for index, calls in enumerate(captured.calls):
                for call in calls:
                    if call.before is not None:
                        found[index] = max(found[index], coarseness(call.before.values.dtype))
        return found

    def depth(self, structure: Structure | None, layers: int) -> Tensor:
        """Layers before each watched one: products with matrices upstream of it, where that is known."""
        depth = torch.arange(layers, dtype=torch.float64)
        if structure is not None:
            depth = torch.maximum(depth, structure.products.to(torch.float64) - 1.0)
        return depth.to(self._device, non_blocking=True)
