"""Simulation of many of the paper's networks at once: forward, backward, one step of gradient descent, feature updates.

One input x, squared loss, one output, hidden features of width m:

    f_0 = U x,   f_l = sqrt(1 - beta^2) f_{l-1} + beta V_l relu(f_{l-1}),  l = 1..L,   output s <a, phi(f_L)>

with phi the identity for a ResNet and ReLU for an MLP (beta = 1). These are :class:`fastfs.models.ResNet` and
:class:`fastfs.models.MLP` on one row. All networks of a seed share x, U, V_l and a, whatever their branch scale and
depth, so a layer is one matrix product with a (networks, m) matrix, batched over seeds. Two further properties make the
simulation fast, and accurate in float32:

- the gradient of V_l is the rank-one ``beta b_l relu(f_{l-1})^T``, so its norm is a product of two norms, and neither
  the gradient nor the updated matrix is formed;
- the second forward computes the difference ``df_l = f'_l - f_l`` directly, without cancellation: the difference of two
  ReLUs is exact where the sign does not change. The step is finite; nothing is linearized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Chains", "Network", "Rates", "Weights"]

_INPUT, _STEM, _HEAD, _HIDDEN = range(4)  # random streams per seed


@dataclass(frozen=True)
class Rates:
    """Learning rates of a network all of whose parameters are trained, for one step of gradient descent."""

    stem: float
    hidden: float
    head: float


@dataclass(frozen=True)
class Network:
    """One network of a batch.

    Args:
        depth: number L of hidden matrices, at least 1.
        branch_scale: beta, in (0, 1].
        output_std: scale s of the output weights, whose entries a are N(0, 1); None means 1/m (mean-field).
        readout: index of the seed's random output weights a; averages over several are smoother.
        rates: learning rates; None trains the hidden matrices alone, with lr_l = step / (L |g_l|^2) (section 4).

    Raises:
        ValueError: the depth is below 1, or the branch scale outside (0, 1].
    """

    depth: int
    branch_scale: float
    output_std: float | None = None
    readout: int = 0
    rates: Rates | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth: expected at least 1 hidden matrix, got {self.depth}")
        if not 0.0 < self.branch_scale <= 1.0:
            raise ValueError(f"branch_scale: expected a number in (0, 1], got {self.branch_scale}")


@dataclass(frozen=True)
class Weights:
    """Random weights of S seeds: x (S, d), stem (S, m, d), hidden (S, L, m, m), head (S, R, m) for R readouts."""

    x: Tensor
    stem: Tensor
    hidden: Tensor
    head: Tensor

    @classmethod
    def draw(
        cls,
        seeds: Sequence[int],
        depth: int,
        width: int,
        in_features: int,
        *,
        readouts: int = 1,
        unit_input: bool = False,
        dtype: torch.dtype = torch.float32,
        hidden: Tensor | None = None,
    ) -> Weights:
        """Draw Gaussian entries of std 1/sqrt(d) for U, sqrt(2/m) for V, and 1 for x and a.

        With ``unit_input``, |x| = 1 and the std of U is 1. Each matrix has its own random stream, so that it depends
        only on seed, layer and shape, and as many threads as torch uses draw them. They are drawn in float32 whatever
        ``dtype``, the dtype of the result. ``hidden`` is memory to reuse.

        Args:
            seeds: the seeds.
            depth: number of hidden matrices.
            width: m.
            in_features: d.
            readouts: number of output weights per seed.
            unit_input: whether |x| = 1.
            dtype: dtype of the result.
            hidden: hidden matrices of an earlier call, whose memory is reused.

        Returns:
            The weights.
        """
        shape = (len(seeds), depth, width, width)
        std = math.sqrt(2.0 / width)
        if hidden is None or hidden.shape != shape or hidden.dtype != dtype:
            hidden = torch.empty(shape, dtype=dtype)
        x = torch.stack([_normal((in_features,), seed, _INPUT) for seed in seeds]).to(dtype)
        stem = torch.stack([_normal((width, in_features), seed, _STEM) for seed in seeds]).to(dtype)
        heads = [torch.stack([_normal((width,), seed, _HEAD, r) for r in range(readouts)]) for seed in seeds]
        head = torch.stack(heads).to(dtype)
        if unit_input:
            x = x / x.norm(dim=1, keepdim=True)
        else:
            stem = stem / math.sqrt(in_features)

        def fill(place: tuple[int, int]) -> None:
            s, layer = place
            matrix = hidden[s, layer]
            if dtype == torch.float32:
                _normal(shape[2:], seeds[s], _HIDDEN, layer, std=std, out=matrix)
            else:
                matrix.copy_(_normal(shape[2:], seeds[s], _HIDDEN, layer, std=std))

        places = [(s, layer) for s in range(len(seeds)) for layer in range(depth)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(fill, places))
        return cls(x, stem, hidden, head)


def _normal(shape: tuple[int, ...], *stream: int, std: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return independent N(0, std^2) in float32 from the random stream identified by these numbers, seed first."""
    state = int(np.random.SeedSequence(stream).generate_state(1)[0])
    result = torch.empty(shape) if out is None else out
    return result.normal_(std=std, generator=torch.Generator().manual_seed(state))


