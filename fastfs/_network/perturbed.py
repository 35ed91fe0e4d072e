"""The model as a function of its parameters: forwards at other parameters than those that it has.

The parameters themselves are never written to: ``torch.func.functional_call`` puts other tensors in their place for one
forward. It runs without torch.compile, whose graphs are made for the parameters that it knows, and inside of
data-parallel wrappers, whose forward is tied to the training step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfs._network.layers import unwrapped

__all__ = [
    "Perturbed",
    "differentiable",
    "eager",
    "has_compiled",
    "interpolate",
    "load_forward_mode",
    "plain_modules",
    "tangents",
]


def has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has a part in the model."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def eager(model: nn.Module) -> Any:
    """A context in which compiled parts of the model run as they were written."""
    return torch.compiler.set_stance("force_eager") if has_compiled(model) else nullcontext()


class Perturbed:
    """Forwards of a model at given values of some of its parameters.

    Args:
        model: the model; wrappers are looked through.
        parameters: those whose values will be given; others stay as they are in the model.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._model = model
        self.compiled = has_compiled(model)
        self._inner = unwrapped(model)
        names = {id(parameter): name for name, parameter in self._inner.named_parameters()}
        self._names = [names.get(id(parameter)) for parameter in parameters]

    def __call__(self, values: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """The output of the model; parameters that are not the model's own have no effect."""
        return self.within(values, lambda model: model(*args, **kwargs))

    def within(self, values: Sequence[Tensor], run: Callable[[nn.Module], Any]) -> Any:
        """What ``run`` gives for the model with these values in place: a backward may have to compute parts again."""
        named = {f"model.{name}": value for name, value in zip(self._names, values, strict=True) if name is not None}
        with eager(self._model):
            return torch.func.functional_call(_Call(self._inner), named, (run,))

    @contextmanager
    def duals(self, values: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Values that carry a direction: forwards on them give exact first-order changes (:func:`tangents`).

        Inside, everything runs by kernels that have a forward-mode derivative (:func:`differentiable`).
        """
        with ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(differentiable(self._inner))
            yield [forward_ad.make_dual(v.detach(), d) for v, d in zip(values, directions, strict=True)]


class _Call(nn.Module):
    """Runs a function of a model as its forward, which is what ``functional_call`` puts parameters in place for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.model)


@contextmanager
def plain_modules() -> Iterator[None]:
    """Without the fused inference path of ``nn.MultiheadAttention``: the same arithmetic with and without gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Without kernels that have no forward-mode derivative: fused attention, and recurrent layers of oneDNN.

    Raises:
        NotImplementedError: the model has another operation without one.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    onednn = torch._C._get_mkldnn_enabled()
    with ExitStack() as stack:
        stack.enter_context(plain_modules())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent and onednn:  # torch.backends.mkldnn.flags would change the precision settings as well
            stack.callback(torch._C._set_mkldnn_enabled, onednn)
            torch._C._set_mkldnn_enabled(False)
        try:
            yield
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{type(model).__name__} has an operation without a forward-mode derivative, so first-order changes "
                "cannot be computed (first_order=False takes a finite step and needs none). torch says: "
                f"{str(error).splitlines()[0]}"
            ) from error


def load_forward_mode() -> None:
    """The first dual tensor of a process makes torch load its rules, with deprecation warnings that are its own.

    Checkpoints of older torch releases keep their inputs by an operation without a rule, and get one.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        for category in (DeprecationWarning, FutureWarning):  # which of them depends on the release
            warnings.simplefilter("ignore", category)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
    saver = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if saver is not None and "jvp" not in vars(saver):
        saver.jvp = staticmethod(_nothing_saved)


def _nothing_saved(_ctx: Any, *_tangents: Tensor | None) -> Tensor:
    """The change of the empty tensor that such an operation gives."""
    return torch.empty((0,))


def tangents(features: Tensor) -> Tensor:
    """The first-order change that features computed from duals carry; zero if they depend on none."""
    tangent = forward_ad.unpack_dual(features).tangent
    return torch.zeros_like(features) if tangent is None else tangent


def interpolate(before: Sequence[Tensor], now: Sequence[Tensor], kappa: Tensor) -> list[Tensor]:
    """before + kappa (now - before), in the dtype of the parameters; for kappa = 1 the bits of ``now``."""
    return [torch.lerp(b, n.detach(), kappa.to(b.dtype)) for b, n in zip(before, now, strict=True)]
