r"""When can a measured angle be trusted? Noise and curvature of a feature update, from sums on the device.

In 16 bits ``f(w + dw) - f(w)`` drowns in rounding once |df|/|f| falls below a few per cent: not only that of the last
operation, which ``rounding_sq`` counts, but that of every layer and every cast of a weight before it (2 to 7 times as
much in the study, with float32 outputs under autocast too, whose last rounding is none). The remedy is the
**central amplified probe**: two forwards at ``w + kappa dw`` and ``w - kappa dw``, with kappa such that the features
move by about 6e-2. Three sums of squares, of

    plus = f(w + kappa dw) - f(w),    minus = f(w - kappa dw) - f(w),    central = f(w + kappa dw) - f(w - kappa dw),

give by the parallelogram law the **second difference** S = |plus + minus|^2 = 2 |plus|^2 + 2 |minus|^2 - |central|^2.
It holds all that is no straight line: rounding noise, 6 sigma^2 of it where one forward has sigma^2, and curvature.
Central holds 2 sigma^2 of noise, so at most S/3, beside (2 kappa |df|)^2, and its curvature cancels to second order;
the one-sided probe has it to first order (errors of 6% at a relative move of 6e-2, where the central has 0.5%).
Half of the largest possible noise is subtracted.

The estimate of the relative error is ``q/4 + r^2 (1 - 1/kappa^2)``, with q = S / |central|^2 (noise and curvature; the
subtraction alone can be wrong by q/12) and r = kappa |df|/|f| (what is left of the curvature). Valid means:

- that estimate is at most 0.02 for the norm, and so is what follows from it for the angle;
- q is at most 0.15 in every measured layer up to this one: noise that swamps a layer disturbs those above it;
- the **residual** of the feature speed formula, from the central dot product (free of curvature to second order), is
  at most 0.01 as a root mean square over the cuts. Only this sees that a deep network in 16 bits has another Jacobian
  than the one that is meant. Without aligned decreases it cannot be asked.

The bounds were fitted to ``benchmarks/monitor/accuracy.py`` with seeds 0 to 2 (seed 0 is in
``benchmarks/results/accuracy-cpu.json``) and then tried on seeds 3 and 4: of 8927 layers called valid in seeds 0, 3
and 4, none was off by more than 2% in norm or angle, the worst by 1.98%. Without residual and bias 426 of 10574 were.
Flagged although right: 3% of the transformers' layers under bf16 autocast, a third of the ResNets', half of the MLPs',
whose first layers move too little beside the others.

Where the caller has |f| of a float32 forward too, its difference counts as **bias**: multiplying by 0.998 leaves many
bf16 numbers as they are, which in a ResNet of 16 blocks made 3% of |f| and |df|. No difference of features shows that.

Without the two forwards the noise is a guess from the precision and the depth, on the safe side: valid are then moves
above 0.06 (first layer) to 0.2 (thirtieth) in bf16, 3e-6 to 1.2e-5 in float32, where a plain replay is enough.

All functions work on the device and never wait for it. Source: section 5 of the notes on measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastfs._monitor import row_reasons as reasons
from fastfs._monitor.measure.kappa import TARGET
from fastfs._stats import FeatureStats

__all__ = ["CentralProbe", "Trusted", "curvature", "judge", "judge_tangent", "refuse", "refuse_codes", "rounding_of"]

TOLERANCE = 0.02
WORST_BELOW = 0.15  # of q, in the layers below
RESIDUAL = 0.01
LEAST_COSINE = 0.1  # the residual is relative to <b, df>, or to this times |b| |df|
BIAS = 0.01

# Root mean square of a rounding error relative to the value: eps times sqrt(3/(8 ln 2) / 12), for a uniform logarithm.
_ROUNDING = 0.212
# Variance of the value noise in units of one rounding, at most: measured 1.4 to 3 at the first layer (weights, inputs
# and outputs are all rounded), 21 after 40 ReLU layers, 49 after 32 residual ones in bf16.
_AT_FIRST, _PER_LAYER = 6.0, 3.0
# More where sums are accumulated in the same precision, as in float32: measured 5 to 16.
_ACCUMULATED, _SINGLE = 12.0, 2.0**-20
# Noise of so many independent directions, at least, that its part along the update averages out of a plain replay: in
# deep ReLU networks all rows are nearly alike, and so is their rounding.
_DIRECTIONS = 64.0
# Relative error of the backward vector per relative noise of the features: 2 to 9 in transformers and ResNets. It
# matters for small angles only.
_BACKWARD = 10.0
# Precisions of this spacing and finer leave the Jacobian as it is: a residual is then curvature.
_SINGLE = 2.0**-20


@dataclass(frozen=True)
class CentralProbe:
    """The central amplified probe: sums of unscaled differences, each of shape (L,), against the same backward vectors.

    Attributes:
        minus: of f(w) and f(w - kappa dw).
        plus: of f(w) and f(w + kappa dw). With kappa = 1 that is the plain replay.
        central: of f(w - kappa dw) and f(w + kappa dw).
        kappa: 0-d tensor, at least 1; a power of two, so that parameters in 16 bits are not rounded anew.
    """

    minus: FeatureStats
    plus: FeatureStats
    central: FeatureStats
    kappa: Tensor


@dataclass(frozen=True)
class Trusted:
    """The best estimate per layer, and how good it is; every tensor has shape (L,).

    Attributes:
        stats: sums of the update by ``dw``, noise removed as far as known; ``rounding_sq`` is the noise that may be
            left in ``update_sq``, so that ``stats.noise_floor`` stays a relative update. Use ``valid`` from here.
        amplified: taken from the probe (else from the plain replay).
        norm_error: estimated relative error of |df|.
        angle_error: estimated relative error of the angle.
        valid: both are at most 0.02, and nothing else speaks against it.
        around: measured around the parameters of the first forward, not as a difference from its features.
        reason: int64, why not: index into :data:`fastfs._monitor.row_reasons.REASONS`, 0 where valid.
    """

    stats: FeatureStats
    amplified: Tensor
    norm_error: Tensor
    angle_error: Tensor
    valid: Tensor
    reason: Tensor
    around: Tensor


def judge(
    plain: FeatureStats,
    probe: CentralProbe | None = None,
    *,
    eps: Tensor,
    depth: Tensor | None = None,
    rows: Tensor | None = None,
    width: Tensor | None = None,
    aligned_decrease: Tensor | None = None,
    exact_before_sq: Tensor | None = None,
    dot_se: Tensor | None = None,
) -> Trusted:
    """Puts together what was measured, per layer from where the error is smaller, and judges it.

    Args:
        plain: of f(w) and f(w + dw): shape (L,), layers in the order of the forward.
        probe: the amplified probe, if there was one.
        eps: float64 (L,): spacing of the numbers at 1 in the coarsest precision that the features pass through,
            whatever their own dtype: 2^-7 under bf16 autocast, 2^-10 for float16 and TF32 products, 2^-23 in float32.
        depth: float64 (L,): how many layers lie before; 0, 1, 2, ... by default. Pass it if few layers are watched.
        rows, width: float64 (L,): of one visit, kept rows on average, and how long they are. By default all entries
            that were counted have noise of their own.
        aligned_decrease: float64 (L,): D of the step, in the scale of the backward vectors; nan for a layer that is no
            cut. With the step as it was, that is parameters after rounding minus before.
        exact_before_sq: float64 (L,): |f|^2 in float32, on the same rows; one forward now and then is enough.
        dot_se: float64 (L,): relative standard error of <b, df> where rows were sampled; the residual has it, too.

    Raises:
        ValueError: shapes that do not fit.
    """
    optional = {
        "depth": depth,
        "rows": rows,
        "width": width,
        "aligned_decrease": aligned_decrease,
        "exact_before_sq": exact_before_sq,
        "dot_se": dot_se,
    }
    _check_shapes(plain, probe, {"eps": eps} | {name: x for name, x in optional.items() if x is not None})
    before_sq = plain.before_sq
    if depth is None:
        depth = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    # A visit that follows another one carries its noise, and weights are rounded for all visits alike.
    entries = plain.count if rows is None or width is None else rows * width
    # For all rows, too: a guess of the noise, unlike a measurement of it, has no more directions than the weights, and
    # half of those, since inputs are correlated.
    guessed_entries = entries if rows is None or width is None else width * torch.minimum(rows, width) / 2
    guessed = 6 * rounding_of(eps, depth) * before_sq
    guessed = torch.maximum(guessed, 3 * plain.rounding_sq)  # in the measure of a second difference
    if probe is None:
        estimate = _plain(plain, guessed, guessed_entries)
        residual_large = torch.zeros((), dtype=torch.bool, device=plain.device)
    else:
        second = _second_difference(probe)
        least = torch.minimum(second, guessed)
        estimate = _better(_amplified(plain, probe, second, entries), _plain(plain, least, guessed_entries))
        residual_large = _residual_large(plain, probe, aligned_decrease, dot_se)

    stats = FeatureStats(estimate.sums)
    finite = (stats.nonfinite == 0) & stats.sums.isfinite().all(dim=-1)
    worst = torch.where(finite & ~estimate.q.isnan(), estimate.q, 0.0).cummax(dim=0).values
    # Of the backward vector, as far as rounding in these layers goes; the smaller of what was seen and the guess.
    noise = torch.where(finite & (before_sq > 0), torch.minimum(estimate.second, guessed) / (6 * before_sq), 0.0)
    backward = _BACKWARD * noise.amax(dim=0).sqrt()
    bias = _bias(before_sq, exact_before_sq)
    norm_error = estimate.error + bias
    angle_error = _angle_error(stats.cos_angle, norm_error, backward, entries)

    conditions = (
        (reasons.BIASED, ~(bias <= BIAS) | ~(norm_error <= TOLERANCE)),
        (reasons.SMALL_ANGLE, ~(angle_error <= TOLERANCE)),
        (reasons.JACOBIAN, residual_large & (eps > _SINGLE)),
        (reasons.BELOW, worst > WORST_BELOW),
        (reasons.NONLINEAR, ~(estimate.error <= TOLERANCE)),
        (reasons.NOISE, ~(estimate.noise_error <= TOLERANCE) | ~(stats.update_sq > 0)),
        (reasons.NO_BACKWARD, ~(stats.backward_sq > 0)),
        (reasons.NO_UPDATE, plain.update_sq <= 0 if probe is None else probe.central.update_sq <= 0),
        (reasons.NONFINITE, ~finite),
    )
    reason = _most_telling(stats, conditions)
    return Trusted(stats, estimate.amplified, norm_error, angle_error, reason == reasons.OK, reason, estimate.amplified)


def judge_tangent(
    stats: FeatureStats, *, eps: Tensor, aligned_decrease: Tensor | None = None, dot_se: Tensor | None = None
) -> Trusted:
    """Judges a first-order update from forward-mode differentiation: nothing was subtracted, so nothing drowns.

    What is left is that in 16 bits the derivative is that of a rounded network; the residual shows it, as in
    :func:`judge`. Arguments and errors as there.
    """
    optional = {"aligned_decrease": aligned_decrease, "dot_se": dot_se}
    _check_shapes(stats, None, {"eps": eps} | {name: x for name, x in optional.items() if x is not None})
    finite = (stats.nonfinite == 0) & stats.sums.isfinite().all(dim=-1)
    large = _residual(stats, stats.update_dot_backward, stats.update_sq, aligned_decrease, dot_se)[0] > RESIDUAL
    zero = torch.zeros_like(stats.update_sq)
    backward = _BACKWARD * _ROUNDING * eps
    angle_error = _angle_error(stats.cos_angle, zero, backward, stats.count)
    conditions = (
        (reasons.SMALL_ANGLE, ~(angle_error <= TOLERANCE)),
        (reasons.JACOBIAN, large.expand(stats.shape)),  # of any precision: first order is what the formula is about
        (reasons.NO_BACKWARD, ~(stats.backward_sq > 0)),
        (reasons.NO_UPDATE, ~(stats.update_sq > 0)),
        (reasons.NONFINITE, ~finite),
    )
    reason = _most_telling(stats, conditions)
    return Trusted(
        stats=stats,
        amplified=zero > 0,
        norm_error=zero,
        angle_error=angle_error,
        valid=reason == reasons.OK,
        reason=reason,
        around=zero == 0,
    )


def rounding_of(eps: Tensor, depth: Tensor) -> Tensor:
    """Variance of the rounding noise in features relative to their square, at most, by precision and depth: (L,)."""
    roundings = (_AT_FIRST + _PER_LAYER * depth) * torch.where(eps < _SINGLE, _ACCUMULATED, 1.0)
    return roundings * (_ROUNDING * eps).square()


def curvature(probe: CentralProbe) -> Tensor:
    """Second-order part of the update relative to its first-order part, at most (rounding noise counts in): (L,)."""
    kappa = probe.kappa.to(torch.float64)
    return (_second_difference(probe) / probe.central.update_sq).sqrt() / kappa


def refuse(trusted: Trusted, code: int, where: Tensor) -> Trusted:
    """Not valid where ``where`` holds, for a reason of :data:`fastfs._monitor.row_reasons.REASONS`."""
    return replace(trusted, valid=trusted.valid & ~where, reason=torch.where(where, code, trusted.reason))


def refuse_codes(trusted: Trusted, codes: Tensor) -> Trusted:
    """The same with a reason for each layer; 0 for none."""
    given = codes > 0
    return replace(trusted, valid=trusted.valid & ~given, reason=torch.where(given, codes, trusted.reason))


@dataclass(frozen=True)
class _Estimate:
    """One way to the update by dw: sums (L, 9), second difference, q, error by noise, in all, which way.

    q is nan where nothing moves (frozen layers), which says nothing about the layers above.
    """

    sums: Tensor
    second: Tensor
    q: Tensor
    noise_error: Tensor
    error: Tensor
    amplified: Tensor


def _second_difference(probe: CentralProbe) -> Tensor:
    """|f(w + kappa dw) + f(w - kappa dw) - 2 f(w)|^2."""
    doubled = 2 * (probe.plus.update_sq + probe.minus.update_sq)
    return (doubled - probe.central.update_sq).clamp_min(0.0)


def _amplified(plain: FeatureStats, probe: CentralProbe, second: Tensor, entries: Tensor) -> _Estimate:
    """Central difference plus what the second difference says of the curvature of the real step (kappa = 1).

    With f(w + k dw) = f + k d + k^2 c / 2 the update is d + c/2: <.,b> and |.|^2 of it follow from the three sums. At
    kappa = 1 this is the plain replay, exactly.
    """
    kappa = probe.kappa.to(torch.float64)
    odd, even = 1 / (2 * kappa), 1 / (2 * kappa**2)

    def linear(name: str) -> Tensor:
        plus, minus = probe.plus._sum(name), probe.minus._sum(name)
        return odd * (plus - minus) + even * (plus + minus)

    share = odd**2 + 3 * even**2  # of the noise in central, that is S/3 at most
    noise = second / 3 * share
    update_sq = (
        odd**2 * probe.central.update_sq
        + 2 * odd * even * (probe.plus.update_sq - probe.minus.update_sq)
        + even**2 * second
        - noise / 2
    )
    q = second / probe.central.update_sq * (share / odd**2)
    moved = kappa.square() * update_sq / plain.before_sq
    noise_error = q / 4 + _along(q, entries)
    error = noise_error + moved * (1 - 1 / kappa.square())
    columns = {
        "update_dot_backward": linear("update_dot_backward"),
        "update_sq": update_sq,
        "before_dot_update": linear("before_dot_update"),
        "abs_update_dot_backward": odd * probe.central.abs_update_dot_backward,
        "rounding_sq": noise / 2,
        "nonfinite": plain._sum("nonfinite") + probe.plus._sum("nonfinite") + probe.minus._sum("nonfinite"),
    }
    return _Estimate(_replace(plain, columns), second, q, noise_error, error, torch.ones_like(q, dtype=torch.bool))


def _plain(plain: FeatureStats, second: Tensor, entries: Tensor) -> _Estimate:
    """The plain replay; ``second`` bounds its noise as a second difference would show it."""
    noise = second / 3
    update_sq = plain.update_sq - noise / 2
    q = torch.where(plain.update_sq > 0, second / update_sq.clamp_min(0.0), torch.nan)  # inf: all of it may be noise
    error = q / 4 + torch.maximum((q / (3 * _DIRECTIONS)).sqrt(), _along(q, entries))
    columns = {"update_sq": update_sq, "rounding_sq": noise / 2}
    return _Estimate(_replace(plain, columns), second, q, error, error, torch.zeros_like(q, dtype=torch.bool))


def _along(q: Tensor, entries: Tensor) -> Tensor:
    """Noise along the update, relative to it: three standard deviations where every entry is rounded by itself.

    It averages out of layers with many entries; of few it is what the norm is off by.
    """
    return (3 * q / entries).sqrt()


def _better(first: _Estimate, second: _Estimate) -> _Estimate:
    """Per layer the one with the smaller error."""
    take = ~(second.error < first.error)
    return _Estimate(
        torch.where(take[:, None], first.sums, second.sums),
        torch.where(take, first.second, second.second),
        torch.where(take, first.q, second.q),
        torch.where(take, first.noise_error, second.noise_error),
        torch.where(take, first.error, second.error),
        torch.where(take, first.amplified, second.amplified),
    )


def _residual_large(
    plain: FeatureStats, probe: CentralProbe, aligned_decrease: Tensor | None, dot_se: Tensor | None
) -> Tensor:
    """Is the residual, with the odd part of the dot product, large as a root mean square? 0-d bool.

    Steps that are large themselves (kappa = 1) may have a residual of the order of the square of their move.
    """
    kappa = probe.kappa.to(torch.float64)
    dot = (probe.plus.update_dot_backward - probe.minus.update_dot_backward) / (2 * kappa)
    update_sq = probe.central.update_sq / (2 * kappa).square()
    residual, cut = _residual(plain, dot, update_sq, aligned_decrease, dot_se)
    moves = torch.where(cut, probe.central.update_sq / (4 * plain.before_sq), 0.0).sum() / cut.sum().clamp_min(1)
    return ~(residual <= RESIDUAL + (moves - (2 * TARGET) ** 2).clamp_min(0.0))


def _residual(
    stats: FeatureStats, dot: Tensor, update_sq: Tensor, aligned_decrease: Tensor | None, dot_se: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Root mean square over the cuts of the residual 1 - D / -<b, df>, and which layers count: 0-d, bool (L,)."""
    if aligned_decrease is None:
        return torch.zeros((), dtype=torch.float64, device=stats.device), torch.zeros_like(dot, dtype=torch.bool)
    scale = torch.maximum(dot.abs(), LEAST_COSINE * (update_sq * stats.backward_sq).sqrt())
    cut = ~aligned_decrease.isnan() & (scale > 0)
    squares = ((dot + aligned_decrease) / scale).square()
    if dot_se is not None:  # an error of the sample is none of the measurement: it is taken out, twice over
        squares = (squares - (2 * dot_se * dot / scale).square()).clamp_min(0.0)
    squares = torch.where(cut, squares, 0.0)
    return (squares.sum() / cut.sum().clamp_min(1)).sqrt(), cut


