"""How much to trust a measured step: brings together what trust.py asks for, and remembers the amplification."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfs.monitor.capture.passes import Pass
from fastfs.monitor.measure import trust
from fastfs.monitor.measure.kappa import choose_kappa, first_kappa, largest_kappa, target_for
from fastfs.monitor.measure.sums import LayerSums
from fastfs.network.structure import Structure
from fastfs.stats import FeatureStats, ParameterStats

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
        self._parameter_eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
        self._device = device
        self.kappa: Tensor | None = None

    def plain(
        self, found: LayerSums, passes: Sequence[Pass], structure: Structure | None, dtype: torch.dtype | None = None
    ) -> trust.Trusted:
        """Of a replay alone; ``dtype`` is what a probe was computed in."""
        eps = self._eps(len(found.rows), passes, dtype)
        return trust.judge(found.stats, eps=eps, depth=self._depth(structure, len(found.rows)))

    def amplified(
        self,
        found: LayerSums,
        passes: Sequence[Pass],
        structure: Structure | None,
        updates: ParameterStats,
        decrease: Tensor,
        probe: Callable[[Tensor], Amplified],
        exact: Callable[[], FeatureStats],
    ) -> tuple[trust.Trusted, LayerSums]:
        """With the central amplified probe, at an amplification that fits what the last one saw.

        Args:
            found: the plain replay.
            passes: what was captured.
            structure: of the model.
            updates: of the parameters.
            decrease: aligned decrease in the scale of the backward vectors, nan for a layer that is no cut.
            probe: measures at a given amplification.
            exact: features of a float32 forward; asked only where the precision is below that.

        Returns:
            The verdict, and the plain replay with the standard errors and quantiles of the probe.
        """
        eps = self._eps(len(found.rows), passes, None)
        depth = self._depth(structure, len(found.rows))
        target = target_for(self._coarsest(passes, None))
        largest = largest_kappa(self._parameter_eps)
        coarse = self._coarsest(passes, None) > torch.finfo(torch.float32).eps
        before_sq = exact().before_sq if coarse else None
        rounds = 1
        if self.kappa is None:
            rounds = _FIRST_ROUNDS
            norms = updates.update_norm, updates.parameter_norm
            self.kappa = first_kappa(*norms, target).clamp_max(largest)
        for _ in range(rounds):
            kappa = self.kappa
            sums = probe(kappa)
            parts = trust.Probe(sums.minus.stats, sums.plus.stats, sums.central.stats, kappa)
            verdict = trust.judge(
                found.stats,
                parts,
                eps=eps,
                depth=depth,
                aligned_decrease=decrease,
                exact_before_sq=before_sq,
                dot_se=sums.central.dot_se,
            )
            self.kappa = choose_kappa(kappa, verdict.stats.relative_update, target, largest)
        return verdict, sums.central.in_place_of(found, 1 / (2 * kappa))

    def tangent(self, found: LayerSums, passes: Sequence[Pass], decrease: Tensor) -> trust.Trusted:
        """Of the first-order update, which has no rounding noise but that of the derivative itself."""
        return trust.judge_tangent(
            found.stats, eps=self._eps(len(found.rows), passes, None), aligned_decrease=decrease, dot_se=found.dot_se
        )

    @staticmethod
    def same_function(verdict: trust.Trusted, difference: FeatureStats) -> trust.Trusted:
        """Not valid where features from a compiled graph and from eager execution are no roundings of each other.

        torch.compile draws other random numbers than eager execution: backward vectors are then of other dropout masks.
        """
        return trust.refuse(verdict, trust.OTHER_MASKS, ~(difference.relative_update <= _OTHER_FUNCTION))

    def _eps(self, layers: int, passes: Sequence[Pass], dtype: torch.dtype | None) -> Tensor:
        """The coarsest precision that each layer's features go through."""
        common = self._coarsest(passes, dtype)
        eps = [common] * layers
        for passed in passes:
            for index, visits in enumerate(passed.visits):
                for visit in visits:
                    if visit.before is not None:
                        eps[index] = max(eps[index], torch.finfo(visit.before.values.dtype).eps)
        return torch.tensor(eps, dtype=torch.float64).to(self._device, non_blocking=True)

    def _coarsest(self, passes: Sequence[Pass], dtype: torch.dtype | None) -> float:
        if dtype is None:
            found = self._parameter_eps
            for passed in passes:
                if passed.state is not None:
                    enabled = [kind for on, kind in passed.state.autocast.values() if on]
                    found = max([found, *(torch.finfo(kind).eps for kind in enabled)])
        else:
            found = torch.finfo(dtype).eps
        tf32 = self._device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision != "ieee"
        return max(found, 2.0**-10) if tf32 and found < 2.0**-10 and found > 2.0**-30 else found

    def _depth(self, structure: Structure | None, layers: int) -> Tensor:
        """Layers before each watched one: matrices upstream of it, where that is known."""
        depth = torch.arange(layers, dtype=torch.float64)
        if structure is not None:
            depth = torch.maximum(depth, structure.matrices.to(torch.float64) - 1.0)
        return depth.to(self._device, non_blocking=True)
