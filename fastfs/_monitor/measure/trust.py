r"""When can a measured angle be trusted? Noise and curvature of a feature update, from sums on the device.

In 16 bits ``f(w + dw) - f(w)`` is lost in rounding once |df|/|f| is below a few per cent. The rounding of the last
operation, which ``rounding_sq`` counts, is a part of it only; every layer and every cast of a weight before adds more
(2 to 7 times as much in the study, also with float32 outputs under autocast, which are not rounded themselves). The
remedy is the **central amplified probe**: two forwards at ``w + kappa dw`` and ``w - kappa dw``, with kappa such that
the features move by about 6e-2. Three sums of squares, of

    plus = f(w + kappa dw) - f(w),    minus = f(w - kappa dw) - f(w),    central = f(w + kappa dw) - f(w - kappa dw),

give by the parallelogram law the **second difference** S = |plus + minus|^2 = 2 |plus|^2 + 2 |minus|^2 - |central|^2.
It contains everything that is not linear: rounding noise, 6 sigma^2 of it where one forward has sigma^2, and curvature.
Central contains 2 sigma^2 of noise, so at most S/3, beside (2 kappa |df|)^2, and its curvature cancels to second order;
the one-sided probe has curvature to first order (errors of 6% at a relative move of 6e-2, where the central one has
0.5%). Half of the largest possible noise is subtracted.

The estimate of the relative error is ``q/4 + r^2 (1 - 1/kappa^2)``, with q = S / |central|^2 (noise and curvature; the
subtraction alone can be wrong by q/12) and r = kappa |df|/|f| (the remaining curvature). A row is valid if

- that estimate is at most 0.02 for the norm, and so is the error of the angle that follows from it;
- q is at most 0.15 in every measured layer up to this one, since noise in a layer disturbs those above it;
- the **residual** of the feature speed formula, from the central dot product (free of curvature to second order), is
  at most 0.01 as a root mean square over the cuts. Only this detects that rounding has changed the Jacobian of a deep
  network in 16 bits. It takes aligned decreases.

The bounds were fitted to ``benchmarks/monitor/accuracy.py`` with seeds 0 to 2 (seed 0 is in
``benchmarks/results/accuracy-cpu.json``) and then tested on seeds 3 and 4: of 8927 layers called valid in seeds 0, 3
and 4, none was off by more than 2% in norm or angle, the worst by 1.98%. Without residual and bias 426 of 10574 were.
Called invalid although right: 3% of the transformers' layers under bf16 autocast, a third of the ResNets', half of the
MLPs', whose first layers move too little beside the others.

If the caller has |f| of a float32 forward too, its difference counts as **bias**: multiplying by 0.998 leaves many
bf16 numbers as they are, which in a ResNet of 16 blocks made 3% of |f| and |df|. No difference of features shows that.

Without the two forwards the noise is estimated from the precision and the depth, on the safe side: valid are then moves
above 0.06 (first layer) to 0.2 (thirtieth) in bf16, 3e-6 to 1.2e-5 in float32, where a plain replay is enough.

All functions work on the device and never wait for it. Source: section 5 of the notes on measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfs._monitor.measure.update_estimates import (
    CentralProbe,
    better,
    from_probe,
    from_replay,
    odd_part,
    second_difference,
)
from fastfs._record import row_reasons as reasons
from fastfs._record.ranks.residual_check import RESIDUAL, SINGLE_SPACING, residual_is_large, rms_residual
from fastfs._stats import FeatureStats

__all__ = ["AssessedUpdate", "assess", "assess_tangent", "refuse", "refuse_codes", "rounding_variance"]

TOLERANCE = 0.02
WORST_BELOW = 0.15  # of q, in the layers below
BIAS = 0.01

# Root mean square of a rounding error relative to the value: eps times sqrt(3/(8 ln 2) / 12), for a uniform logarithm.
_ROUNDING = 0.212
# Variance of the value noise in units of one rounding, at most: measured 1.4 to 3 at the first layer (weights, inputs
# and outputs are all rounded), 21 after 40 ReLU layers, 49 after 32 residual ones in bf16.
_AT_FIRST, _PER_LAYER = 6.0, 3.0
# More where sums are accumulated in the same precision, as in float32: measured 5 to 16.
_ACCUMULATED = 12.0
# Relative error of the backward vector per relative noise of the features: 2 to 9 in transformers and ResNets. It
# matters for small angles only.
_BACKWARD = 10.0


@dataclass(frozen=True)
class AssessedUpdate:
    """The best estimate of the update per layer, and how good it is; every tensor has shape (L,).

    Attributes:
        stats: Sums of the update by ``dw``, noise removed as far as known; ``rounding_sq`` is the noise that may be
            left in ``update_sq``, so that ``stats.noise_floor`` stays a relative update. Use ``valid`` from here.
        amplified: Whether the estimate comes from the probe, else from the plain replay.
        norm_error: Estimated relative error of |df|.
        angle_error: Estimated relative error of the angle.
        valid: Whether both errors are at most 0.02, and no other test failed.
        reason: int64, why it is not valid: index into :data:`fastfs._record.row_reasons.REASONS`, 0 if valid.
        self_contained: Whether the estimate comes from second forwards alone, not from their difference to the features
            of the first.
        odd: What the residual was computed from, float64 (3, L), see :func:`update_estimates.odd_part`; None without a
            residual.
    """

    stats: FeatureStats
    amplified: Tensor
    norm_error: Tensor
    angle_error: Tensor
    valid: Tensor
    reason: Tensor
    self_contained: Tensor
    odd: Tensor | None = None


def assess(
    plain: FeatureStats,
    probe: CentralProbe | None = None,
    *,
    eps: Tensor,
    depth: Tensor | None = None,
    rows: Tensor | None = None,
    width: Tensor | None = None,
    aligned_decrease: Tensor | None = None,
    exact_before_sq: Tensor | None = None,
    dot_margin: Tensor | None = None,
) -> AssessedUpdate:
    """Returns for each layer the estimate with the smaller error, and whether it can be trusted.

    Args:
        plain: Sums of f(w) and f(w + dw): shape (L,), layers in the order of the forward.
        probe: The amplified probe, if there was one.
        eps: float64 (L,), spacing of the numbers at 1 in the coarsest precision that the features pass through,
            whatever their own dtype: 2^-7 under bf16 autocast, 2^-10 for float16 and TF32 products, 2^-23 in float32.
        depth: float64 (L,), number of layers before each one; 0, 1, 2, ... by default. Pass it if few layers are
            watched.
        rows: float64 (L,), average number of kept rows of one visit. By default every entry that was counted has noise
            of its own.
        width: float64 (L,), length of a row.
        aligned_decrease: float64 (L,), D of the step, in the scale of the backward vectors; NaN for a layer that is no
            cut. The update is that of the rounded parameters.
        exact_before_sq: float64 (L,), |f|^2 in float32, on the same rows; one forward now and then is enough.
        dot_margin: float64 (L,), how far <b, df>, and with it the residual, may be off by the choice of rows, relative.

    Raises:
        ValueError: The shapes do not fit.
    """
    optional = {
        "depth": depth,
        "rows": rows,
        "width": width,
        "aligned_decrease": aligned_decrease,
        "exact_before_sq": exact_before_sq,
        "dot_margin": dot_margin,
    }
    _check_shapes(plain, probe, {"eps": eps} | {name: x for name, x in optional.items() if x is not None})
    before_sq = plain.before_sq
    if depth is None:
        depth = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    # A visit that follows another one carries its noise, and weights are rounded for all visits alike.
    entries = plain.count if rows is None or width is None else rows * width
    # Noise that is estimated, not measured, is taken to have no more independent entries than the weights have, and
    # half of those, since inputs are correlated.
    independent = entries if rows is None or width is None else width * torch.minimum(rows, width) / 2
    noise_bound = 6 * rounding_variance(eps, depth) * before_sq
    noise_bound = torch.maximum(noise_bound, 3 * plain.rounding_sq)  # as a second difference
    if probe is None:
        estimate = from_replay(plain, noise_bound, independent)
        residual_large, odd = torch.zeros((), dtype=torch.bool, device=plain.device), None
    else:
        second = second_difference(probe)
        least = torch.minimum(second, noise_bound)
        replayed = from_replay(plain, least, independent)
        estimate = better(from_probe(plain, probe, second, entries), replayed)
        dot, update_sq, moved_sq = odd = odd_part(plain, probe)
        residual_large = residual_is_large(dot, update_sq, plain.backward_sq, aligned_decrease, dot_margin, moved_sq)

    stats = FeatureStats(estimate.sums)
    finite = (stats.nonfinite == 0) & stats.sums.isfinite().all(dim=-1)
    worst = torch.where(finite & ~estimate.q.isnan(), estimate.q, 0.0).cummax(dim=0).values
    # Error of the backward vector by rounding in these layers, from the smaller of measured and estimated noise.
    noise = torch.where(finite & (before_sq > 0), torch.minimum(estimate.second, noise_bound) / (6 * before_sq), 0.0)
    backward = _BACKWARD * noise.amax(dim=0).sqrt()
    bias = _bias(before_sq, exact_before_sq)
    norm_error = estimate.error + bias
    angle_error = _angle_error(stats.cos_angle, norm_error, backward, entries)

    conditions = (
        (reasons.BIASED, ~(bias <= BIAS) | ~(norm_error <= TOLERANCE)),
        (reasons.SMALL_ANGLE, ~(angle_error <= TOLERANCE)),
        (reasons.JACOBIAN, residual_large & (eps > SINGLE_SPACING)),
        (reasons.BELOW, worst > WORST_BELOW),
        (reasons.NONLINEAR, ~(estimate.error <= TOLERANCE)),
        (reasons.NOISE, ~(estimate.noise_error <= TOLERANCE) | ~(stats.update_sq > 0)),
        (reasons.NO_BACKWARD, ~(stats.backward_sq > 0)),
        (reasons.NO_UPDATE, plain.update_sq <= 0 if probe is None else probe.central.update_sq <= 0),
        (reasons.NONFINITE, ~finite),
    )
    reason = _last_code(stats, conditions)
    return AssessedUpdate(
        stats, estimate.amplified, norm_error, angle_error, reason == reasons.OK, reason, estimate.amplified, odd
    )


def assess_tangent(
    stats: FeatureStats, *, eps: Tensor, aligned_decrease: Tensor | None = None, dot_margin: Tensor | None = None
) -> AssessedUpdate:
    """Returns a first-order update from forward-mode differentiation, and whether it can be trusted.

    It has no error by subtraction. In 16 bits the derivative is that of a rounded network; the residual shows that.
    Arguments and errors are those of :func:`assess`.
    """
    optional = {"aligned_decrease": aligned_decrease, "dot_margin": dot_margin}
    _check_shapes(stats, None, {"eps": eps} | {name: x for name, x in optional.items() if x is not None})
    finite = (stats.nonfinite == 0) & stats.sums.isfinite().all(dim=-1)
    dot, update_sq = stats.update_dot_backward, stats.update_sq
    large = rms_residual(dot, update_sq, stats.backward_sq, aligned_decrease, dot_margin)[0] > RESIDUAL
    zero = torch.zeros_like(stats.update_sq)
    backward = _BACKWARD * _ROUNDING * eps
    angle_error = _angle_error(stats.cos_angle, zero, backward, stats.count)
    conditions = (
        (reasons.SMALL_ANGLE, ~(angle_error <= TOLERANCE)),
        (reasons.JACOBIAN, large.expand(stats.shape)),  # in any precision: the formula is of first order
        (reasons.NO_BACKWARD, ~(stats.backward_sq > 0)),
        (reasons.NO_UPDATE, ~(stats.update_sq > 0)),
        (reasons.NONFINITE, ~finite),
    )
    reason = _last_code(stats, conditions)
    return AssessedUpdate(
        stats=stats,
        amplified=zero > 0,
        norm_error=zero,
        angle_error=angle_error,
        valid=reason == reasons.OK,
        reason=reason,
        self_contained=zero == 0,
        odd=torch.stack([dot, update_sq, zero]),
    )


def rounding_variance(eps: Tensor, depth: Tensor) -> Tensor:
    """Returns a bound of the variance of rounding noise in features relative to their square: (L,).

    Args:
        eps: See :func:`assess`.
        depth: See :func:`assess`.
    """
    roundings = (_AT_FIRST + _PER_LAYER * depth) * torch.where(eps < SINGLE_SPACING, _ACCUMULATED, 1.0)
    return roundings * (_ROUNDING * eps).square()


def refuse(update: AssessedUpdate, code: int, where: Tensor) -> AssessedUpdate:
    """Marks the layers of a mask (L,) as not valid, for a reason of `row_reasons`."""
    return replace(update, valid=update.valid & ~where, reason=torch.where(where, code, update.reason))


def refuse_codes(update: AssessedUpdate, codes: Tensor) -> AssessedUpdate:
    """The same with a reason for each layer, int64 (L,); 0 for none."""
    given = codes > 0
    return replace(update, valid=update.valid & ~given, reason=torch.where(given, codes, update.reason))


def _last_code(stats: FeatureStats, conditions: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The code of the last condition that holds, per layer; 0 where none does."""
    reason = torch.full(stats.shape, reasons.OK, dtype=torch.int64, device=stats.device)
    for code, holds in conditions:
        reason = torch.where(holds, code, reason)
    return reason


