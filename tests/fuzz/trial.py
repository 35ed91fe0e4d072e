"""The model of a generated training loop and what is beside it: built from a recipe alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.fuzz.bodies import ROWS, WIDTH, Switch, Tagged, make_body
from tests.fuzz.recipe import Recipe

__all__ = ["Trial"]


class Scaled(nn.Module):
    """A wrapper with a forward of its own, whose only child is called ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.module((x - 0.5) * 1.5, *args)
        return out


class Outer(nn.Module):
    """What is trained beside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.encoder = nn.Linear(WIDTH, WIDTH)
        self.generator = nn.Linear(WIDTH, WIDTH)


class Trial:
    """Model, what is beside it, and its optimizers, from the same random state always."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(recipe.seed)
        random.seed(recipe.seed)
        np.random.seed(recipe.seed % 2**32)  # noqa: NPY002
        self.recipe = recipe
        self.switch = Switch(autocast=recipe.precision == "autocast inside")
        self.switch.again = {"checkpoint": False, "reentrant checkpoint": True}.get(recipe.call)
        self.inner: nn.Module = make_body(recipe, self.switch)
        self.outer = Outer()
        for module in (self.inner, self.outer):
            if recipe.precision in ("float64", "bfloat16"):
                getattr(module, {"float64": "double"}.get(recipe.precision, recipe.precision))()
        self.inner.train(recipe.training == "train")
        self.model: nn.Module = Scaled(self.inner) if recipe.call == "wrapper" else self.inner
        self.dtype = next(self.inner.parameters()).dtype
        self.losses: list[Any] = []
        self.optimizers: list[Any] = []
        self.repeats = 2 if recipe.extra == "retain graph" else 1
        self.before = 0.01 if recipe.scaler == "by hand" else 1.0

    def exactly(self) -> Trial:
        """In float64."""
        self.switch.exact, self.dtype = True, torch.float64
        self.inner.double()
        self.outer.double()
        return self

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        return self.inner, self.outer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All, trained or not."""
        return [p for module in self.modules for p in module.parameters()]

    # What the loss is of

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.recipe.seed + number)
        x, y = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
        return x.to(self.dtype), y.to(self.dtype)

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """The model, in the precision of the loop."""
        on = self.recipe.precision == "autocast" and not self.switch.exact
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out: Tensor = self.model(x=x) if self.recipe.call == "keyword" and not args else self.model(x, *args)
        return out

    def _with(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(self.model, weights, (x,))
        return out

    def compute(self, step: int, part: int) -> Tensor:
        """The loss of a micro-batch: every forward whose gradient counts, and those that come with it."""
        x, y = self.batch(4 * step + part)
        call = self.recipe.call
        self.inputs = x
        if self.recipe.extra == "gan":
            fake = self.outer.generator(x).detach()
            return (F.mse_loss(self(x), y) + F.mse_loss(self(fake), -y)) / int(self.recipe.micro)
        if call == "input with gradient":
            x.requires_grad_()
        out = self._output(x, y, step, part)
        loss = F.mse_loss(out.to(torch.promote_types(out.dtype, torch.float32)), y.to(out.dtype).float().to(out.dtype))
        return loss / int(self.recipe.micro) * self.before

    def _output(self, x: Tensor, y: Tensor, step: int, part: int) -> Tensor:
        call = self.recipe.call
        if call == "soft prompt":
            x = x + self.outer.prompt
        elif call == "encoder":
            x = torch.tanh(self.outer.encoder(x))
        elif call == "subclass input":
            x = Tagged.of(x, 0.5)
        elif call == "no gradient pass":
            with torch.no_grad():
                self(x)
        if self.recipe.body == "heads":
            return self(x, "other" if (step + part) % 2 else "head")
        if call == "noisy weights":
            generator = torch.Generator().manual_seed(step)
            named = dict(self.model.named_parameters())
            noise = {k: torch.randn(p.shape, generator=generator).to(p.dtype) for k, p in named.items()}
            return self._with(x, {k: p + 0.1 * noise[k] for k, p in named.items()})
        if call == "fast weights":
            named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
            inner = F.mse_loss(self._with(x, named), y)
            found = torch.autograd.grad(inner, list(named.values()), create_graph=True, allow_unused=True)
            moved = {k: p if g is None else p - 0.1 * g for (k, p), g in zip(named.items(), found, strict=True)}
            return self._with(x, moved)
        if call == "own output":
            for _ in range(2):
                x = x + self(x).to(x.dtype)
            return x
        if call == "target":
            return self(x) - 0.1 * self(x).detach()
        return self(x)