def _most_telling(stats: FeatureStats, conditions: Sequence[tuple[int, Tensor]]) -> Tensor:
    """The last code that holds, per layer; 0 where none does."""
    reason = torch.full(stats.shape, reasons.OK, dtype=torch.int64, device=stats.device)
    for code, holds in conditions:
        reason = torch.where(holds, code, reason)
    return reason


def _bias(before_sq: Tensor, exact_before_sq: Tensor | None) -> Tensor:
    """By how much the norms of the features are off. No difference of features can show that.

    Example: multiplying by 0.998 leaves many bf16 numbers as they are, and the error adds up over the layers.
    """
    if exact_before_sq is None:
        return torch.zeros_like(before_sq)
    return ((before_sq / exact_before_sq).sqrt() - 1).abs()


def _angle_error(cosine: Tensor, norm_error: Tensor, backward: Tensor, entries: Tensor) -> Tensor:
    """Relative change of the angle: both signs, the larger.

    Args:
        cosine: of the angle.
        norm_error: relative error of |df|, which is one of the cosine.
        backward: relative error of the backward vector. Half its square is one of the norm; its part along df averages
            out over many entries, of few it is taken three standard deviations large.
        entries: how many entries have errors of their own.
    """
    angle = cosine.acos()
    sine = (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    along = torch.hypot(cosine.abs() * norm_error, 3 * backward * sine / entries.sqrt())  # of different roundings
    change = cosine.abs() * backward.square() / 2 + along
    up, down = (cosine + change).clamp(-1.0, 1.0).acos(), (cosine - change).clamp(-1.0, 1.0).acos()
    return torch.maximum(angle - up, down - angle) / angle


def _replace(stats: FeatureStats, columns: dict[str, Tensor]) -> Tensor:
    return torch.stack([columns[name] if name in columns else stats._sum(name) for name in stats.names], dim=-1)


def _check_shapes(plain: FeatureStats, probe: CentralProbe | None, vectors: dict[str, Tensor]) -> None:
    if len(plain.shape) != 1:
        raise ValueError(f"judge: expected statistics of shape (L,), one per layer, got {tuple(plain.shape)}")
    shapes = {name: vector.shape for name, vector in vectors.items()}
    if probe is not None:
        shapes |= {"minus": probe.minus.shape, "plus": probe.plus.shape, "central": probe.central.shape}
        if probe.kappa.dim():
            raise ValueError(f"judge: kappa: expected a 0-d tensor, got shape {tuple(probe.kappa.shape)}")
    for name, shape in shapes.items():
        if shape != plain.shape:
            raise ValueError(f"judge: {name}: expected shape {tuple(plain.shape)}, got {tuple(shape)}")