def _bias(before_sq: Tensor, exact_before_sq: Tensor | None) -> Tensor:
    """Returns the relative error of the norms of the features, which no difference of features can show.

    Example: multiplying by 0.998 leaves many bf16 numbers as they are, and the error adds up over the layers.
    """
    if exact_before_sq is None:
        return torch.zeros_like(before_sq)
    return ((before_sq / exact_before_sq).sqrt() - 1).abs()


def _angle_error(cosine: Tensor, norm_error: Tensor, backward: Tensor, entries: Tensor) -> Tensor:
    """Returns the relative change of the angle, the larger one of both signs.

    Args:
        cosine: Cosine of the angle.
        norm_error: Relative error of |df|, and so of the cosine.
        backward: Relative error of the backward vector. Half its square is an error of the norm; its part along df
            averages out over many entries, and counts with three standard deviations.
        entries: Number of entries with errors of their own.
    """
    angle = cosine.acos()
    sine = (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    along = torch.hypot(cosine.abs() * norm_error, 3 * backward * sine / entries.sqrt())  # of independent roundings
    change = cosine.abs() * backward.square() / 2 + along
    up, down = (cosine + change).clamp(-1.0, 1.0).acos(), (cosine - change).clamp(-1.0, 1.0).acos()
    return torch.maximum(angle - up, down - angle) / angle


def _check_shapes(plain: FeatureStats, probe: CentralProbe | None, vectors: dict[str, Tensor]) -> None:
    if len(plain.shape) != 1:
        raise ValueError(f"assess: expected statistics of shape (L,), one per layer, got {tuple(plain.shape)}")
    shapes = {name: vector.shape for name, vector in vectors.items()}
    if probe is not None:
        shapes |= {"minus": probe.minus.shape, "plus": probe.plus.shape, "central": probe.central.shape}
        if probe.kappa.dim():
            raise ValueError(f"assess: kappa: expected a 0-d tensor, got shape {tuple(probe.kappa.shape)}")
    for name, shape in shapes.items():
        if shape != plain.shape:
            raise ValueError(f"assess: {name}: expected shape {tuple(plain.shape)}, got {tuple(shape)}")
