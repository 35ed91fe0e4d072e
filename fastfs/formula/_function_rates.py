"""Function-space learning rates: how far the update of each parameter tensor moves the output of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._functional import update_stats
from fastfs._network.learning_rates import LearningRates
from fastfs._network.linearization import Linearization, LossFunction
from fastfs.formula._measure import updates_of

__all__ = ["FunctionLearningRates", "function_learning_rates"]


@dataclass(frozen=True)
class FunctionLearningRates:
    """How far one step moves the output to first order, for P parameter tensors. Tensors are float64.

    Attributes:
        parameters: names of the parameters.
        rates: (P,) estimates of rms(J_T dw_T) over all entries of the output, with the Jacobian J_T of the output by
            tensor T, in units of the output per step.
        standard_errors: (P,) of the rates, from the number of probes.
        total: estimate of rms(J dw), by all tensors together, 0-d. Its square is not the sum of those of the rates,
            because what the tensors do may add up or cancel.
        total_standard_error: of the total, 0-d.
        count: entries of the output.
        probes: number of backwards.
    """

    parameters: list[str]
    rates: Tensor
    standard_errors: Tensor
    total: Tensor
    total_standard_error: Tensor
    count: int
    probes: int


def function_learning_rates(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Any,
    *,
    layer: str = "",
    probes: int = 32,
    seed: int = 0,
    lr: LearningRates | None = None,
    optimizer: Optimizer | None = None,
    updates: Mapping[str, Tensor] | None = None,
    parameters: str | None = None,
    dtype: torch.dtype | None = None,
) -> FunctionLearningRates:
    """Estimate the function-space learning rate of every parameter tensor, by one backward for each random probe.

    For a random cotangent v with independent standard normal entries, v^T J_T dw_T is normal with the variance
    |J_T dw_T|^2, and one backward gives it for all tensors. With K probes the relative standard error of a rate is
    1 / sqrt(2 K). Neither the model nor the optimizer nor a global random stream is changed.

    Args:
        model: any network.
        loss_fn: function of the model and the batch that returns the loss, a scalar that includes its own mean. The
            gradients of ``lr`` and ``optimizer`` are those of this loss.
        batch: second argument of ``loss_fn``.
        layer: name of the module whose output counts; by default the model. Of several tensors in it, the first
            floating-point one counts.
        probes: K, at least 1.
        seed: of the probes.
        lr: learning rate of gradient descent, dw = -lr g, as for :func:`measure`.
        optimizer: optimizer whose next step is measured instead.
        updates: parameter name -> dw, measured instead; other parameters do not move.
        parameters: regular expression, searched for in the names of the parameters to move; None moves all trainable
            ones.
        dtype: dtype to compute in, such as ``torch.float64``.

    Returns:
        The rates.

    Raises:
        TypeError: not exactly one of ``lr``, ``optimizer`` and ``updates`` is given, or an argument has the wrong type.
        ValueError: ``probes`` is no integer of at least 1, no module has the name, or it does not run exactly once;
            otherwise as for :func:`measure`.
        RuntimeError: in inference mode, or the forward is not repeatable.

    Source: section 3 of E. Milsom, B. Anson and L. Aitchison, "Function-Space Learning Rates", arXiv 2502.17405,
    without their approximation of the update by Kronecker factors.
    """
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes: expected an integer >= 1, got {probes!r}")
    lin = Linearization(model, loss_fn, batch, layers=[layer], parameters=parameters, dtype=dtype)
    moves = updates_of(lin, lr=lr, optimizer=optimizer, updates=updates)
    linear = torch.func.vjp(lin.function(0), list(lin.parameters))
    output, pull = linear[0], linear[1]
    generator = torch.Generator(output.device).manual_seed(seed)
    found = []
    for _ in range(probes):
        v = torch.randn(output.shape, generator=generator, device=output.device, dtype=output.dtype)
        (gradients,) = pull(v)
        found.append(update_stats(list(gradients), moves).dot)
    products = torch.stack(found)  # (K, P)
    every = torch.cat([products, products.sum(dim=1, keepdim=True)], dim=1)
    rates = (every.square().mean(dim=0) / output.numel()).sqrt()
    errors = rates / (2 * probes) ** 0.5
    return FunctionLearningRates(
        parameters=lin.names,
        rates=rates[:-1],
        standard_errors=errors[:-1],
        total=rates[-1],
        total_standard_error=errors[-1],
        count=output.numel(),
        probes=probes,
    )
