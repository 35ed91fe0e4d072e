"""UpdateMeter: what every step of an optimizer does to each parameter, without a second copy of the parameters.

For SGD, Adam, AdamW, Adamax and RMSprop the update follows from what is left after the step (`closed_forms`), and one
pass over gradients, parameters and state measures it. For everything else the parameters are copied before the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from fastfs import functional
from fastfs.checks import DTYPES
from fastfs.monitor.measure import closed_forms
from fastfs.monitor.measure.closed_forms import Form, Group, closed_form, coefficients, rewrites_gradients
from fastfs.rules import Rule
from fastfs.stats import ParameterStats

_SNAPSHOT = (1.0, 0.0, -1.0, 0.0)  # dw = w - s


@dataclass
class _Part:
    """Parameters of one group and device that are measured in the same way in the step under way."""

    group: Group
    form: Form | None  # None: by a snapshot
    device: torch.device
    closed: bool  # by the form
    indices: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)


@dataclass
class _Call:
    """The arguments of one call of the op."""

    indices: list[int] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    coefficients: list[Tensor] = field(default_factory=list)


class UpdateMeter:
    """Measures the update of every parameter in every step: <g, dw>, |dw|^2, |g|^2 and |w|^2.

    Call `before` right before the optimizer's step (in a step pre-hook, or the line above) and `after` right after it
    (in a step post-hook), before the gradients are cleared. Neither waits for a device, and neither changes anything
    that training sees.

    A closed form tells the update that the optimizer made. What else changes a parameter (a hook that clamps it) is
    seen by a snapshot only, and so is the rounding of w itself.

    Args:
        optimizer: Any optimizer with one update per step: not LBFGS.
        snapshot: Copy all parameters before every step, for `previous`, and take every update from the copies.

    Raises:
        ValueError: for LBFGS, whose step evaluates the gradient several times.
    """

    def __init__(self, optimizer: Optimizer, *, snapshot: bool = False) -> None:
        if isinstance(optimizer, LBFGS):
            raise ValueError("UpdateMeter: expected an optimizer with one update per step, got LBFGS")
        self.optimizer = optimizer
        self.snapshot = snapshot
        self._buffers: dict[Tensor, Tensor] = {}
        # By id of a parameter: form and dtype with which its state was found to serve; of the state that is `_state`.
        self._closed: dict[int, tuple[Form, torch.dtype]] = {}
        self._state: object = optimizer.state
        self._forms: dict[Form, Form] = {}
        self._parts: list[_Part] | None = None  # between before() and after()
        self._orders: dict[tuple[int, ...], Tensor] = {}

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of the optimizer, in the order of its groups; also those added since."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def snapshot_bytes(self) -> int:
        """Memory of the copies in all, once every parameter that needs one has had a gradient."""
        total = 0
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._buffers or form is None or not self._follows(p, form):
                    total += p.numel() * p.element_size()
        return total

    @property
    def exact(self) -> str:
        """How each part is measured, in a sentence."""
        kinds: Counter[str] = Counter()
        name = type(self.optimizer).__name__
        for group in self.optimizer.param_groups:
            form = self._form(group)
            for p in group["params"]:
                if p in self._buffers or form is None or not self._follows(p, form):
                    kinds["from a copy made before the step, exactly"] += 1
                else:
                    kinds[f"by the closed form of {name}, up to {str(p.dtype).removeprefix('torch.')} rounding"] += 1
        parts = [f"{count} parameter{'s' * (count > 1)} {how}" for how, count in kinds.items()]
        return "; ".join(parts) + "." if parts else "No parameters."

    @property
    def previous(self) -> list[Tensor]:
        """The parameters before the last step, in the order of `parameters`; overwritten by the next `before`.

        Raises:
            RuntimeError: without `snapshot=True`, or for a parameter that was added after the last `before`.
        """
        if not self.snapshot:
            raise RuntimeError("UpdateMeter.previous: expected UpdateMeter(optimizer, snapshot=True)")
        parameters = self.parameters
        if not all(p in self._buffers for p in parameters):
            raise RuntimeError("UpdateMeter.previous: expected a call of before() right before the last step")
        return [self._buffers[p] for p in parameters]

    def before(self) -> None:
        """Copies the parameters that need it; to be called right before the step, when all gradients are there.

        Raises:
            ValueError: for a parameter of a dtype that cannot be measured, or a DTensor.
        """
        parts: list[_Part] = []
        copied: list[Tensor] = []
        if self.optimizer.state is not self._state:  # load_state_dict makes a new one
            self._state = self.optimizer.state
            self._closed.clear()
        closed, index = self._closed, -1
        for group in self.optimizer.param_groups:
            form = self._form(group)
            found: list[_Part] = []
            part: _Part | None = None
            for p in group["params"]:
                index += 1
                gradient = p.grad
                if gradient is None:
                    if self.snapshot:
                        copied.append(p)
                    continue
                dtype = p.dtype
                follows = form is not None and gradient.dtype is dtype and not gradient.is_sparse
                if follows and closed.get(id(p)) != (form, dtype):
                    follows = self._learn(p, form)
                if not follows:
                    _check(index, p)
                    copied.append(p)
                device = p.device
                if part is None or part.device != device or part.closed is not follows:
                    part = next((x for x in found if x.device == device and x.closed is follows), None)
                    if part is None:
                        part = _Part(group, form if follows else None, device, follows)
                        found.append(part)
                part.indices.append(index)
                part.params.append(p)
            parts += found
        self._copy(copied)
        self._parts = parts

    def after(self) -> ParameterStats:
        """The statistics of the step that was just made: shape (P,), on the device of the first parameter.

        Rows of zeros for parameters that had no gradient in this step, and no update in a step that a fused optimizer
        skipped because GradScaler had found infinite gradients (`optimizer.found_inf`).

        Raises:
            RuntimeError: if `before` was not called for this step, or gradients or state are missing.
        """
        if self._parts is None:
            raise RuntimeError("UpdateMeter.after: expected a call of before() right before this step")
        parts, self._parts = self._parts, None
        calls: dict[tuple[torch.device, Rule, torch.device], _Call] = {}
        with torch.no_grad():
            for part in parts:
                self._add(part, calls)
            results = [(call.indices, self._measure(rule, call)) for (_, rule, _), call in calls.items()]
            return ParameterStats(self._in_order(results))

    def _form(self, group: Group) -> Form | None:
        form = None if self.snapshot else closed_form(self.optimizer, group)
        return form and self._forms.setdefault(form, form)  # one object each: quick to compare

    def _learn(self, p: Tensor, form: Form | None) -> bool:
        """`_follows`, kept for the next steps once there is a state."""
        if form is None or not self._follows(p, form):
            return False
        if not form.states or self.optimizer.state.get(p):
            self._closed[id(p)] = (form, p.dtype)
        return True

    def _follows(self, p: Tensor, form: Form) -> bool:
        """Whether the update of this parameter follows from the state."""
        dtype = p.dtype
        if dtype not in closed_forms.DTYPES:
            return False
        if p.grad is not None and p.grad.dtype != dtype:
            return False
        state = self.optimizer.state.get(p)
        if not state:
            return True  # torch makes it with the parameter's dtype
        for name in form.states:
            entry = state.get(name)
            if entry is not None and entry.dtype != dtype:
                return False
        return True

    @torch.no_grad()
    def _copy(self, params: list[Tensor]) -> None:
        if not params and not self._buffers:
            return
        old = self._buffers
        self._buffers = {}
        for p in params:
            buffer = old.get(p)
            if buffer is None or buffer.shape != p.shape or buffer.dtype != p.dtype or buffer.device != p.device:
                buffer = torch.empty_like(p, requires_grad=False)
            self._buffers[p] = buffer
        if len(old) > len(params):  # parameters without a gradient in this step keep their buffers
            current = set(self.parameters)
            self._buffers.update({p: b for p, b in old.items() if p in current and p not in self._buffers})
        if params:
            torch._foreach_copy_([self._buffers[p] for p in params], [p.detach() for p in params])

    def _add(self, part: _Part, calls: dict[tuple[torch.device, Rule, torch.device], _Call]) -> None:
        """Adds a part to the call that it can share."""
        form, params = part.form, part.params
        gradients = [p.grad for p in params]
        if any(g is None for g in gradients):
            raise RuntimeError("UpdateMeter.after: a gradient was cleared since before(); call it before zero_grad()")
        states = self.optimizer.state
        rewritten = rewrites_gradients(self.optimizer, part.group, params)
        if form is None:
            dense = [
                self._dense(p, g, part.group if rewritten else None) for p, g in zip(params, gradients, strict=True)
            ]
            table = torch.tensor([_SNAPSHOT], dtype=torch.float64, device="cpu").expand(len(params), -1)
            call = calls.setdefault((part.device, Rule.LINEAR, table.device), _Call())
            call.gradients += dense
            for p, g in zip(params, dense, strict=True):
                call.parameters.append(p.to(g.dtype))
                call.first.append(self._buffers[p].to(g.dtype))
        else:
            try:
                kept = [states[p] for p in params] if form.states else []
                steps = [s["step"] for s in kept] if form.steps else []
                first = gradients if form.first is None else [s[form.first] for s in kept]
                second = params if form.second is None else [s[form.second] for s in kept]
            except KeyError as missing:
                raise RuntimeError(
                    f"UpdateMeter.after: the optimizer's state has no {missing}; call it right after step()"
                ) from None
            table = coefficients(self.optimizer, part.group, form, len(params), steps, rewritten)
            call = calls.setdefault((part.device, form.rule, table.device), _Call())
            call.gradients += gradients  # type: ignore[arg-type]
            call.parameters += params
            call.first += first  # type: ignore[arg-type]
            if form.rule.states == 2:
                call.second += second
        call.indices += part.indices
        call.coefficients.append(table)

    def _dense(self, p: Tensor, gradient: Tensor | None, rewritten: Group | None) -> Tensor:
        """The gradient as the op takes it, of the wider dtype of gradient and parameter."""
        assert gradient is not None
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        gradient = gradient.to(torch.promote_types(gradient.dtype, p.dtype))
        if rewritten is not None:
            gradient = gradient - rewritten["momentum"] * self.optimizer.state[p]["momentum_buffer"]
        return gradient

    def _measure(self, rule: Rule, call: _Call) -> Tensor:
        tables = call.coefficients
        table = torch.cat(tables) if len(tables) > 1 else tables[0].contiguous()
        sums = functional.optimizer_stats(rule, call.gradients, call.parameters, call.first, call.second, table).sums
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None:  # the step did nothing, and the state is that of the last one
            made = found_inf.reshape(()).to(sums.device, non_blocking=True) == 0
            sums[:, :2] = torch.where(made, sums[:, :2], 0.0)
        return sums

    def _in_order(self, results: Sequence[tuple[list[int], Tensor]]) -> Tensor:
        """One row per parameter, zeros for those that no result has."""
        parameters = self.parameters
        count, columns = len(parameters), len(ParameterStats.names)
        if len(results) == 1 and results[0][0] == list(range(count)):
            return results[0][1]
        device = parameters[0].device if parameters else torch.device("cpu")
        zeros = torch.zeros((1, columns), dtype=torch.float64, device=device)
        rows = torch.cat([zeros, *(sums.to(device, non_blocking=True) for _, sums in results)])
        places = [0] * count
        for place, index in enumerate((i for indices, _ in results for i in indices), start=1):
            places[index] = place
        key = tuple(places)
        order = self._orders.get(key)
        if order is None or order.device != device:
            order = torch.tensor(places, dtype=torch.int64, device="cpu").to(device, non_blocking=True)
            self._orders = {key: order}  # the last one: which parameters have gradients seldom changes
        return rows[order]


def _check(index: int, p: Tensor) -> None:
    if hasattr(p, "to_local"):
        raise ValueError(f"parameter {index} is a {type(p).__name__}, expected a tensor of this rank alone")
    if p.dtype not in DTYPES:
        raise ValueError(f"parameter {index} has dtype {p.dtype}, expected one of {', '.join(map(str, DTYPES))}")