@dataclass(frozen=True)
class Chains:
    """One step of S seeds x N networks, K the largest depth: vectors of every layer, zero above a network's depth.

    Attributes:
        depths: (N,) int64.
        features: f_l, (K + 1, S, N, m), l = 0..K.
        updates: df_l, (K + 1, S, N, m).
        backward: b_l = dLoss/df_l, (K + 1, S, N, m).
        own: (K + 1, S, N); ``-own b_l`` is the part of df_l due to the update of V_l, the rest is carried over.
        rates: learning rate of V_l, (K + 1, S, N); 0 at l = 0.
        gradient_sq: |g_l|^2 of V_l, (K + 1, S, N); 0 at l = 0.
        output: (S, N).
        read_change: norm of the change of phi(f_L), the input of the output weights, (S, N).
        loss_change: actual change of ``(output - target)^2 / 2``, (S, N).
    """

    depths: Tensor
    features: Tensor
    updates: Tensor
    backward: Tensor
    own: Tensor
    rates: Tensor
    gradient_sq: Tensor
    output: Tensor
    read_change: Tensor
    loss_change: Tensor

    @classmethod
    def run(
        cls,
        weights: Weights,
        networks: Sequence[Network],
        *,
        mlp: bool = False,
        step: float = 1e-3,
        target: float = 1.0,
    ) -> Chains:
        """Compute forward, backward, update, and the exact difference of the second forward.

        Args:
            weights: weights of S seeds, with at least as many hidden matrices as the deepest network.
            networks: at least one.
            mlp: whether a ReLU precedes the output weights.
            step: target loss decrease of automatic learning rates; given rates are multiplied by it.
            target: y.

        Returns:
            Vectors and scalars of the step.

        Raises:
            ValueError: there is no network, or the networks need more matrices or readouts than there are.
        """
        if not networks:
            raise ValueError("networks: expected at least one")
        deepest = max(network.depth for network in networks)
        readouts = 1 + max(network.readout for network in networks)
        if weights.head.shape[1] < readouts:
            raise ValueError(f"weights: {weights.head.shape[1]} readouts, but a network has number {readouts - 1}")
        if weights.hidden.shape[1] < deepest:
            raise ValueError(f"weights: {weights.hidden.shape[1]} hidden matrices, but a network is {deepest} deep")
        # Sorted by depth: the networks that have layer l are then the first `alive[l]`.
        order = sorted(range(len(networks)), key=lambda n: -networks[n].depth)
        chains = _run(weights, [networks[n] for n in order], mlp, step, target)
        back = torch.tensor(order).argsort()
        if torch.equal(back, torch.arange(len(order))):
            return chains
        axis = {"depths": 0, "output": 1, "read_change": 1, "loss_change": 1}
        return cls(
            **{
                field.name: getattr(chains, field.name).index_select(axis.get(field.name, 2), back)
                for field in dataclasses.fields(cls)
            }
        )


