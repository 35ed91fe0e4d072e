"""The backward-to-feature kernel of the paper's networks, formed densely by a recursion.

With T_l = sqrt(1 - beta^2) I + beta V_l D_{l-1}, where D marks the active units, the kernel of the hidden matrices is

    K_0 = 0,   K_l = T_l K_{l-1} T_l^T + lr_l beta^2 |relu(f_{l-1})|^2 I.

This is independent of the products of :class:`fastfs.spectrum.BFK`. It costs m^3 per layer, and suits small widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfs._reproduce.paper.chains import Chains, Network, Weights

__all__ = ["KernelPrediction", "dense_kernel", "predict", "wide_cos_angle"]


@dataclass(frozen=True)
class KernelPrediction:
    """Cosines of the output angle, each (seeds,) float64.

    Attributes:
        predicted: m_1/sqrt(M_2), from the spectrum alone.
        first_order: b^T K b / (|b| |K b|) for the actual b.
        measured: cosine of the actual step.
    """

    predicted: Tensor
    first_order: Tensor
    measured: Tensor


def dense_kernel(weights: Weights, chains: Chains, network: Network, index: int) -> Tensor:
    """Return K_L of network number ``index`` of ``chains``, (S, m, m)."""
    beta = network.branch_scale
    skip = math.sqrt(1.0 - beta**2)
    seeds, _, width, _ = weights.hidden.shape
    kernel = torch.zeros(seeds, width, width, dtype=weights.hidden.dtype)
    for layer in range(1, network.depth + 1):
        active = chains.features[layer - 1, :, index].relu()
        mask = (active > 0).to(kernel.dtype)
        matrix = weights.hidden[:, layer - 1]
        left = skip * kernel + beta * torch.bmm(matrix, mask[:, :, None] * kernel)
        kernel = skip * left + beta * torch.bmm(left * mask[:, None, :], matrix.transpose(1, 2))
        added = chains.rates[layer, :, index] * beta**2 * active.square().sum(dim=1)
        kernel.diagonal(dim1=1, dim2=2).add_(added[:, None])
    return kernel


def predict(weights: Weights, chains: Chains, network: Network, index: int) -> KernelPrediction:
    """Return the cosine from the spectrum, from the kernel and from the step."""
    kernel = dense_kernel(weights, chains, network, index).double()
    width = kernel.shape[-1]
    first = kernel.diagonal(dim1=1, dim2=2).sum(dim=1) / width
    second = kernel.square().sum(dim=(1, 2)) / width
    backward = chains.backward[network.depth, :, index].double()
    update = chains.updates[network.depth, :, index].double()
    moved = torch.bmm(kernel, backward[:, :, None])[:, :, 0]

    def cosine(change: Tensor) -> Tensor:
        result: Tensor = (backward * change).sum(dim=1) / (backward.norm(dim=1) * change.norm(dim=1))
        return result

    return KernelPrediction(first / second.sqrt(), cosine(moved), cosine(-update))


def wide_cos_angle(depth: int, branch_scale: float) -> float:
    """Return M_1/sqrt(M_2) for infinite width under the assumption of independent active units.

    A layer adds 2 beta^2 to the second moment of J J^T, so with equal contributions of the L hidden matrices
    ``cos^-2 = 1 + beta^2 (L - 1)(2 L - 1)/(3 L)``: 1/sqrt(1 + 2 c^2/3) for beta = c/sqrt(L), and 1/sqrt(l) for MLPs.

    Args:
        depth: number L of hidden matrices.
        branch_scale: beta.

    Returns:
        The cosine.
    """
    return 1.0 / math.sqrt(1.0 + branch_scale**2 * (depth - 1) * (2 * depth - 1) / (3 * depth))
