"""Attention logits, dead and saturated features, and tokens of experts, from calls of torch functions in a forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastfs._monitor.capture.sampling import RowChoice, RowSampler
from fastfs._monitor.measure.weight_motion import AT_ONCE, wide
from fastfs._network.running_modules import given_to
from fastfs._network.weight_products import UnreadCallError, is_plain

__all__ = ["ACTIVATIONS", "ROUTING", "SOFTMAX", "CallPlace", "ForwardCalls", "LayerCalls"]

SOFTMAX = frozenset((F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax))
"""Functions that turn attention logits into weights."""

ROUTING = frozenset((torch.topk, Tensor.topk))
"""Functions that choose experts."""

ACTIVATIONS = frozenset((
    *(F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu),
    *(F.gelu, F.silu, F.mish, F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid, F.softsign),
    *(F.tanh, torch.tanh, Tensor.tanh, torch.tanh_, Tensor.tanh_),
    *(F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, Tensor.sigmoid_),
))  # fmt: skip
"""Functions of single entries."""

_TINY = 1e-3  # derivative of an activation up to which it passes next to nothing on
_ATTENTION = ("attention", "attn")
_COMPOSED = "transformers.activations"  # module of classes that compute an activation by several functions


@dataclass(frozen=True)
class CallPlace:
    """Where a call is: the name of the innermost module, and the innermost watched layer.

    Attributes:
        name: Of the module.
        layer: Number of the layer, None outside of all.
        classes: Names of the classes of the modules from the innermost one to the layer, and the module's own name.
        module: The innermost module.
    """

    name: str
    layer: int | None
    classes: str
    module: Any


@dataclass
class Activation:
    """The kept rows of all calls of activation functions in one module.

    Attributes:
        layer: The watched layer.
        dead: 1 for a unit that is inactive on all of them, 0 for others, NaN if it is not finite, float64 (units,).
        sums: Numbers of entries and of saturated ones, estimated for all rows, and the variance of the latter, (3,).
        sampled: Whether not all rows were kept.
    """

    layer: int | None
    dead: Tensor
    sums: Tensor
    sampled: bool

    def add(self, other: Activation) -> bool:
        """Adds other calls; returns whether they have the same units."""
        if self.dead.shape != other.dead.shape:
            return False
        self.dead, self.sums = torch.minimum(self.dead, other.dead), self.sums + other.sums
        self.sampled = self.sampled or other.sampled
        return True


@dataclass
class ForwardCalls:
    """What the calls of one forward have shown, by the name of the module.

    Attributes:
        heads: Watched layer, and the largest logit of each head.
        activations: Calls of activation functions.
        experts: Watched layer, and the tokens of each expert.
        choosing: Calls of top-k in a layer that has not returned yet: place, indices, number of candidates and rows.
        unknown: Why nothing is known of a module, by its name and kind; with its layer.
    """

    heads: dict[str, tuple[int | None, Tensor]] = field(default_factory=dict)
    activations: dict[str, Activation] = field(default_factory=dict)
    experts: dict[str, tuple[int | None, Tensor]] = field(default_factory=dict)
    choosing: list[tuple[CallPlace, Tensor, int, int]] = field(default_factory=list)
    unknown: dict[tuple[str, str], tuple[int | None, str]] = field(default_factory=dict)

    def add(self, other: ForwardCalls) -> None:
        """Adds another forward of the step."""
        self.unknown |= other.unknown
        for ours, theirs, merge in ((self.heads, other.heads, torch.maximum), (self.experts, other.experts, torch.add)):
            for name, (layer, values) in theirs.items():
                if name in ours and ours[name][1].shape == values.shape:
                    values = merge(ours[name][1], values)
                ours[name] = layer, values
        for name, activation in other.activations.items():
            known = self.activations.setdefault(name, activation)
            if known is not activation and not known.add(activation):
                self.unknown[name, "activations"] = activation.layer, _UNITS

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors for the payload and what the host knows of them."""
        lost: dict[str, list[Any]] = {"heads": [], "activations": []}
        for (name, kind), (layer, why) in self.unknown.items():
            lost[kind].append([name, 0, layer, *([False] if kind == "activations" else []), why])
        heads = {n: x for n, x in self.heads.items() if (n, "heads") not in self.unknown}
        calls = {n: x for n, x in self.activations.items() if (n, "activations") not in self.unknown}
        fields: dict[str, Tensor] = {}
        for name, every in (("head_logits", heads), ("expert_tokens", self.experts)):
            if every:
                fields[name] = torch.cat([values for _, values in every.values()])
        if calls:
            dead = [x.sums.new_tensor([x.dead.numel()]) for x in calls.values()]
            rows = [torch.cat([n, x.dead.sum()[None], x.sums]) for n, x in zip(dead, calls.values(), strict=True)]
            fields["activation_sums"] = torch.stack(rows)
        facts = {
            "heads": [[name, len(x), layer, None] for name, (layer, x) in heads.items()] + lost["heads"],
            "activations": [[n, 1, x.layer, x.sampled, None] for n, x in calls.items()] + lost["activations"],
            "experts": [[name, len(x), layer] for name, (layer, x) in self.experts.items()],
        }
        return fields, facts


