"""The backward-feature angle: predicted from the spectrum, computed exactly from the kernel, and measured in a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._network.layers import AUTO, Selection
from fastfs._network.learning_rates import LearningRates, resolve
from fastfs._network.linearization import Linearization, LossFunction, Visits
from fastfs._stats import FeatureStats
from fastfs.formula._measure import over_visits, updates_of
from fastfs.spectrum._moments import Moments, moments
from fastfs.spectrum._operator import BFK
from fastfs.spectrum._table import LayerTable

__all__ = ["Angles", "angles"]


@dataclass(frozen=True)
class Angles(LayerTable):
    """Cosines of the angle between the feature update and -b for L layers, as float64 on the CPU; nan where undefined.

    Attributes:
        layers: names of the layers.
        cut: (L,) whether the layer is a cut. ``exact`` and ``descent`` are equal at cuts.
        reason: (L,) why it is not a cut, or None.
        predicted: (L,) ``M_1/sqrt(M_2)`` of the kernel of gradient descent: the cosine for a b that is isotropic and
            independent of the kernel.
        predicted_error: (L,) standard error of ``predicted``.
        exact: (L,) ``b^T K b/(|b| |K b|)`` of that kernel.
        descent: (L,) cosine of the first-order feature update of gradient descent.
        measured: (L,) cosine of the actual, finite update: of the optimizer if one was given, otherwise of gradient
            descent. Meaningful only where ``valid``.
        valid: (L,) bool: whether the finite update exceeds rounding (:attr:`fastfs.FeatureStats.valid`). If it does
            not, use a larger step or ``dtype=torch.float64``.
        noise_floor: (L,) ``|df|/|f|`` caused by rounding of the features alone
            (:attr:`fastfs.FeatureStats.noise_floor`).
        first_order: (L,) cosine of the first-order feature update of the same step.
        preconditioned: (L,) ``M_1/sqrt(M_2)`` of the kernel with the rates -dw/g of the optimizer's step; None without
            optimizer. This kernel depends on b, contrary to the assumption of the prediction.
        preconditioned_error: (L,) standard error of ``preconditioned``; None without optimizer.
        excluded: (L,) share of |dw| upstream for which -dw/g is negative or not finite. The rate is taken as 0 there,
            and the step is not preconditioned descent (momentum, weight decay); None without optimizer.
        undetermined: (L,) share of the upstream parameter entries with zero gradient and zero update. Their rate is
            unknown and taken as 0 in ``preconditioned`` (with ReLU, entries of inactive units); None without optimizer.
        products: number of products with kernels.
    """

    layers: list[str]
    cut: list[bool]
    reason: list[str | None]
    predicted: Tensor
    predicted_error: Tensor
    exact: Tensor
    descent: Tensor
    measured: Tensor
    valid: Tensor
    noise_floor: Tensor
    first_order: Tensor
    preconditioned: Tensor | None
    preconditioned_error: Tensor | None
    excluded: Tensor | None
    undetermined: Tensor | None
    products: int

    @property
    def misalignment(self) -> Tensor:
        """(L,) angle in radians that the optimizer adds to that of gradient descent, to first order; 0 without one."""
        return self.first_order.acos() - self.descent.acos()

    def _columns(self) -> dict[str, list[Any]]:
        names = ["predicted", "predicted_error", "exact", "descent", "first_order", "measured", "valid", "noise_floor"]
        columns: dict[str, list[Any]] = {"layer": self.layers, "cut": self.cut}
        columns.update({name: getattr(self, name).tolist() for name in names})
        columns["angle"] = self.measured.acos().tolist()
        if self.preconditioned is not None:
            columns["misalignment"] = self.misalignment.tolist()
            for name in ("preconditioned", "preconditioned_error", "excluded", "undetermined"):
                columns[name] = getattr(self, name).tolist()
        columns["reason"] = self.reason
        return columns


def angles(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    layers: Selection = AUTO,
    lr: LearningRates | None = None,
    optimizer: Optimizer | None = None,
    parameters: str | None = None,
    dtype: torch.dtype | None = None,
    rtol: float = 0.02,
    max_probes: int = 256,
    sketch: int = 0,
    seed: int = 0,
    chunk: int = 16,
) -> Angles:
    """Predict, compute and measure the angle of every layer, for gradient descent or an optimizer.

    Neither the model nor the optimizer is changed.

    Args:
        model: any network, as for :class:`BFK`.
        loss_fn: function of the model and the batch that returns the loss.
        batch: second argument of ``loss_fn``.
        layers: the layers to measure, as for :class:`fastfs.Monitor`. Each has to run exactly once.
        lr: learning rates of gradient descent; 1 for its kernel if only an optimizer is given. First-order angles
            depend only on the ratios of the rates. The measured angle depends on their size: a step that is too small
            is lost in the rounding of the features, as ``valid`` shows.
        optimizer: optimizer that takes the measured step from its current state.
        parameters: regular expression over the names of the parameters to move, as for :class:`BFK`.
        dtype: dtype to compute in, as for :class:`BFK`.
        rtol: relative standard error of M_1 and M_2, as for :func:`moments`. The error of the predicted cosine is
            smaller, because the two are correlated.
        max_probes: largest number of random vectors, as for :func:`moments`.
        sketch: columns of the Hutch++ sketch, as for :func:`moments`.
        seed: seed of the random vectors, as for :func:`moments`.
        chunk: number of vectors multiplied at once.

    Returns:
        Cosines per layer with their errors.

    Raises:
        TypeError: neither ``lr`` nor ``optimizer`` is given.
        ValueError: a layer does not run exactly once, or another argument is invalid.

    Source: sections 2 and 3 of "The Feature Speed Formula", arXiv 2311.18718.
    """
    if lr is None and optimizer is None:
        raise TypeError("angles: expected lr, optimizer or both, got none")
    lin = Linearization(model, loss_fn, batch, layers=layers, parameters=parameters, dtype=dtype)
    rates = resolve(1.0 if lr is None else lr, lin.names, lin.parameters)
    options: dict[str, Any] = {"rtol": rtol, "max_probes": max_probes, "min_probes": max(2, min(16, max_probes))}
    options.update(sketch=sketch, seed=seed)

    def predict(rates: Sequence[float | Tensor], exact: list[Tensor] | None) -> list[Moments]:
        result = []
        for layer in lin.layers:
            kernel = BFK.of(lin, layer.index, rates, chunk=chunk)
            if exact is not None:
                exact.append(kernel.cos_angle().cpu())
            result.append(moments(kernel, **options))
        return result

    exact: list[Tensor] = []
    spectra = predict(rates, exact)
    descent = updates_of(lin, lr=1.0 if lr is None else lr)
    step = descent
    preconditioned = preconditioned_error = excluded = undetermined = None
    products = len(lin.layers) + sum(m.products for m in spectra)
    if optimizer is not None:
        step = updates_of(lin, optimizer=optimizer)
        ratios, left_out, unknown = _ratios(step, lin.gradients)
        under = predict(ratios, None)
        preconditioned = torch.stack([m.predicted_cos_angle for m in under])
        preconditioned_error = torch.stack([m.predicted_cos_angle_error for m in under])
        upstream = lin.structure.upstream.double()
        excluded = (upstream @ left_out).sqrt() / (upstream @ _squares(step)).sqrt()
        sizes = torch.tensor([p.numel() for p in lin.parameters], dtype=torch.float64)
        undetermined = (upstream @ unknown) / (upstream @ sizes)
        products += sum(m.products for m in under)
    moved = lin.forward([p + dw for p, dw in zip(lin.parameters, step, strict=True)]).features
    finite = _stats(lin, moved, first_order=False)
    first = _stats(lin, lin.jvp(descent).features, first_order=True).cos_angle
    of_step = first if optimizer is None else _stats(lin, lin.jvp(step).features, first_order=True).cos_angle
    return Angles(
        layers=[layer.name for layer in lin.layers],
        cut=list(lin.structure.cut),
        reason=list(lin.structure.reason),
        predicted=torch.stack([m.predicted_cos_angle for m in spectra]),
        predicted_error=torch.stack([m.predicted_cos_angle_error for m in spectra]),
        exact=torch.stack(exact),
        descent=first,
        measured=finite.cos_angle,
        valid=finite.valid,
        noise_floor=finite.noise_floor,
        first_order=of_step,
        preconditioned=preconditioned,
        preconditioned_error=preconditioned_error,
        excluded=excluded,
        undetermined=undetermined,
        products=products,
    )


def _ratios(step: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[list[float | Tensor], Tensor, Tensor]:
    """Return -dw/g where it is a rate, else 0; per parameter, |dw|^2 of the rest and the number of undetermined."""
    rates: list[float | Tensor] = []
    rest, unknown = [], []
    for dw, g in zip(step, gradients, strict=True):
        ratio = -dw / g
        usable = ratio.isfinite() & (ratio >= 0)
        rates.append(torch.where(usable, ratio, 0.0))
        rest.append(torch.where(usable, 0.0, dw))
        unknown.append(float(((dw == 0) & (g == 0)).sum()))
    return rates, _squares(rest), torch.tensor(unknown, dtype=torch.float64)


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum().cpu() for t in tensors])


def _stats(lin: Linearization, after: Sequence[Visits], *, first_order: bool) -> FeatureStats:
    """Return (L,) statistics on the CPU, from the features after the step or from their changes."""
    layers = zip(lin.features, after, lin.backward, strict=True)
    return FeatureStats(torch.stack([over_visits(*layer, first_order=first_order).cpu() for layer in layers]))
