"""Forwards of a model at other parameter values than its current ones.

The parameters themselves are never modified: ``torch.func.functional_call`` substitutes other tensors for one forward.
The forward runs without torch.compile, whose graphs are specialized on the parameters, and inside of data-parallel
wrappers, whose own forward belongs to the training step.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfs._network.fully_sharded import groups_of, optimized_parameters
from fastfs._network.layers import unwrapped

__all__ = [
    "Perturbed",
    "differentiable",
    "eager",
    "has_compiled",
    "interpolate",
    "load_forward_mode",
    "tangents",
    "without_fast_path",
]


def has_compiled(model: nn.Module) -> bool:
    """Whether torch.compile wraps the model or a part of it."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def eager(model: nn.Module) -> Any:
    """Return a context in which compiled parts of the model run eagerly."""
    return torch.compiler.set_stance("force_eager") if has_compiled(model) else nullcontext()


class Perturbed:
    """Runs a model at given values of some of its parameters.

    Args:
        model: the model. Its wrappers are removed.
        parameters: parameters whose values will be given; the others keep their values.

    Attributes:
        compiled: whether torch.compile wraps the model or a part of it.
        gathers: whether FSDP2 gathers parameters of the model, which then only runs on its own.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        self._model = model
        self.compiled = has_compiled(model)
        self._inner = unwrapped(model)
        names = {id(parameter): name for name, parameter in optimized_parameters(self._inner)}
        self._names = [names.get(id(parameter)) for parameter in parameters]
        self._own = list(parameters)
        self.gathers = bool(groups_of(self._inner.modules()))

    def __call__(self, values: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the model. Values for parameters that the model does not own have no effect."""
        return self.within(values, lambda model: model(*args, **kwargs))

    def within(self, values: Sequence[Tensor], run: Callable[[nn.Module], Any]) -> Any:
        """Return ``run(model)`` with the values in place.

        A backward that recomputes parts of the forward belongs into ``run``.

        Raises:
            NotImplementedError: FSDP2 shards the model, and the values are not the model's own. It swaps parameters
                itself, so that others cannot take their place.
        """
        if all(map(operator.is_, values, self._own)) and len(values) == len(self._own):
            with eager(self._model):
                return run(self._inner)
        if self.gathers:
            raise NotImplementedError(
                "a model that fully_shard manages runs on its own parameters only, expected no other values: use "
                'mode="batch" without amplify'
            )
        named = {f"model.{name}": value for name, value in zip(self._names, values, strict=True) if name is not None}
        with eager(self._model):
            return torch.func.functional_call(_Call(self._inner), named, (run,))

    @contextmanager
    def duals(self, values: Sequence[Tensor], directions: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Create dual tensors, on which forwards compute exact first-order changes (see :func:`tangents`).

        Inside of the context, all kernels have a forward-mode derivative (:func:`differentiable`).

        Args:
            values: values of the parameters.
            directions: their directions, of the same shapes.

        Yields:
            One dual tensor per parameter.
        """
        with ExitStack() as stack:
            stack.enter_context(forward_ad.dual_level())
            stack.enter_context(differentiable(self._inner))
            yield [forward_ad.make_dual(v.detach(), d) for v, d in zip(values, directions, strict=True)]


class _Call(nn.Module):
    """A module whose forward calls a function of the model, as ``functional_call`` requires."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.model)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Disable the fused path of ``nn.MultiheadAttention``, so that the arithmetic does not depend on gradients."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Disable kernels without a forward-mode derivative: fused attention, and recurrent layers of oneDNN.

    Args:
        model: the model that runs inside of the context.

    Yields:
        Nothing.

    Raises:
        NotImplementedError: the model has another operation without a forward-mode derivative.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    onednn = torch._C._get_mkldnn_enabled()
    with ExitStack() as stack:
        stack.enter_context(without_fast_path())
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
    """Load torch's forward-mode rules without the deprecation warnings that the first dual tensor of a process causes.

    In older torch releases, checkpoints save their inputs by an operation without such a rule; this adds one.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        for category in (DeprecationWarning, FutureWarning):  # which of them depends on the release
            warnings.simplefilter("ignore", category)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
    saver = getattr(torch.utils.checkpoint, "_NoopSaveInputs", None)
    if saver is not None and "jvp" not in vars(saver):
        saver.jvp = staticmethod(_nothing_saved)


def _nothing_saved(_ctx: Any, *_tangents: Tensor | None) -> Tensor:
    """Return the tangent of the empty tensor that this operation returns."""
    return torch.empty((0,))


def tangents(features: Tensor) -> Tensor:
    """Return the first-order change of features computed from dual tensors; zero if they depend on none."""
    tangent = forward_ad.unpack_dual(features).tangent
    return torch.zeros_like(features) if tangent is None else tangent


def interpolate(before: Sequence[Tensor], now: Sequence[Tensor], kappa: Tensor) -> list[Tensor]:
    """Return before + kappa (now - before) in the parameters' dtype; kappa = 1 gives the exact bits of ``now``."""
    return [torch.lerp(b, n.detach(), kappa.to(b.dtype)) for b, n in zip(before, now, strict=True)]
