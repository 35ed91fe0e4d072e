"""The numbers of a step by hand: a second trial is given the state of the first one's forward, and runs again.

Nothing of the training is touched: states are cloned before the forwards of a step, parameters before and after the
optimizer, and everything else happens in shadows, one in the precision of the loop and one in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastfs
from fastfs._monitor.capture.sampling import RowSampler, SampleSubset
from tests.fuzz.bodies import LAYERS, ROWS
from tests.fuzz.states import buffers_of, clones, copy_values, give_random_state, random_state, restore, state_of

if TYPE_CHECKING:
    from tests.fuzz.trial import Trial

__all__ = ["SAMPLES", "Hand", "LayerNumbers", "Numbers"]

H = 1e-3  # of the central difference in float64
SAMPLES = 3  # of the ROWS of a batch, for the monitors with samples=


@dataclass
class LayerNumbers:
    """Of one layer; None where there is nothing to compare.

    Attributes:
        entries: numbers that the features have.
        same: features before, backward vectors and features after in the precision of the loop, flat, float64. With
            samples=, those of the samples, multiplied such that their squares estimate those of all.
        exact: in float64.
        linear: the derivative along the update, in float64.
        decreases: D, with the gradients as autograd had them and as ``.grad`` held them.
        owned: whether it is clear which parameters are its own: all layers have run, in an order.
        rounding: what rounding of parameters and gradients to their dtype may add to D; and so on.
    """

    entries: int = 0
    same: tuple[Tensor, Tensor, Tensor] | None = None
    exact: tuple[Tensor, Tensor, Tensor] | None = None
    linear: Tensor | None = None
    decreases: list[float] = field(default_factory=list)
    rounding: float = 0.0
    gradient_norms: list[float] = field(default_factory=list)
    gradient_rounding: float = 0.0
    owned: bool = True
    update_norm: float = math.nan
    update_rounding: float = 0.0


Numbers = dict[str, LayerNumbers]
Passes = list[list[tuple[str, Tensor]]]


class Hand:
    """Watches one trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._shadows: dict[bool, Trial] = {}
        self._handles: list[Any] = []
        self._raw: list[Tensor | None] = []
        self._met: list[list[Tensor]] = []  # the buffers that each forward of the step found
        self.counting = False
        if trial.recipe.compiled == "none":
            trial.model.register_forward_pre_hook(lambda *_: self._forward())
        for index, p in enumerate(trial.parameters):
            if p.requires_grad:
                p.register_hook(lambda g, i=index: self._gradient(i, g))

    @staticmethod
    def probe(trial: Trial) -> fastfs.monitor.Probe:
        """A fixed batch."""
        x, y = trial.batch(999)
        return fastfs.monitor.Probe(x.float(), lambda out: F.mse_loss(out.float(), y.float()))

    # Told by the loop

    def enter(self, step: int, parts: int) -> None:
        """Right before the forwards that count."""
        self.step, self.parts = step, parts
        self._raw = [None] * len(self.trial.parameters)
        self._entry = state_of(self.trial)
        self._met = []
        self._at_forward = clones(self.trial.parameters)
        self._grads: list[Tensor | None] = []

    def gradients(self, scale: float) -> None:
        """Right after the backwards that count."""
        self._scale = scale
        self._grads = [None if p.grad is None else p.grad.detach().clone() for p in self.trial.parameters]

    def before_step(self, restored: Mapping[Tensor, Tensor] | None = None, *, as_forward: bool = False) -> None:
        """Right before the optimizer's update.

        Args:
            restored: parameters that the step puts back first, to these values.
            as_forward: the update came within the backward.
        """
        known = restored or {}
        now = clones([known.get(p, p) for p in self.trial.parameters])
        self._before = self._at_forward if as_forward else now
        if self.trial.recipe.monitor == "probe":  # runs here, after what the training forward did to the buffers
            self._entry = state_of(self.trial)

    def after_step(self) -> None:
        self._after = clones(self.trial.parameters)

    def _forward(self) -> None:
        if self.counting:
            self._met.append(clones(buffers_of(self.trial)))

    def _gradient(self, index: int, gradient: Tensor) -> None:
        if self.counting:
            old, new = self._raw[index], gradient.detach().clone()
            self._raw[index] = new if old is None else old + new

    # Afterwards

    def numbers(self) -> Numbers:
        """Of the step that is over; global generators stay what they are."""
        now = random_state()
        try:
            return self._numbers()
        finally:
            give_random_state(now)

    def _numbers(self) -> Numbers:
        probe = self.trial.recipe.monitor == "probe"
        if probe:  # forward and backward right before the step
            self._at_forward = self._before
        result: Numbers = {}
        exact = self._shadow(True)
        step = [a.to(_wide(a)) - b.to(_wide(b)) for a, b in zip(self._after, self._before, strict=True)]
        wide = [b.to(_wide(b)) for b in self._before]
        found = self._triple(exact, self._before, self._after)
        ahead, behind = (
            self._features(exact, [w + sign * H * d for w, d in zip(wide, step, strict=True)], found)
            for sign in (1, -1)
        )
        same = found if probe else self._triple(self._shadow(False), self._before, self._after)
        gradients = [self._raw, self._grads]
        if probe:
            gradients = [self._probe_gradients(shadow) for shadow in (exact, self._shadow(False))]
        # Of several forwards each may leave layers out: what has less upstream is the earlier layer.
        order = sorted(found.order, key=lambda name: len(found.upstream[name]))
        for name in _names(exact):
            layer = result[name] = LayerNumbers()
            layer.same, layer.exact = same.layer(name), found.layer(name)
            layer.entries = found.entries(name)
            layer.owned = set(order) == set(_names(exact)) and not found.ambiguous
            if ahead is not None and behind is not None and layer.exact is not None:
                layer.linear = (ahead[name] - behind[name]) / (2 * H)
            upstream = found.upstream.get(name, set())
            before = order[: order.index(name)] if name in order else []
            earlier = set().union(*(found.upstream[other] for other in before))
            self._aligned(layer, step, gradients, upstream, upstream - earlier)
        return result

    def _aligned(
        self,
        layer: LayerNumbers,
        step: Sequence[Tensor],
        gradients: Sequence[Sequence[Tensor | None]],
        upstream: set[int],
        own: set[int],
    ) -> None:
        scale = 1.0 if self.trial.recipe.monitor == "probe" else self._scale
        trained = {id(p) for o in self.trial.optimizers for group in o.param_groups for p in group["params"]}
        upstream = {i for i in upstream if id(self.trial.parameters[i]) in trained}
        own &= upstream

        along = step
        if self.trial.recipe.precision == "float64" and self.trial.recipe.monitor == "probe":  # which is in float32
            along = [(a.float() - b.float()).double() for a, b in zip(self._after, self._before, strict=True)]

        def dot(a: Tensor, b: Tensor) -> float:
            product = a.to(_wide(a)).conj() * b.to(_wide(b))
            return float(product.real.sum())

        for values in gradients:
            grads = {i: g / scale for i in upstream if (g := values[i]) is not None}
            layer.decreases.append(-sum(dot(g, along[i]) for i, g in grads.items()))
            layer.gradient_norms.append(math.sqrt(sum(dot(grads[i], grads[i]) for i in own if i in grads)))
            eps = max((torch.finfo(self._before[i].dtype).eps for i in grads), default=0.0)
            sizes = (g.abs().double() * (self._after[i].abs() + step[i].abs()) for i, g in grads.items())
            layer.rounding = max(layer.rounding, 2 * eps * float(sum(x.sum() for x in sizes)))
            layer.gradient_rounding = max(layer.gradient_rounding, eps * layer.gradient_norms[-1])
        layer.update_norm = math.sqrt(sum(dot(step[i], step[i]) for i in own))
        layer.update_rounding = sum(
            2 * torch.finfo(self._before[i].dtype).eps * float(self._after[i].abs().double().norm()) for i in own
        )

    # In the shadows

    def _shadow(self, exact: bool) -> Trial:
        if exact not in self._shadows:
            trial = type(self.trial)(self.trial.recipe)
            trial.switch.again = None  # everything in plain sight
            self._shadows[exact] = trial.exactly() if exact else trial
        return self._shadows[exact]

    def _run(self, shadow: Trial, values: Sequence[Tensor]) -> tuple[Passes, Tensor]:
        """The forwards of the step again, at these parameters."""
        for mine, theirs, value in zip(shadow.parameters, self.trial.parameters, values, strict=True):
            mine.data = value.to(_wide(value)) if shadow.switch.exact else value.clone()
            mine.requires_grad_(theirs.requires_grad)
        restore(shadow, self._entry)
        if shadow.recipe.monitor == "probe":
            return self._taps(shadow, lambda: _probe_loss(shadow))
        return self._taps(shadow, lambda: sum(shadow.compute(self.step, part) for part in range(self.parts)))

    def _taps(self, shadow: Trial, loss: Callable[[], Any]) -> tuple[Passes, Tensor]:
        """Every forward starts from the buffers that its like found in training, whatever the ones before it left."""
        passes: Passes = []

        def enter(*_: Any) -> None:
            if shadow.recipe.monitor != "probe" and len(passes) < len(self._met):
                copy_values(buffers_of(shadow), self._met[len(passes)])
            passes.append([])

        handles = [shadow.model.register_forward_pre_hook(enter)]
        for name in _names(shadow):

            def tap(_m: Any, _a: Any, out: Any, name: str = name) -> None:
                passes[-1].append((name, out[0] if isinstance(out, tuple) else out))

            handles.append(shadow.inner.get_submodule(name).register_forward_hook(tap))
        try:
            return passes, loss()
        finally:
            for handle in handles:
                handle.remove()

    def _triple(self, shadow: Trial, before: Sequence[Tensor], after: Sequence[Tensor]) -> _Found:
        passes, loss = self._run(shadow, self._at_forward)
        visits = [tensor for visits in passes for _, tensor in visits if tensor.requires_grad]
        shadow_loss = loss if shadow.recipe.monitor == "probe" else loss * self.trial.repeats
        gradients: Sequence[Tensor | None] = ()
        if visits:
            gradients = torch.autograd.grad(shadow_loss, visits, allow_unused=True, retain_graph=True)
        samples = self.trial.recipe.monitor.startswith("samples")
        found = _Found(passes, dict(zip(map(id, visits), gradients, strict=True)), samples)
        found.walk(shadow.parameters)
        moved = any(not torch.equal(a, b) for a, b in zip(self._at_forward, before, strict=True))
        found.before = self._features(shadow, before, found) if moved else found.features(passes)
        found.after = self._features(shadow, after, found)
        return found

    def _features(self, shadow: Trial, values: Sequence[Tensor], found: _Found) -> dict[str, Tensor] | None:
        passes, _ = self._run(shadow, values)
        return found.features(passes)

    def _probe_gradients(self, shadow: Trial) -> list[Tensor | None]:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # with it, gradients of all uses of a weight are added up in 16 bits
        try:
            _, loss = self._run(shadow, self._before)
        finally:
            torch.set_autocast_cache_enabled(cached)
        trained = [p for p in shadow.parameters if p.requires_grad]
        found = dict(zip(map(id, trained), torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
        return [found.get(id(p)) for p in shadow.parameters]


class _Found:
    """Features of the forwards that count, and what came back to them."""

    def __init__(self, passes: Passes, gradients: dict[int, Tensor | None], samples: bool) -> None:
        self._passes = passes
        self._samples = samples
        self._gradients = gradients
        self.counted = [
            number
            for number, visits in enumerate(passes)
            if any(gradients.get(id(tensor)) is not None for _, tensor in visits)
        ]
        self.before: dict[str, Tensor] | None = None
        self.after: dict[str, Tensor] | None = None
        self.upstream: dict[str, set[int]] = {}  # in the order in which the layers put something out

    @property
    def order(self) -> list[str]:
        return list(self.upstream)

    @property
    def ambiguous(self) -> bool:
        """Whether forwards that leave layers out do not tell which of two layers is the earlier one."""
        different = {frozenset(upstream) for upstream in self.upstream.values()}
        return len(self.counted) > 1 and len(different) < len(self.upstream)

    def layer(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.before is None or self.after is None or name not in self.before or name not in self.after:
            return None
        back = [
            torch.zeros_like(tensor) if (g := self._gradients[id(tensor)]) is None else g
            for number in self.counted
            for visited, tensor in self._passes[number]
            if visited == name and tensor.requires_grad
        ]
        if not back:
            return None
        return self.before[name], torch.cat([self._flat(b) for b in back]), self.after[name]

    def entries(self, name: str) -> int:
        """How many numbers the features of a layer have."""
        visits = [x for number in self.counted for visited, x in self._passes[number] if visited == name]
        return sum(x.numel() for x in visits if x.requires_grad)

    def _flat(self, x: Tensor) -> Tensor:
        x = x.detach().double()
        if not self._samples or x.shape[0] % ROWS:
            return x.flatten()
        numbers = RowSampler(None, SAMPLES).samples_of(SampleSubset(SAMPLES, ROWS), x.device)
        return x.reshape(ROWS, -1)[numbers].flatten() * math.sqrt(ROWS / SAMPLES)

    def features(self, passes: Passes) -> dict[str, Tensor] | None:
        """Those that belong to the counted ones; None if the forwards went another way."""
        shapes = [[(name, x.shape) for name, x in visits] for visits in passes]
        if shapes != [[(name, x.shape) for name, x in visits] for visits in self._passes]:
            return None
        result: dict[str, list[Tensor]] = {}
        for number in self.counted:
            for (name, tensor), (_, first) in zip(passes[number], self._passes[number], strict=True):
                if first.requires_grad:
                    result.setdefault(name, []).append(self._flat(tensor))
        return {name: torch.cat(parts) for name, parts in result.items()}

    def walk(self, parameters: Sequence[Tensor]) -> None:
        """Which parameters are upstream of each layer."""
        index = {id(p): number for number, p in enumerate(parameters)}
        for number in self.counted:
            for name, tensor in self._passes[number]:
                self.upstream.setdefault(name, set()).update(_leaves(tensor.grad_fn, index))


def _leaves(start: Any, index: dict[int, int]) -> set[int]:
    found, seen, stack = set(), set(), [start]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in index:
            found.add(index[id(leaf)])
        stack += [following for following, _ in node.next_functions]
    return found


def _names(trial: Trial) -> list[str]:
    """The watched layers."""
    pattern = re.compile(LAYERS.get(trial.recipe.body, r"blocks\.\d+$"))
    return [name for name, _ in trial.inner.named_modules() if pattern.search(name)]


def _probe_loss(shadow: Trial) -> Tensor:
    x, y = shadow.batch(999)
    return F.mse_loss(shadow.model(x), y)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
