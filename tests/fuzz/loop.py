"""The training loop of a trial, step by step."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.fuzz.hand import Hand, Numbers
from tests.fuzz.optimizers import Sam, make_optimizers
from tests.fuzz.trial import Trial

__all__ = ["Loop"]


def _halve_gradient(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(0.5)


def _step_now(optimizer: torch.optim.Optimizer, _p: Tensor) -> None:
    optimizer.step()
    optimizer.zero_grad()


class Loop:
    """Takes training steps; tells the hand what counts, if there is one."""

    def __init__(self, trial: Trial, hand: Hand | None, stack: contextlib.ExitStack) -> None:
        self.trial, self.hand, self.recipe = trial, hand, trial.recipe
        recipe = self.recipe
        self.model: Any = trial.model
        if recipe.compiled != "none":
            self.model = trial.model = torch.compile(trial.model, backend=recipe.compiled)
        trained = [p for p in trial.parameters if p.requires_grad and p is not getattr(trial.inner, "late", None)]
        if recipe.extra == "gan":
            mine = {id(p) for p in trial.outer.generator.parameters()}
            trained = [p for p in trained if id(p) not in mine]
            self.gan = torch.optim.Adam(trial.outer.generator.parameters(), lr=0.01)
        trial.optimizers = make_optimizers(recipe.optimizer, trained, recipe.scale)
        self.real: list[torch.optim.Optimizer] = [getattr(o, "optimizer", o) for o in trial.optimizers]
        self.trained = trained
        self.sam = Sam(trained, self.real[0]) if recipe.sam == "two steps" else None
        self.scaler: Any = None
        if recipe.scaler in ("scaler", "overflow"):
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        self.parts = int(recipe.micro)
        self.scheduler: Any = None
        if recipe.schedule != "none":
            self.scheduler = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in self.real]
        self._hooks(stack)
        self.monitors: list[Any] = []
        self.marks: list[dict[int, int]] = []

    def _hooks(self, stack: contextlib.ExitStack) -> None:
        """Those that are there before the monitor."""
        recipe = self.recipe
        if recipe.schedule == "early hook":
            self.real[0].register_step_post_hook(self._advance)
        elif recipe.schedule == "global hook":
            stack.callback(register_optimizer_step_post_hook(self._halve).remove)
        if recipe.clip == "step hook":
            self.real[0].register_step_pre_hook(self._scale)
        elif recipe.clip == "tensor hook":
            self.trained[0].register_hook(lambda g: 0.5 * g)
        elif recipe.clip == "accumulate hook":
            self.trained[0].register_post_accumulate_grad_hook(_halve_gradient)
        if recipe.optimizer == "in backward":
            for p, optimizer in zip(self.trained, self.real, strict=True):
                p.register_post_accumulate_grad_hook(functools.partial(_step_now, optimizer))

    def late(self, monitors: list[Any]) -> None:
        """What comes after the monitor was attached."""
        self.monitors = monitors
        self.marks = [{} for _ in monitors]
        if self.recipe.schedule == "late hook":
            self.real[0].register_step_post_hook(self._advance)
        if self.recipe.clip == "late step hook":
            self.real[0].register_step_pre_hook(self._scale)

    def _advance(self, *_: Any) -> None:
        for scheduler in self.scheduler:
            scheduler.step()

    def _halve(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(optimizer is o for o in self.real):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] / 2

    def _scale(self, *_: Any) -> None:
        for number, p in enumerate(self.trained):
            if p.grad is not None:
                p.grad.mul_(0.5 if number % 2 else 0.3)

    # One step

    def step(self, step: int) -> Numbers | None:
        """Numbers by hand of the step, if it was one."""
        recipe, trial = self.recipe, self.trial
        self._extra(step)
        self._zero("before")
        cached = parametrize.cached() if recipe.weights == "cached" else contextlib.nullcontext()
        with cached:
            if recipe.optimizer in ("closure", "moving closure"):
                trial.losses.append(self._closure(step))
            else:
                self._gradients(step)
                self._update(step)
        if recipe.call == "input zeroed":
            trial.inputs.detach().zero_()
        if recipe.schedule == "after":
            self._advance()
        self._second(step)
        self._zero("after")
        overflow = recipe.scaler == "overflow" and step == 1
        return self.hand.numbers() if self.hand is not None and not overflow else None

    def _gradients(self, step: int) -> None:
        recipe, trial = self.recipe, self.trial
        if recipe.sam != "none":
            self._backwards(step)
            if self.sam is not None:
                self.sam.first_step()
            else:
                self._perturb()
        if self.hand is not None:
            self.hand.enter(step, self.parts)
            self.hand.counting = True
        if recipe.optimizer == "in backward":
            self._mark(step)
        self._backwards(step)
        if self.hand is not None:
            self.hand.counting = False
            self.hand.gradients(1.0 if self.scaler is None else self.scaler.get_scale())
        trial.losses.append(torch.rand(1))  # a loop may draw in between
        if recipe.sam in ("copy", "data"):
            self._restore()
        if recipe.scaler == "overflow" and step == 1 and self.trained[0].grad is not None:
            self.trained[0].grad.view(-1)[0] = torch.inf
        self._clip()

    def _backwards(self, step: int) -> None:
        trial, recipe = self.trial, self.recipe
        for part in range(self.parts):
            loss = trial.compute(step, part)
            trial.losses.append(loss.detach().clone())
            if recipe.extra == "gradient beside":
                found = torch.autograd.grad(loss, self.trained[:2], retain_graph=True, allow_unused=True)
                trial.losses += [g.clone() for g in found if g is not None]
            scaled = loss if self.scaler is None else self.scaler.scale(loss)
            if recipe.extra == "retain graph":
                scaled.backward(retain_graph=True)
            scaled.backward()

    def _update(self, step: int) -> None:
        recipe, trial = self.recipe, self.trial
        if recipe.optimizer == "in backward":
            if self.hand is not None:
                self.hand.before_step(as_forward=True)
                self.hand.after_step()
            return
        self._mark(step)
        if self.sam is not None:
            if self.hand is not None:
                self.hand.before_step({p: state["old"] for p, state in self.sam.state.items() if "old" in state})
            self.sam.second_step()
        else:
            if self.hand is not None:
                self.hand.before_step()
            for optimizer in trial.optimizers:
                if self.scaler is None:
                    optimizer.step()
                else:
                    self.scaler.step(optimizer)
            if self.scaler is not None:
                self.scaler.update()
        if self.hand is not None:
            self.hand.after_step()

    def _closure(self, step: int) -> Any:
        (optimizer,) = self.trial.optimizers

        def closure() -> Tensor:
            if self.recipe.optimizer == "moving closure":
                with torch.no_grad():
                    for p in self.trained:
                        p.mul_(0.9)
            optimizer.zero_grad()
            self._gradients(step)
            if self.hand is not None:
                self.hand.before_step()
            last: Tensor = [x for x in self.trial.losses if isinstance(x, Tensor)][-1]
            return last

        self._mark(step)
        loss = optimizer.step(closure)
        if self.hand is not None:
            self.hand.after_step()
        return loss

    def _mark(self, step: int) -> None:
        for marks, monitor in zip(self.marks, self.monitors, strict=True):
            marks[monitor.step] = step

    def _zero(self, when: str) -> None:
        kind = self.recipe.zero
        if self.recipe.optimizer == "in backward" or (when == "after") != kind.endswith("after"):
            return
        if kind == "model zeros":
            for module in self.trial.modules:
                module.zero_grad(set_to_none=False)
            return
        for optimizer in self.trial.optimizers:
            optimizer.zero_grad(set_to_none=not kind.startswith("zeros"))

    def _clip(self) -> None:
        kind, trained = self.recipe.clip, self.trained
        if self.scaler is not None and kind in ("norm", "value", "groups"):
            for optimizer in self.trial.optimizers:
                self.scaler.unscale_(optimizer)
        if kind == "norm":
            self.trial.losses.append(nn.utils.clip_grad_norm_(trained, 0.01).detach())
        elif kind == "value":
            nn.utils.clip_grad_value_(trained, 0.001)
        elif kind == "groups":
            for some in (trained[::2], trained[1::2]):
                nn.utils.clip_grad_norm_(some, 0.01)

    # Sharpness-aware minimisation

    @torch.no_grad()
    def _perturb(self) -> None:
        self.old = [p.detach().clone() for p in self.trained]
        for p in self.trained:
            if p.grad is not None:
                p.add_(p.grad, alpha=0.1)
        for optimizer in self.trial.optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def _restore(self) -> None:
        for p, old in zip(self.trained, self.old, strict=True):
            if self.recipe.sam == "data":
                p.data = old
            else:
                p.copy_(old)

    # What happens beside the training

    def _extra(self, step: int) -> None:
        extra, trial = self.recipe.extra, self.trial
        if extra == "evaluation":
            trial.inner.eval()
            with torch.no_grad():
                trial.losses.append(trial(trial.batch(700 + step)[0]).clone())
            trial.inner.train(self.recipe.training == "train")
            trial.losses.append(trial(trial.batch(800 + step)[0]).detach().clone())
        elif extra == "thrown away":
            trial.compute(step, 0).backward()
            self._throw_away()
        elif extra == "add group" and step == 1:
            trial.inner.late.requires_grad_()
            self.real[0].add_param_group({"params": [trial.inner.late]})
            self.trained.append(trial.inner.late)
        elif extra.startswith(("raise", "interrupt")) and step == 1:
            self._attempt(extra)

    def _attempt(self, extra: str) -> None:
        """A step that does not come to its end."""
        trial = self.trial
        kind, place = extra.split()
        error = KeyboardInterrupt if kind == "interrupt" else ZeroDivisionError

        def stop(*_: Any) -> None:
            raise error

        handle = trial.inner.head.register_forward_pre_hook(stop) if place == "forward" else None
        with contextlib.suppress(error):  # as notebooks and robust loops do
            loss = trial.compute(3, 0)
            if place == "backward":
                loss.register_hook(stop)
            loss.backward()
            if place == "step":
                handle = self.real[0].register_step_pre_hook(stop)
                self.real[0].step()
        if handle is not None:
            handle.remove()
        self._throw_away()

    def _throw_away(self) -> None:
        for optimizer in self.trial.optimizers:
            optimizer.zero_grad(set_to_none="zeros" not in self.recipe.zero)

    def _second(self, step: int) -> None:
        """The other optimizer's turn, through the same model: gradients that are no step's."""
        if self.recipe.extra == "gan":
            trial = self.trial
            self.gan.zero_grad(set_to_none="zeros" not in self.recipe.zero)
            fake = trial.outer.generator(trial.batch(900 + step)[0])
            trial(fake).square().mean().backward()
            self.gan.step()
