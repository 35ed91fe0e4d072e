"""(h) The angle predicted from the kernel's spectrum, beside the measured one."""

from __future__ import annotations

import math

import numpy as np
import pandas
import torch
from torch import Tensor, nn

from fastfs._reproduce.paper.chains import Chains, Network, Weights
from fastfs._reproduce.paper.kernel import predict, wide_cos_angle
from fastfs._reproduce.paper.study import Advance, Outcome, StudySettings, Value
from fastfs.models import ResNet
from fastfs.spectrum import BFK, moments

__all__ = ["predicted_against_measured"]

_SCALES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
_PROBED = (0.5, 1.0, 2.0, 4.0)


def resnet_of(weights: Weights, seed: int, network: Network) -> tuple[ResNet, Tensor]:
    """Return the fastfs model and input of a simulated network, in float32."""
    in_features, width = weights.stem.shape[2], weights.stem.shape[1]
    model = ResNet(in_features, width, network.depth, branch_scale=network.branch_scale)
    matrices = [p for name, p in model.named_parameters() if not name.startswith("head")]
    sources = [weights.stem[seed], *weights.hidden[seed, : network.depth]]
    with torch.no_grad():
        for matrix, source in zip(matrices, sources, strict=True):
            matrix.copy_(source)
        model.head.weight.copy_(weights.head[seed, network.readout][None] / width)
    return model, weights.x[seed][None]


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    """Return the squared loss for the target 1."""
    loss: Tensor = (model(x) - 1).square().sum() / 2
    return loss


def _probed(weights: Weights, chains: Chains, network: Network, index: int, probes: int) -> tuple[float, float]:
    """Return the prediction from random probes of the kernel as an operator, and its standard error."""
    model, x = resnet_of(weights, 0, network)
    rates = {
        rf"^blocks\.{layer}\.linear\.weight$": float(chains.rates[layer + 1, 0, index])
        for layer in range(network.depth)
    }
    kernel = BFK(model, loss_fn, x, f"blocks.{network.depth - 1}", lr=rates, parameters="^blocks")
    found = moments(kernel, min_probes=probes, max_probes=probes)
    return float(found.predicted_cos_angle.detach()), float(found.predicted_cos_angle_error.detach())


def predicted_against_measured(settings: StudySettings, advance: Advance) -> Outcome:
    """Compute prediction, first order and actual step, for ResNets over sqrt(L) beta and the MLP of the same depth."""
    seeds = settings.seed_list(10, 3)
    depth, width, probes = settings.pick((100, 200, 64), (50, 128, 16))
    scales = [*(c for c in _SCALES if c < math.sqrt(depth)), math.sqrt(depth)]
    networks = [Network(depth, c / math.sqrt(depth)) for c in scales]
    rows = []
    gaps: dict[str, list[float]] = {"prediction": [], "kernel": [], "probes": []}
    with torch.no_grad():
        weights = Weights.draw(seeds, depth, width, 10)
        chains = Chains.run(weights, networks, step=1e-4)
    for n, (c, network) in enumerate(zip(scales, networks, strict=True)):
        with torch.no_grad():
            found = predict(weights, chains, network, n)
        probed, error = math.nan, math.nan
        if c in _PROBED:
            probed, error = _probed(weights, chains, network, n, probes)
            gaps["probes"].append((probed - float(found.predicted[0])) / max(error, 1e-9))
        gaps["prediction"].append(float((found.predicted - found.measured).mean()))
        if network.branch_scale < 1:
            gaps["kernel"].append(float((found.first_order - found.measured).abs().max()))
        rows.append(
            {
                "sqrt_depth_beta": c,
                "depth": depth,
                "width": width,
                "predicted": float(found.predicted.mean()),
                "first_order": float(found.first_order.mean()),
                "measured": float(found.measured.mean()),
                "measured_std": float(found.measured.std(correction=0)),
                "predicted_wide": wide_cos_angle(depth, network.branch_scale),
                "probed_first_seed": probed,
                "probed_error": error,
                "predicted_first_seed": float(found.predicted[0]),
                "seeds": len(seeds),
            }
        )
        advance(1 / len(scales))
    values = {
        "prediction": Value(float(np.max(np.abs(gaps["prediction"]))), note="largest |predicted - measured| cosine"),
        "kernel": Value(max(gaps["kernel"]), note="largest |b'Kb/(|b||Kb|) - measured|, ResNets"),
        "probes": Value(float(np.max(np.abs(gaps["probes"]))), note="largest gap to the exact moments, in errors"),
    }
    return Outcome(pandas.DataFrame(rows), values)