_UNITS = "its calls have different numbers of units"


class LayerCalls:
    """Looks at calls on kept rows.

    Args:
        sampler: Chooses rows.
        device: Of the results.
    """

    def __init__(self, sampler: RowSampler, device: torch.device) -> None:
        self._sampler = sampler
        self._device = device

    # Attention

    def attention(
        self, found: ForwardCalls, place: CallPlace, func: Any, args: Any, kwargs: Any, heads: int | None
    ) -> None:
        """Notes the largest logit of each head, of kept queries and all keys that they may attend to.

        Args:
            found: Of the forward.
            place: Of the call.
            func: One of `SOFTMAX`.
            args: Its arguments.
            kwargs: Its arguments by name.
            heads: Number of heads that the first dimension of three counts together with the samples, if it is known.
        """
        try:
            if func is F.scaled_dot_product_attention:
                largest = self._of_product(*args, **kwargs)
            else:
                largest = self._of_softmax(_logits(place, args, kwargs, heads))
        except UnreadCallError as error:
            found.unknown[place.name, "heads"] = place.layer, str(error)
            return
        if largest is None:
            return
        result = ForwardCalls(heads={place.name: (place.layer, largest.to(self._device, torch.float64))})
        if place.name in found.heads and found.heads[place.name][1].shape != largest.shape:
            found.unknown[place.name, "heads"] = place.layer, "its calls have different numbers of heads"
        else:
            found.add(result)

    def _queries(self, samples: int, queries: int, device: torch.device) -> Tensor:
        """Returns the positions of the kept queries, the same ones in every sample."""
        kept = min(max(self._sampler.wanted(samples * queries) // samples, 1), queries)
        return self._sampler.rows_of(RowChoice(queries, kept), device)

    def _of_softmax(self, logits: Tensor | None) -> Tensor | None:
        if logits is None or not logits.numel():
            return None
        at = self._queries(logits.shape[0], logits.shape[2], logits.device)
        largest = wide(logits[:, :, at], "matmul").amax(dim=3)
        # Models may subtract the largest logit of each query, which is then not known.
        return torch.where((largest == 0.0).all(), math.nan, largest.amax(dim=(0, 2)))

    def _of_product(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if not all(map(is_plain, (query, key))):
            raise UnreadCallError("its queries and keys are no ordinary tensors")
        if query.dim() == 3:
            query, key = query.unsqueeze(1), key.unsqueeze(1)
            attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        if query.dim() != 4:
            raise UnreadCallError(f"its queries have {query.dim()} dimensions, expected 4 (samples, heads, ...)")
        if not query.numel() or not key.numel():
            return None
        samples, heads, queries = max(len(query), len(key)), max(query.shape[1], key.shape[1]), query.shape[2]
        query, key = query.expand(samples, heads, -1, -1), key.expand(samples, -1, -1, -1)
        shared = heads // key.shape[1]
        at = self._queries(samples, queries, query.device)
        factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        mask = None if attn_mask is None else attn_mask.expand(samples, heads, queries, key.shape[2])
        numbers = torch.arange(key.shape[2], device=query.device)
        found = []
        step = max(AT_ONCE // max(heads * len(at) * key.shape[2], 1), 1)
        for first in range(0, samples, step):
            now = slice(first, first + step)
            keys = wide(key[now], "matmul").repeat_interleave(shared, dim=1)
            logits = wide(query[now][:, :, at], "matmul") * factor @ keys.transpose(-1, -2)
            if is_causal:
                logits = logits.masked_fill(numbers[None, :] > at[:, None], -math.inf)
            if mask is not None:
                own = mask[now][:, :, at]
                logits = logits.masked_fill(~own, -math.inf) if own.dtype is torch.bool else logits + own
            found.append(logits.amax(dim=(0, 2, 3)))
        return torch.stack(found).amax(dim=0)

    # Activations

    def activation(self, found: ForwardCalls, place: CallPlace, func: Any, args: Any, kwargs: Any) -> None:
        """Notes on which kept entries the derivative of an activation function is at most 0.001.

        A unit is an entry of the last dimension, and a row everything before it; of four and more dimensions, a unit is
        a channel, the second dimension, and a row a sample.
        """
        x, *rest = args if args else (kwargs["input"],)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("input", "out")}
        if (whole := _whole(place.module)) is not None:
            func, x, rest, kwargs = whole.forward, given_to(whole), [], {}
        if not is_plain(x) or x.dim() < 2 or not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1], 1) if x.dim() < 4 else x.detach().flatten(2)
        total, units, size = rows.shape
        most = max(AT_ONCE // (units * size), 2)
        choice = RowChoice(total, min(self._sampler.wanted(total), most))
        kept = wide(self._sampler.keep(rows.flatten(1), choice).values, "matmul").view(-1, units, size)
        finite = kept.isfinite()
        flat = (_derivative(func, kept, rest, kwargs).abs() <= _TINY).double().where(finite, math.nan)
        own = flat.flatten(1).sum(dim=1)
        k = choice.kept
        variance = own.new_zeros(()) if k == total else own.var() * (total * total / k * (1.0 - k / total))
        sums = torch.stack([own.new_tensor(float(x.numel())), own.sum() * (total / k), variance])
        dead = flat.amin(dim=(0, 2))
        activation = Activation(place.layer, dead.to(self._device), sums.to(self._device), k < total)
        found.add(ForwardCalls(activations={place.name: activation}))

    # Experts

    def choice(self, found: ForwardCalls, place: CallPlace, args: Any, kwargs: Any, indices: Tensor) -> None:
        """Notes a call of top-k along the last dimension in a watched layer, until the layer returns."""
        scores = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        if place.layer is not None and is_plain(scores) and scores.dim() > 1 and dim in (-1, scores.dim() - 1):
            found.choosing.append((place, indices, scores.shape[-1], scores.numel() // max(scores.shape[-1], 1)))

    def leave(self, found: ForwardCalls, layer: int, rows: int) -> None:
        """Counts the tokens of experts when a layer has returned so many rows.

        Top-k chooses experts if it was called for each row once, and of several such calls in a module, the one with
        the most candidates: others choose groups of experts.
        """
        choosing = [each for each in found.choosing if each[0].layer == layer]
        found.choosing = [each for each in found.choosing if each[0].layer != layer]
        for place, indices, experts, count in choosing:
            known = found.experts.get(place.name)
            if count != rows or (known is not None and len(known[1]) > experts):
                continue
            ones = torch.ones(indices.numel(), dtype=torch.float64, device=indices.device)
            tokens = ones.new_zeros(experts).scatter_add_(0, indices.flatten(), ones).to(self._device)
            if known is not None and len(known[1]) < experts:
                del found.experts[place.name]
            found.add(ForwardCalls(experts={place.name: (place.layer, tokens)}))


def _logits(place: CallPlace, args: Any, kwargs: Any, heads: int | None) -> Tensor | None:
    """Returns the input of a softmax over keys, (samples, heads, queries, keys); None if it is none."""
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not is_plain(x) or dim not in (-1, x.dim() - 1):
        return None
    values: Tensor = x.detach()
    if heads is not None and x.dim() == 3:
        return values.view(-1, heads, *values.shape[1:])
    return values if x.dim() == 4 and any(word in place.classes.lower() for word in _ATTENTION) else None


def _whole(module: Any) -> Any:
    """Returns the module if it computes an activation by several functions, else None."""
    return module if type(module).__module__ == _COMPOSED else None


def _derivative(func: Callable[..., Tensor], x: Tensor, rest: Any, kwargs: Any) -> Tensor:
    """Returns the derivative of a function of single entries, which may write to its argument."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    with torch.enable_grad(), hooks:  # innermost, so that those of a checkpoint do not see these tensors
        x = x.requires_grad_()
        (found,) = torch.autograd.grad(func(x.clone(), *rest, **kwargs).sum(), x)
    return found