def _run(weights: Weights, networks: Sequence[Network], mlp: bool, step: float, target: float) -> Chains:
    """Run networks sorted from the deepest to the shallowest; see :meth:`Chains.run`."""
    dtype, (seeds, _, width, _) = weights.hidden.dtype, weights.hidden.shape
    depths = [network.depth for network in networks]
    count, deepest = len(networks), depths[0]
    alive = [sum(depth >= layer for depth in depths) for layer in range(deepest + 2)]
    beta = torch.tensor([network.branch_scale for network in networks], dtype=torch.float64)
    skip = (1.0 - beta.square()).sqrt().to(dtype)[:, None]
    beta_sq, beta = beta.square().to(dtype), beta.to(dtype)[:, None]
    std = torch.tensor([1.0 / width if n.output_std is None else n.output_std for n in networks], dtype=dtype)[:, None]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(deepest + 1, seeds, count, *shape, dtype=dtype)

    features, updates, backward = zeros(width), zeros(width), zeros(width)
    own, rates, gradient_sq = zeros(), zeros(), zeros()

    # Forward.
    features[0] = torch.bmm(weights.stem, weights.x[:, :, None]).transpose(1, 2)
    for layer in range(1, deepest + 1):
        n = alive[layer]
        below = features[layer - 1][:, :n]
        branch = torch.bmm(below.relu(), weights.hidden[:, layer - 1].transpose(1, 2))
        features[layer][:, :n] = skip[:n] * below + beta[:n] * branch
    tops = torch.tensor(depths), slice(None), torch.arange(count)
    last = features[tops].transpose(0, 1)  # (S, N, m)
    read = last.relu() if mlp else last
    head = std * weights.head[:, [network.readout for network in networks]]
    output = _dot(head, read)
    residual = output - target

    # Backward.
    start = residual[..., None] * head
    if mlp:
        start = start * (last > 0)
    for layer in range(deepest, 0, -1):
        n = alive[layer]
        new = alive[layer + 1]
        backward[layer][:, new:n] = start[:, new:n]
        above = backward[layer][:, :n]
        below = features[layer - 1][:, :n]
        gradient_sq[layer][:, :n] = beta_sq[:n] * _dot(above, above) * _dot(below.relu(), below.relu())
        back = torch.bmm(above, weights.hidden[:, layer - 1])
        backward[layer - 1][:, :n] = skip[:n] * above + beta[:n] * (below > 0) * back

    # Learning rates.
    chosen = torch.tensor(
        [(0.0, 0.0, 0.0) if n.rates is None else (n.rates.stem, n.rates.hidden, n.rates.head) for n in networks],
        dtype=dtype,
    )
    given = torch.tensor([network.rates is not None for network in networks])
    share = step / torch.tensor(depths, dtype=dtype)
    for layer in range(1, deepest + 1):
        n = alive[layer]
        automatic = share[:n] / gradient_sq[layer][:, :n]
        rates[layer][:, :n] = torch.where(given[:n], step * chosen[:n, 1], automatic)

    # The difference between the second forward and the first.
    input_sq = weights.x.square().sum(dim=1)[:, None, None]
    updates[0] = -step * chosen[:, 0, None] * input_sq * backward[0]
    for layer in range(1, deepest + 1):
        n = alive[layer]
        below, delta = features[layer - 1][:, :n], updates[layer - 1][:, :n]
        moved = _relu_difference(below, delta)
        active = below.relu()
        own[layer][:, :n] = rates[layer][:, :n] * beta_sq[:n] * (_dot(active, active) + _dot(active, moved))
        branch = torch.bmm(moved, weights.hidden[:, layer - 1].transpose(1, 2))
        made = own[layer][:, :n, None] * backward[layer][:, :n]
        updates[layer][:, :n] = skip[:n] * delta + beta[:n] * branch - made
    delta = updates[tops].transpose(0, 1)
    moved = _relu_difference(last, delta) if mlp else delta
    trained = step * chosen[:, 2] * residual * (_dot(read, read) + _dot(read, moved))
    change = _dot(head, moved) - trained
    return Chains(
        depths=torch.tensor(depths),
        features=features,
        updates=updates,
        backward=backward,
        own=own,
        rates=rates,
        gradient_sq=gradient_sq,
        output=output,
        read_change=moved.norm(dim=-1),
        loss_change=residual * change + change.square() / 2,
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    result: Tensor = torch.linalg.vecdot(a, b)
    return result


def _relu_difference(before: Tensor, change: Tensor) -> Tensor:
    """Return relu(before + change) - relu(before) without cancellation: the change itself where both are positive."""
    return torch.where(before > 0, torch.maximum(change, -before), (before + change).relu())
