"""Statistics of one step for every network, seed and layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastfs._functional import feature_stats
from fastfs._reproduce.paper.chains import Chains, Network, Weights

__all__ = ["Steps", "simulate"]

_BYTES = 1_200_000_000  # of hidden matrices in memory at a time; further seeds are processed in later batches


@dataclass(frozen=True)
class Steps:
    """Statistics at every layer, as NaN-padded float64 arrays (seeds, networks, K + 1) over l = 0..K.

    Attributes:
        networks: the networks.
        seeds: the seeds.
        cos_angle: cosine of the backward-feature angle; NaN where nothing below is trained.
        feature_rms: rms(f_l).
        update_rms: rms(df_l).
        backward_norm: |b_l|.
        own_norm: norm of the component of df_l due to the update of V_l, which is along -b_l.
        read_rms: rms of the change of phi(f_L), (seeds, networks): of f_L for a ResNet, of relu(f_L) for an MLP.
        loss_change: (seeds, networks).
    """

    networks: tuple[Network, ...]
    seeds: tuple[int, ...]
    cos_angle: np.ndarray
    feature_rms: np.ndarray
    update_rms: np.ndarray
    backward_norm: np.ndarray
    own_norm: np.ndarray
    read_rms: np.ndarray
    loss_change: np.ndarray

    @property
    def angle(self) -> np.ndarray:
        """(seeds, networks, K + 1) backward-feature angles in radians."""
        result: np.ndarray = np.arccos(self.cos_angle)
        return result

    def last(self, values: np.ndarray) -> np.ndarray:
        """Return ``values`` (seeds, networks, K + 1) at the last layer of each network: (seeds, networks)."""
        depths = np.array([network.depth for network in self.networks])
        result: np.ndarray = values[:, np.arange(len(depths)), depths]
        return result

    @property
    def sensitivity(self) -> np.ndarray:
        """(seeds, networks) S = rms of the change of phi(f_L) / |loss change| (section 1 of the paper).

        It refers to the last hidden features as the output weights see them, after the ReLU of an MLP, as published.
        Before the ReLU, S is sqrt(2) times as large in a wide MLP.
        """
        result: np.ndarray = self.read_rms / np.abs(self.loss_change)
        return result


def _by_layer(chains: Chains) -> tuple[np.ndarray, ...]:
    """Return the per-layer arrays of :class:`Steps`, from the vectors of all layers, each (S, N, K + 1)."""
    # The update is passed as "update - 0", a difference that is exact, unlike f' - f in float32.
    nothing = torch.zeros_like(chains.updates)
    stats = feature_stats(nothing, chains.updates, chains.backward, per_row=True)
    levels, seeds, count, width = chains.updates.shape
    # Features are of order 1, so their plain float32 norm is accurate to 1e-6.
    feature_rms = chains.features.norm(dim=-1).double() / math.sqrt(width)
    absent = torch.arange(levels)[:, None, None] > chains.depths

    def padded(values: Tensor) -> np.ndarray:
        shaped = values.reshape(levels, seeds, count).masked_fill(absent, math.nan)
        result: np.ndarray = shaped.permute(1, 2, 0).numpy()
        return result

    own_norm = chains.own.double().flatten() * stats.backward_norm
    return tuple(padded(v) for v in (stats.cos_angle, feature_rms, stats.update_rms, stats.backward_norm, own_norm))


def simulate(
    networks: Sequence[Network],
    *,
    width: int,
    seeds: Sequence[int],
    in_features: int = 10,
    unit_input: bool = False,
    mlp: bool = False,
    step: float = 1e-3,
    dtype: torch.dtype = torch.float32,
    advance: Callable[[int], None] | None = None,
) -> Steps:
    """Simulate one step of gradient descent of every network for every seed, and the feature updates of all layers.

    Args:
        networks: at least one; they share the matrices of a seed.
        width: m.
        seeds: at least one, each at least 0.
        in_features: d.
        unit_input: whether |x| = 1 instead of Gaussian entries.
        mlp: as in :meth:`Chains.run`.
        step: as in :meth:`Chains.run`.
        dtype: float32, or float64 as a check.
        advance: called with the number of seeds of each finished part.

    Returns:
        Statistics of the step.

    Raises:
        ValueError: there is no network or seed, or the width is below 1.
    """
    if not seeds or not networks or width < 1:
        raise ValueError(f"expected networks, seeds and a width, got {len(networks)}, {len(seeds)} and {width}")
    deepest = max(network.depth for network in networks)
    readouts = 1 + max(network.readout for network in networks)
    parts: list[tuple[np.ndarray, ...]] = []
    hidden: Tensor | None = None
    with torch.no_grad():
        for some in _portions(seeds, deepest * width**2 * dtype.itemsize):
            weights = Weights.draw(
                some, deepest, width, in_features, readouts=readouts, unit_input=unit_input, dtype=dtype, hidden=hidden
            )
            hidden = weights.hidden
            chains = Chains.run(weights, networks, mlp=mlp, step=step)
            ends = (chains.read_change.double() / math.sqrt(width)).numpy(), chains.loss_change.double().numpy()
            parts.append((*_by_layer(chains), *ends))
            if advance is not None:
                advance(len(some))
    arrays = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    return Steps(tuple(networks), tuple(seeds), *arrays)


def _portions(seeds: Sequence[int], bytes_each: int) -> Iterator[Sequence[int]]:
    size = max(1, _BYTES // bytes_each)
    for start in range(0, len(seeds), size):
        yield seeds[start : start + size]
