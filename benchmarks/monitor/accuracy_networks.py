"""The networks of :mod:`benchmarks.monitor.accuracy` in every precision, as functions of their parameters."""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastfs._network.guard import Guard
from fastfs._network.journal import Journal
from fastfs._network.precision import coarseness
from fastfs._network.structure import analyse, edge_of

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Precision of the measured run.

    Attributes:
        parameters: dtype of the parameters.
        autocast: dtype of autocast, or None.
        inside: whether the model enables autocast in its forward, rather than its caller.
        linear: how the linear layers multiply: "casts" to bfloat16 by hand, in "fp8", or as torch does.
        tf32: whether float32 products on the GPU use TF32.
    """

    parameters: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    inside: bool = False
    linear: str | None = None
    tf32: bool = False


SETTINGS = {
    "autocast bf16": Setting(autocast=torch.bfloat16),
    "bf16": Setting(torch.bfloat16),
    "autocast fp16": Setting(autocast=torch.float16),
    "float32": Setting(),
    "autocast bf16 inside": Setting(autocast=torch.bfloat16, inside=True),
    "casts to bf16": Setting(linear="casts"),
    "fp8 products": Setting(linear="fp8"),
}
ON_GPU = {"TF32 products": Setting(tf32=True)}


@dataclass(frozen=True)
class Case:
    """A network with its batch. Its watched layers are ``model.blocks``."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor


def loss(outputs: Tensor, labels: Tensor) -> Tensor:
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    return F.cross_entropy(wide.reshape(-1, wide.shape[-1]), labels.reshape(-1))


class Float8(torch.autograd.Function):
    """Round to scaled float8: e4m3 in the forward, e5m2 for gradients, as in training recipes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _through(x, torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _through(gradient, torch.float8_e5m2)


def _through(x: Tensor, dtype: torch.dtype) -> Tensor:
    scale = torch.finfo(dtype).max / x.abs().amax().clamp_min(1e-30)
    return (x * scale).to(dtype).to(x.dtype) / scale


def _in_bfloat16(linear: nn.Linear, x: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.bfloat16()
    return F.linear(x.bfloat16(), linear.weight.bfloat16(), bias).to(x.dtype)


def _in_float8(linear: nn.Linear, x: Tensor) -> Tensor:
    rounded_x, rounded_weight = Float8.apply(x), Float8.apply(linear.weight)
    return F.linear(rounded_x, rounded_weight, linear.bias)


PRODUCTS = {"casts": _in_bfloat16, "fp8": _in_float8}


class Network:
    """The case in one precision, as a function of its parameters."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case, self.setting, self.dtype = case, setting, setting.parameters
        self.device = torch.device("cuda" if setting.tf32 else "cpu")
        self.model = copy.deepcopy(case.model).to(self.device, self.dtype)
        inputs = case.inputs.to(self.dtype) if case.inputs.is_floating_point() else case.inputs
        self.inputs = inputs.to(self.device)
        if setting.linear is not None:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    module.forward = functools.partial(PRODUCTS[setting.linear], module)  # type: ignore[method-assign]
        if setting.inside:
            self.model.forward = self.cast()(self.model.forward)
        self.taps: list[Tensor] = []
        self.seen: list[float] = []  # largest machine epsilon up to each block
        self.guard: Guard | None = None
        for block in self.model.blocks:
            block.register_forward_hook(self.tap)

    def cast(self) -> torch.autocast:
        dtype = self.setting.autocast
        return torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)

    def tap(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.taps.append(output)
        if self.guard is not None:
            self.seen.append(max(self.guard.coarsest, coarseness(output.dtype)))

    def forward(self, parameters: Parameters) -> tuple[list[Tensor], Tensor]:
        self.taps.clear()
        on_device = {name: p.to(self.device) for name, p in parameters.items()}
        if self.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = self.setting.tf32
        with contextlib.nullcontext() if self.setting.inside else self.cast():
            outputs = functional_call(self.model, on_device, (self.inputs,))
        return list(self.taps), outputs

    @torch.no_grad()
    def coarsest(self, parameters: Parameters) -> list[float]:
        """Return the largest machine epsilon that each block's features depend on, as the monitor detects it."""
        self.seen.clear()
        with Guard(Journal(), ()) as self.guard:
            self.forward(parameters)
        self.guard = None
        return list(self.seen)

    @torch.no_grad()
    def features(self, parameters: Parameters) -> list[Tensor]:
        return [
            tap.to("cpu", copy=True) for tap in self.forward({n: p.to(self.dtype) for n, p in parameters.items()})[0]
        ]

    def backward(self, parameters: Parameters, steps: list[Parameters]) -> tuple[list[Tensor], list[Tensor]]:
        """Return backward vectors, and for every step the aligned decrease per layer (nan where it is no cut)."""
        leaves = {n: p.detach().to(self.dtype).requires_grad_() for n, p in parameters.items()}
        taps, outputs = self.forward(leaves)
        found = analyse([[edge_of(tap)] for tap in taps], [outputs], list(leaves.values()), list(leaves))
        wanted = [*taps, *leaves.values()]
        gradients = [g.cpu() for g in torch.autograd.grad(loss(outputs, self.case.labels.to(self.device)), wanted)]
        vectors, gradients = gradients[: len(taps)], gradients[len(taps) :]
        cut = torch.tensor(found.cut)
        decreases = []
        for step in steps:
            pairs = zip(gradients, leaves, strict=True)
            dots = torch.stack([-(g.double() * step[name]).sum() for g, name in pairs])
            decreases.append(torch.where(cut, found.upstream.double() @ dots, torch.nan))
        return vectors, decreases

    def jvp(self, parameters: Parameters, step: Parameters) -> list[Tensor]:
        names = list(parameters)

        def taps(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(self.forward(dict(zip(names, values, strict=True)))[0])

        primal = tuple(parameters[n].to(self.dtype) for n in names)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)  # of torch, at the first jvp
            return list(torch.func.jvp(taps, primal, tuple(step[n].to(self.dtype) for n in names))[1])
